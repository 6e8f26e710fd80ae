"""How many questions a device answers at a time (`eval.batch_size = "auto"`), and in how many parts a sweep runs coefficients.

Their memory is estimated from the shapes of the model. On accelerators the compiled programs confirm it: where they need more,
fewer are taken. The sizes depend on the model, its methods, the devices, and the lengths and number of all questions alone, so
that a run that goes on computes the batches of the first.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lsg_jax.answer_programs import answer_batch, read_batch
from lsg_jax.config import BatchSize, MeshConfig, ModelConfig
from lsg_jax.eval.batches import Bucket
from lsg_jax.memory import GIB, agreed_memory, peak_bytes, shard_bytes
from lsg_jax.methods.method import BASE, Method
from lsg_jax.model.attention import attention_path
from lsg_jax.sharding import abstract_batch, batch_rows, make_mesh
from lsg_jax.types import Batch
from lsg_jax.vlm import VLM

logger = logging.getLogger(__name__)

USED = 0.95  # of a device's memory; the rest is left to what is not counted
COPIED, TILE = 0.7, 8  # of the cache: what decoding copies to another layout at first, whose rows come in tiles of eight
DECODED = 2.4  # times the cache: what decoding holds of it and of the cache that it was given, measured for 8 questions
MOST, MOST_ON_CPU = 256, 16  # questions: larger batches gain nothing, and their images fill the host


@dataclass(frozen=True)
class Size:
    """Questions at a time on each device along `data` and `fsdp`; parts in which a sweep runs its coefficients, one by one."""

    questions: int
    parts: int = 1

    def at_once(self, coefficients: int) -> int:
        """Coefficients that run at once; the last part may repeat one."""
        return -(-coefficients // self.parts)


@dataclass(frozen=True)
class Room:
    """The memory of each device of a mesh that answers, in bytes, and an estimate of what questions take of it.

    Attributes:
        tensor: devices that hold the model together.
        value: bytes of a key, and of a value of the residual stream.
        weights: on one device.
        memory: that programs may use on one device.
        most: questions at a time.
        passes: over each prompt; 2 for methods that contrast logits.
        plain: whether attention over prompts holds its weights, instead of running through a kernel.
        shared: whether several methods go on from one pass (`eval.together`).
    """

    model: ModelConfig
    tensor: int
    value: int
    weights: float
    memory: float
    most: int = MOST
    plain: bool = False
    passes: int = 1
    shared: bool = False

    @classmethod
    def of(cls, model: ModelConfig, params: dict, mesh: Mesh | None, memory: float, **more: Any) -> Room:
        """The room beside parameters, which may be abstract, on their mesh."""
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        return cls(
            model,
            tensor=1 if mesh is None else mesh.shape["tensor"],
            value=np.dtype(params["language_model"]["embed_tokens"].dtype).itemsize,
            weights=shard_bytes(params),
            memory=memory,
            plain=attention_path(model.text, mesh) != "kernel",
            most=MOST_ON_CPU if platform == "cpu" else MOST,
            **more,
        )

    def question(self, bucket: Bucket, new_tokens: int) -> float:
        """Bytes of one question of an evaluation: the larger of its two programs."""
        kept = self.passes * self._cache(bucket.length + new_tokens)
        beside = kept + 5 * self._stream(bucket.length) if self.shared else 0.0
        return beside + max(kept + self._running(bucket), DECODED * kept + self._layer(bucket.length))

    def alone(self) -> Room:
        """The room of one of several methods."""
        return dataclasses.replace(self, shared=False)

    def shared_pass(self, bucket: Bucket) -> float:
        """Bytes of what the cells of one question of a sweep share."""
        layers = self.model.text.num_layers
        return layers * self._stream(bucket.length) / self.tensor + self._cache(bucket.length)

    def cells(self, bucket: Bucket, new_tokens: int, rows: int) -> float:
        """Bytes of so many rows of a sweep, each a question under one coefficient tuple."""
        kept, copied = self._cache(bucket.length + new_tokens), -(-rows // TILE) * TILE
        return rows * kept + max(COPIED * copied * kept + rows * self._layer(bucket.length), rows * self._running(bucket))

    def evaluation(self, bucket: Bucket, new_tokens: int) -> Size:
        """Questions of an evaluation at a time, in whole tiles where there are several."""
        questions = self._fitting(self._free / self.question(bucket, new_tokens))
        return Size(questions if questions in (self.most, questions % TILE) else questions - questions % TILE)

    def sweep(self, bucket: Bucket, new_tokens: int, coefficients: int, *, questions: int | None = None) -> Size:
        """Questions of a sweep at a time, each under all coefficients, and parts where that is too much for one.

        Args:
            questions: None for as many as fit.
        """
        shared, kept = self.shared_pass(bucket), self._cache(bucket.length + new_tokens)
        cells_fit = lambda n, at_once: n * shared + self.cells(bucket, new_tokens, n * at_once) <= self._free
        if questions is None:
            reading = self._fitting(self._free / (shared + self._running(bucket) + 2 * kept))
            questions = max((n for n in range(1, reading + 1) if cells_fit(n, coefficients)), default=1)
        at_once = max((n for n in range(1, coefficients + 1) if cells_fit(questions, n)), default=1)
        return Size(questions, -(-coefficients // at_once))

    @property
    def _free(self) -> float:
        return USED * self.memory - self.weights

    def _fitting(self, questions: float) -> int:
        return max(1, min(self.most, math.floor(questions)))

    def _share(self, size: int) -> float:
        """What a device holds of a dimension that is sharded along `tensor`."""
        return size / self.tensor if size % self.tensor == 0 else size

    def _cache(self, tokens: int) -> float:
        text = self.model.text
        return 2.0 * self.value * text.num_layers * self._share(text.num_kv_heads) * text.head_dim * tokens

    def _stream(self, length: int) -> float:
        return float(self.value * length * self.model.text.hidden_size)

    def _layer(self, length: int) -> float:
        """Values of one decoder layer: of the stream, the MLP and the attention."""
        text = self.model.text
        heads = self._share(text.num_heads) * text.head_dim
        return self._stream(length) + 3 * self.value * length * (self._share(text.intermediate_size) + heads)

    def _running(self, bucket: Bucket) -> float:
        """Values that live at once in a pass over a prompt.

        The larger of those in the tower, whose images lie on all devices, and in the decoder. Their number was fitted to
        programs that were compiled for TPUs (docs/scaling.md).
        """
        text, vision, length = self.model.text, self.model.vision, bucket.length
        scores = 2 * self._share(text.num_heads) * length**2 if self.plain else 0  # float32, twice, of a quarter of the queries
        wide = 7 * self.value * length * self._share(text.intermediate_size)
        patches = max(bucket.patches, vision.num_patches)
        image = patches * self.value * (6 * vision.hidden_size + 2 * vision.intermediate_size)
        image += 0 if vision.native else 8 * vision.num_heads * patches**2
        features = self.value * patches * vision.hidden_size * len(self.model.feature_layers)
        decoder = self._layer(length) + 9 * self._stream(length) + wide + scores
        return max(decoder, bucket.tiles * (image / self.tensor + features))


def evaluation_sizes(
    models: Iterable[VLM], batch_size: BatchSize, new_tokens: int, *, questions: int, decodes: bool = True
) -> Callable[[Bucket], int]:
    """Questions at a time on each device by bucket; every process must call it, and what it returns.

    Args:
        models: that answer each batch; several share one pass.
        new_tokens: of each answer.
        questions: that there are; no more are taken.
        decodes: whether answers are generated; where their likelihoods are computed, the estimate alone decides.
    """
    if batch_size != "auto":
        return lambda _: batch_size
    models = list(models)
    vlm, memory = max(models, key=lambda model: model.method.contrasts), agreed_memory()
    passes = 2 if vlm.method.contrasts else 1
    room = Room.of(vlm.config, vlm.params, vlm.mesh, memory, passes=passes, shared=len(models) > 1)
    room = dataclasses.replace(room, most=min(room.most, max(1, -(-questions // batch_rows(vlm.mesh)))))

    def needed(bucket: Bucket, size: Size) -> float:
        batch = abstract_questions(vlm.config, vlm.mesh, size.questions * batch_rows(vlm.mesh), bucket, method=vlm.method)
        beside = size.questions * (room.question(bucket, new_tokens) - room.alone().question(bucket, new_tokens))
        return beside + _answering_bytes(vlm, batch, new_tokens)

    @functools.cache
    def size_of(bucket: Bucket) -> int:
        size = room.evaluation(bucket, new_tokens)
        if decodes and is_accelerator(vlm.mesh):
            size = confirmed(size, functools.partial(needed, bucket), room)
        logger.info("eval.batch_size auto: %d questions of %d tokens at a time on a device", size.questions, bucket.length)
        return size.questions

    return size_of


def is_accelerator(mesh: Mesh | None) -> bool:
    """Whether the devices have a memory of their own, which a compiled program must fit."""
    return (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).platform != "cpu"


def confirmed(
    size: Size, needed: Callable[[Size], float], room: Room, *, coefficients: int = 1, keep_questions: bool = False
) -> Size:
    """The size, or the first smaller one for which the compiled programs fit, or the smallest.

    Args:
        needed: bytes that they need on each device; infinite for a program that the compiler refuses.
        coefficients: of a sweep. keep_questions: only its parts may become more.
    """
    limit = USED * room.memory
    while (bytes_needed := needed(size)) > limit:
        share = 0.8 if math.isinf(bytes_needed) else (limit - room.weights) / (bytes_needed - room.weights)
        fewer = smaller(size, share, coefficients=coefficients, keep_questions=keep_questions)
        if fewer is None:
            break
        logger.info("%s needs %.1f of %.1f GiB a device, next %s", size, bytes_needed / GIB, limit / GIB, fewer)
        size = fewer
    return size


def smaller(size: Size, share: float, *, coefficients: int = 1, keep_questions: bool = False) -> Size | None:
    """The next size to try: about this share of the questions, or of a single one's coefficients; None if none is left."""
    take = lambda count: max(1, min(count - 1, math.floor(share * count)))
    if size.questions > 1 and not keep_questions:
        return dataclasses.replace(size, questions=take(size.questions))
    if (at_once := size.at_once(coefficients)) > 1:
        return dataclasses.replace(size, parts=math.ceil(coefficients / take(at_once)))
    return None


def abstract_questions(model: ModelConfig, mesh: Mesh | None, rows: int, bucket: Bucket, *, method: Method = BASE) -> Batch:
    """Questions with an image each, as they are placed on the mesh.

    Args:
        rows: over all devices.
        method: whose questions they are: it may read their words, or the replies to others (`Batch.words`, `Batch.route`).
    """
    mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else mesh
    patches = bucket.patches or None
    batch = abstract_batch(model, mesh, rows, bucket.length, tiles=bucket.tiles, patches=patches)
    of = lambda like, dtype: jax.ShapeDtypeStruct(like.shape, dtype, sharding=like.sharding)
    return dataclasses.replace(
        batch,
        words=of(batch.input_ids, jnp.int8) if method.reads_words else None,
        route=of(batch.gate_position, jnp.int32) if method.first_questions("") else None,
    )


def abstract_results(function: Any, arguments: tuple[Any, ...], static: tuple[Any, ...], compiled: Any) -> Any:
    """Shapes and shardings of what a compiled program gives."""
    shapes = jax.eval_shape(lambda *given: function(*given, *static), *arguments)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, shapes, compiled.output_shardings)


def compiled_bytes(function: Any, *arguments: Any) -> tuple[float, Any]:
    """What a jitted function needs on each device, and the compiled program; infinite and None where it is refused."""
    try:
        compiled = function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf, None
    return peak_bytes(compiled), compiled


def _answering_bytes(vlm: VLM, batch: Batch, new_tokens: int) -> float:
    """What reading and answering a batch need on each device, the larger of both."""
    static = vlm.graphdef, new_tokens
    reading, compiled = compiled_bytes(read_batch, vlm.params, batch, *static)
    if compiled is None:
        return math.inf
    read, cache = abstract_results(read_batch, (vlm.params, batch), static, compiled)
    answering, _ = compiled_bytes(answer_batch, vlm.params, batch.without_images(), read, cache, *static)
    return max(reading, answering)
