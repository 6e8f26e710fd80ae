"""One tokenized example, before it is padded into a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lsg_jax.data.layout import ImageSize, tile_bucket
from lsg_jax.types import IGNORE


@dataclass(frozen=True)
class Encoded:
    """One tokenized example.

    Attributes:
        ids: int32 [T]; each `<image>` is replaced by the tokens of its image's layout.
        num_prompt: number of tokens before the (first) answer.
        cut: number of answer tokens removed by truncation.
        answers: (start, stop) of each answer, end marker included. None: a single answer, from `num_prompt` to the end.
        image_sizes: (width, height) in pixels of the images whose tokens are in `ids`, in their order.
        num_tiles: squares, or native images, that the vision tower sees of them.
        patches: of each, filled up as in a batch (P).
        words: int8 [n], `Batch.words` of the last n tokens of the prompt, the others being 0; None if they are not asked for.
    """

    ids: np.ndarray
    num_prompt: int
    cut: int = 0
    answers: tuple[tuple[int, int], ...] | None = None
    image_sizes: tuple[ImageSize, ...] = ()
    num_tiles: int = 0
    patches: int = 0
    words: np.ndarray | None = None

    @property
    def tiles(self) -> int:
        """Tiles of a row that holds the example, at least one and rounded up so that few shapes compile."""
        return tile_bucket(self.num_tiles)

    @property
    def answered(self) -> np.ndarray:
        """int [A], positions of the answer tokens, ascending."""
        spans = [(self.num_prompt, len(self.ids))] if self.answers is None else self.answers
        return np.concatenate([np.arange(*span) for span in spans])

    @property
    def labels(self) -> np.ndarray | None:
        """int32 [T], `ids` with -100 outside the answers (not shifted). None if there is no answer token."""
        positions = self.answered
        if not len(positions):
            return None
        labels = np.full(len(self.ids), IGNORE, np.int32)
        labels[positions] = self.ids[positions]
        return labels
