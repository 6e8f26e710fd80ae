"""Log likelihoods of given answers, for benchmarks that compare choices by likelihood instead of generating."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lsg_jax.checkpoint.processes import host_array
from lsg_jax.config import EvalConfig
from lsg_jax.data.conversation import RecordError, question_turn
from lsg_jax.data.encoded import Encoded
from lsg_jax.data.processor import Processor
from lsg_jax.errors import InputError
from lsg_jax.eval.answering import ask_routes, item_pixels, item_size, plan, unusable
from lsg_jax.eval.benchmark import Item
from lsg_jax.methods.method_model import assemble
from lsg_jax.sharding import batch_rows, local_rows, place_rows
from lsg_jax.types import IGNORE, Batch
from lsg_jax.vlm import PROMPT_BUCKET, VLM

SLOT_BUCKET = 8  # answer lengths are rounded up to a multiple, so that few shapes compile


def log_likelihoods(
    vlm: VLM, items: Sequence[Item], prompts: Sequence[str], answers: Sequence[str], config: EvalConfig
) -> list[tuple[float, bool]]:
    """For every item the log probability in nats of its answer after its prompt, and whether greedy decoding would give it.

    The text template sets the text between prompt and answer, so whitespace around an answer does not count, nor does the end
    marker. Gates read at the end of the prompt, as in generation. All processes must call it.

    Raises:
        InputError: prompt and answer together are too long, or an image cannot be read; names the item.
    """
    processor = vlm.make_processor(config.image_aspect, config.template)
    encoded = {i: _encode(processor, items[i], prompts[i], answers[i], config) for i in range(len(items))}
    size = config.batch_size * batch_rows(vlm.mesh)
    rows = local_rows(vlm.mesh, size)
    routes = ask_routes(vlm, items, prompts, config, which=list(encoded))
    found: dict[int, tuple[float, bool]] = {}
    for members in plan(encoded, size):
        batch = _batch(processor, [members[row] for row in rows], items, encoded, slots=_slots(encoded, members))
        if routes is not None:
            batch = dataclasses.replace(batch, route=np.array([routes[members[row]] for row in rows], np.int32))
        nats, greedy = _score(vlm.params, place_rows(batch, vlm.mesh, size), vlm.graphdef)
        found |= {i: (float(n), bool(g)) for i, n, g in zip(members, host_array(nats), host_array(greedy), strict=True)}
    return [found[i] for i in range(len(items))]


def _encode(processor: Processor, item: Item, prompt: str, answer: str, config: EvalConfig) -> Encoded:
    try:
        turn = question_turn(prompt, has_image=item.image is not None)
        whole = processor.encode([turn], answer.strip(), image_size=item_size(processor, item), max_length=config.max_length)
    except RecordError as error:
        raise unusable(item, error) from None
    if whole.cut:
        raise InputError(f"question {item.id}: the answer does not fit into {config.max_length} tokens; raise max_length")
    ends = np.isin(whole.ids[whole.num_prompt :], processor.model.eos_token_ids)
    length = whole.num_prompt + (int(ends.argmax()) if ends.any() else len(ends))
    return dataclasses.replace(whole, ids=whole.ids[:length])


def _slots(encoded: dict[int, Encoded], members: Sequence[int]) -> int:
    longest = max(len(encoded[i].ids) - encoded[i].num_prompt for i in members)
    return -(-max(longest, 1) // SLOT_BUCKET) * SLOT_BUCKET


def _batch(
    processor: Processor, members: Sequence[int], items: Sequence[Item], encoded: dict[int, Encoded], *, slots: int
) -> Batch:
    pixels = {i: item_pixels(processor, items[i]) for i in set(members)}
    length = -(-max(len(encoded[i].ids) for i in members) // PROMPT_BUCKET) * PROMPT_BUCKET
    return processor.collate(
        [encoded[i] for i in members], [pixels[i] for i in members], max_length=length, max_answer_tokens=slots
    )


@functools.partial(jax.jit, static_argnums=2)
def _score(params: dict, batch: Batch, graphdef: Any) -> tuple[jax.Array, jax.Array]:
    """Log probabilities float32 [B], greedy bool [B]; only the answer slots pass through the output head."""
    model = assemble(graphdef, params)
    logits = model.language_model.logits(model(batch, rows=jnp.asarray(batch.answer_index)).hidden)
    used = batch.answer_target != IGNORE
    target = jnp.where(used, batch.answer_target, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return -jnp.where(used, losses, 0.0).sum(-1), ((logits.argmax(-1) == target) | ~used).all(-1)
