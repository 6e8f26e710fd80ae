"""Chat template and image token of a checkpoint's files, with the precedence of transformers' `AutoProcessor`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsg_jax.data.conversation import IMAGE_TAG
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.files import read_regular
from lsg_jax.installed import transformers
from lsg_jax.json_files import read_object

PROCESSOR_FILE = "processor_config.json"
TEMPLATE_FILE = "chat_template.jinja"
OLD_TEMPLATE_FILE = "chat_template.json"
TEMPLATE_FOLDER = "additional_chat_templates"
MAX_TEMPLATE_BYTES = 1 << 20


def open_tokenizer(folder: Path, where: Path | None = None) -> Any:
    """The tokenizer of a local folder. No code of the checkpoint is run.

    Args:
        where: names the folder in errors; None for itself.

    Raises:
        InputError: the folder has no tokenizer, or it cannot be read.
    """
    AutoTokenizer = transformers().AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for missing and damaged files
        message = " ".join(f"{type(error).__name__}: {error}".split())
        what = f"no usable tokenizer: {message[:200]}"
        raise InputError(f"{where or folder}: {what}; put tokenizer.json into the checkpoint, and convert it") from None


def read_chat_template(folder: Path, tokenizer: Any) -> str | None:
    """The Jinja source that `AutoProcessor` renders prompts with; None if the checkpoint has none.

    The first of these that exists: the field `chat_template` of `processor_config.json`, the file `chat_template.json`, the
    file `chat_template.jinja` with those in `additional_chat_templates/`, and the tokenizer's own. Of several named templates,
    the one named `default`.

    Raises:
        InputError: a file cannot be read, or what it holds is no template.
        ConfigError: there are named templates, but none named `default`.
    """
    path = folder / PROCESSOR_FILE
    found = read_object(path).get("chat_template") if path.is_file() else None
    if found is None and (path := folder / OLD_TEMPLATE_FILE).is_file():
        found = read_object(path).get("chat_template")
        if found is None:
            raise InputError(f"{path}: no chat template in it")
    elif found is None:
        path = folder / TEMPLATE_FILE
        files = {file.stem: file for file in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
        found = {name: _read_text(file) for name, file in (files | ({"default": path} if path.is_file() else {})).items()}
    if not found:
        path, found = folder / "tokenizer_config.json", tokenizer.chat_template
    return default_of(found, path)


def default_of(found: Any, path: Path | str) -> str | None:
    """A template itself, or of a list or dict of named ones that named `default`. Errors as of `read_chat_template`."""
    if found is None or isinstance(found, str):
        return found
    try:
        named = found if isinstance(found, dict) else {item["name"]: item["template"] for item in found}
    except (TypeError, KeyError):
        raise InputError(f"{path}: chat_template is neither text nor a list of named templates") from None
    if not all(isinstance(text, str) for text in named.values()):
        raise InputError(f"{path}: chat_template holds something other than text")
    if "default" not in named:
        names = ", ".join(sorted(map(str, named))) or "nothing"
        raise ConfigError(
            f"{path}: its chat templates are {names}; none is named default: choose a template by name, such as vicuna_v1"
        )
    return named["default"]


def read_image_token(folder: Path, tokenizer: Any, stated_id: int, *, tag: str = IMAGE_TAG) -> str:
    """How the processor writes a token of an image.

    Where chat templates write an image as something else than `<image>`, config.json's id says which token it is.

    The tokenizer's attribute `image_token`, else that of `processor_config.json`, else `<image>`, as in LLaVA's processors.
    Where the tokenizer knows no `<image>`, the added token of config.json's id, unless it means something else, as padding.

    Args:
        stated_id: the id of the image token in config.json.
        tag: how the chat template writes an image (`ImageConfig.tag`).

    Raises:
        InputError: `processor_config.json` cannot be read, or its image token is not text.
    """
    if tag != IMAGE_TAG:
        named = (getattr(tokenizer, name, None) for name in ("context_image_token", "image_token"))  # InternVL has the first
        return next(filter(None, named), None) or tokenizer.convert_ids_to_tokens(stated_id) or tag
    path = folder / PROCESSOR_FILE
    stated = read_object(path).get("image_token") if path.is_file() else None
    if isinstance(stated, Mapping):  # an added token with its flags
        stated = stated.get("content")
    if not isinstance(stated, str | None) or stated == "":
        raise InputError(f"{path}: image_token is not text: {str(stated)[:80]!r}")
    if token := getattr(tokenizer, "image_token", None) or stated:
        return str(token)
    named = tokenizer.added_tokens_decoder.get(stated_id)
    others = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    if named is None or named.content in others or image_token_id(tokenizer, IMAGE_TAG) is not None:
        return IMAGE_TAG
    return named.content


def image_token_id(tokenizer: Any, image_token: str) -> int | None:
    """The id of the image token; None if it is not one token of the vocabulary."""
    return tokenizer.get_vocab().get(image_token)


def _read_text(path: Path) -> str:
    try:
        return read_regular(path, limit=MAX_TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
