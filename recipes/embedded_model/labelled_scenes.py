"""Training data of the vision tower: drawn scenes with labels, in memory."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from functools import partial

import numpy as np

from lsg_jax.data.drawing import draw
from lsg_jax.data.scene_questions import Split
from recipes.embedded_model.conversations import scene_conversation
from recipes.embedded_model.labels import labels

_CHUNK = 250  # scenes that a worker process draws at once


@dataclass(frozen=True)
class LabelledScenes:
    """Images uint8 [N, side, side, 3] and their labels, as `labels.labels` gives them."""

    images: np.ndarray
    labels: dict[str, np.ndarray]

    def batch(self, number: int, size: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Batch `number` (from 0) of an endless stream. Each epoch visits every scene once, in a new order."""
        epoch, place = divmod(number, len(self.images) // size)
        chosen = np.random.default_rng([seed, epoch]).permutation(len(self.images))[place * size : (place + 1) * size]
        return self.images[chosen], {name: values[chosen] for name, values in self.labels.items()}


def draw_labelled_scenes(split: Split, count: int, *, side: int, grid: int, seed: int) -> LabelledScenes:
    """Draws the first `count` scenes of a split (`scene_conversation`), on all cores."""
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    work = partial(_draw, split, side=side, grid=grid, seed=seed)
    if len(chunks) == 1:
        drawn = [work(chunks[0])]
    else:
        with multiprocessing.get_context("spawn").Pool() as pool:
            drawn = pool.map(work, chunks)
    return LabelledScenes(
        np.concatenate([images for images, _ in drawn]),
        {name: np.concatenate([known[name] for _, known in drawn]) for name in drawn[0][1]},
    )


def _draw(split: Split, indices: range, *, side: int, grid: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    scenes = [scene_conversation(split, index, seed=seed)[0] for index in indices]
    return np.stack([draw(scene, side) for scene in scenes]), labels(scenes, grid)
