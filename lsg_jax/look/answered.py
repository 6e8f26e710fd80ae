"""A question with the model's greedy answer behind it, as one sequence: for studies of the attention of answer tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lsg_jax.config import ModelConfig
from lsg_jax.model.projector import members
from lsg_jax.types import NO_SOURCE, Array, Batch
from lsg_jax.vlm import VLM


def with_answer(
    vlm: VLM, batch: Batch, max_new_tokens: int, *, answer: np.ndarray | None = None
) -> tuple[Batch, np.ndarray, np.ndarray]:
    """Appends an answer to one left-padded question.

    The batch is padded to `max_new_tokens` whatever the answer's length, so that all images share one compiled program.

    Args:
        answer: int32 [A], at most `max_new_tokens` ids; None for the model's greedy one.

    Returns:
        The batch [1, T + max_new_tokens], bool mask of the prompt's tokens, and the answer's ids without the end marker.
    """
    room = ((0, 0), (0, max_new_tokens))
    prompt = np.pad(batch.attention_mask, room)
    if answer is None and not max_new_tokens:
        answer = np.zeros(0, np.int32)
    elif answer is None:
        answer = vlm.generate_batch(batch, max_new_tokens)[0]
        ended = np.isin(answer, vlm.config.eos_token_ids)
        answer = answer[: int(np.argmax(ended))] if ended.any() else answer
    ids, valid = np.pad(batch.input_ids, room, constant_values=vlm.config.pad_token_id), prompt.copy()
    start = batch.input_ids.shape[1]
    ids[0, start : start + len(answer)] = answer
    valid[0, start : start + len(answer)] = True
    whole = dataclasses.replace(
        batch,
        input_ids=ids,
        attention_mask=valid,
        source=np.pad(batch.source, (*room, (0, 0)), constant_values=NO_SOURCE),
        weight=None if batch.weight is None else np.pad(batch.weight, (*room, (0, 0))),
        positions=None if batch.positions is None else _continued(batch.positions, max_new_tokens),
        block=None if batch.block is None else np.pad(batch.block, room, constant_values=-1),
        words=None if batch.words is None else np.pad(batch.words, room),
    )
    return whole, prompt, answer


def _continued(positions: np.ndarray, count: int) -> np.ndarray:
    """Rotary positions [1, T, 3] of a left-padded prompt, and of `count` tokens of text after it."""
    after = positions.max() + 1 + np.arange(count, dtype=positions.dtype)
    return np.concatenate([positions, np.broadcast_to(after[None, :, None], (1, count, 3))], axis=1)


def patches_behind(source: Array, tokens: jax.Array, patches: int, config: ModelConfig) -> jax.Array:
    """The patches behind visual tokens of a batch of one row, as indices of their features; `NO_SOURCE` where there are fewer.

    Args:
        source: `Batch.source`.
        tokens: int32 [V], positions in the sequence.
        patches: number of patches that the vision tower sees.

    Returns:
        int32 [V, K merge^2].
    """
    outputs = jnp.asarray(source)[0, tokens]  # [V, K], the connector's outputs behind the tokens
    behind = members(patches, config)[outputs]  # [V, K, merge^2], the features behind those
    return jnp.where(outputs[..., None] >= 0, behind, NO_SOURCE).reshape(len(tokens), -1)


def largest_behind(sizes: jax.Array, shown: jax.Array) -> jax.Array:
    """The largest of the patches behind each token: [P, ...] -> [V, ...]; `shown` is what `patches_behind` returned."""
    present = (shown >= 0).reshape(*shown.shape, *[1] * (sizes.ndim - 1))
    return jnp.where(present, sizes[shown], 0).max(1)
