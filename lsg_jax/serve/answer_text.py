"""The tokens of an answer as they come -> its text, in pieces that no later token changes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lsg_jax.data.text_processor import TextProcessor

_BYTE = re.compile("<0x[0-9A-F]{2}>")


class AnswerText:
    """The text of an answer. Its pieces together are what `Processor.decode` gives of all tokens, up to a stop string.

    Stop strings are looked for in the text as it is generated. Outer whitespace is no part of the answer.

    Attributes:
        tokens: so far, the end-of-sequence token included.
        finish: `stop` at the end of sequence or a stop string, `length` at `limit` tokens; None for an answer that goes on.
    """

    def __init__(self, processor: TextProcessor, stop: Sequence[str], limit: int):
        self._processor, self._stop, self._limit = processor, tuple(stop), limit
        self._ends = set(processor.model.eos_token_ids)
        self._sent = ""
        self.tokens: list[int] = []
        self.finish: str | None = None

    def add(self, tokens: Sequence[int]) -> str:
        """Takes the next tokens, and returns the next piece of text, often empty. Tokens behind the end are dropped."""
        before = len(self.tokens)
        for token in tokens:
            self.tokens.append(token)
            if token in self._ends:
                self.finish = "stop"
            elif len(self.tokens) >= self._limit:
                self.finish = "length"
            if self.finish:
                break
        text = self._processor.decode_all(self.tokens)
        if self._stop and self._stopped_at(text) is not None:
            # the first token with which the text contains a stop string
            while len(self.tokens) > before + 1 and self._stopped_at(self._processor.decode_all(self.tokens[:-1])) is not None:
                self.tokens.pop()
            text = self._processor.decode_all(self.tokens)
            text, self.finish = text[: self._stopped_at(text)], "stop"
        return self._piece(text.strip() if self.finish else self._settled(text))

    def _stopped_at(self, text: str) -> int | None:
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        return min(found) if found else None

    def _settled(self, text: str) -> str:
        """As much of a text as no later token changes."""
        if _BYTE.fullmatch(self._processor.tokenizer.convert_ids_to_tokens(self.tokens[-1]) or ""):
            return self._sent  # bytes become characters together
        text = text.rstrip("\ufffd")
        for stop in self._stop:  # a stop string may have begun
            most = min(len(stop) - 1, len(text))
            text = text[: len(text) - next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)]
        return text.strip()

    def _piece(self, text: str) -> str:
        if not text.startswith(self._sent) or len(text) <= len(self._sent):
            return ""
        piece, self._sent = text[len(self._sent) :], text
        return piece
