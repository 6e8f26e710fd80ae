"""How many questions of a sweep a device answers at a time, and in how many parts it runs their coefficients."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lsg_jax.analysis.sweep_cells import PromptPass, answer_cells, run_prompts
from lsg_jax.checkpoint.processes import host_array
from lsg_jax.config import BatchSize, Grouping
from lsg_jax.eval.batches import Bucket
from lsg_jax.eval.sizes import (
    Room,
    Size,
    abstract_questions,
    abstract_results,
    compiled_bytes,
    confirmed,
    is_accelerator,
)
from lsg_jax.memory import agreed_memory
from lsg_jax.sharding import batch_rows
from lsg_jax.vlm import VLM

logger = logging.getLogger(__name__)


def sweep_sizes(
    vlm: VLM, batch_size: BatchSize, new_tokens: int, coefficients: np.ndarray, grouping: Grouping, *, questions: int
) -> Callable[[Bucket], Size]:
    """Questions at a time and parts of their coefficients by bucket; every process must call it, and what it returns.

    Args:
        new_tokens: of each answer.
        coefficients: float32 [C, G].
        questions: that there are; no more are taken.
    """
    count, groups = len(coefficients), batch_rows(vlm.mesh)
    given = None if batch_size == "auto" else batch_size
    room = Room.of(vlm.config, vlm.params, vlm.mesh, agreed_memory())
    room = dataclasses.replace(room, most=min(room.most, max(1, -(-questions // groups))))

    def needed(bucket: Bucket, size: Size) -> float:
        batch = abstract_questions(vlm.config, vlm.mesh, size.questions * groups, bucket)
        static = vlm.graphdef, new_tokens
        reading, compiled = compiled_bytes(run_prompts, vlm.params, batch, *static)
        if compiled is None:
            return math.inf
        shared, *_ = abstract_results(run_prompts, (vlm.params, batch), static, compiled)
        some = coefficients[: size.at_once(count)]
        cells, _ = compiled_bytes(answer_cells, vlm.params, shared, np.int32(0), some, vlm.graphdef, grouping, new_tokens)
        return max(reading, cells)

    @functools.cache
    def size_of(bucket: Bucket) -> Size:
        size = room.sweep(bucket, new_tokens, count, questions=given)
        if is_accelerator(vlm.mesh):
            kept = given is not None
            size = confirmed(size, functools.partial(needed, bucket), room, coefficients=count, keep_questions=kept)
        how = "at once" if size.parts == 1 else f"in {size.parts} parts"
        what = "sweep: %d questions of %d tokens at a time on a device, %d coefficients %s"
        logger.info(what, size.questions, bucket.length, count, how)
        return size

    return size_of


def answer_in_parts(
    vlm: VLM, shared: PromptPass, layer: int, coefficients: np.ndarray, grouping: Grouping, new_tokens: int, *, size: Size
) -> tuple[np.ndarray, np.ndarray]:
    """`answer_cells` of one layer for all coefficients [C, G], on the host, in equal parts of one compiled program."""
    count = len(coefficients)
    at_once = size.at_once(count)
    padded = np.concatenate([coefficients, np.repeat(coefficients[-1:], size.parts * at_once - count, axis=0)])
    found: list[tuple[Any, ...]] = []
    for start in range(0, len(padded), at_once):
        some = padded[start : start + at_once]
        made = answer_cells(vlm.params, shared, np.int32(layer), some, vlm.graphdef, grouping, new_tokens)
        found.append(jax.tree.map(host_array, made))
    tokens, margin = (np.concatenate(arrays, axis=1)[:, :count] for arrays in zip(*found, strict=True))
    return tokens, margin
