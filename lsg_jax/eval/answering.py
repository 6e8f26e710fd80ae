"""Greedy answers to many questions: batches over all devices and processes, few shapes, images read ahead by threads.

An answer should not depend on the other questions of its batch. So padding depends only on a question's own length. Rounding
errors still differ with the shape of the batch and can decide a near tie between two tokens: such a question is answered again,
alone on its device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from lsg_jax.config import EvalConfig
from lsg_jax.data.conversation import RecordError
from lsg_jax.data.encoded import Encoded
from lsg_jax.data.images import image_size
from lsg_jax.data.layout import ImageSize
from lsg_jax.data.processor import Processor
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Item
from lsg_jax.model.generate import Generated
from lsg_jax.sharding import batch_rows, local_rows, place_rows
from lsg_jax.vlm import PROMPT_BUCKET, REPLY_TOKENS, VLM

READ_AHEAD = 2  # batches whose images are read while another is computed


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
        InputError: a prompt is too long, or an image cannot be read; names the item.
    """
    processor = vlm.make_processor(config.image_aspect, config.template)
    outputs = dict(known or {})
    encoded = {i: encode_item(processor, items[i], prompts[i], config) for i in range(len(items)) if i not in outputs}
    routes = ask_routes(vlm, items, prompts, config, which=list(encoded))
    text_only = all(items[i].image is None for i in encoded)

    def run(asked: Mapping[int, Encoded], batch_size: int, near_tie: float) -> list[int]:
        """Answers the questions; returns the positions of near ties, which stay open."""
        size = batch_size * batch_rows(vlm.mesh)
        rows = local_rows(vlm.mesh, size)
        undecided = []
        for members, pixels in _batches(plan(asked, size), rows, items, processor, config.num_threads):
            local = vlm.pad_questions([asked[members[row]] for row in rows], pixels)
            if text_only:
                local = local.without_images()
            if routes is not None:
                local = replace(local, route=np.array([routes[members[row]] for row in rows], np.int32))
            made = vlm.generate_in_full(place_rows(local, vlm.mesh, size), max_new_tokens)
            near = {i for i, margin in zip(members, made.margin, strict=True) if margin < near_tie}
            new = {i: _answer(processor, made, row, items[i]) for row, i in enumerate(members) if i not in near}
            undecided += sorted(near)
            outputs.update(new)
            if on_batch and new:
                on_batch(new)
        return undecided

    near_tie = 0.0 if config.batch_size == 1 else near_tie_of(vlm, config)
    undecided = run(encoded, config.batch_size, near_tie)
    run({i: encoded[i] for i in undecided}, 1, 0.0)
    return [outputs[i] for i in range(len(items))]


def ask_routes(
    vlm: VLM, items: Sequence[Item], prompts: Sequence[str], config: EvalConfig, *, which: Sequence[int]
) -> dict[int, int] | None:
    """`Batch.route` of the questions `which` by position, from the plain model's replies; a collective.

    None for a method that asks no first question. A question without an image is not asked about: its route is 0.
    """
    first = vlm.first_questions([prompts[i] for i in which], [items[i].image is not None for i in which])
    asked = {which[place]: question for place, question in first.items()}
    if not asked:
        return None
    blind = [replace(items[i], image=None) for i in asked]
    replies = answer(vlm.plain(), blind, list(asked.values()), config, max_new_tokens=REPLY_TOKENS)
    return dict.fromkeys(which, 0) | {i: vlm.method.read_reply(reply.text) for i, reply in zip(asked, replies, strict=True)}


def _answer(processor: Processor, made: Generated, row: int, item: Item) -> Answer:
    gated = made.ratios is not None and item.image is not None
    return Answer(processor.decode(made.tokens[row]), made.ratios[:, row] if gated else None)


def near_tie_of(vlm: VLM, config: EvalConfig) -> float:
    """The margin in logits below which an answer is computed again alone (EvalConfig)."""
    if config.near_tie is not None:
        return config.near_tie
    return 1e-3 if vlm.frozen["language_model"]["embed_tokens"].dtype == np.float32 else 0.0


def plan(encoded: Mapping[int, Encoded], size: int) -> list[list[int]]:
    """Batches of exactly `size` positions, each of one bucket of tiles and length.

    The last of a bucket is padded with its first member.
    """
    buckets: dict[tuple[int, int], list[int]] = {}
    for i, e in encoded.items():
        buckets.setdefault((e.tiles, -(-len(e.ids) // PROMPT_BUCKET)), []).append(i)
    batches = []
    for bucket in sorted(buckets):
        members = buckets[bucket]
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            batches.append(chosen + chosen[:1] * (size - len(chosen)))
    return batches


def encode_item(processor: Processor, item: Item, prompt: str, config: EvalConfig) -> Encoded:
    """The tokens of a question. Raises InputError that names the item if it is too long, or its image cannot be read."""
    size = item_size(processor, item)
    try:
        return processor.encode_question(
            prompt, has_image=item.image is not None, image_size=size, max_length=config.max_length
        )
    except RecordError as error:
        raise unusable(item, error) from None


def unusable(item: Item, error: RecordError) -> InputError:
    """The error of a question that cannot be asked, with what to do if it is too long."""
    too_long = error.reason in ("prompt_too_long", "image_truncated", "nothing_supervised")
    return InputError(f"question {item.id}: {error}{'; raise eval.max_length' if too_long else ''}")


def item_size(processor: Processor, item: Item) -> ImageSize | None:
    """(width, height) of the item's image; None where it does not matter, or there is none. Errors as `item_pixels`."""
    if item.image is None or not processor.image.canvases:
        return None
    try:
        image = item.image.read()
        return image.size if isinstance(image, Image.Image) else image_size(image)
    except InputError as error:
        raise InputError(f"question {item.id}: {error}") from None


def item_pixels(processor: Processor, item: Item) -> np.ndarray | None:
    """uint8 [S, size, size, 3], None for an item without an image. Raises InputError that names the item."""
    try:
        return None if item.image is None else processor.pixels(item.image.read())
    except InputError as error:
        raise InputError(f"question {item.id}: {error}") from None


def _batches(
    batches: Iterable[list[int]], rows: list[int], items: Sequence[Item], processor: Processor, threads: int
) -> Iterator[tuple[list[int], list[np.ndarray | None]]]:
    """Yields (members, pixels of this process's rows); images are read in advance."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[list[int], list[Future]]] = deque()
        try:
            for members in batches:
                once = {i: pool.submit(item_pixels, processor, items[i]) for i in dict.fromkeys(members[row] for row in rows)}
                waiting.append((members, [once[members[row]] for row in rows]))
                if len(waiting) > READ_AHEAD:
                    ready, futures = waiting.popleft()
                    yield ready, [future.result() for future in futures]
            while waiting:
                ready, futures = waiting.popleft()
                yield ready, [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
