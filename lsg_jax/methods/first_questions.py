"""Questions that a method puts to the base model before the question itself, and what their replies decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lsg_jax.methods.method import Method


@dataclass(frozen=True)
class FirstQuestion:
    """One such question.

    Attributes:
        sees_image: whether it is asked with the images of the question.
    """

    text: str
    sees_image: bool


def routes(
    method: Method, asked: Sequence[tuple[int, FirstQuestion]], replies: Sequence[str], which: Sequence[int]
) -> np.ndarray:
    """`Batch.route` int32 [n] of the questions `which`; one about which nothing was asked has route 0.

    Args:
        asked: one of `which`, and what was asked about it.
        replies: as many as `asked`.
    """
    by_question: dict[int, tuple[str, ...]] = {}
    for (i, _), reply in zip(asked, replies, strict=True):
        by_question[i] = (*by_question.get(i, ()), reply)
    return np.array([method.read_replies(by_question[i]) if i in by_question else 0 for i in which], np.int32)
