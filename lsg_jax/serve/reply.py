"""Replies as the OpenAI protocol writes them."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from lsg_jax.serve.request import Refused

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Completion:
    """What all parts of a reply have in common.

    Attributes:
        model: its name. method: what is done to it.
        prompt_tokens: of the question, images included.
        fingerprint: of the weights.
    """

    model: str
    method: str
    prompt_tokens: int
    fingerprint: str
    name: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, tokens: int, finish: str) -> dict[str, Any]:
        """The reply in one piece."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": self.usage(tokens),
            "lsg": {"method": self.method},
        }

    def chunk(self, delta: dict[str, str], finish: str | None = None, *, usage: bool = False) -> str:
        """An event of a stream; `usage`: the client wants it in the last one."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]} | ({"usage": None} if usage else {}))

    def usage_chunk(self, tokens: int) -> str:
        """The event of a stream that has the counts."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage(tokens)})

    def usage(self, tokens: int) -> dict[str, int]:
        """The counts; `tokens` of the answer, the end-of-sequence token included."""
        total = self.prompt_tokens + tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def error_body(refused: Refused) -> dict[str, Any]:
    """An error."""
    kind = TYPES.get(refused.status, "invalid_request_error" if refused.status < 500 else "server_error")
    return {"error": {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}}


def event(value: dict[str, Any]) -> str:
    """An event of a stream."""
    return f"data: {json.dumps(value, allow_nan=False, separators=(',', ':'))}\n\n"
