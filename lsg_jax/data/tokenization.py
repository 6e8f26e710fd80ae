"""Text -> token ids, as in LLaVA's code."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, Literal

from lsg_jax.data.conversation import IMAGE_TAG, RecordError
from lsg_jax.data.templates import TEMPLATES
from lsg_jax.errors import ConfigError


class ChunkTokenizer:
    """Text with `<image>` tags -> token ids, as in LLaVA's code.

    The prompt is split at the tags, and each chunk is tokenized on its own. This puts the piece `▁` in front of the newline
    after an image; tokenizing the whole string would not, with `legacy=False` (Metaspace `first`). Text without an image gets
    the ids of the whole string. The prompt and the answer are tokenized together.

    Special tokens within a turn's text (`</s>`) stay text; those of the template are control tokens. They look alike after
    rendering, so `protect` replaces the former beforehand. A copy of the tokenizer has a stand-in for each control token, with
    the same flags, and treats the literal spelling as ordinary text. The markers of templates and the image token count as
    special, whether or not the tokenizer's file says so.

    Args:
        image_token: how the checkpoint's processor writes an image.
        mark_segments: text after a control token starts a word, as in Phi-3's tokenizer files and in xtuner's training on
            them. transformers 5 reads `legacy = false` as "only the first text does".
        bos: whether a text begins with the BOS token, if the tokenizer adds it.

    Raises:
        ConfigError: the tokenizer is a slow one.
    """

    _STAND_IN = re.compile("\ue000lsg:c[0-9]+\ue001")
    _HIDDEN = re.compile("\ue000lsg:t([0-9]+)\ue001")

    def __init__(self, tokenizer: Any, *, image_token: str = IMAGE_TAG, mark_segments: bool = False, bos: bool = True):
        from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"{type(tokenizer).__name__}: a fast tokenizer (tokenizer.json) is needed")
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        known = {image_token, *(marker for template in TEMPLATES.values() for marker in template.markers)}
        added = {t.content: (i, t) for i, t in tokenizer.added_tokens_decoder.items() if t.special or t.content in known}
        backend.add_special_tokens(list(added))  # `encode_special_tokens` is about special ones only
        self.control: dict[str, int] = {text: index for text, (index, _) in added.items()}
        self._literals = sorted({*added, IMAGE_TAG, image_token}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._literals)))
        self._stand_ins = {text: f"\ue000lsg:c{i}\ue001" for i, text in enumerate(added)}
        backend.add_tokens(
            [
                AddedToken(self._stand_ins[text], special=False, normalized=t.normalized, lstrip=t.lstrip, rstrip=t.rstrip)
                for text, (_, t) in added.items()
            ]
        )
        self._ids = {backend.token_to_id(self._stand_ins[text]): index for text, (index, _) in added.items()}
        self._backend = backend
        self._beginning = functools.lru_cache(maxsize=64)(self._chunk)  # usually just the system text
        words = backend.pre_tokenizer
        self._eats_space = isinstance(words, pre_tokenizers.Metaspace) and words.prepend_scheme != "never"
        if self._eats_space and mark_segments:
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            backend.pre_tokenizer = None
            self._eats_space = False
        self._begins_with_bos, bos = bos, tokenizer.bos_token_id
        self._bos = bos if bos is not None and tokenizer("a").input_ids[:1] == [bos] else None

    def protect(self, text: str, *, tags: Literal["none", "first", "all"] = "none") -> str:
        """Replaces special tokens in a turn's text by placeholders.

        Args:
            tags: which `<image>` tags stay: none, one at the very start, or all.

        Raises:
            RecordError: `reserved_text`, the text contains the private characters of the placeholders; or `bad_text`, it
                contains half of a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RecordError("bad_text", f"the text contains half of a surrogate pair: {text[:80]!r}") from None
        if "\ue000lsg:" in text:
            raise RecordError("reserved_text", "the text contains the private-use sequence U+E000 `lsg:`")

        def hidden(match: re.Match[str]) -> str:
            kept = match[0] == IMAGE_TAG and (tags == "all" or (tags == "first" and match.start() == 0))
            return match[0] if kept else f"\ue000lsg:t{self._literals.index(match[0])}\ue001"

        return self._pattern.sub(hidden, text)

    def encode(
        self, prompt: str, answer: str | None, image_ids: Sequence[Sequence[int]], *, beginning: bool = True
    ) -> tuple[list[int], int]:
        """(ids, number of prompt ids). The ids of each image replace its tag; the prompt has one for each.

        With `beginning`, exactly one BOS comes first, if the tokenizer adds it, or none (`bos`).
        """
        *before, last = prompt.split(IMAGE_TAG)
        prompt_ids: list[int] = []
        for number, (text, ids) in enumerate(zip(before, image_ids, strict=True)):
            prompt_ids += self._chunk(text) if number else self._with_bos(self._beginning(text), beginning)
            prompt_ids += ids
        last_ids = self._chunk(last)
        answer_ids = [] if answer is None else self._continuation(last, last_ids, answer)
        prompt_ids += last_ids if before else self._with_bos(last_ids, beginning)
        return prompt_ids + answer_ids, len(prompt_ids)

    def _with_bos(self, ids: list[int], beginning: bool) -> list[int]:
        if not beginning or self._bos is None:
            return ids
        ids = ids[1:] if ids[:1] == [self._bos] else ids
        return [self._bos, *ids] if self._begins_with_bos else ids

    def offsets(self, text: str, part: str) -> tuple[str, tuple[int, int] | None, list[tuple[int, int]]]:
        """How a text without images is tokenized.

        Args:
            part: of the text.

        Returns:
            The text as the tokenizer sees it; where `part` first starts and ends in it, None if it does not occur; and where
            each token does.
        """
        text, part = self._seen(text), self._seen(part).strip()
        start = self._STAND_IN.sub(lambda m: " " * len(m[0]), text).find(part)
        found = None if start < 0 else (start, start + len(part))
        return text, found, self._backend.encode(text, add_special_tokens=False).offsets

    def _chunk(self, text: str) -> list[int]:
        # `encode` would keep the other threads of the interpreter waiting
        (found,) = self._backend.encode_batch([self._seen(text)], add_special_tokens=False)
        return [self._ids.get(i, i) for i in found.ids]

    def _seen(self, text: str) -> str:
        """The text that the tokenizer is given."""
        text = self._pattern.sub(lambda m: self._stand_ins.get(m[0], m[0]), text)
        text = self._HIDDEN.sub(lambda m: self._literals[int(m[1])], text)
        if self._eats_space and text.startswith(" "):
            text = " " + text  # Metaspace turns a leading space into its mark; SentencePiece puts the mark before the space
        return text

    def _continuation(self, prompt: str, prompt_ids: list[int], answer: str) -> list[int]:
        """Ids of the answer. The prompt's ids must stay as they are at generation, without an answer."""
        joint = self._chunk(prompt + answer)
        if joint[: len(prompt_ids)] == prompt_ids:
            return joint[len(prompt_ids) :]
        # a merge spans both: tokenize the answer after a control token, where no word start is added
        if not self.control:
            return self._chunk(answer)
        return self._chunk(next(iter(self.control)) + answer)[1:]
