"""The manifest of a model folder: what the backbone is, and the digest of every part of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lsg_jax.config import ModelConfig, from_dict, identity, to_dict
from lsg_jax.digest import json_sha256
from lsg_jax.errors import CheckpointError, ConfigError, InputError
from lsg_jax.files import check_inside
from lsg_jax.json_files import read_json, write_sealed

MANIFEST = "lsg_manifest.json"
FORMAT = "lsg-model-1"
JOURNAL = "base.journal"

_AGAIN = "convert the model again with `lsg convert`"


@dataclass(frozen=True)
class LeafEntry:
    """One stored leaf.

    Attributes:
        shape: of the whole leaf, [L, ...] when stacked over layers.
        dtype: name of the stored dtype.
        rows: length of a block along axis 0.
        sha256: digest of each block, in order.
    """

    shape: tuple[int, ...]
    dtype: str
    rows: int
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class ModelSource:
    """The checkpoint that a model was converted from.

    Attributes:
        name: Hub id or name of the folder.
        revision: commit on the Hub; None for a local folder.
        files: weight file -> bytes.
    """

    name: str
    revision: str | None
    files: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """What a model folder holds.

    Attributes:
        leaves: leaf name -> entry.
        files: other files of the Orbax checkpoint, by their path below `base/` -> sha256.
        source: None for a model that was not converted from a checkpoint.
        hf: file below `hf/` -> sha256.
        names: canonical tensor name -> name in the source.
        dtypes: canonical tensor name -> dtype in the source.
        carried: tensors that the model does not use and `export` gives back.
        repeats: tied tensor -> the tensor that it equals.
        ignored: tensor of the source that was dropped -> why.
    """

    config: ModelConfig
    leaves: dict[str, LeafEntry]
    files: dict[str, str]
    source: ModelSource | None = None
    hf: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
    repeats: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Identity of the backbone: sha256 over `leaves`."""
        return json_sha256(to_dict(self)["leaves"])

    @property
    def preparation(self) -> str:
        """Digest of what numbers depend on besides weights and sinks: the configuration, and the files of `text_files`."""
        return json_sha256([identity(self.config), self.text_files])

    @property
    def text_files(self) -> dict[str, str]:
        """The part of `hf` that prompts and pixels depend on: all but weights that `export` gives back."""
        return {name: digest for name, digest in self.hf.items() if not name.endswith(".safetensors")}


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Writes `lsg_manifest.json`, the marker of a complete model folder, and drops the journal of the conversion.

    Args:
        folder: the model folder (or its `.tmp` before the rename).

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = Path(folder) / MANIFEST
    content = {**to_dict(manifest), "format": FORMAT, "digest": manifest.digest}
    try:
        write_sealed(path, content, sort_keys=True)
        path.with_name(JOURNAL).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from None


def read_manifest(folder: str | Path) -> Manifest:
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
        content = read_json(path)
    except InputError as error:
        raise CheckpointError(f"{error}; {_AGAIN}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path}: unknown format {found!r}, expected {FORMAT!r}; {_AGAIN}")
    if content.pop("self_sha256", None) != json_sha256(content):
        raise CheckpointError(f"{path}: was changed after it was written or is damaged; {_AGAIN}")
    del content["format"]
    digest = content.pop("digest", None)
    try:
        manifest = from_dict(Manifest, content, where=str(path))
    except ConfigError as error:
        raise CheckpointError(f"{error}; {_AGAIN}") from None
    try:
        check_inside((*manifest.hf, *manifest.files), path)
    except InputError as error:
        raise CheckpointError(f"{error}; {_AGAIN}") from None
    if manifest.digest != digest:
        raise CheckpointError(f"{path}: its digest does not fit its leaves; {_AGAIN}")
    return manifest
