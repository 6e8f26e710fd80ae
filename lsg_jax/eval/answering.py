"""Greedy answers to many questions: batches over all devices and processes, few shapes, images read ahead by threads.

An answer should not depend on the other questions of its batch. So padding depends only on a question's own length. Rounding
errors still differ with the shape of the batch and can decide a near tie between two tokens: such a question is answered again,
alone on its device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lsg_jax.config import BatchSize, EvalConfig
from lsg_jax.data.processor import Processor
from lsg_jax.eval.batches import QuestionBatch, batches, encode_item
from lsg_jax.eval.benchmark import Item
from lsg_jax.eval.sizes import evaluation_sizes
from lsg_jax.eval.together import Together
from lsg_jax.memory import check_answers
from lsg_jax.methods.finite import check_finite
from lsg_jax.methods.first_questions import routes
from lsg_jax.model.generate import Generated
from lsg_jax.sharding import batch_rows, local_rows, place_rows
from lsg_jax.types import Batch
from lsg_jax.vlm import PROMPT_BUCKET, REPLY_TOKENS, VLM


@dataclass(frozen=True)
class Answer:
    """The model's answer and its gate ratios.

    Attributes:
        ratios: float32 [gated layers, G]; None without gates or without an image.
    """

    text: str
    ratios: np.ndarray | None = None


OnBatch = Callable[[str, dict[int, Answer]], None]
"""Called with the name of a model and its new answers by position."""


def answer(
    vlm: VLM,
    items: Sequence[Item],
    prompts: Sequence[str],
    config: EvalConfig,
    *,
    max_new_tokens: int,
    known: Mapping[int, Answer] | None = None,
    on_batch: Callable[[dict[int, Answer]], None] | None = None,
) -> list[Answer]:
    """`answer_all` of one model."""
    save = None if on_batch is None else lambda _, new: on_batch(new)
    found = answer_all({"": vlm}, items, prompts, config, max_new_tokens=max_new_tokens, known={"": known or {}}, on_batch=save)
    return found[""]


def answer_all(
    models: Mapping[str, VLM],
    items: Sequence[Item],
    prompts: Sequence[str],
    config: EvalConfig,
    *,
    max_new_tokens: int,
    known: Mapping[str, Mapping[int, Answer]] | None = None,
    on_batch: OnBatch | None = None,
) -> dict[str, list[Answer]]:
    """The answer of each model to every item, in their order. All processes must call it.

    Args:
        models: by name; one, or several that may answer together (`together.groups`).
        prompts: the user's turn of each item.
        max_new_tokens: of each answer; `config.max_new_tokens` is ignored.
        known: by model, answers by position that are not computed again, the same in every process.
        on_batch: called after each batch of a model.

    Raises:
        InputError: a prompt is too long or its tags are not its images, or an image cannot be read; names the item.
        NonFiniteError: logits of an item are not finite; names the item. Answers of its batch are not kept.
    """
    job = _Answers(models, items, prompts, config, max_new_tokens, known or {}, on_batch)
    undecided = job.run(models, range(len(items)), config.batch_size)
    for name, which in undecided.items():
        job.run({name: models[name]}, which, 1)
    return {name: [found[i] for i in range(len(items))] for name, found in job.outputs.items()}


class _Answers:
    """The answers of models to items. `outputs`: name of a model -> its answers by position, so far."""

    def __init__(
        self,
        models: Mapping[str, VLM],
        items: Sequence[Item],
        prompts: Sequence[str],
        config: EvalConfig,
        max_new_tokens: int,
        known: Mapping[str, Mapping[int, Answer]],
        on_batch: OnBatch | None,
    ):
        self.items, self.prompts, self.config, self.limit, self.on_batch = items, prompts, config, max_new_tokens, on_batch
        self.outputs = {name: dict(known.get(name, {})) for name in models}
        # the text of a question is tokenized in one way for all; its words are found where a method reads them
        self.reader = next((model for model in models.values() if model.method.reads_words), next(iter(models.values())))
        self.processor = self.reader.make_processor(config.image_aspect, config.template)
        self.text_only = not any(item.images for item in items)
        self.near_tie = 0.0 if config.batch_size == 1 else near_tie_of(self.reader, config)
        self.routes = None
        if len(models) == 1:
            left = [i for i in range(len(items)) if not self.is_known(i, models)]
            self.routes = ask_routes(self.reader, items, prompts, config, which=left)

    def is_known(self, position: int, models: Iterable[str]) -> bool:
        """Whether each of these models has answered a question."""
        return all(position in self.outputs[name] for name in models)

    def run(self, models: Mapping[str, VLM], which: Sequence[int], batch_size: BatchSize) -> dict[str, list[int]]:
        """Answers the questions; returns the positions of near ties, which stay open where a batch has several questions."""
        mesh, items, config = self.reader.mesh, self.items, self.config
        groups = batch_rows(mesh)
        remedy = "lower eval.batch_size or eval.max_new_tokens"
        for model in models.values():
            check_answers(model, groups * (1 if batch_size == "auto" else batch_size), PROMPT_BUCKET + self.limit, remedy)
        each = evaluation_sizes(models.values(), batch_size, self.limit, questions=len(which))
        undecided: dict[str, list[int]] = {name: [] for name in models}
        together = Together(models) if len(models) > 1 and not self.text_only else None
        encode = lambda i, sizes: encode_item(self.processor, items[i], self.prompts[i], sizes, config.max_length)
        known, threads = {i for i in which if self.is_known(i, models)}, config.num_threads
        size = lambda bucket: groups * each(bucket)
        asked = batches(self.processor, items, which, encode, size=size, mesh=mesh, threads=threads, known=known)
        for batch in asked:
            local = self._local(batch, local_rows(mesh, len(batch.members)))
            placed = place_rows(local, mesh, len(batch.members))
            left = [name for name in models if not all(i in self.outputs[name] for i in batch.members)]
            made: Iterator[tuple[str, Generated]]
            if together is None or placed.images is None:
                made = ((name, models[name].generate_in_full(placed, self.limit)) for name in left)
            else:
                made = together.answers(left, placed, self.limit)
            for name, found in made:
                undecided[name] += self._keep(name, models[name], batch.members, found, several=len(batch.members) > groups)
        return undecided

    def _local(self, batch: QuestionBatch, rows: Sequence[int]) -> Batch:
        """The rows of a batch that this process holds."""
        members = batch.members
        local = self.reader.pad_questions([batch.encoded[members[row]] for row in rows], batch.pixels)
        if self.text_only:
            local = local.without_images()
        if self.routes is not None:
            route = [self.routes.get(members[row], 0) for row in rows]  # what is known is not routed again, nor kept
            local = replace(local, route=np.array(route, np.int32))
        return local

    def _keep(self, name: str, model: VLM, members: Sequence[int], made: Generated, *, several: bool) -> list[int]:
        """Keeps the answers of a batch, of `several` questions on a device or not; returns the positions of near ties."""
        items, outputs = self.items, self.outputs[name]
        check_finite(made.margin, [f"question {items[i].id}" for i in members], model.method)
        near_tie = self.near_tie if several else 0.0
        near = {i for i, margin in zip(members, made.margin, strict=True) if margin < near_tie} - outputs.keys()
        other = near | outputs.keys()
        new = {i: _answer(self.processor, made, row, items[i]) for row, i in enumerate(members) if i not in other}
        outputs.update(new)
        if self.on_batch and new:
            self.on_batch(name, new)
        return sorted(near)


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
