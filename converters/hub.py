"""Finds a checkpoint: a local folder, or one on the Hugging Face Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from converters.reader import BIN, BIN_INDEX, INDEX, SAFETENSORS
from lsg_jax.checkpoint.problem import first_line
from lsg_jax.errors import InputError

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

_SAFETENSORS = (SAFETENSORS, INDEX, "model-*.safetensors")
_BIN = (BIN, BIN_INDEX, "pytorch_model-*.bin")


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


def find_checkpoint(source: str | Path) -> Checkpoint:
    """Finds a local folder, or downloads the files of a Hub id `owner/name` to the usual cache.

    Raises:
        InputError: neither a folder nor a Hub id, or the download failed.
    """
    if Path(source).is_dir():
        return Checkpoint(Path(source), Path(source).resolve().name)
    if Path(source).exists():
        raise InputError(f"{source}: is a file; give the folder of the checkpoint, or a Hub id such as owner/name")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(source)):
        raise InputError(f"{source}: no such folder, and not a Hub id such as owner/name")
    folder = _download(str(source), (*SMALL_FILES, *_SAFETENSORS))
    if not any((folder / name).exists() for name in (SAFETENSORS, INDEX)):
        folder = _download(str(source), (*SMALL_FILES, *_BIN))
    return Checkpoint(folder, str(source), folder.name if folder.parent.name == "snapshots" else None)


def _download(repository: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), ignore_patterns=["*.py"]))
    except (OSError, ValueError, HfHubHTTPError) as error:  # also LocalEntryNotFoundError and HFValidationError
        raise InputError(
            f"{repository}: no such folder, and it could not be fetched from the Hugging Face Hub: {first_line(error)}"
        ) from None
