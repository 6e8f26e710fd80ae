"""The tokenizer and the chat template of a trained part: trainers save those that they trained with beside it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.layouts.layout import Twin
from converters.layouts.tokens import has_tokenizer, open_fast_tokenizer
from lsg_jax.data.processor_files import (
    OLD_TEMPLATE_FILE,
    PROCESSOR_FILE,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    image_token_id,
    read_image_token,
)
from lsg_jax.errors import CheckpointError, InputError
from lsg_jax.json_files import read_object

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")
_TEMPLATE_FILES = (TEMPLATE_FILE, OLD_TEMPLATE_FILE, f"{TEMPLATE_FOLDER}/*.jinja")
_TOKENIZER_CONFIG = "tokenizer_config.json"


def take_files_of_part(part: Path, base: Path, work: Path, config: Mapping[str, Any], twin: Twin | None) -> None:
    """Puts the tokenizer and the chat template of a trained part in place of those of its base.

    What the part does not hold stays that of the base.

    Args:
        part: the folder of the part. base: that of its base.
        work: holds a copy of the base's small files.
        config: config.json of the model.
        twin: of an original layout, which adds the image token, and may set the chat template; None for Hugging Face's layout.

    Raises:
        InputError: the part's tokenizer cannot be read, lacks the image token of the base, or has fewer tokens than the base's.
        CheckpointError: a file cannot be copied.
    """
    own_tokenizer = has_tokenizer(part)
    own_template = _has_template(part)
    if own_tokenizer and has_tokenizer(base):
        _check_tokenizer(part, base, None if twin else config)
    try:
        if own_template:
            _remove_templates(work)
            _copy(part, work, _TEMPLATE_FILES)
            _move_template(part, work, PROCESSOR_FILE)
        if own_tokenizer:
            template = _template_in(work / _TOKENIZER_CONFIG)
            for path in _matching(work, _TOKENIZER_FILES):
                path.unlink()
            _copy(part, work, _TOKENIZER_FILES)
            if not own_template and template is not None:
                _set_template(work / _TOKENIZER_CONFIG, template)
        elif own_template:
            _move_template(part, work, _TOKENIZER_CONFIG)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be copied from {part}: {error.strerror}") from None
    template_of = "its layout" if twin and twin.chat_template is not None else part if own_template else base
    logger.info("tokenizer: of %s; chat template: of %s", part if own_tokenizer else base, template_of)


def _check_tokenizer(part: Path, base: Path, config: Mapping[str, Any] | None) -> None:
    """Raises InputError unless the part's tokenizer has all that the base's model needs; without `config`, no image token."""
    theirs, own = open_fast_tokenizer(base, base), open_fast_tokenizer(part, part)
    remedy = "is this the base of the adapter? Without the tokenizer's files there, that of the base is taken"
    if len(own) < len(theirs):
        raise InputError(f"{part}: its tokenizer has {len(own)} tokens, that of its base {base} has {len(theirs)}; {remedy}")
    if config is None:
        return
    stated = config.get("image_token_index", config.get("image_token_id"))
    token = read_image_token(base, theirs, stated if isinstance(stated, int) else -1)
    if image_token_id(theirs, token) is not None and image_token_id(own, token) is None:
        raise InputError(f"{part}: its tokenizer lacks {token}, the image token of its base {base}; {remedy}")


def _has_template(folder: Path) -> bool:
    in_fields = any(_template_in(folder / name) is not None for name in (PROCESSOR_FILE, _TOKENIZER_CONFIG))
    return in_fields or bool(_matching(folder, _TEMPLATE_FILES))


def _template_in(path: Path) -> Any:
    return read_object(path).get("chat_template") if path.is_file() else None


def _set_template(path: Path, template: Any) -> None:
    """Sets the field `chat_template` of a JSON file, or removes it for None."""
    fields = read_object(path) if path.is_file() else {}
    fields.pop("chat_template", None)
    if template is not None:
        fields["chat_template"] = template
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _remove_templates(folder: Path) -> None:
    for path in _matching(folder, _TEMPLATE_FILES):
        path.unlink()
    for name in (PROCESSOR_FILE, _TOKENIZER_CONFIG):
        if _template_in(folder / name) is not None:
            _set_template(folder / name, None)


def _move_template(part: Path, work: Path, name: str) -> None:
    """Takes over the field `chat_template` of one JSON file alone; its other fields stay those of the base."""
    if (template := _template_in(part / name)) is not None:
        _set_template(work / name, template)


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for path in _matching(source, patterns):
        if path.suffix != ".py":
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
