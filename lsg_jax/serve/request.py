"""The body of a request for a chat completion -> what is asked; everything else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

MAX_STOPS, MAX_STOP = 4, 1_000  # stop strings, and characters of one
MAX_MESSAGES, MAX_TEXT = 256, 400_000  # messages, and characters of all of them
MAX_TEMPERATURE = 2.0
SHOWN = 80  # characters of a name that an error repeats
SEEDS = -(1 << 63), (1 << 63) - 1

OWN = "lsg"
"""The field, beside those of the protocol, that chooses a method."""

WITHOUT_EFFECT = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
"""Fields of the protocol on which no answer depends; they are not looked at."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
}
"""Fields of the protocol that are not supported -> their values that change nothing, beside null."""


class Refused(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        message: one line: what is wrong and what to do.
        param: the field it is about.
        code: in a word, for programs.
        headers: of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        # a request may hold halves of surrogate pairs, which no reply can
        self.message, self.param = (
            text and " ".join(text.encode(errors="replace").decode().split()) for text in (message, param)
        )
        self.status, self.code = status, code
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Message:
    """A message: its texts, and the addresses of its images where they stand between them.

    Attributes:
        parts: (kind, text or address), in their order.
    """

    role: Literal["system", "user", "assistant"]
    parts: tuple[tuple[Literal["text", "image"], str], ...]

    @property
    def text(self) -> str:
        """Its texts after each other."""
        return "".join(value for kind, value in self.parts if kind == "text")

    @property
    def images(self) -> list[str]:
        """The addresses of its images."""
        return [value for kind, value in self.parts if kind == "image"]


@dataclass(frozen=True)
class ChatRequest:
    """A request for a chat completion.

    Attributes:
        max_tokens: None for as many as the server gives.
        temperature: 0 for greedy.
        seed: None for one that is drawn.
        method: what is done to the model; None for the server's own.
        coefficients: as JSON has them, of the method of this name.
    """

    model: str
    messages: tuple[Message, ...]
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    method: str | None = None
    coefficients: Any = None

    @property
    def images(self) -> list[str]:
        """The addresses of all images, in their order."""
        return [address for message in self.messages for address in message.images]


def parse(body: bytes, *, max_images: int) -> ChatRequest:
    """Reads a body. Raises Refused."""
    fields = _object(body)
    known = {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream"}
    known |= {"stream_options", OWN}
    for name, value in fields.items():
        if name in known or name in WITHOUT_EFFECT or value is None:
            continue
        if name not in NEUTRAL:
            raise _bad(name, "this server does not know the field: leave it out", code="unknown_parameter")
        if not any(_same(value, neutral) for neutral in NEUTRAL[name]):
            raise _bad(name, "this server does not support the field: leave it out", code="unsupported_parameter")
    if not isinstance(fields.get("model"), str):
        raise _bad("model", "name the model, as GET /v1/models lists it")
    messages = _messages(fields.get("messages"))
    if (images := sum(len(message.images) for message in messages)) > max_images:
        raise _bad("messages", f"{images} images: {max_images} is the most", code="too_many_images")
    stream = _flag(fields, "stream")
    method, coefficients = _method(fields.get(OWN))
    return ChatRequest(
        model=fields["model"],
        messages=messages,
        max_tokens=_max_tokens(fields),
        temperature=_number(fields, "temperature", 0.0, MAX_TEMPERATURE, 0.0),
        top_p=_number(fields, "top_p", 0.0, 1.0, 1.0),
        seed=_whole(fields, "seed", *SEEDS),
        stop=_stop(fields.get("stop")),
        stream=stream,
        include_usage=_include_usage(fields.get("stream_options"), stream),
        method=method,
        coefficients=coefficients,
    )


def _object(body: bytes) -> dict[str, Any]:
    def constant(name: str) -> None:
        raise ValueError(name)

    try:
        value = json.loads(body, parse_constant=constant, object_pairs_hook=_once)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise Refused(400, "the body is no JSON object with each name once", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body is no JSON object", code="invalid_json")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def shortened(name: str) -> str:
    """A name of a request, short enough for an error."""
    return name if len(name) <= SHOWN else f"{name[:SHOWN]}..."


def _bad(param: str, problem: str, *, code: str = "invalid_value") -> Refused:
    param = shortened(param)
    return Refused(400, f"{param}: {problem}", param=param, code=code)


def _same(value: Any, neutral: Any) -> bool:
    """Equality that tells True from 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise _bad(name, "give true or false")
    return bool(value)


def _number(fields: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise _bad(name, f"give a number from {low:g} to {high:g}")
    return float(value)


def _whole(fields: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _bad(name, f"give a whole number from {low:,} to {high:,}")
    return value


def _max_tokens(fields: Mapping[str, Any]) -> int | None:
    """The limit, under its name of today or of before."""
    old, new = (_whole(fields, name, 1, 1 << 31) for name in ("max_tokens", "max_completion_tokens"))
    if old is not None and new is not None and old != new:
        raise _bad("max_tokens", f"it is {old}, and max_completion_tokens is {new}: give one of them")
    return old if new is None else new


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or len(given) > MAX_STOPS or not all(isinstance(each, str) for each in given):
        raise _bad("stop", f"give a string or up to {MAX_STOPS} strings")
    if any(not 0 < len(each) <= MAX_STOP for each in given):
        raise _bad("stop", f"a string of 1 to {MAX_STOP:,} characters ends an answer")
    return tuple(given)


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict) or not stream:
        raise _bad("stream_options", "give an object, and only with stream: true")
    if set(value) - {"include_usage", "include_obfuscation"} or value.get("include_obfuscation"):
        raise _bad("stream_options", "include_usage is the one option that this server supports", code="unsupported_parameter")
    return _flag(value, "include_usage")


def _method(value: Any) -> tuple[str | None, Any]:
    if value is None:
        return None, None
    if not isinstance(value, dict) or set(value) - {"method", "coefficients"}:
        raise _bad(OWN, 'give an object of "method" and, for the method coefficients, "coefficients"')
    method = value.get("method")
    if method is not None and not isinstance(method, str):
        raise _bad(OWN, "method: give the name of a method")
    if (value.get("coefficients") is not None) != (method == "coefficients"):
        raise _bad(OWN, "coefficients: they go with the method coefficients, and it needs them")
    return method, value.get("coefficients")


def _messages(value: Any) -> tuple[Message, ...]:
    """System messages come first; then user and assistant take turns, and the user has the last one."""
    if not isinstance(value, list) or not value:
        raise _bad("messages", "give a list of messages")
    if len(value) > MAX_MESSAGES:
        raise _bad("messages", f"{len(value)} messages: {MAX_MESSAGES} is the most")
    messages = [_message(number, each) for number, each in enumerate(value)]
    if sum(len(message.text) for message in messages) > MAX_TEXT:
        raise _bad("messages", f"more than {MAX_TEXT:,} characters of text: this is too long")
    turns = [message.role for message in messages]
    while turns and turns[0] == "system":
        turns.pop(0)
    if "system" in turns:
        raise _bad("messages", "a system message comes after others: put it first")
    if not turns or turns != [("user", "assistant")[i % 2] for i in range(len(turns))] or len(turns) % 2 == 0:
        raise _bad("messages", "after system messages, user and assistant take turns, from a user's message to a user's")
    return tuple(messages)


ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


def _message(number: int, value: Any) -> Message:
    where = f"messages[{number}]"
    if not isinstance(value, dict):
        raise _bad(where, "give an object of role and content")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _bad(f"{where}.role", f"choose among {', '.join(ROLES)}")
    for name, extra in value.items():
        if name not in ("role", "content", "name") and extra is not None and extra != []:
            raise _bad(f"{where}.{name}", "this server does not know the field: leave it out", code="unknown_parameter")
    content = value.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise _bad(f"{where}.content", "give a text, or a list of parts")
    readers = {"text": _text_part}
    if role == "user":
        readers["image_url"] = _image_part
    parts = tuple(_part(f"{where}.content[{index}]", part, readers) for index, part in enumerate(content))
    message = Message(ROLES[role], parts)
    if role != "assistant" and not message.text.strip() and not message.images:
        raise _bad(f"{where}.content", "the message is empty")
    return message


Part = tuple[Literal["text", "image"], str]


def _part(where: str, value: Any, readers: Mapping[str, Callable[[str, Any], Part]]) -> Part:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in readers:
        raise _bad(where, f"give an object whose type is {' or '.join(readers)}")
    if _names(value) - {"type", kind}:
        raise _bad(where, f"beside type, it may have {kind} alone", code="unknown_parameter")
    return readers[kind](where, value.get(kind))


def _text_part(where: str, value: Any) -> Part:
    if not isinstance(value, str):
        raise _bad(f"{where}.text", "give a text")
    return "text", value


def _image_part(where: str, value: Any) -> Part:
    where = f"{where}.image_url"
    if not isinstance(value, dict) or not isinstance(value.get("url"), str) or _names(value) - {"url", "detail"}:
        raise _bad(where, "give an object of url and, if you like, detail")
    if value.get("detail") not in (None, "auto", "low", "high"):
        raise _bad(f"{where}.detail", "choose among auto, low, high; it changes nothing here")
    return "image", value["url"]


def _names(value: Mapping[str, Any]) -> set[str]:
    """The fields of an object that are not null."""
    return {name for name, held in value.items() if held is not None}
