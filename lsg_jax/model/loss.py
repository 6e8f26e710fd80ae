"""Next-token cross-entropy at the answer positions, without a [B, T, V] array of logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lsg_jax.model.llava import Llava
from lsg_jax.types import IGNORE, Batch


def answer_loss(model: Llava, batch: Batch, *, remat: str = "none") -> tuple[jax.Array, dict[str, Any]]:
    """Mean cross-entropy over the answer tokens of the whole batch.

    Only the A answer slots of each row reach the output head: logits are [B, A, V].

    Returns:
        loss float32 [] in nats a token (0 for a batch without answers), and a dict: `tokens` int32 [], `correct` int32 []
        (greedy hits) and, of a gated model, `ratios` float32 [gated layers, G] as means over the rows with an image (0 without
        any).
    """
    out = model(batch, remat=remat, rows=jnp.asarray(batch.answer_index))
    logits = model.language_model.logits(out.hidden)
    used = batch.answer_target != IGNORE
    target = jnp.where(used, batch.answer_target, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    tokens = used.sum()
    loss = jnp.where(used, losses, 0.0).sum() / jnp.maximum(tokens, 1)
    correct = ((logits.argmax(-1) == target) & used).sum()
    ratios = {} if model.gate_config is None else {"ratios": mean_ratios(model, batch, out.ratios)}
    return loss, {"tokens": tokens, "correct": correct, **ratios}


def mean_ratios(model: Llava, batch: Batch, ratios: jax.Array | None) -> jax.Array:
    """Gate ratios [L - first gated layer, B, G] as means over the rows with an image: float32 [gated layers, G]."""
    layers, groups = model.gate_config.layers, model.gate_config.num_groups  # type: ignore[union-attr]
    if ratios is None:  # a batch without images
        return jnp.zeros((len(layers), groups))
    has_image = (batch.input_ids == model.config.image_token_id).any(-1)
    gated = ratios[jnp.array(layers) - min(layers)]
    return jnp.where(has_image[:, None], gated, 0.0).sum(1) / jnp.maximum(has_image.sum(), 1)


def answer_slots(labels: np.ndarray, slots: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Turns labels as Hugging Face has them into answer slots, on the host.

    Args:
        labels: int [B, T], -100 where there is no loss; label t is predicted from position t - 1, so label 0 never counts.
        slots: A; None for the longest row.

    Returns:
        answer_index int32 [B, A] and answer_target int32 [B, A], as Batch has them.

    Raises:
        ValueError: a row has more labels than slots.
    """
    rows = [np.flatnonzero(row[1:] != IGNORE) for row in np.asarray(labels)]
    longest = max((len(row) for row in rows), default=0)
    slots = max(longest, 1) if slots is None else slots
    if longest > slots:
        raise ValueError(f"a row has {longest} answer tokens, there are {slots} slots")
    index = np.zeros((len(rows), slots), np.int32)
    target = np.full((len(rows), slots), IGNORE, np.int32)
    for i, row in enumerate(rows):
        index[i, : len(row)] = row
        target[i, : len(row)] = labels[i, row + 1]
    return index, target
