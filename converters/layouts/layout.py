"""The interface of an original layout: what `converters/layouts/<name>.py` provides."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Aspect = Literal["pad", "processor", "anyres"]
"""How the original code makes an image fit: padded to a square, as the tower's image processor does it, or cut into tiles."""


@dataclass(frozen=True)
class Twin:
    """What an original config.json says, in the terms of the Hugging Face layout.

    Attributes:
        model_type: of the twin, a family of `converters/families`.
        text_config: of the twin. vision_config: of the twin; None where config.json names the tower only.
        fields: all other fields of the twin's config.json but the tokens'.
        tower: the repository of the vision tower, or a folder.
        unused_layers: last layers of the tower that the original code removes; with them goes its pooling head.
        aspect: how an image is made to fit.
        video_token: whether the twin has a token for videos, `<video>`.
        pad_token: added to the vocabulary; None where the tokenizer has one that is kept.
        chat_template: Jinja source that the tokenizer gets; None keeps what it has.
        ignored: field of config.json that changes nothing in the twin -> why.
    """

    model_type: str
    text_config: dict[str, Any]
    vision_config: dict[str, Any] | None
    fields: dict[str, Any]
    tower: str
    unused_layers: int = 0
    aspect: Aspect = "processor"
    video_token: bool = False
    pad_token: str | None = None
    chat_template: str | None = None
    ignored: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """An original layout.

    Attributes:
        title: for messages.
        matches: whether a config.json is of this layout.
        twin: config.json and how errors name it -> the twin. Raises ConfigError for what the twin cannot do.
        names: (pattern, replacement) of original tensor names; see `hf_name`.
    """

    title: str
    matches: Callable[[Mapping[str, Any]], bool]
    twin: Callable[[Mapping[str, Any], str], Twin]
    names: tuple[tuple[str, str], ...]

    def hf_name(self, name: str) -> str:
        """Original tensor name -> the name that transformers 5 saves it by. A name that no pattern fits stays as it is."""
        for pattern, replacement in self.names:
            if re.fullmatch(pattern, name):
                return re.sub(pattern, replacement, name)
        return name
