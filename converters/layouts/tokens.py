"""Tokenizer files: the image token that an original layout lacks, and files of SentencePiece alone."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.layouts.layout import Twin
from lsg_jax.data.conversation import IMAGE_TAG
from lsg_jax.data.processor_files import open_tokenizer
from lsg_jax.errors import InputError

VIDEO_TAG = "<video>"
"""Stands for a video in the text of LLaVA-OneVision."""

ROW_MULTIPLE = 64
"""Vocabularies that grow are filled up to a multiple of this, as the conversion scripts of transformers do."""


@dataclass(frozen=True)
class Tokens:
    """The ids of the tokens that the twin needs: the image token, and those for videos and padding if there are any."""

    image: int
    video: int | None
    pad: int | None

    @property
    def fields(self) -> dict[str, int]:
        """Fields of the twin's config.json."""
        ids = {"image_token_index": self.image, "video_token_index": self.video, "pad_token_id": self.pad}
        return {name: token for name, token in ids.items() if token is not None}

    def rows(self, stored: int) -> int:
        """Rows of the twin's embedding, given those of the original."""
        needed = max(self.fields.values()) + 1
        return stored if needed <= stored else -(-needed // ROW_MULTIPLE) * ROW_MULTIPLE


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds any tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
    return any((folder / name).is_file() for name in names)


def is_sentencepiece_alone(folder: Path) -> bool:
    """Whether a folder holds `tokenizer.model`, and no `tokenizer.json` that could be read without SentencePiece."""
    return (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()


def open_fast_tokenizer(folder: Path, where: Path) -> Any:
    """The tokenizer of transformers in a folder, which errors call `where`. One of SentencePiece is converted.

    Raises:
        InputError: there is none, it is damaged, or a library is missing that reads it.
    """
    if is_sentencepiece_alone(folder) and importlib.util.find_spec("sentencepiece") is None:
        raise InputError(
            f"{where}: holds tokenizer.model and no tokenizer.json; run `pip install sentencepiece protobuf` to convert it, "
            "or put the language model's tokenizer.json beside it"
        )
    tokenizer = open_tokenizer(folder, where)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{where}: {type(tokenizer).__name__} is a slow tokenizer; put the model's tokenizer.json beside it")
    return tokenizer


def complete_tokenizer(folder: Path, twin: Twin, where: Path) -> Tokens:
    """Adds the image, video and padding tokens and the chat template of a twin to the tokenizer files of a folder.

    Raises:
        InputError: see `open_fast_tokenizer`.
    """
    from tokenizers import AddedToken

    tokenizer = open_fast_tokenizer(folder, where)
    added = [IMAGE_TAG, VIDEO_TAG] if twin.video_token else [IMAGE_TAG]
    known = tokenizer.get_vocab()
    new = [AddedToken(tag, special=True, normalized=False) for tag in added if tag not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    if twin.pad_token is not None:
        tokenizer.add_special_tokens({"pad_token": twin.pad_token})
    if twin.chat_template is not None:
        for path in (*folder.glob("chat_template*"), *folder.glob("additional_chat_templates/*")):
            path.unlink()
        tokenizer.chat_template = twin.chat_template
    tokenizer.save_pretrained(folder)
    known = tokenizer.get_vocab()
    return Tokens(known[IMAGE_TAG], known[VIDEO_TAG] if twin.video_token else None, tokenizer.pad_token_id)
