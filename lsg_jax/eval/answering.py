"""Greedy answers to many questions: batches over all devices and processes, few shapes, images read ahead by threads.

An answer should not depend on the other questions of its batch. So padding depends only on a question's own length. Rounding
errors still differ with the shape of the batch and can decide a near tie between two tokens: such a question is answered again,
alone on its device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lsg_jax.config import EvalConfig
from lsg_jax.data.processor import Processor
from lsg_jax.eval.batches import batches, encode_item
from lsg_jax.eval.benchmark import Item
from lsg_jax.memory import check_answers
from lsg_jax.methods.finite import check_finite
from lsg_jax.methods.first_questions import routes
from lsg_jax.model.generate import Generated
from lsg_jax.sharding import batch_rows, local_rows, place_rows
from lsg_jax.vlm import PROMPT_BUCKET, REPLY_TOKENS, VLM


@dataclass(frozen=True)
class Answer:
    """The model's answer and its gate ratios.

    Attributes:
        ratios: float32 [gated layers, G]; None without gates or without an image.
    """

    text: str
    ratios: np.ndarray | None = None


OnBatch = Callable[[dict[int, Answer]], None]


def answer(
    vlm: VLM,
    items: Sequence[Item],
    prompts: Sequence[str],
    config: EvalConfig,
    *,
    max_new_tokens: int,
    known: Mapping[int, Answer] | None = None,
    on_batch: OnBatch | None = None,
) -> list[Answer]:
    """The model's answer to every item, in their order. All processes must call it.

    Args:
        prompts: the user's turn of each item.
        max_new_tokens: of each answer; `config.max_new_tokens` is ignored.
        known: answers by position that are not computed again, the same in every process.
        on_batch: called after each batch with the new answers by position.

    Raises:
        InputError: a prompt is too long or its tags are not its images, or an image cannot be read; names the item.
        NonFiniteError: logits of an item are not finite; names the item. Answers of its batch are not kept.
    """
    processor = vlm.make_processor(config.image_aspect, config.template)
    outputs = dict(known or {})
    left = [i for i in range(len(items)) if i not in outputs]
    routes = ask_routes(vlm, items, prompts, config, which=left)
    text_only = not any(item.images for item in items)
    encode = lambda i, sizes: encode_item(processor, items[i], prompts[i], sizes, config.max_length)

    def run(which: Sequence[int], batch_size: int, near_tie: float) -> list[int]:
        """Answers the questions; returns the positions of near ties, which stay open."""
        size = batch_size * batch_rows(vlm.mesh)
        least, remedy = PROMPT_BUCKET + max_new_tokens, "lower eval.batch_size or eval.max_new_tokens"
        check_answers(vlm, size, least, remedy)
        rows = local_rows(vlm.mesh, size)
        undecided = []
        for batch in batches(processor, items, which, encode, size=size, rows=rows, threads=config.num_threads, known=outputs):
            members = batch.members
            local = vlm.pad_questions([batch.encoded[members[row]] for row in rows], batch.pixels)
            if text_only:
                local = local.without_images()
            if routes is not None:
                local = replace(local, route=np.array([routes[members[row]] for row in rows], np.int32))
            made = vlm.generate_in_full(place_rows(local, vlm.mesh, size), max_new_tokens)
            check_finite(made.margin, [f"question {items[i].id}" for i in members], vlm.method)
            near = {i for i, margin in zip(members, made.margin, strict=True) if margin < near_tie} - outputs.keys()
            other = near | outputs.keys()
            new = {i: _answer(processor, made, row, items[i]) for row, i in enumerate(members) if i not in other}
            undecided += sorted(near)
            outputs.update(new)
            if on_batch and new:
                on_batch(new)
        return undecided

    near_tie = 0.0 if config.batch_size == 1 else near_tie_of(vlm, config)
    run(run(range(len(items)) if routes is None else left, config.batch_size, near_tie), 1, 0.0)
    return [outputs[i] for i in range(len(items))]


def ask_routes(
    vlm: VLM, items: Sequence[Item], prompts: Sequence[str], config: EvalConfig, *, which: Sequence[int]
) -> dict[int, int] | None:
    """`Batch.route` of the questions `which` by position, from the plain model's replies; a collective.

    None for a method that asks no first questions. A question without an image is not asked about: its route is 0.
    """
    first = vlm.first_questions([prompts[i] for i in which], [bool(items[i].images) for i in which])
    asked = [(which[place], question) for place, question in first]
    if not asked:
        return None
    shown = [items[i] if question.sees_image else replace(items[i], images=()) for i, question in asked]
    replies = answer(vlm.plain(), shown, [question.text for _, question in asked], config, max_new_tokens=REPLY_TOKENS)
    found = routes(vlm.method, asked, [reply.text for reply in replies], which)
    return dict(zip(which, found.tolist(), strict=True))


def _answer(processor: Processor, made: Generated, row: int, item: Item) -> Answer:
    gated = made.ratios is not None and item.images
    return Answer(processor.decode(made.tokens[row]), made.ratios[:, row] if gated else None)


def near_tie_of(vlm: VLM, config: EvalConfig) -> float:
    """The margin in logits below which an answer is computed again alone (EvalConfig)."""
    if config.near_tie is not None:
        return config.near_tie
    return 1e-3 if vlm.frozen["language_model"]["embed_tokens"].dtype == np.float32 else 0.0
