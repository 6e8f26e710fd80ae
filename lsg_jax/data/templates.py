"""Text templates: turns -> prompt and answer. Pure functions of text."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lsg_jax.data.conversation import IMAGE_TAG, RecordError, Turn
from lsg_jax.data.template_process import RENDERER, TemplateError
from lsg_jax.errors import ConfigError


@dataclass(frozen=True)
class TextTemplate:
    """How turns become text. `{}` stands for the turn's text, `{eos}` for the tokenizer's end-of-sequence token.

    `system_turn` writes a conversation's own system text in place of `system`; None for a template without a place for one.
    `question` ends with the generation prompt. `answer` ends with the end marker, where generation stops. `between` follows
    each answer but the last. With `image`, a turn is a list of images and texts, as the chat templates of later models take it:
    the newline after an image is none of the text.
    """

    system: str
    question: str
    answer: str
    between: str = ""
    question_without_image: str | None = None  # None: as `question`; with `image`, of a turn that does not start with one
    markers: tuple[str, ...] = ()  # control tokens that the tokenizer must know
    strip: bool = False  # turns, or their texts, lose outer whitespace
    image: str | None = None  # how `<image>` is written in a turn; None: as it stands there
    system_turn: str | None = None


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
_LLAMA3_QUESTION = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
_LLAMA3_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>"
_LLAMA3_MARKERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHATML_MARKERS = ("<|im_start|>", "<|im_end|>")
_HELPFUL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_CHATML = TextTemplate(
    system="",
    system_turn="<|im_start|>system\n{}<|im_end|>\n",
    question="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    answer="{}<|im_end|>",
    between="\n",
    markers=_CHATML_MARKERS,
)
_QWEN_VL = replace(
    _CHATML, markers=("<|vision_start|>", "<|vision_end|>", *_CHATML_MARKERS), image="<|vision_start|><image><|vision_end|>"
)

TEMPLATES: dict[str, TextTemplate] = {
    # LLaVA-1.5: no space after the end marker.
    "vicuna_v1": TextTemplate(system=_VICUNA_SYSTEM, system_turn="{} ", question="USER: {} ASSISTANT:", answer=" {}{eos}"),
    # LLaVA-OneVision in HF format: a question without an image keeps the newline that would follow the image.
    "qwen2": TextTemplate(
        system="",
        question="<|im_start|>user {}<|im_end|><|im_start|>assistant\n",
        question_without_image="<|im_start|>user \n{}<|im_end|><|im_start|>assistant\n",
        answer="{}<|im_end|>",
        markers=_CHATML_MARKERS,
    ),
    # LLaVA-NeXT and LLaVA-OneVision with Qwen, in LLaVA-NeXT's own code.
    "qwen_1_5": replace(_CHATML, system=_HELPFUL),
    # LLaVA-1.6-34B.
    "chatml_direct": TextTemplate(
        system="<|im_start|>system\nAnswer the questions.<|im_end|>",
        system_turn="<|im_start|>system\n{}<|im_end|>",
        question="<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n",
        answer="{}<|im_end|>",
        markers=_CHATML_MARKERS,
    ),
    # LLaVA-1.6-Mistral.
    "mistral_instruct": TextTemplate(system="", question="[INST] {} [/INST]", answer=" {} {eos}"),
    # LLaVA-NeXT-Llama-3 as it was trained. Its inference code writes <|start_header_id|> twice before `user`.
    "llava_llama_3": TextTemplate(
        system="<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are able to "
        "understand the visual content that the user provides, and assist the user with a variety of tasks using natural "
        "language.<|eot_id|>",
        system_turn=_LLAMA3_SYSTEM,
        question=_LLAMA3_QUESTION,
        answer="{}<|eot_id|>",
        markers=_LLAMA3_MARKERS,
        strip=True,
    ),
    # LLaVA-Llama-3 (xtuner).
    "llama3": TextTemplate(
        system="", system_turn=_LLAMA3_SYSTEM, question=_LLAMA3_QUESTION, answer="{}<|eot_id|>", markers=_LLAMA3_MARKERS
    ),
    # LLaVA-Phi-3 (xtuner).
    "phi3": TextTemplate(
        system="",
        question="<|user|>\n{}<|end|>\n<|assistant|>\n",
        answer="{}<|end|>",
        between="\n",
        markers=("<|user|>", "<|assistant|>", "<|end|>"),
    ),
    # TinyLLaVA with a Qwen2 base model, and with an instruct model: vicuna_v1 with an end marker of their own.
    "qwen2_base": TextTemplate(
        system=_VICUNA_SYSTEM,
        system_turn="{} ",
        question="USER: {} ASSISTANT:",
        answer=" {}<|endoftext|>",
        markers=("<|endoftext|>",),
    ),
    "qwen2_instruct": TextTemplate(
        system=_VICUNA_SYSTEM,
        system_turn="{} ",
        question="USER: {} ASSISTANT:",
        answer=" {}<|im_end|>",
        markers=("<|im_end|>",),
    ),
    # The published chat templates of Qwen2-VL and Qwen2.5-VL, Qwen3-VL, InternVL3, Gemma 3 and SmolVLM2.
    "qwen2_vl": replace(_QWEN_VL, system=_HELPFUL),
    "qwen3_vl": _QWEN_VL,
    "internvl": replace(_CHATML, image="<image>\n"),
    "gemma3": TextTemplate(
        system="",
        question="<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
        answer="{}<end_of_turn>",
        between="\n",
        markers=("<start_of_turn>", "<end_of_turn>"),
        strip=True,
        image="<image>",
    ),
    "smolvlm": TextTemplate(
        system="<|im_start|>",
        question="User:{}<end_of_utterance>\nAssistant:",
        question_without_image="User: {}<end_of_utterance>\nAssistant:",
        answer=" {}<end_of_utterance>",
        between="\n",
        markers=("<|im_start|>", "<end_of_utterance>"),
        image="<image>",
    ),
    # LLaVA-1.5 as VLMEvalKit asks it: a human instead of a user, spaces around the image, and one after `ASSISTANT:`.
    "vlmevalkit_llava": TextTemplate(
        system=_VICUNA_SYSTEM.replace("user", "human"),
        system_turn="{} ",
        question="USER: {} ASSISTANT: ",
        answer="{}{eos}",
        image=" <image> ",
    ),
}

_OF_FAMILIES: dict[tuple[str, bool], tuple[str, ...]] = {
    ("llama", False): ("llama3",),
    ("llama", True): ("llava_llama_3", "chatml_direct"),
    ("mistral", True): ("mistral_instruct",),
    ("qwen2", False): ("qwen2",),
    ("qwen2", True): ("qwen_1_5",),
    ("phi3", False): ("phi3",),
    ("phi3", True): ("phi3",),
}
"""(family of the language model, whether its images have tiles) -> templates in order of preference."""


_OF_MODELS = {
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
    "internvl": "internvl",
    "gemma3": "gemma3",
    "smolvlm": "smolvlm",
}
"""Family of the whole model (`ModelConfig.family`) -> its template, for those that have one whatever their language model."""


def default_template(family: str, *, tiles: bool, known: Collection[str], model: str = "llava") -> str:
    """The template of a checkpoint that brings no chat template: the first of its family whose markers are all `known`.

    `vicuna_v1` where there is none, as of Vicuna itself.

    Args:
        family: of the language model. model: of the whole model.
    """
    if model in _OF_MODELS:
        return _OF_MODELS[model]
    for name in _OF_FAMILIES.get((family, tiles), ()):
        if set(TEMPLATES[name].markers) <= set(known):
            return name
    return "vicuna_v1"


def render(
    template: TextTemplate, turns: Sequence[Turn], answer: str | None, *, eos: str, system: str | None = None
) -> tuple[str, str | None]:
    """(prompt, up to the generation prompt; answer with its end marker, or None).

    Args:
        system: in place of the template's own system text, which needs a `system_turn`; None for its own.
    """
    parts = [template.system if system is None else _fill(template.system_turn or "{}", system, eos)]
    for turn in turns:
        text = turn.text.strip() if template.strip else turn.text
        shows = IMAGE_TAG in text
        if template.image is not None and turn.role == "human":
            shows, text = text.startswith(IMAGE_TAG), _written(template, text)
        if turn.role == "gpt":
            parts.append(_fill(template.answer, text, eos) + template.between)
        elif shows or template.question_without_image is None:
            parts.append(_fill(template.question, text, eos))
        else:
            parts.append(_fill(template.question_without_image, text, eos))
    if answer is not None:
        answer = _fill(template.answer, answer.strip() if template.strip else answer, eos)
    return "".join(parts), answer


def _written(template: TextTemplate, text: str) -> str:
    """A human turn with its images as `template.image` writes them."""
    parts = [part.get("text") for part in _in_parts(text)]
    return "".join(template.image or "" if part is None else part.strip() if template.strip else part for part in parts)


def _fill(pattern: str, text: str, eos: str) -> str:
    # str.format would interpret braces in the text
    before, after = pattern.replace("{eos}", eos).split("{}")
    return before + text + after


def as_jinja(template: TextTemplate) -> str:
    """The template in Jinja, for the file `chat_template.jinja` of a checkpoint that was trained with it.

    Messages alternate between `user` and `assistant`, and end with a question to be answered or with an answer. Content is
    text, or a list of parts; images come in front of the text.
    """
    without = template.question_without_image or template.question
    return (
        f"{{{{ {json.dumps(template.system)} }}}}{{% for message in messages %}}"
        "{% set images = 0 %}{% set text = message['content'] %}"
        f"{{% if text is not string %}}{_parts_in_jinja(template)}{{% endif %}}"
        f"{'{% set text = text | trim %}' if template.strip and template.image is None else ''}"
        f"{{% if message['role'] == 'assistant' %}}{{{{ {_expression(template.answer)} }}}}"
        f"{{% if not loop.last %}}{{{{ {json.dumps(template.between)} }}}}{{% endif %}}"
        "{% elif message['role'] != 'user' %}{{ raise_exception('this model knows no role ' + message['role']) }}"
        f"{{% elif images %}}{{{{ {_expression(template.question)} }}}}"
        f"{{% else %}}{{{{ {_expression(without)} }}}}{{% endif %}}{{% endfor %}}"
    )


def _parts_in_jinja(template: TextTemplate) -> str:
    """Sets `text` of a list of parts, and `images`, whether the question is one with an image."""
    if template.image is None:
        image = json.dumps(IMAGE_TAG + "\n")
        return (
            "{% set images = text | selectattr('type', 'equalto', 'image') | list | length %}"
            "{% set text = text | selectattr('type', 'equalto', 'text') | map(attribute='text') | join %}"
            f"{{% if images %}}{{% set text = ({image} * images ~ text) | trim %}}{{% endif %}}"
        )
    written = "part['text'] | trim" if template.strip else "part['text']"
    return (
        "{% set images = text[0]['type'] == 'image' %}{% set made = namespace(text='') %}{% for part in text %}"
        f"{{% set made.text = made.text ~ ({json.dumps(template.image)} if part['type'] == 'image' else ({written})) %}}"
        "{% endfor %}{% set text = made.text %}"
    )


def _expression(pattern: str) -> str:
    """A pattern of `TextTemplate` as an expression in Jinja."""
    names = {"{}": "text", "{eos}": "eos_token"}
    return " ~ ".join(names.get(part) or json.dumps(part) for part in re.split(r"(\{\}|\{eos\})", pattern) if part)


DATE = datetime.datetime(2024, 7, 26)
"""Today's date as chat templates see it. It never changes, so a prompt is the same on any day; Llama 3.1's own default."""


def with_fixed_date(source: str) -> str:
    """A Jinja source in which `strftime_now(format)` gives `DATE`, instead of the time at which it is rendered."""
    if "strftime_now" not in source:
        return source
    # transformers passes only plain data to templates, so the function is written in Jinja
    texts = {f"%{letter}": DATE.strftime(f"%{letter}") for letter in "aAbBcdfGHIjmMpSuUVwWxXyYzZ"} | {"%e": f"{DATE.day:2}"}
    texts |= {f"%-{letter}": texts[f"%{letter}"].lstrip("0") or "0" for letter in "dHIjmMS"}  # without leading zeros
    # not every platform's strftime knows these
    together = {"%F": "%Y-%m-%d", "%D": "%m/%d/%y", "%T": "%H:%M:%S", "%R": "%H:%M", "%h": "%b"}
    texts |= {directive: DATE.strftime(parts) for directive, parts in together.items()}
    filters = "".join(f"|replace('{directive}', '{text}')" for directive, text in texts.items())
    # `%%` is a percent sign: what follows it is no directive
    percent = "{% if not loop.first %}%{% endif %}"
    body = f"{{% for part in format.split('%%') %}}{percent}{{{{ part{filters} }}}}{{% endfor %}}"
    # the newline is the one that `trim_blocks` removes
    return f"{{% macro strftime_now(format) %}}{body}{{% endmacro %}}\n{source}"


class ChatTemplate:
    """The checkpoint's own template, rendered as by `tokenizer.apply_chat_template`, in a process of its own.

    Templates of LLaVA checkpoints take a list of parts as content, those of language models a string, and some write the text
    parts alone. A test render decides. A template that writes no image gets it in front of the text, as in LLaVA's code.

    Args:
        source: in Jinja.
        image_token: how the template writes an image. What it renders has `<image>` in its place.
        ends: tokens that end an answer, beside the tokenizer's end of sequence.

    Raises:
        ConfigError: the template fails on a short conversation, or drops the image or the text.
    """

    def __init__(self, tokenizer: Any, source: str, image_token: str = IMAGE_TAG, *, ends: Sequence[str] = ()):
        self._ends = tuple(ends)
        self._tokens = dict(tokenizer.special_tokens_map)
        self._source = with_fixed_date(source)
        self._image_token = image_token
        self._eos: str = tokenizer.eos_token or ""
        probe = [Turn("human", f"{IMAGE_TAG}\nquestion"), Turn("gpt", "answer"), Turn("human", "second")]
        problems = []
        for self._content in ("parts", "text", "text in a part"):
            try:
                text = self._apply(probe, generate=True)
            except RecordError as error:
                problems.append(str(error))
                continue
            # a template that expects a string prints the list as Python does, or drops it
            if "'type'" not in text and all(t in text for t in ("question", "answer", "second")):
                return
            problems.append(f"rendered {text[:80]!r}")
        raise ConfigError(
            f"the checkpoint's chat template cannot be used ({'; '.join(problems)}); choose one of {', '.join(TEMPLATES)}"
        )

    @functools.cached_property
    def _system_content(self) -> Callable[[str], Any] | None:
        """How a system message is given, as a text or in parts; None for a template that refuses, drops or misreads it."""
        question, text = [Turn("human", "question")], "answer"
        in_part = lambda system: [{"type": "text", "text": system}]
        try:
            as_answer = self._apply([Turn("gpt", text), *question], generate=True)
        except RecordError:  # an answer without a question before it
            as_answer = ""
        for content in (str, in_part):
            try:
                written = self._apply(question, generate=True, system=content(text))
            except RecordError:
                continue
            if text in written and "'type'" not in written and written != as_answer:
                return content
        return None

    @property
    def knows_system(self) -> bool:
        """Whether it writes a system message, and not as if it were an answer."""
        return self._system_content is not None

    def _apply(self, turns: Sequence[Turn], *, generate: bool, system: Any = None) -> str:
        """The text of turns, after a system message of this content."""
        messages = [{"role": "user" if t.role == "human" else "assistant", "content": self._as_content(t)} for t in turns]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        shown = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": generate}
        try:
            text = RENDERER.render(self._source, {**self._tokens, **shown})
        except TemplateError as error:
            raise RecordError("chat_template_failed", f"the chat template fails: {str(error)[:200]}") from None
        text = text.replace(self._image_token, IMAGE_TAG)
        if (found := text.count(IMAGE_TAG)) != (expected := sum(turn.text.count(IMAGE_TAG) for turn in turns)):
            raise RecordError("image_not_written", f"the chat template writes {found} images of {expected} in {text[:80]!r}")
        return text

    def _as_content(self, turn: Turn) -> str | list[dict[str, str]]:
        if self._content == "parts":
            return _in_parts(turn.text) if turn.role == "human" else [{"type": "text", "text": turn.text}]
        text = turn.text.replace(IMAGE_TAG, self._image_token)
        return text if self._content == "text" else [{"type": "text", "text": text}]

    def render(self, turns: Sequence[Turn], answer: str | None, *, system: Any = None) -> tuple[str, str | None]:
        """As the function `render`: (prompt, answer with its end marker or None); `system` needs `knows_system`.

        Raises:
            RecordError: `chat_template_failed` or `image_not_written`: the template refuses these turns, or drops an image.
        """
        if system is not None:
            assert self._system_content is not None
            system = self._system_content(system)
        prompt = self._apply(turns, generate=True, system=system)
        if answer is None:
            return prompt, None
        whole = self._apply([*turns, Turn("gpt", answer)], generate=False, system=system)
        if whole.startswith(prompt):
            tail = whole[len(prompt) :]
        else:
            # LLaVA-OneVision writes "assistant \n" before answers, but "assistant\n" as the generation prompt
            start = whole.rfind(answer.strip())
            if start < 0:
                raise ConfigError(f"the checkpoint's chat template rewrites answers; choose one of {', '.join(TEMPLATES)}")
            tail = whole[start:]
        if self._eos and self._eos in tail:
            return prompt, tail[: tail.rindex(self._eos) + len(self._eos)]
        # templates for inference only may write no end marker, but the model has to learn to stop
        tail = tail.rstrip()
        return prompt, tail if tail.endswith(self._ends) else tail + self._eos


def _in_parts(text: str) -> list[dict[str, str]]:
    """A human turn as a list of images and texts in their order; a newline after an image, or space between two, is none."""
    first, *rest = text.split(IMAGE_TAG)
    parts = [{"type": "text", "text": first}] if first.strip() else []
    for piece in rest:
        parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.removeprefix("\n")})
    if not any(part["type"] == "text" for part in parts):
        parts.append({"type": "text", "text": "" if rest else text})
    return parts
