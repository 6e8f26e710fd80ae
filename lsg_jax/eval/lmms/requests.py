"""Requests of lmms-eval as questions of `lsg eval`. Nothing here imports lmms-eval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Item

MAX_NEW_TOKENS = 1024  # for a task without a limit, as in lmms-eval's own LLaVA adapters
FILLED_IN = "\n\n"  # lmms-eval's stop string for tasks without one; its own LLaVA adapters ignore it


class Document:
    """The images of one document. Reading all of them in turn calls `visuals` once, and none is kept."""

    def __init__(self, visuals: Callable[[], Any]):
        self._visuals = visuals
        self._waiting: dict[int, Image.Image] = {}

    def image(self, index: int) -> Image.Image:
        """One of the images that `visuals` returns."""
        if index not in self._waiting:
            self._waiting = dict(enumerate(self._visuals()))
        return self._waiting.pop(index)


@dataclass(frozen=True)
class Visual:
    """An image of a document, read on demand."""

    document: Document
    index: int

    def read(self) -> Image.Image:
        return self.document.image(self.index)


@dataclass(frozen=True)
class Asked:
    """One question: the images are in `item`, the prompt is `text`."""

    item: Item
    text: str
    max_new_tokens: int
    until: tuple[str, ...]


def ask(where: str, context: str, visuals: Callable[[], Any], decoding: Mapping[str, Any]) -> Asked:
    """Checks one request.

    Args:
        where: names it in errors.
        context: tags `<image>` in it say where its images stand; without any, they come first.
        visuals: reads the images from the data set; called again before the batch of the question.
        decoding: generation settings of the task.

    Raises:
        InputError: an input is no image, or the task asks for sampling or beams.
    """
    found = visuals() or []
    for visual in found:
        if not isinstance(visual, Image.Image):
            raise InputError(
                f"{where}: the task gives an input of type {type(visual).__name__}; lsg_jax answers questions about images"
            )
    if samples(decoding) or (decoding.get("num_beams") or 1) > 1:
        raise InputError(f"{where}: lsg_jax decodes greedily; give --gen_kwargs do_sample=False,temperature=0,num_beams=1")
    until = decoding.get("until") or ()
    document = Document(visuals)
    return Asked(
        item=Item(id=where, question=context, answers=(), images=tuple(Visual(document, i) for i in range(len(found)))),
        text=context,
        max_new_tokens=int(decoding.get("max_new_tokens") or MAX_NEW_TOKENS),
        until=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop not in ("", FILLED_IN)),
    )


def samples(decoding: Mapping[str, Any]) -> bool:
    """Whether generation settings ask for sampling: a temperature above 0, unless `do_sample` is false."""
    temperature, do_sample = decoding.get("temperature"), decoding.get("do_sample")
    return bool(do_sample) if temperature is None else float(temperature) > 0 and do_sample is not False


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))].strip()
