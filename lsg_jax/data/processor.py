"""One model folder's way from turns and images to token ids and pixels, and from examples to a `Batch`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from lsg_jax.config import ModelConfig
from lsg_jax.data import images
from lsg_jax.data.conversation import (
    IMAGE_TAG,
    TEMPLATES,
    ChatTemplate,
    ChunkTokenizer,
    RecordError,
    Turn,
    render,
    tag_front,
)
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.types import IGNORE, Batch

CHAT_TEMPLATE = "chat_template"
"""Name of the template that the checkpoint ships."""


@dataclass(frozen=True)
class Encoded:
    """One example as tokens.

    Attributes:
        ids: int32 [T], the image spliced in as one image token per patch.
        num_prompt: number of leading ids before the (first) answer.
        cut: number of answer tokens that truncation removed.
        answers: (start, stop) of each answer with its end marker; None: one, from `num_prompt` to the end.
    """

    ids: np.ndarray
    num_prompt: int
    cut: int = 0
    answers: tuple[tuple[int, int], ...] | None = None

    @property
    def answered(self) -> np.ndarray:
        """Places of the answer tokens, ascending: int [A]."""
        spans = [(self.num_prompt, len(self.ids))] if self.answers is None else self.answers
        return np.concatenate([np.arange(*span) for span in spans])

    @property
    def labels(self) -> np.ndarray | None:
        """int32 [T], the ids with -100 where there is no answer (not shifted); None without any."""
        places = self.answered
        if not len(places):
            return None
        labels = np.full(len(self.ids), IGNORE, np.int32)
        labels[places] = self.ids[places]
        return labels


class Processor:
    """Tokenizer, text template and image preparation of one model.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        model: sizes, special ids and image settings of the checkpoint.
        template: `vicuna_v1`, `qwen2`, `phi3` or `chat_template`. None: the checkpoint's own chat template if it has one,
            otherwise the one of the language model's family if the tokenizer knows its markers, otherwise `vicuna_v1`.
        image_aspect: `pad`, `crop` or `squash` instead of what `model.image` says.
        chat_template: Jinja source that stands in for the tokenizer's own.

    Raises:
        ConfigError: the template is unknown or does not fit the tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: ModelConfig,
        *,
        template: str | None = None,
        image_aspect: Literal["pad", "crop", "squash"] | None = None,
        chat_template: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.model = model
        self.image = dataclasses.replace(model.image, aspect=image_aspect) if image_aspect else model.image
        self._chunks = ChunkTokenizer(tokenizer, mark_segments=model.text.family == "phi3")
        chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        self.template = template or self._default_template(chat_template is not None)
        self._chat: ChatTemplate | None = None
        if self.template == CHAT_TEMPLATE:
            if chat_template is None:
                raise ConfigError(f"the checkpoint has no chat template; choose one of {', '.join(TEMPLATES)}")
            self._chat = ChatTemplate(tokenizer, chat_template)
        elif self.template not in TEMPLATES:
            raise ConfigError(f"unknown template {self.template!r}; known: {', '.join((*TEMPLATES, CHAT_TEMPLATE))}")
        else:
            self._check_markers(self.template)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        model: ModelConfig,
        *,
        template: str | None = None,
        image_aspect: Literal["pad", "crop", "squash"] | None = None,
    ) -> Processor:
        """Reads tokenizer files (and an older `chat_template.json`) from a local folder; runs no code of the checkpoint."""
        from transformers import AutoTokenizer

        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such model folder")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for missing and damaged files
            raise InputError(f"{folder}: no usable tokenizer: {str(error).strip().splitlines()[0][:200]}") from None
        source = None
        if (path := folder / "chat_template.json").is_file() and not tokenizer.chat_template:
            try:
                source = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path}: no chat template in it") from None
        return cls(tokenizer, model, template=template, image_aspect=image_aspect, chat_template=source)

    def _default_template(self, has_chat_template: bool) -> str:
        if has_chat_template:
            return CHAT_TEMPLATE
        family = self.model.text.family
        if family in TEMPLATES and set(TEMPLATES[family].markers) <= set(self._chunks.control):
            return family
        return "vicuna_v1"

    def _check_markers(self, name: str) -> None:
        missing = [m for m in TEMPLATES[name].markers if m not in self._chunks.control]
        if missing or not self.tokenizer.eos_token:
            raise ConfigError(f"template {name}: the tokenizer lacks {', '.join(missing) or 'an end-of-sequence token'}")

    # ------------------------------------------------------------------------------------------------------------------ text

    def encode(
        self,
        prompt_turns: Sequence[Turn],
        answer: str | None,
        *,
        max_length: int | None = None,
        max_answer_tokens: int | None = None,
    ) -> Encoded:
        """Tokenises one example and truncates it from its right end, after the image has been spliced in.

        Raises:
            RecordError: `image_truncated`, `nothing_supervised` (no answer token is left), or, without an answer,
                `prompt_too_long`.
        """
        prompt, ending = self._render(prompt_turns, answer)
        ids, num_prompt = self._chunks.encode(prompt, ending, [self.model.image_token_id] * self.model.num_image_tokens)
        limit = len(ids) if max_answer_tokens is None else num_prompt + max_answer_tokens
        limit = limit if max_length is None else min(limit, max_length)
        kept = ids[:limit]
        if kept.count(self.model.image_token_id) != ids.count(self.model.image_token_id):
            raise RecordError("image_truncated", f"the image's tokens do not fit into {max_length} tokens")
        if answer is None and len(kept) < num_prompt:
            raise RecordError("prompt_too_long", f"the prompt has {num_prompt} tokens; at most {max_length} fit")
        if answer is not None and len(kept) <= num_prompt:
            raise RecordError("nothing_supervised", f"the prompt has {num_prompt} tokens; no answer fits into {max_length}")
        return Encoded(np.asarray(kept, np.int32), num_prompt, len(ids) - len(kept))

    def encode_conversation(self, turns: Sequence[Turn], *, max_length: int, max_answer_tokens: int) -> Encoded:
        """Tokenises a conversation as one example in which every answer counts; cut as `encode` does.

        Raises:
            RecordError: `image_truncated`, `nothing_supervised`, or `answers_apart`: under this template an answer within
                is not what a model is taught to say at the end, so that no one sequence serves all answers.
        """
        image_ids = [self.model.image_token_id] * self.model.num_image_tokens
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        prompt, ending = self._render(turns[:-1], turns[-1].text)
        for question, answer in self._exchanges(turns, prompt + (ending or "")):
            more, start = self._chunks.encode(question, answer, image_ids, beginning=not ids)
            spans.append((len(ids) + start, len(ids) + len(more)))
            ids += more
        if ids != self._chunks.encode(prompt, ending, image_ids)[0]:
            raise RecordError("answers_apart", "its turns are other tokens together than one by one")
        whole = Encoded(np.asarray(ids, np.int32), spans[0][0], answers=tuple(spans))
        places = whole.answered[:max_answer_tokens]
        length = min(max_length, int(places[-1]) + 1)
        kept = tuple((start, min(stop, length)) for start, stop in spans if start < length)
        if (whole.ids[length:] == self.model.image_token_id).any():
            raise RecordError("image_truncated", f"the image's tokens do not fit into {max_length} tokens")
        if not kept:
            raise RecordError("nothing_supervised", f"the prompt has {spans[0][0]} tokens; no answer fits into {max_length}")
        cut = len(whole.answered) - sum(stop - start for start, stop in kept)
        return Encoded(whole.ids[:length], spans[0][0], cut, kept)

    def _exchanges(self, turns: Sequence[Turn], text: str) -> Iterator[tuple[str, str]]:
        """Cuts a rendered conversation: (what stands before an answer, the answer with its marker) one after the other."""
        _, first = self._render(turns[:1], turns[1].text)
        lead, found, trail = (first or "").partition(self._chunks.protect(turns[1].text))
        at = 0
        for asked, told in zip(turns[::2], turns[1::2], strict=True):
            answer = lead + self._chunks.protect(told.text) + trail
            start = text.find(answer, at)
            question = self._chunks.protect(asked.text, keep_tag=True).removeprefix(IMAGE_TAG).strip()
            if not found or start < 0 or question not in text[at:start]:
                raise RecordError("answers_apart", "the template writes earlier answers in another way than the last one")
            yield text[at:start], answer
            at = start + len(answer)
        if at < len(text):
            raise RecordError("answers_apart", "the template writes something behind the last answer")

    def surely_fits(self, prompt_turns: Sequence[Turn], answer: str, *, max_length: int, max_answer_tokens: int) -> bool:
        """Whether `encode` can neither fail nor cut anything, told from the length of the text, which is much faster.

        A token stands for at least one byte, except BOS and the mark that a first word may get. Normalising can lengthen text
        beyond ASCII, so that is never sure.
        """
        prompt, ending = self._render(prompt_turns, answer)
        tags = prompt.count(IMAGE_TAG)
        most = len(prompt) + len(ending or "") + 2 + tags * self.model.num_image_tokens
        fits = most <= max_length and 0 < len(ending or "") <= max_answer_tokens and tags < 2
        return fits and prompt.isascii() and answer.isascii()

    def _render(self, prompt_turns: Sequence[Turn], answer: str | None) -> tuple[str, str | None]:
        """(text of the prompt, the answer with its end marker), special tokens in somebody's words hidden."""
        turns = [Turn(t.role, self._chunks.protect(t.text, keep_tag=t.role == "human")) for t in prompt_turns]
        protected = None if answer is None else self._chunks.protect(answer)
        if self._chat is not None:
            return self._chat.render(turns, protected)
        return render(TEMPLATES[self.template], turns, protected, eos=self.tokenizer.eos_token)

    def encode_question(self, text: str, *, has_image: bool = True, max_length: int | None = None) -> Encoded:
        """The generation prompt of a single question, without an answer. A tag in `text` moves to the front."""
        turn = Turn("human", tag_front(text) if has_image else text.replace(IMAGE_TAG, "").strip())
        return self.encode([turn], None, max_length=max_length)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text up to the first end-of-sequence token, without special tokens and outer whitespace."""
        kept: list[int] = []
        for token in map(int, ids):
            if token in self.model.eos_token_ids:
                break
            kept.append(token)
        return self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    # ---------------------------------------------------------------------------------------------------------------- images

    def pixels(self, image: Image.Image | bytes | str | Path) -> np.ndarray:
        """An image, its file, or the file's bytes -> uint8 [size, size, 3]."""
        opened = images.to_rgb(image) if isinstance(image, Image.Image) else images.open_image(image)
        return images.prepare_pixels(opened, self.image)

    @property
    def blank(self) -> np.ndarray:
        """uint8 [size, size, 3] of zeros, what a row without an image carries."""
        return np.zeros((self.image.size, self.image.size, 3), np.uint8)

    # --------------------------------------------------------------------------------------------------------------- batches

    def row(
        self,
        encoded: Encoded,
        pixels: np.ndarray | None,
        *,
        max_length: int,
        max_answer_tokens: int,
        padding_side: Literal["left", "right"] = "right",
        row_id: int = -1,
    ) -> dict[str, np.ndarray]:
        """The fields of `Batch` for one example, without the batch axis.

        Raises:
            InputError: the example is longer than `max_length`, its answer longer than `max_answer_tokens`, or its image
                tokens are neither none nor as many as the vision tower's features.
        """
        length = len(encoded.ids)
        answered = encoded.answered
        targets = encoded.ids[answered]
        if length > max_length or len(targets) > max_answer_tokens:
            raise InputError(
                f"example of {length} tokens ({len(targets)} of them answer) exceeds {max_length} ({max_answer_tokens})"
            )
        count = int((encoded.ids == self.model.image_token_id).sum())
        if count not in (0, self.model.num_image_tokens):
            raise InputError(f"{count} image tokens in a prompt; the vision tower gives {self.model.num_image_tokens} features")
        if count and pixels is None:
            raise InputError("the prompt has image tokens, but no image was given")
        start = 0 if padding_side == "right" else max_length - length
        input_ids = np.full(max_length, self.model.pad_token_id, np.int32)
        input_ids[start : start + length] = encoded.ids
        positions = np.arange(max_length)
        answer_index = np.zeros(max_answer_tokens, np.int32)
        answer_target = np.full(max_answer_tokens, IGNORE, np.int32)
        answer_index[: len(targets)] = start + answered - 1  # whose hidden state predicts it
        answer_target[: len(targets)] = targets
        return {
            "input_ids": input_ids,
            "attention_mask": (positions >= start) & (positions < start + length),
            "pixels": self.blank if pixels is None else pixels,
            "gate_position": np.asarray(start + encoded.num_prompt - 1, np.int32),
            "answer_index": answer_index,
            "answer_target": answer_target,
            "row_id": np.asarray(row_id, np.int32),
        }

    def collate(
        self,
        encoded: Sequence[Encoded],
        pixels: Sequence[np.ndarray | None],
        *,
        max_length: int,
        max_answer_tokens: int,
        padding_side: Literal["left", "right"] = "right",
        row_ids: Sequence[int] | None = None,
    ) -> Batch:
        """Stacks examples into a `Batch` of numpy arrays: T = `max_length`, A = `max_answer_tokens`. See `row` for errors."""
        if not encoded or len(encoded) != len(pixels):
            raise InputError(f"{len(encoded)} examples and {len(pixels)} images cannot make a batch")
        rows = [
            self.row(
                e,
                p,
                max_length=max_length,
                max_answer_tokens=max_answer_tokens,
                padding_side=padding_side,
                row_id=-1 if row_ids is None else row_ids[i],
            )
            for i, (e, p) in enumerate(zip(encoded, pixels, strict=True))
        ]
        return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})
