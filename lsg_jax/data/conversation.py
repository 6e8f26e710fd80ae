"""LLaVA records, text templates, and text -> token ids. Pure functions of text: no files, no images.

A record is `{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value": str}, ...]}`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lsg_jax.errors import ConfigError, LsgError

IMAGE_TAG = "<image>"
"""The image's place in records, templates and prompts: at the start of a turn, followed by a newline."""


class RecordError(LsgError):
    """A record cannot be used. `reason` is a short slug by which rejects are counted."""

    exit_code = 65

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Turn:
    """One turn. The text of a human turn may start with `<image>\\n`; no other text contains the tag."""

    role: Literal["human", "gpt"]
    text: str


@dataclass(frozen=True)
class Conversation:
    """A validated record: alternating turns from a human one to an answer, with at most one image.

    `image` is the path as in the record, None without an image. `notes` are slugs of repairs: `image_without_tag`,
    `leading_turn_dropped`, `unanswered_turn_dropped`.
    """

    record_id: str
    image: str | None
    turns: tuple[Turn, ...]
    notes: tuple[str, ...] = ()


Example = tuple[tuple[Turn, ...], str]
"""The turns before an answer (the last is human), and the answer."""


def parse_record(record: Any, *, default_id: str = "") -> Conversation:
    """Validates a LLaVA record.

    Raises:
        RecordError: with reason `not_a_record`, `bad_id`, `bad_image_field`, `several_images`, `no_turns`, `bad_turn`,
            `unknown_role`, `roles_not_alternating`, `tag_in_answer`, `tag_without_image`, `empty_question`, `empty_answer`
            or `nothing_supervised`.
    """
    if not isinstance(record, dict):
        raise RecordError("not_a_record", f"expected an object, got {type(record).__name__}")
    record_id = record.get("id", default_id)
    if isinstance(record_id, bool) or not isinstance(record_id, (str, int)):
        raise RecordError("bad_id", f"id is neither text nor an integer: {str(record_id)[:80]!r}")
    image = image_field(record.get("image"))
    turns, notes = _alternating(_read_turns(record.get("conversations")))
    turns, tag_notes = _place_tag(turns, image is not None)
    for number, turn in enumerate(turns):
        if turn.text.strip():
            continue
        reason = "empty_answer" if turn.role == "gpt" else "empty_question"
        raise RecordError(reason, f"turn {number} ({turn.role}) is empty")
    if not turns:
        raise RecordError("nothing_supervised", "no question is followed by an answer")
    return Conversation(str(record_id), image, tuple(turns), (*notes, *tag_notes))


def image_field(value: Any) -> str | None:
    """The path in a record's `image` field; None without an image. RecordError `several_images` or `bad_image_field`."""
    if isinstance(value, list):
        if len(value) > 1:
            raise RecordError("several_images", f"the record lists {len(value)} images; one is supported")
        value = value[0] if value else None
    # pandas exports a missing path as nan, as a number or as text
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        raise RecordError("bad_image_field", f"image is not a path: {str(value)[:80]!r}")
    value = value.strip()
    return None if value == "" or value.lower() == "nan" else value


def _read_turns(conversations: Any) -> list[Turn]:
    if not isinstance(conversations, list) or not conversations:
        raise RecordError("no_turns", "conversations is missing, empty or not a list")
    turns = []
    for number, item in enumerate(conversations):
        if not isinstance(item, dict) or not isinstance(item.get("value"), str):
            raise RecordError("bad_turn", f"turn {number} has no text in `value`")
        role = item.get("from")
        if role not in ("human", "gpt") and number > 0:
            raise RecordError("unknown_role", f"turn {number} is from {role!r}; expected human or gpt")
        try:
            item["value"].encode("utf-8")
        except UnicodeEncodeError:
            raise RecordError("bad_turn", f"turn {number} contains half of a surrogate pair") from None
        # A leading turn of any other role (a system prompt) counts as a leading answer, which is dropped.
        turns.append(Turn("human" if role == "human" else "gpt", item["value"]))
    return turns


def _alternating(turns: list[Turn]) -> tuple[list[Turn], list[str]]:
    """Drops one leading turn that is not human, as LLaVA does, and a last question without an answer."""
    notes = []
    if turns[0].role != "human":
        turns = turns[1:]
        notes.append("leading_turn_dropped")
    for number, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[number % 2]:
            raise RecordError("roles_not_alternating", f"turn {number + len(notes)} is a second {turn.role} turn in a row")
    if len(turns) > 2 and turns[-1].role == "human" and IMAGE_TAG not in turns[-1].text:
        turns = turns[:-1]
        notes.append("unanswered_turn_dropped")
    if not turns or turns[-1].role == "human":
        raise RecordError("nothing_supervised", "the last question has no answer")
    return turns, notes


def _place_tag(turns: list[Turn], has_image: bool) -> tuple[list[Turn], list[str]]:
    """Moves `<image>` to the front of its turn, or puts it in front of the first question."""
    for number, turn in enumerate(turns):
        if turn.role == "gpt" and IMAGE_TAG in turn.text:
            raise RecordError("tag_in_answer", f"turn {number} is an answer that contains {IMAGE_TAG}")
    count = sum(turn.text.count(IMAGE_TAG) for turn in turns)
    if count > 1:
        raise RecordError("several_images", f"{count} {IMAGE_TAG} tags; one image is supported")
    if count and not has_image:
        raise RecordError("tag_without_image", f"{IMAGE_TAG} in the text, but the record has no image")
    if has_image and not count:
        return [Turn("human", tag_front(turns[0].text)), *turns[1:]], ["image_without_tag"]
    return [replace(t, text=tag_front(t.text)) if IMAGE_TAG in t.text else t for t in turns], []


def tag_front(text: str) -> str:
    """`<image>\\n` and the text, without other tags and outer whitespace."""
    return f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}".strip()


def examples(turns: Sequence[Turn]) -> list[Example]:
    """One example per answer; the turns before it are the prompt."""
    return [(tuple(turns[:i]), turn.text) for i, turn in enumerate(turns) if turn.role == "gpt"]


# ---------------------------------------------------------------------------------------------------------------- templates


@dataclass(frozen=True)
class TextTemplate:
    """How turns become text. `{}` stands for the turn's text, `{eos}` for the tokenizer's end-of-sequence token.

    `question` ends with the generation prompt. `answer` ends with the end marker, where generation stops. `between` follows
    each answer but the last.
    """

    system: str
    question: str
    answer: str
    between: str = ""
    question_without_image: str | None = None  # None: as `question`
    markers: tuple[str, ...] = ()  # control tokens that the tokenizer must know


TEMPLATES: dict[str, TextTemplate] = {
    # LLaVA-1.5: no space after the end marker.
    "vicuna_v1": TextTemplate(
        system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. ",
        question="USER: {} ASSISTANT:",
        answer=" {}{eos}",
    ),
    # LLaVA-OneVision: a question without an image keeps the newline that would follow the image.
    "qwen2": TextTemplate(
        system="",
        question="<|im_start|>user {}<|im_end|><|im_start|>assistant\n",
        question_without_image="<|im_start|>user \n{}<|im_end|><|im_start|>assistant\n",
        answer="{}<|im_end|>",
        markers=("<|im_start|>", "<|im_end|>"),
    ),
    # LLaVA-Phi-3 (xtuner).
    "phi3": TextTemplate(
        system="",
        question="<|user|>\n{}<|end|>\n<|assistant|>\n",
        answer="{}<|end|>",
        between="\n",
        markers=("<|user|>", "<|assistant|>", "<|end|>"),
    ),
}


def render(template: TextTemplate, turns: Sequence[Turn], answer: str | None, *, eos: str) -> tuple[str, str | None]:
    """(prompt, up to the generation prompt; answer with its end marker, or None)."""
    parts = [template.system]
    for turn in turns:
        if turn.role == "gpt":
            parts.append(_fill(template.answer, turn.text, eos) + template.between)
        elif turn.text.startswith(IMAGE_TAG) or template.question_without_image is None:
            parts.append(_fill(template.question, turn.text, eos))
        else:
            parts.append(_fill(template.question_without_image, turn.text, eos))
    return "".join(parts), None if answer is None else _fill(template.answer, answer, eos)


def _fill(pattern: str, text: str, eos: str) -> str:
    # str.format would interpret braces in the text
    before, after = pattern.replace("{eos}", eos).split("{}")
    return before + text + after


class ChatTemplate:
    """The checkpoint's own template, rendered by `tokenizer.apply_chat_template` (sandboxed Jinja).

    Templates of LLaVA checkpoints take a list of parts as content, those of language models a string. A test render decides.

    Raises:
        ConfigError: the template fails on a short conversation, or drops the image tag or the text.
    """

    def __init__(self, tokenizer: Any, source: str | None = None):
        self._tokenizer = tokenizer
        self._source = source
        self._eos: str = tokenizer.eos_token or ""
        probe = [Turn("human", f"{IMAGE_TAG}\nquestion"), Turn("gpt", "answer"), Turn("human", "second")]
        problems = []
        for self._in_parts in (True, False):
            try:
                text = self._apply(probe, generate=True)
            except Exception as error:  # Jinja raises what the template raises
                problems.append(f"{type(error).__name__}: {error}")
                continue
            # a template that expects a string prints the list as Python does, or drops it
            if text.count(IMAGE_TAG) == 1 and "'type'" not in text and all(t in text for t in ("question", "answer", "second")):
                return
            problems.append(f"rendered {text[:80]!r}")
        raise ConfigError(
            f"the checkpoint's chat template cannot be used ({'; '.join(problems)}); choose one of {list(TEMPLATES)}"
        )

    def _apply(self, turns: Sequence[Turn], *, generate: bool) -> str:
        messages: list[dict[str, Any]] = []
        for turn in turns:
            role = "user" if turn.role == "human" else "assistant"
            content: Any = turn.text
            if self._in_parts:
                text = turn.text.removeprefix(IMAGE_TAG).removeprefix("\n") if turn.role == "human" else turn.text
                content = [{"type": "image"}] if text != turn.text else []
                content.append({"type": "text", "text": text})
            messages.append({"role": role, "content": content})
        return self._tokenizer.apply_chat_template(
            messages, chat_template=self._source, tokenize=False, add_generation_prompt=generate
        )

    def render(self, turns: Sequence[Turn], answer: str | None) -> tuple[str, str | None]:
        """As the function `render`: (prompt, answer with its end marker or None)."""
        prompt = self._apply(turns, generate=True)
        if answer is None:
            return prompt, None
        whole = self._apply([*turns, Turn("gpt", answer)], generate=False)
        if whole.startswith(prompt):
            tail = whole[len(prompt) :]
        else:
            # LLaVA-OneVision writes "assistant \n" before answers, but "assistant\n" as the generation prompt
            start = whole.rfind(answer.strip())
            if start < 0:
                raise ConfigError(f"the checkpoint's chat template rewrites answers; choose one of {list(TEMPLATES)}")
            tail = whole[start:]
        if self._eos and self._eos in tail:
            return prompt, tail[: tail.rindex(self._eos) + len(self._eos)]
        # templates for inference only may write no end marker, but the model has to learn to stop
        return prompt, tail.rstrip() + self._eos


# ------------------------------------------------------------------------------------------------------------- tokenization


class ChunkTokenizer:
    """Text with at most one `<image>` -> token ids, as in LLaVA's code.

    The prompt is split at `<image>`, and each chunk is tokenized on its own. This puts the piece `▁` in front of the newline
    after an image; tokenizing the whole string would not, with `legacy=False` (Metaspace `first`). Text without an image gets
    the ids of the whole string. The prompt and the answer are tokenized together.

    Special tokens within a turn's text (`</s>`) stay text; those of the template are control tokens. They look alike after
    rendering, so `protect` replaces the former beforehand. A copy of the tokenizer has a stand-in for each control token, with
    the same flags, and treats the literal spelling as ordinary text.

    Args:
        mark_segments: text after a control token starts a word, as in Phi-3's tokenizer files and in xtuner's training on
            them. transformers 5 reads `legacy = false` as "only the first text does".

    Raises:
        ConfigError: the tokenizer is a slow one.
    """

    _HIDDEN = re.compile("\ue000lsg:t([0-9]+)\ue001")

    def __init__(self, tokenizer: Any, *, mark_segments: bool = False):
        from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"{type(tokenizer).__name__}: a fast tokenizer (tokenizer.json) is needed")
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        markers = {marker for template in TEMPLATES.values() for marker in template.markers}
        added = {t.content: (i, t) for i, t in tokenizer.added_tokens_decoder.items() if t.special or t.content in markers}
        self.control: dict[str, int] = {text: index for text, (index, _) in added.items()}
        self._literals = sorted({*added, IMAGE_TAG}, key=len, reverse=True)
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
        bos = tokenizer.bos_token_id
        self._bos = bos if bos is not None and tokenizer("a").input_ids[:1] == [bos] else None

    def protect(self, text: str, *, keep_tag: bool = False) -> str:
        """Replaces special tokens in a turn's text by placeholders. With `keep_tag`, a tag at the very start stays.

        Raises:
            RecordError: `reserved_text`, the text contains the private characters of the placeholders.
        """
        if "\ue000lsg:" in text:
            raise RecordError("reserved_text", "the text contains the private-use sequence U+E000 `lsg:`")
        tag = IMAGE_TAG if keep_tag and text.startswith(IMAGE_TAG) else ""
        hidden = self._pattern.sub(lambda m: f"\ue000lsg:t{self._literals.index(m[0])}\ue001", text[len(tag) :])
        return tag + hidden

    def encode(
        self, prompt: str, answer: str | None, image_ids: Sequence[int], *, beginning: bool = True
    ) -> tuple[list[int], int]:
        """(ids, number of prompt ids). `image_ids` replace the tag.

        With `beginning`, exactly one BOS comes first, if the tokenizer adds it.
        """
        first, *rest = prompt.split(IMAGE_TAG)
        if len(rest) > 1:
            raise ConfigError(f"the template writes {len(rest)} {IMAGE_TAG} tags")
        head: list[int] = []
        if rest:
            head = [*self._with_bos(self._beginning(first), beginning), *image_ids]
        last = rest[0] if rest else first
        prompt_ids = self._chunk(last)
        answer_ids = [] if answer is None else self._continuation(last, prompt_ids, answer)
        prompt_ids = head + prompt_ids if rest else self._with_bos(prompt_ids, beginning)
        return prompt_ids + answer_ids, len(prompt_ids)

    def _with_bos(self, ids: list[int], beginning: bool) -> list[int]:
        return [self._bos, *ids] if beginning and self._bos is not None and ids[:1] != [self._bos] else ids

    def _chunk(self, text: str) -> list[int]:
        text = self._pattern.sub(lambda m: self._stand_ins.get(m[0], m[0]), text)
        text = self._HIDDEN.sub(lambda m: self._literals[int(m[1])], text)
        if self._eats_space and text.startswith(" "):
            text = " " + text  # Metaspace turns a leading space into its mark; SentencePiece puts the mark before the space
        return [self._ids.get(i, i) for i in self._backend.encode(text, add_special_tokens=False).ids]

    def _continuation(self, prompt: str, prompt_ids: list[int], answer: str) -> list[int]:
        """Ids of the answer. The prompt's ids must stay as they are at generation, without an answer."""
        joint = self._chunk(prompt + answer)
        if joint[: len(prompt_ids)] == prompt_ids:
            return joint[len(prompt_ids) :]
        # a merge spans both: tokenize the answer after a control token, where no word start is added
        if not self.control:
            return self._chunk(answer)
        return self._chunk(next(iter(self.control)) + answer)[1:]
