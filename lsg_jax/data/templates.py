"""Text templates: turns -> prompt and answer. Pure functions of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lsg_jax.data.conversation import IMAGE_TAG, Turn
from lsg_jax.errors import ConfigError


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
