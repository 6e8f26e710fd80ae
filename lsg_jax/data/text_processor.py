"""Turns -> token ids of one model, with the tokens of images in their places."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from lsg_jax.config import Aspect, ModelConfig
from lsg_jax.data.conversation import IMAGE_TAG, RecordError, Turn, question_turn, tags_differ
from lsg_jax.data.encoded import Encoded
from lsg_jax.data.layout import ImageSize, VisualLayout, depends_on_size, lay_out
from lsg_jax.data.native import arrange
from lsg_jax.data.processor_files import default_of, image_token_id
from lsg_jax.data.rows import patches_of
from lsg_jax.data.templates import TEMPLATES, ChatTemplate, default_template, render
from lsg_jax.data.tokenization import ChunkTokenizer
from lsg_jax.data.words import word_kinds
from lsg_jax.errors import ConfigError, InputError

CHAT_TEMPLATE = "chat_template"
"""Name of the checkpoint's own template."""


class TextProcessor:
    """Tokenizer and text template of one model. `Processor` adds the preparation of images.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        model: configuration of the checkpoint.
        template: a name in `TEMPLATES`, or `chat_template`. None: the checkpoint's chat template if it has one, else that of
            its family (`default_template`).
        image_aspect: `pad`, `crop` or `squash`; overrides `model.image.aspect`.
        chat_template: the checkpoint's, in Jinja. None: the tokenizer's, if it has one.
        image_token: how the checkpoint's processor writes a token of an image. If the tokenizer knows it, its id is what stands
            for an image in token ids, whatever `model.image_token_id` says. `chat_template` writes an image so too, if
            `model.image.tag` names nothing else.
        bos: whether a prompt begins with the BOS token, if the tokenizer adds it.
        words: whether `encode` finds the content words of the question (`Encoded.words`).

    Attributes:
        model: the configuration, with `image_aspect` and the id of `image_token` applied.

    Raises:
        ConfigError: the template is unknown or does not fit the tokenizer, or the model's images have no choice of aspect.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: ModelConfig,
        *,
        template: str | None = None,
        image_aspect: Aspect | None = None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TAG,
        bos: bool = True,
        words: bool = False,
    ):
        if image_aspect and depends_on_size(model.image):
            raise ConfigError("image_aspect: this model takes the whole image and its tiles as they are; leave it out")
        self.tokenizer, self.words = tokenizer, words
        self.image = dataclasses.replace(model.image, aspect=image_aspect) if image_aspect else model.image
        known_id = image_token_id(tokenizer, image_token)
        image_id = model.image_token_id if known_id is None else known_id
        self.model = dataclasses.replace(model, image=self.image, image_token_id=image_id)
        mark = model.text.family == "phi3"
        self._chunks = ChunkTokenizer(tokenizer, image_token=image_token, mark_segments=mark, bos=bos)
        # text is never tokenized to a control token, but may be to any other
        known = tokenizer.convert_ids_to_tokens(image_id) is not None
        self._image_is_text = known and image_id not in self._chunks.control.values()
        if chat_template is None and template in (None, CHAT_TEMPLATE):
            chat_template = default_of(getattr(tokenizer, "chat_template", None), "the tokenizer")
        self.template = template or CHAT_TEMPLATE
        if template is None and chat_template is None:
            tiles = bool(model.image.canvases)
            known_markers = self._chunks.control
            self.template = default_template(model.text.family, tiles=tiles, known=known_markers, model=model.family)
        self._chat: ChatTemplate | None = None
        if self.template == CHAT_TEMPLATE:
            if chat_template is None:
                raise ConfigError(f"the checkpoint has no chat template; choose one of {', '.join(TEMPLATES)}")
            tag = image_token if model.image.tag == IMAGE_TAG else model.image.tag
            ends = [tokenizer.convert_ids_to_tokens(token) for token in self.model.eos_token_ids]
            self._chat = ChatTemplate(tokenizer, chat_template, tag, ends=[end for end in ends if end])
        elif self.template not in TEMPLATES:
            raise ConfigError(f"unknown template {self.template!r}; known: {', '.join((*TEMPLATES, CHAT_TEMPLATE))}")
        else:
            self._check_markers(self.template)

    def _check_markers(self, name: str) -> None:
        missing = [m for m in TEMPLATES[name].markers if m not in self._chunks.control]
        if missing or not self.tokenizer.eos_token:
            raise ConfigError(f"template {name}: the tokenizer lacks {', '.join(missing) or 'an end-of-sequence token'}")

    def encode(
        self,
        prompt_turns: Sequence[Turn],
        answer: str | None,
        *,
        system: str | None = None,
        image_sizes: Sequence[ImageSize] | None = None,
        max_length: int | None = None,
        max_answer_tokens: int | None = None,
    ) -> Encoded:
        """Tokenizes one example, then truncates it on the right.

        Args:
            prompt_turns: the turns before the answer.
            answer: None for generation.
            system: the conversation's own system text, in place of the template's. A template without a place for one gets it
                in front of the text of the first turn, with an empty line between, as Gemma's does.
            image_sizes: (width, height) in pixels of the images that the tags `<image>` stand for, in order; there may be more,
                of turns that follow. None: all are as large as the vision tower's. Of at most one image, the tag is at the
                start of its turn, and further tags are text.
            max_length: maximum number of tokens in all.
            max_answer_tokens: maximum number of answer tokens.

        Raises:
            RecordError: `image_truncated`, `nothing_supervised` (no answer token is left), `tags_and_images_differ`,
                `reserved_text`, `bad_text`, `image_token_in_text`, `image_size`, those of `ChatTemplate.render`; without an
                answer, `prompt_too_long`; with `words`, `question_rewritten`.
        """
        shown = self.shown(prompt_turns, image_sizes)
        prompt, ending = self._render(prompt_turns, answer, image_sizes, system)
        prompt, image_ids = expand_tags(prompt, self.layouts(shown))
        ids, num_prompt = self._chunks.encode(prompt, ending, image_ids)
        self._check_text(ids, image_ids)
        limit = len(ids) if max_answer_tokens is None else num_prompt + max_answer_tokens
        limit = limit if max_length is None else min(limit, max_length)
        kept = ids[:limit]
        if kept.count(self.model.image_token_id) != ids.count(self.model.image_token_id):
            raise self._truncated(shown, max_length)
        if answer is None and len(kept) < num_prompt:
            raise RecordError("prompt_too_long", f"the prompt has {num_prompt} tokens; at most {max_length} fit")
        if answer is not None and len(kept) <= num_prompt:
            raise RecordError("nothing_supervised", f"the prompt has {num_prompt} tokens; no answer fits into {max_length}")
        encoded = Encoded(np.asarray(kept, np.int32), num_prompt, len(ids) - len(kept))
        if self.words:
            encoded = dataclasses.replace(encoded, words=self._words(prompt, prompt_turns[-1], image_sizes))
        return self._with_images(encoded, shown)

    def _words(self, prompt: str, question: Turn, image_sizes: Sequence[ImageSize] | None) -> np.ndarray:
        """`Encoded.words`: of what comes after the last image of a rendered prompt."""
        asked = self._protected(question, image_sizes).text.split(IMAGE_TAG)[-1]
        text, place, offsets = self._chunks.offsets(prompt.split(IMAGE_TAG)[-1], asked)
        if place is None:
            raise RecordError("question_rewritten", "the template writes the question differently: its words cannot be found")
        return word_kinds(text, place, offsets)

    def encode_conversation(
        self,
        turns: Sequence[Turn],
        *,
        image_sizes: Sequence[ImageSize] | None = None,
        max_length: int,
        max_answer_tokens: int,
    ) -> Encoded:
        """Tokenizes a conversation as one example with a loss on every answer. Arguments and truncation as in `encode`.

        Raises:
            RecordError: those of `encode`, or `answers_apart`: the template or the tokenizer writes an earlier answer
                differently from a final one, so one sequence cannot train both.
        """
        shown = self.shown(turns, image_sizes)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        prompt, ending = self._render(turns[:-1], turns[-1].text, image_sizes)
        prompt, image_ids = expand_tags(prompt, self.layouts(shown))
        left = iter(image_ids)
        for question, answer in self._exchanges(turns, prompt + (ending or ""), image_sizes):
            here = list(itertools.islice(left, question.count(IMAGE_TAG)))
            more, start = self._chunks.encode(question, answer, here, beginning=not ids)
            spans.append((len(ids) + start, len(ids) + len(more)))
            ids += more
        if ids != self._chunks.encode(prompt, ending, image_ids)[0]:
            raise RecordError("answers_apart", "its turns tokenize differently together than one by one")
        self._check_text(ids, image_ids)
        whole = Encoded(np.asarray(ids, np.int32), spans[0][0], answers=tuple(spans))
        positions = whole.answered[:max_answer_tokens]
        length = min(max_length, int(positions[-1]) + 1)
        kept = tuple((start, min(stop, length)) for start, stop in spans if start < length)
        if (whole.ids[length:] == self.model.image_token_id).any():
            raise self._truncated(shown, max_length)
        if not kept:
            raise RecordError("nothing_supervised", f"the prompt has {spans[0][0]} tokens; no answer fits into {max_length}")
        cut = len(whole.answered) - sum(stop - start for start, stop in kept)
        return self._with_images(Encoded(whole.ids[:length], spans[0][0], cut, kept), shown)

    def _check_text(self, ids: list[int], image_ids: list[list[int]]) -> None:
        """Raises RecordError `image_token_in_text` where text has the id that stands for an image."""
        token = self.model.image_token_id
        if ids.count(token) != sum(each.count(token) for each in image_ids):
            name = self.tokenizer.convert_ids_to_tokens(token)
            raise RecordError("image_token_in_text", f"the text contains token {token} ({name!r}), which is this model's image")

    def _exchanges(
        self, turns: Sequence[Turn], text: str, image_sizes: Sequence[ImageSize] | None
    ) -> Iterator[tuple[str, str]]:
        """Splits a rendered conversation into pairs (text before the answer, the answer with its end marker)."""
        _, first = self._render(turns[:1], turns[1].text, image_sizes)
        prefix, found, suffix = (first or "").partition(self._chunks.protect(turns[1].text))
        at = 0
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            answer = prefix + self._chunks.protect(gpt.text) + suffix
            start = text.find(answer, at)
            question = self._protected(human, image_sizes).text.split(IMAGE_TAG)
            if not found or start < 0 or not all(piece.strip() in text[at:start] for piece in question):
                raise RecordError("answers_apart", "the template writes earlier answers differently from the last one")
            yield text[at:start], answer
            at = start + len(answer)
        if at < len(text):
            raise RecordError("answers_apart", "the template writes text after the last answer")

    def surely_fits(
        self,
        prompt_turns: Sequence[Turn],
        answer: str,
        *,
        image_sizes: Sequence[ImageSize] | None = None,
        max_length: int,
        max_answer_tokens: int,
    ) -> bool:
        """Whether `encode` certainly neither fails nor truncates. Reads only the length of the text, so it is much faster.

        Each token covers at least one byte, except BOS and the word-start mark of the first word. Text beyond ASCII is never
        sure, because normalization can lengthen it; nor is any where a token of text stands for an image.
        """
        prompt, ending = self._render(prompt_turns, answer, image_sizes)
        prompt, image_ids = expand_tags(prompt, self.layouts(self.shown(prompt_turns, image_sizes)))
        most = len(prompt) + len(ending or "") + 2 + sum(map(len, image_ids))
        fits = most <= max_length and 0 < len(ending or "") <= max_answer_tokens
        return fits and not self._image_is_text and prompt.isascii() and answer.isascii()

    def layouts(self, image_sizes: Sequence[ImageSize]) -> list[VisualLayout]:
        """The layouts of the images that one example shows, of (width, height) pixels, in their order.

        An image is `alone` (`layout.lay_out`) if the example shows no other. Of a conversation that is split into examples, the
        first ones may show an image alone that later ones show beside another.

        Raises:
            RecordError: `image_size`, the model takes no image of this size.
        """
        found, alone = [], len(image_sizes) == 1
        for number, size in enumerate(image_sizes, 1):
            try:
                found.append(lay_out(size, self.model, alone=alone))
            except InputError as error:
                which = "" if alone else f"image {number} of {len(image_sizes)}: "
                raise RecordError("image_size", f"{which}{error}") from None
        return found

    @property
    def square(self) -> ImageSize:
        """Width and height of the images of the vision tower, in pixels."""
        return self.model.vision.image_size, self.model.vision.image_size

    def shown(self, turns: Sequence[Turn], image_sizes: Sequence[ImageSize] | None) -> tuple[ImageSize, ...]:
        """Sizes of the images that the tags of these turns stand for, the first ones of `image_sizes`; see `encode`.

        Raises:
            RecordError: `tags_and_images_differ`, there are fewer images.
        """
        tags = sum(self._protected(turn, image_sizes).text.count(IMAGE_TAG) for turn in turns)
        if image_sizes is None:
            return (self.square,) * tags
        if tags > len(image_sizes):
            raise tags_differ(tags, len(image_sizes))
        return tuple(image_sizes[:tags])

    def _truncated(self, image_sizes: Sequence[ImageSize], max_length: int | None) -> RecordError:
        of = "the image's tokens do" if len(image_sizes) == 1 else f"the tokens of {len(image_sizes)} images do"
        return RecordError("image_truncated", f"{of} not fit into {max_length} tokens")

    def _with_images(self, encoded: Encoded, image_sizes: tuple[ImageSize, ...]) -> Encoded:
        layouts = self.layouts(image_sizes)
        tiles = sum(layout.tiles for layout in layouts)
        return dataclasses.replace(encoded, image_sizes=image_sizes, num_tiles=tiles, patches=self.patches(layouts))

    def patches(self, layouts: Sequence[VisualLayout]) -> int:
        """P of a row that shows images of these layouts; of a native tower, the largest one, filled up."""
        return patches_of(max((arrange(each.grid, self.model).length for each in layouts if each.grid), default=0), self.model)

    def _protected(self, turn: Turn, image_sizes: Sequence[ImageSize] | None) -> Turn:
        """The turn with its special tokens hidden, except the tags of images; see `encode`."""
        tags: Literal["none", "first", "all"] = "none"
        if turn.role == "human":
            tags = "first" if image_sizes is None or len(image_sizes) < 2 else "all"
        return Turn(turn.role, self._chunks.protect(turn.text, tags=tags))

    def _render(
        self,
        prompt_turns: Sequence[Turn],
        answer: str | None,
        image_sizes: Sequence[ImageSize] | None,
        system: str | None = None,
    ) -> tuple[str, str | None]:
        """(prompt, answer with its end marker). Special tokens within the turns' own text are hidden."""
        turns = [self._protected(turn, image_sizes) for turn in prompt_turns]
        protected = None if answer is None else self._chunks.protect(answer)
        if system is not None:
            system = self._chunks.protect(system)
            if not self.knows_system:
                turns[0], system = _with_system(turns[0], system), None
        if self._chat is not None:
            return self._chat.render(turns, protected, system=system)
        return render(TEMPLATES[self.template], turns, protected, eos=self.tokenizer.eos_token, system=system)

    @property
    def knows_system(self) -> bool:
        """Whether the template has a place for a conversation's own system text."""
        return self._chat.knows_system if self._chat is not None else TEMPLATES[self.template].system_turn is not None

    def encode_question(
        self, text: str, *, image_sizes: Sequence[ImageSize] | None = None, max_length: int | None = None
    ) -> Encoded:
        """Tokenizes the generation prompt of a single question, whose tags are placed by `conversation.question_turn`.

        Args:
            image_sizes: as in `encode`, all of them; () for a question without an image, None for one square image.

        Raises:
            RecordError: those of `encode` and `question_turn`.
        """
        turn = question_turn(text, 1 if image_sizes is None else len(image_sizes))
        return self.encode([turn], None, image_sizes=image_sizes, max_length=max_length)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text up to the first end-of-sequence token. Special tokens and outer whitespace are removed."""
        return self.decode_all(ids).strip()

    def decode_all(self, ids: Sequence[int] | np.ndarray) -> str:
        """As `decode`, with outer whitespace."""
        kept: list[int] = []
        for token in map(int, ids):
            if token in self.model.eos_token_ids:
                break
            kept.append(token)
        return self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _with_system(turn: Turn, system: str) -> Turn:
    """The turn with a system text in front of its own, behind images that it begins with."""
    images = re.match(rf"(?:{IMAGE_TAG}\s*)*", turn.text)
    end = images.end() if images else 0
    return dataclasses.replace(turn, text=f"{turn.text[:end]}{system}\n\n{turn.text[end:]}")


def expand_tags(text: str, layouts: Sequence[VisualLayout]) -> tuple[str, list[list[int]]]:
    """Writes each image of a rendered text with its separators.

    Args:
        text: with a tag for each image.

    Returns:
        The text, with a tag for each piece of an image between separators; and the token ids behind each of these tags.
    """
    first, *rest = text.split(IMAGE_TAG)
    written, runs = [first], []
    for layout, after in zip(layouts, rest, strict=True):
        at = 0
        for before, count in layout.text:
            written += [before, IMAGE_TAG]
            runs.append(layout.token_ids[at : at + count].tolist())
            at += count
        written += [layout.tail, after]
    return "".join(written), runs
