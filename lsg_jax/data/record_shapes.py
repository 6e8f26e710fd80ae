"""The shapes of conversation records: under which keys their turns, roles, texts and images are.

- LLaVA, sharegpt: `conversations: [{from, value}]`, `image`.
- LLaMA-Factory, ms-swift: `conversations` or `messages`, `images`, `system`.
- OpenAI, Hugging Face: `messages: [{role, content}]`; the content is text or parts `{type: "text" | "image" | "image_url"}`,
  images are in the parts or under `images`.
- Pairs: `instruction`, `input`, `output`, or `query`, `response`; `history: [[question, answer]]`.

Nothing is left out in silence: a key that is not read is noted, and a record is rejected if it may lose an image, a video or
audio. Pure functions of parsed JSON.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lsg_jax.errors import LsgError

IMAGE_TAG = "<image>"
"""An image's place in records, templates and prompts."""

Role = Literal["system", "human", "gpt", "other"]

ROLES: dict[str, Role] = {
    **dict.fromkeys(("human", "user"), "human"),
    **dict.fromkeys(("gpt", "assistant", "model"), "gpt"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TURN_KEYS = ("conversations", "messages")
PAIR_KEYS = (("instruction", "output"), ("query", "response"))
IMAGE_KEYS = (
    "image", "images", "image_path", "image_paths", "image_file", "image_files", "image_url", "image_urls", "image_list",
    "img", "imgs", "img_path", "img_paths", "picture", "pictures",
)  # fmt: skip
"""Keys that hold a path, an object with a path, or a list of these."""

PATH_KEYS = ("path", "url", "image", "image_url", "file_name")
"""Keys of the path where an image is an object."""

ROLE_KEYS, TEXT_KEYS = ("from", "role"), ("value", "content", "text")
_FALSE, _TRUE = ("false", "no", "0", "0.0"), ("true", "yes", "1", "1.0")
WEIGHT_KEYS, MASK_KEYS = ("loss", "loss_weight", "weight", "train"), ("mask", "masked")
"""Keys of a turn that say not to learn from it: the first if false, the second if true."""

LABEL_KEYS = {"label": ("false",), "kto_tag": _FALSE}
"""Keys of a record that mark it as a negative example (KTO), by these values. A `label` of 0 or no may be a class."""

TEXT_PARTS, IMAGE_PARTS = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")

# Signs of media that are not read. A closing tag makes `<video>` part of an HTML text.
_MEDIUM = re.compile(r"(video|audio)(s|_paths?|_files?|_urls?)?")
_MEDIUM_TAG = re.compile(r"<(video|audio)>(?!.*</\1>)", re.DOTALL)
OTHER_TAG = re.compile(r"<ImageHere>|<\|image(?:_pad|_\d+)?\|>|<image[ _]?\d+>|<image_placeholder>|<img>[^<]*</img>")
"""Image tags of other tools."""

_BOX_TAG = re.compile(r"<bbox>|<ref-object>")
_MEDIA_NAME = re.compile(r"image|img|pictur|photo|video|audio")
_NAME_OF_ONE = re.compile(r".*(?:image|img|picture|photo)s?(?:[ _-]?\d+|[ _-][a-z])?(?:[ _-](?:paths?|files?|list))?")
_IMAGE_FILE = re.compile(r"[^\n]+\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|jp2)", re.IGNORECASE)
_URL = re.compile(r"(?:https?|data|s3|gs):", re.IGNORECASE)


class RecordError(LsgError):
    """A record cannot be used. `reason` is a short slug by which rejects are counted."""

    exit_code = 65

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Message:
    """One turn as the record has it; `written` is its role's name there. Images are `<image>` in the text."""

    role: Role
    written: str
    text: str


def tags_in_front(text: str, images: int) -> str:
    """`<image> <image>\\n` and the text, without other tags and outer whitespace."""
    return f"{' '.join([IMAGE_TAG] * images)}\n{text.replace(IMAGE_TAG, '').strip()}".strip()


def has_turns(record: dict[str, Any]) -> bool:
    """Whether a record has one of the keys of its turns, whatever that holds."""
    return any(key in record for key in (*TURN_KEYS, *(pair[0] for pair in PAIR_KEYS)))


def read_messages(record: dict[str, Any]) -> list[Message]:
    """All turns of a record, system turns too.

    Raises:
        RecordError: `no_turns`, `two_conversations`, `bad_turn`, `unsupervised_turn`, `video`, `audio`, `other_image_tag` or
            `boxes_elsewhere`.
    """
    for key, words in LABEL_KEYS.items():
        if _reads(record.get(key), words):
            raise RecordError("unsupervised_turn", f"{key} = {record[key]} marks a negative example; every answer is learnt")
    messages = [_message(number, item) for number, item in enumerate(_turns(record))]
    for number, message in enumerate(messages):
        if _given(record.get("objects")) and (box := _BOX_TAG.search(message.text)):
            raise RecordError("boxes_elsewhere", f"turn {number} has {box[0]} in place of an entry of `objects`; write it out")
        if message.role != "human":  # answers may explain HTML
            continue
        if medium := _MEDIUM_TAG.search(message.text):
            raise _unsupported(medium[1], f"turn {number} contains {medium[0]}")
        if tag := OTHER_TAG.search(message.text):
            raise RecordError("other_image_tag", f"turn {number} marks an image as {tag[0][:80]}; write {IMAGE_TAG}")
    return messages


def image_fields(record: dict[str, Any]) -> list[str]:
    """The paths of a record's images, in their order; empty for a text-only record. Bad turns count as turns without images.

    Raises:
        RecordError: `bad_image_field`, `image_not_a_file` (a URL or the image itself), or `several_image_keys` if two keys
            hold different images.
    """
    found = {key: paths for key in IMAGE_KEYS if (paths := _paths(record.get(key), key))}
    in_turns = [path for item in _listed_turns(record) for path in _turn_images(item)]
    if in_turns:
        found["the turns"] = in_turns
    # A URL beside a file says where the file came from.
    files = {key: paths for key, paths in found.items() if not all(map(_URL.match, paths))} or found
    paths = next(iter(files.values()), [])
    if any(other != paths for other in files.values()):
        raise RecordError("several_image_keys", f"{' and '.join(files)} hold different images; keep one")
    for path in paths:
        if _URL.match(path):
            raise RecordError("image_not_a_file", f"{path[:80]}: not a file; save the image and give its path")
    return paths if in_turns else _in_order_of_parts(record, paths)


def check_keys(record: dict[str, Any], *, has_image: bool) -> list[str]:
    """Notes on a record's keys: `key_not_read: NAME` of those that nothing reads, `system_dropped` of a system prompt.

    Raises:
        RecordError: `video` or `audio`; `unknown_image_key` if a record without an image seems to have one under another key.
    """
    notes = dict.fromkeys(["system_dropped"] if _given(record.get("system")) else [])  # each once, in order
    for where, key, value in _unread(record):
        if medium := _MEDIUM.fullmatch(key.lower()):
            raise _unsupported(medium[1], f"the record has {key}{where}")
        if not has_image and (name := _hidden_image(key, value)):
            raise RecordError(
                "unknown_image_key",
                f"no image is listed, but {name}{where} seems to be one; name its path `image` or remove the key",
            )
        notes[f"key_not_read: {key[:80]}{where}"] = None
    return list(notes)


def may_hold_another(key: str, value: Any, paths: list[str]) -> bool:
    """Whether a key that nothing reads may hold an image beside the listed `paths`.

    Its name says so (`image_2`, `left_image`), or it holds an image's file. A listed file, with or without its folder, is no
    other image. A URL counts by the name of its key alone: it may say where a file came from.
    """
    texts = [text for text in _texts(value) if not any(f"/{path}".endswith(f"/{text}") for path in paths)]
    files = [text for text in texts if _IMAGE_FILE.fullmatch(text) and not _URL.match(text)]
    return bool(files or (texts and _NAME_OF_ONE.fullmatch(key.lower())))


def _unread(record: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(where, key, value) of each key that nothing reads and that holds anything, in the record, its turns and their parts."""
    pair = next((pair for pair in PAIR_KEYS if pair[0] in record), ())
    known = {"id", "source", "system", *TURN_KEYS, *IMAGE_KEYS, *pair, *(("input", "history") if pair else ())}
    objects = [("", record, known)]
    objects += [(" of a turn", item, {*ROLE_KEYS, *TEXT_KEYS, *IMAGE_KEYS}) for item in _listed_turns(record)]
    for part in _parts(record):
        paths = PATH_KEYS if _kind(part) in IMAGE_PARTS else ()
        objects.append((" of a part", part, {"type", "text", "index", *paths}))
    for where, item, known in objects:
        for key, value in item.items() if isinstance(item, dict) else ():
            if key not in known and _given(value):
                yield where, key, value


# ------------------------------------------------------------------------------------------------------------------- turns


def _turns(record: dict[str, Any]) -> list[Any]:
    """The turns, as they are or made of pairs."""
    given = [record[key] for key in TURN_KEYS if _given(record.get(key))]
    if len(given) > 1 and given[0] != given[1]:
        raise RecordError("two_conversations", f"{' and '.join(TURN_KEYS)} differ; keep one")
    if given and isinstance(given[0], list):
        return given[0]
    pair = next((pair for pair in PAIR_KEYS if pair[0] in record), None)
    if given or pair is None:
        keys = ", ".join(map(str, record))[:120] or "none"
        raise RecordError("no_turns", f"conversations (or messages) is missing, empty or not a list; the keys are {keys}")
    for key in (*pair, "input"):
        if _given(record.get(key)) and not isinstance(record[key], str):
            raise RecordError("bad_turn", f"{key} is not text: {str(record[key])[:80]}")
    question = "\n".join(record[key] for key in (pair[0], "input") if _given(record.get(key)))
    history = record["history"] if _given(record.get("history")) else []
    if not isinstance(history, list) or not all(isinstance(said, list) and len(said) == 2 for said in history):
        raise RecordError("bad_turn", "history is not a list of pairs [question, answer]")
    if wrong := [text for said in history for text in said if not isinstance(text, str)]:
        raise RecordError("bad_turn", f"history has an entry that is not text: {str(wrong[0])[:80]}")
    pairs = [*history, [question, record.get(pair[1])]]
    return [{"from": role, "value": text} for said in pairs for role, text in zip(("human", "gpt"), said, strict=True)]


def _listed_turns(record: dict[str, Any]) -> list[Any]:
    return next((record[key] for key in TURN_KEYS if _given(record.get(key)) and isinstance(record[key], list)), [])


def _parts(record: dict[str, Any]) -> list[dict[str, Any]]:
    """All parts of the contents of the turns that are objects."""
    contents = [item.get(key) for item in _listed_turns(record) if isinstance(item, dict) for key in TEXT_KEYS]
    return [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]


def _kind(part: dict[str, Any]) -> Any:
    """A part's type. Without one it is that of its only key, as in Qwen-VL's {image: path} and {text: text}."""
    return part.get("type") if "type" in part or len(part) != 1 else next(iter(part))


def _message(number: int, item: Any) -> Message:
    role = _only(item, ROLE_KEYS, number)
    content = _only(item, TEXT_KEYS, number)
    if isinstance(content, list):
        content = "".join(_part_text(part, number) for part in content)
    if not isinstance(content, str):
        raise RecordError("bad_turn", f"turn {number} has no text in `value` or `content`")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise RecordError("bad_turn", f"turn {number} contains half of a surrogate pair") from None
    kind = ROLES.get(role.lower(), "other") if isinstance(role, str) else "other"
    signs = [key for keys, words in ((WEIGHT_KEYS, _FALSE), (MASK_KEYS, _TRUE)) for key in keys if _reads(item.get(key), words)]
    if kind == "gpt" and signs:
        key = signs[0]
        raise RecordError("unsupervised_turn", f"turn {number} has {key} = {item[key]}; every answer of a record is learnt")
    if IMAGE_TAG not in content:
        own = sum(len(_paths(item.get(key), key)) for key in IMAGE_KEYS)
        content = tags_in_front(content, own) if own else content
    return Message(kind, str(role)[:80], content)


def _only(item: Any, keys: tuple[str, ...], number: int) -> Any:
    """The value under whichever of the keys a turn has; None if it has none."""
    if not isinstance(item, dict):
        raise RecordError("bad_turn", f"turn {number} is no object")
    values = [item[key] for key in keys if item.get(key) is not None]
    if any(value != values[0] for value in values[1:]):  # NaN differs from itself
        raise RecordError("bad_turn", f"turn {number}: {', '.join(key for key in keys if key in item)} differ; keep one")
    return values[0] if values else None


def _part_text(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    kind = _kind(part) if isinstance(part, dict) else None
    if kind in IMAGE_PARTS:
        return IMAGE_TAG
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(kind, str) and (medium := re.search("video|audio", kind)):
        raise _unsupported(medium[0], f"turn {number} has a part of type {kind}")
    raise RecordError("bad_turn", f"turn {number} has a part that is neither text nor image: {str(part)[:80]}")


# ------------------------------------------------------------------------------------------------------------------ images


def _turn_images(item: Any) -> Iterator[str]:
    """Paths in a turn: under a key of its own, or in the parts of its content."""
    if not isinstance(item, dict):
        return
    for key in IMAGE_KEYS:
        yield from _paths(item.get(key), key)
    for part in next((item[key] for key in TEXT_KEYS if isinstance(item.get(key), list)), []):
        if isinstance(part, dict) and _kind(part) in IMAGE_PARTS:
            yield from _paths(next((part[key] for key in PATH_KEYS if _given(part.get(key))), None), "image")


def _in_order_of_parts(record: dict[str, Any], paths: list[str]) -> list[str]:
    """Paths of the record in the order in which parts `{type: image, index}` show them; as they are without such parts."""
    indices = [part["index"] for part in _parts(record) if _kind(part) in IMAGE_PARTS and isinstance(part.get("index"), int)]
    return [paths[i] for i in indices] if sorted(indices) == list(range(len(paths))) else paths


def _paths(value: Any, key: str) -> list[str]:
    """The paths in the value of an image key."""
    if isinstance(value, list):
        found = [_paths(entry, key) for entry in value]
        if any(found) and not all(found):
            raise RecordError("bad_image_field", f"{key}: entry {found.index([]) + 1} of {len(found)} has no path")
        return [path for paths in found for path in paths]
    if isinstance(value, dict):
        if (inner := next((value[k] for k in PATH_KEYS if _given(value.get(k))), None)) is not None:
            return _paths(inner, key)
        if _given(value.get("bytes")):
            raise RecordError("image_not_a_file", f"{key} holds the image itself; save it to a file and give its path")
        raise RecordError("bad_image_field", f"{key} is an object without a path: {str(value)[:80]}")
    # pandas exports a missing path as nan, as a number or as text
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if not isinstance(value, str):
        raise RecordError("bad_image_field", f"{key} is not a path: {str(value)[:80]!r}")
    value = value.strip()
    return [] if value == "" or value.lower() == "nan" else [value]


def _hidden_image(key: str, value: Any) -> str | None:
    """The key that seems to hold an image, by its name or because its value is an image's file; searches lists and objects."""
    if isinstance(value, list):
        return next((name for entry in value if (name := _hidden_image(key, entry))), None)
    if isinstance(value, dict):
        return next((f"{key}.{name}" for inner, entry in value.items() if (name := _hidden_image(str(inner), entry))), None)
    named = bool(value) and _given(value) and _MEDIA_NAME.search(key.lower())
    return key if named or (isinstance(value, str) and _IMAGE_FILE.fullmatch(value.strip())) else None


def _texts(value: Any) -> list[str]:
    """All texts in a value, its lists and its objects, that are not blank."""
    if isinstance(value, list | dict):
        return [text for entry in (value.values() if isinstance(value, dict) else value) for text in _texts(entry)]
    return [value.strip()] if isinstance(value, str) and value.strip() else []


def _given(value: Any) -> bool:
    """Whether a key holds anything: not null, empty, blank or NaN."""
    if isinstance(value, float):
        return not math.isnan(value)
    return bool(value.strip()) if isinstance(value, str) else value is not None and value != [] and value != {}


def _reads(value: Any, words: tuple[str, ...]) -> bool:
    """Whether a flag, as a boolean, a number or text, is one of the words."""
    return str(value).strip().lower() in words


def _unsupported(medium: str, where: str) -> RecordError:
    return RecordError(medium, f"{where}: {medium} is not supported in records")
