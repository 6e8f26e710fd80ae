"""Finds a checkpoint: a local folder, a folder of the Hugging Face cache, or one on the Hugging Face Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from converters.reader import BIN, BIN_INDEX, INDEX, SAFETENSORS
from lsg_jax.checkpoint.manifest import MANIFEST
from lsg_jax.checkpoint.run_record import RUN
from lsg_jax.errors import InputError
from lsg_jax.hub import REPOSITORY, failure

ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
OTHER_TRAINED = "non_lora_trainables.bin"
PROJECTOR = "mm_projector.bin"

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "*.model",
)
"""File patterns of what a model needs besides its weights. Code (`*.py`) is never fetched."""

_TRAINED = (ADAPTER_CONFIG, *ADAPTERS, OTHER_TRAINED, PROJECTOR)
_SAFETENSORS = (SAFETENSORS, INDEX, "model-*.safetensors", *_TRAINED)
_BIN = (BIN, BIN_INDEX, "pytorch_model-*.bin", *_TRAINED)


_WRITTEN_BY_LSG = {
    MANIFEST: "a model folder, converted already; use it as MODEL, or `lsg export` writes the Hugging Face format",
    RUN: "a run folder, which holds trained gates and no checkpoint; convert the model, and give this folder as --gates",
}
"""A file that tells what `lsg` wrote -> what its folder is."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine.

    Attributes:
        folder: its local folder. name: the Hub id, or the folder's name.
        revision: commit on the Hub, None for a local folder.
    """

    folder: Path
    name: str
    revision: str | None = None


def find_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Finds a local folder, or downloads the files of a Hub id `owner/name` to the usual cache.

    Of a folder `models--owner--name` of the cache, the snapshot is taken that `revision` names, by default that of `main`.

    Args:
        revision: branch, tag or commit, for a Hub id or a folder of the cache.

    Raises:
        InputError: neither a folder nor a Hub id, no such revision, or the download failed.
    """
    folder = Path(source)
    if not str(source):
        raise InputError("the checkpoint's name is empty: give its folder, or a Hub id such as owner/name")
    if folder.is_dir():
        return _in_cache(folder, revision) or _local(folder, revision)
    if folder.exists():
        raise InputError(f"{source}: is a file; give the folder of the checkpoint, or a Hub id such as owner/name")
    if not re.fullmatch(REPOSITORY, str(source)):
        raise InputError(f"{source}: no such folder, and not a Hub id such as owner/name")
    found = _download(str(source), revision, (*SMALL_FILES, *_SAFETENSORS))
    if not any((found / name).exists() for name in (SAFETENSORS, INDEX, *ADAPTERS)):
        found = _download(str(source), revision, (*SMALL_FILES, *_BIN))
    return Checkpoint(found, str(source), found.name if found.parent.name == "snapshots" else None)


def _local(folder: Path, revision: str | None) -> Checkpoint:
    if revision is not None:
        raise InputError(f"{folder}: a local folder has no revisions; leave --revision out, or give a Hub id")
    for name, kind in _WRITTEN_BY_LSG.items():
        if (folder / name).is_file() and not any((folder / other).exists() for other in ("config.json", *_TRAINED)):
            raise InputError(f"{folder}: is {kind}")
    return Checkpoint(folder, folder.resolve().name)


def _in_cache(folder: Path, revision: str | None) -> Checkpoint | None:
    """A checkpoint in the Hugging Face cache: `models--owner--name` or one of its snapshots. None for other folders."""
    whole = folder.resolve()
    if whole.parent.name == "snapshots" and whole.parent.parent.name.startswith("models--"):
        if revision not in (None, whole.name):
            raise InputError(f"{folder}: is the snapshot of another revision than {revision}; leave --revision out")
        return Checkpoint(folder, _repository(whole.parent.parent.name), whole.name)
    snapshots = folder / "snapshots"
    if not whole.name.startswith("models--") or not snapshots.is_dir():
        return None
    name = _repository(whole.name)
    commits = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
    if not commits:
        raise InputError(f"{folder}: a folder of the Hugging Face cache without a snapshot; fetch it with `hf download {name}`")
    reference = folder / "refs" / (revision or "main")
    if ".." not in (revision or "") and reference.is_file():
        wanted = reference.read_text(encoding="utf-8").strip()
    else:
        wanted = revision or (commits[0] if len(commits) == 1 else "main")
    matching = [commit for commit in commits if commit.startswith(wanted)]
    if len(matching) != 1:
        held = ", ".join(commits[:8])
        raise InputError(f"{folder}: the Hugging Face cache has no snapshot of revision {wanted}; it has {held}")
    return Checkpoint(snapshots / matching[0], name, matching[0])


def _repository(cache_name: str) -> str:
    """`models--owner--name` -> `owner/name`."""
    return cache_name.removeprefix("models--").replace("--", "/")


def _download(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*.py"]))
    except (OSError, ValueError, HTTPError) as error:  # also LocalEntryNotFoundError and HFValidationError
        raise InputError(failure(repository, revision, error, sought="no such folder")) from None
