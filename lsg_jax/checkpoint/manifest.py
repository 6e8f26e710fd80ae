"""The manifest of a model folder: what the backbone is, and the digest of every part of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lsg_jax.digest import canonical_json, json_sha256
from lsg_jax.errors import CheckpointError, InputError
from lsg_jax.files import read_json, write_json

MANIFEST = "lsg_manifest.json"
FORMAT = "lsg-model-1"
JOURNAL = "base.journal"


def write_manifest(folder: str | Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Writes `lsg_manifest.json`, the marker of a complete model folder, and drops the journal of the conversion.

    Args:
        folder: the model folder (or its `.tmp` before the rename).
        manifest: "config", the "leaves" and "files" that `BaseWriter.finish` returned, and any other JSON keys. "format",
            "digest" (sha256 over the leaves: the backbone's identity) and "self_sha256" (over all other keys) are set here.

    Returns:
        The manifest as written.

    Raises:
        CheckpointError: the file cannot be written, or a needed key is missing.
    """
    folder = Path(folder)
    if missing := [key for key in ("config", "leaves", "files") if key not in manifest]:
        raise CheckpointError(f"{folder / MANIFEST}: the manifest needs {', '.join(missing)}")
    full = {key: value for key, value in manifest.items() if key != "self_sha256"}
    full |= {"format": FORMAT, "digest": json_sha256(manifest["leaves"])}
    full = json.loads(canonical_json(full))  # what a reader will see: tuples as lists, keys as strings
    full["self_sha256"] = json_sha256(full)
    try:
        write_json(folder / MANIFEST, full)
        (folder / JOURNAL).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder / MANIFEST}: cannot be written: {error.strerror}") from None
    return full


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Reads and checks `lsg_manifest.json`.

    Raises:
        InputError: `folder` is missing or is no converted model (the message says what to run).
        CheckpointError: the manifest is damaged or of a format that this version does not know.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder; make one with `lsg convert`")
    if not path.is_file():
        if (folder / "config.json").is_file():
            raise InputError(f"{folder}: a Hugging Face folder, not a converted model; run `lsg convert` on it first")
        raise InputError(f"{folder}: no {MANIFEST}: not a converted model, or a conversion that did not end; run `lsg convert`")
    try:
        manifest = read_json(path)
    except InputError as error:
        raise CheckpointError(f"{error}; convert the model again with `lsg convert`") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: unknown format {found!r}, expected {FORMAT!r}; convert the model again with `lsg convert`"
        )
    rest = {key: value for key, value in manifest.items() if key != "self_sha256"}
    if manifest.get("self_sha256") != json_sha256(rest):
        raise CheckpointError(
            f"{path}: was changed after it was written or is damaged; convert the model again with `lsg convert`"
        )
    return manifest
