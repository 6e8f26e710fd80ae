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
from lsg_jax.data.layout import ImageSize
from lsg_jax.data.processor import Processor
from lsg_jax.errors import InputError
from lsg_jax.eval.answering import ask_routes
from lsg_jax.eval.batches import QuestionBatch, batches, unusable
from lsg_jax.eval.benchmark import Item
from lsg_jax.eval.sizes import evaluation_sizes
from lsg_jax.methods.finite import check_finite
from lsg_jax.methods.method_model import assemble
from lsg_jax.model.generate import is_sound
from lsg_jax.progress import tracing
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
        InputError: prompt and answer together are too long, the prompt's tags are not the item's images, or an image cannot be
            read; names the item.
    """
    processor = vlm.make_processor(config.image_aspect, config.template)
    encode = lambda i, sizes: _encode(processor, items[i], prompts[i], answers[i], sizes, config)
    each = evaluation_sizes([vlm], config.batch_size, 0, questions=len(items), decodes=False)
    size = lambda bucket: batch_rows(vlm.mesh) * each(bucket)
    routes = ask_routes(vlm, items, prompts, config, which=range(len(items)))
    found: dict[int, tuple[float, bool]] = {}
    asked = batches(processor, items, range(len(items)), encode, size=size, mesh=vlm.mesh, threads=config.num_threads)
    for questions in asked:
        members = questions.members
        rows = local_rows(vlm.mesh, len(members))
        batch = _batch(processor, [members[row] for row in rows], questions)
        if routes is not None:
            batch = dataclasses.replace(batch, route=np.array([routes[members[row]] for row in rows], np.int32))
        nats, greedy = _score(vlm.params, place_rows(batch, vlm.mesh, len(members)), vlm.graphdef)
        check_finite(host_array(nats), [f"question {items[i].id}" for i in members], vlm.method)
        found |= {i: (float(n), bool(g)) for i, n, g in zip(members, host_array(nats), host_array(greedy), strict=True)}
    return [found[i] for i in range(len(items))]


def _encode(
    processor: Processor, item: Item, prompt: str, answer: str, sizes: Sequence[ImageSize], config: EvalConfig
) -> Encoded:
    try:
        turn = question_turn(prompt, len(sizes))
        whole = processor.encode([turn], answer.strip(), image_sizes=sizes, max_length=config.max_length)
    except RecordError as error:
        raise unusable(item, error) from None
    if whole.cut:
        raise InputError(f"question {item.id}: the answer does not fit into {config.max_length} tokens; raise max_length")
    ends = np.isin(whole.ids[whole.num_prompt :], processor.model.eos_token_ids)
    length = whole.num_prompt + (int(ends.argmax()) if ends.any() else len(ends))
    return dataclasses.replace(whole, ids=whole.ids[:length])


def _batch(processor: Processor, members: Sequence[int], questions: QuestionBatch) -> Batch:
    """The rows of this process, in the shape of the whole batch."""
    encoded = questions.encoded
    longest = max(len(each.ids) - each.num_prompt for each in encoded.values())
    slots = -(-max(longest, 1) // SLOT_BUCKET) * SLOT_BUCKET
    length = -(-max(len(each.ids) for each in encoded.values()) // PROMPT_BUCKET) * PROMPT_BUCKET
    return processor.collate([encoded[i] for i in members], questions.pixels, max_length=length, max_answer_tokens=slots)


@functools.partial(jax.jit, static_argnums=2)
def _score(params: dict, batch: Batch, graphdef: Any) -> tuple[jax.Array, jax.Array]:
    """Log probabilities float32 [B], greedy bool [B]; only the answer slots pass through the output head."""
    tracing("the scoring of options", batch.input_ids)
    model = assemble(graphdef, params)
    logits, hidden = model.logits(batch, rows=jnp.asarray(batch.answer_index))
    used = batch.answer_target != IGNORE
    target = jnp.where(used, batch.answer_target, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    losses = jnp.where(is_sound(hidden), losses, jnp.nan)
    return -jnp.where(used, losses, 0.0).sum(-1), ((logits.argmax(-1) == target) | ~used).all(-1)
