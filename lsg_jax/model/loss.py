"""Next-token cross-entropy at the answer positions, without a [B, T, V] array of logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsg_jax.config import GateConfig
from lsg_jax.gating.keys import GROUPS
from lsg_jax.model.multimodal import VisionLanguageModel
from lsg_jax.types import IGNORE, Batch, Sequence

VOCABULARY_CHUNK = 8192  # tokens


def answer_loss(model: VisionLanguageModel, batch: Batch, *, remat: str = "none") -> tuple[jax.Array, dict[str, Any]]:
    """Mean cross-entropy over the answer tokens of the whole batch.

    Only the A answer slots of each row reach the output head, and logits are computed over chunks of the vocabulary, so
    that no array of them is larger than [B, A, VOCABULARY_CHUNK].

    Returns:
        loss float32 [] in nats a token (0 for a batch without answers), and a dict: `tokens` int32 [], `correct` int32 []
        (greedy hits), `visual_tokens` and `v_sinks` of `count_sinks` and, of a gated model, `ratios` float32 [gated layers, G]
        as means over the rows with an image (0 without any).
    """
    sequence = model.sequence(batch)
    out = model(batch, sequence=sequence, remat=remat, rows=jnp.asarray(batch.answer_index))
    loss, metrics = score_answers(model, batch, out.hidden)
    metrics |= count_sinks(sequence)
    if model.gate is not None:
        metrics["ratios"] = mean_ratios(model.gate, batch, out.ratios)
    return loss, metrics


def count_sinks(sequence: Sequence) -> dict[str, jax.Array]:
    """`visual_tokens` and, among them, `v_sinks`: int32 [] each, over all rows; of a model without V-sink dimensions 0."""
    visual = sequence.visual
    if visual is None:
        return {"visual_tokens": jnp.int32(0), "v_sinks": jnp.int32(0)}
    return {"visual_tokens": visual.mask.sum(), "v_sinks": visual.v_sink.sum()}


def score_answers(model: VisionLanguageModel, batch: Batch, hidden: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`answer_loss` from the output of the last layer at the answer slots [B, A, D]: loss, `tokens` and `correct`."""
    used = batch.answer_target != IGNORE
    target = jnp.where(used, batch.answer_target, 0)
    normed, head = model.language_model.head_inputs(hidden)
    losses, best = chunked_cross_entropy(normed, head, target)
    tokens = used.sum()
    loss = jnp.where(used, losses, 0.0).sum() / jnp.maximum(tokens, 1)
    return loss, {"tokens": tokens, "correct": ((best == target) & used).sum()}


def chunked_cross_entropy(
    hidden: jax.Array, head: jax.Array, target: jax.Array, *, chunk: int = VOCABULARY_CHUNK
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of softmax(hidden · head), without the logits of all tokens at once, forward or backward.

    Args:
        hidden: [B, A, D], after the final norm.
        head: [D, V].
        target: int32 [B, A].

    Returns:
        losses float32 [B, A] in nats, and the most likely token int32 [B, A], the first of equals.
    """
    words, dtype = head.shape[1], hidden.dtype
    chunk = min(chunk, words)
    hidden = hidden.astype(jnp.float32)  # so that its gradient, a sum over chunks, is rounded once

    def add(carry: tuple[jax.Array, ...], number: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        largest, total, hit, best = carry
        first = number * chunk
        start = jnp.minimum(first, words - chunk)  # the last chunk overlaps the one before
        logits = jnp.einsum(
            "BAD,DV->BAV",
            hidden.astype(dtype),
            jax.lax.dynamic_slice_in_dim(head, start, chunk, axis=1),
            preferred_element_type=jnp.float32,  # bfloat16 logits would round away the differences between close candidates
        )
        word = start + jnp.arange(chunk)
        new = jnp.where(word >= first, logits, -jnp.inf)
        top = jax.lax.stop_gradient(new.max(-1))
        best = jnp.where(top > largest, start + new.argmax(-1).astype(jnp.int32), best)
        above = jnp.maximum(largest, top)
        total = total * jnp.exp(largest - above) + jnp.exp(new - above[..., None]).sum(-1)
        hit = hit + jnp.where((word == target[..., None]) & (word >= first), logits, 0.0).sum(-1)
        return (above, total, hit, best), None

    nothing = jnp.zeros(target.shape, jnp.float32)
    start = (jnp.full(target.shape, -jnp.inf), nothing, nothing, jnp.zeros(target.shape, jnp.int32))
    add = jax.checkpoint(add, prevent_cse=False)
    (largest, total, hit, best), _ = jax.lax.scan(add, start, jnp.arange(-(-words // chunk)))
    return largest + jnp.log(total) - hit, best


def mean_ratios(gate: GateConfig, batch: Batch, ratios: jax.Array | None) -> jax.Array:
    """Gate ratios [L - first gated layer, B, G] as means over the rows with an image: float32 [gated layers, G]."""
    if ratios is None:  # a batch without images
        return jnp.zeros((len(gate.layers), len(GROUPS[gate.grouping])))
    return mean_over_images(batch, ratios[jnp.array(gate.layers) - min(gate.layers)])


def mean_over_images(batch: Batch, ratios: jax.Array) -> jax.Array:
    """float32 [n, B, G] -> [n, G], over the rows with an image."""
    shown = has_image(batch)
    return jnp.where(shown[:, None], ratios, 0.0).sum(1) / jnp.maximum(shown.sum(), 1)


def has_image(batch: Batch) -> jax.Array:
    """bool [B]."""
    if batch.source is None:
        return jnp.zeros(batch.input_ids.shape[0], bool)
    return (jnp.asarray(batch.source) >= 0).any((-2, -1))


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
