"""Compiled programs of a sweep: the ungated prompt pass of a batch, then one layer at a time under all coefficients at once.

Key scales in layer l change nothing below l. So the layers below l are run once for all cells, and a cell (layer l,
coefficients c) runs only the layers from l on; its KV cache below l is that of the ungated pass.

Memory for one question of LLaVA-1.5-7B (704 tokens, bfloat16): 0.55 GB shared by all its cells (0.18 residual stream, 0.37 keys
and values), and 0.37 GB for each coefficient tuple that is run at once, 4.6 GB with eleven; activations come on top.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lsg_jax.config import GateConfig, Grouping
from lsg_jax.gating.gate import KeyScaling
from lsg_jax.methods.method_model import MethodModel, assemble
from lsg_jax.model.generate import cache_of, decode_greedily, last_token, with_room
from lsg_jax.progress import tracing
from lsg_jax.types import Array, Batch, KVCache, Sequence, VisualTokens

NO_LAYER = -1
"""Stands for a layer where no key is scaled: the base model."""


@flax.struct.dataclass
class PromptPass:
    """Result of the ungated prompt pass of a batch, shared by its cells.

    Attributes:
        batch: the questions, without pixels.
        visual: their visual tokens.
        boundaries: [L, B, T, D], the residual stream entering each layer.
        cache: keys and values of all layers, S = T.
        sequence: what else the decoder ran on: positions, blocks, what is added after layers.
    """

    batch: Batch
    visual: VisualTokens
    boundaries: Array
    cache: KVCache
    sequence: Sequence

    @classmethod
    def of(cls, batch: Batch, sequence: Sequence, boundaries: jax.Array, cache: KVCache) -> PromptPass:
        """The pass over `sequence`, which was made of the batch."""
        assert sequence.visual is not None
        rest = sequence.replace(x=None, visual=None)  # type: ignore[attr-defined]
        return cls(batch.without_images(), sequence.visual, boundaries, cache, rest)


@functools.partial(jax.jit, static_argnums=(2, 3))
def run_prompts(params: dict, batch: Batch, graphdef: Any, max_new_tokens: int) -> tuple[PromptPass, jax.Array, jax.Array]:
    """The ungated prompt pass over a batch with images, and the base model's answers.

    Args:
        graphdef: of the model without gates or method.

    Returns:
        The pass; tokens int32 [B, max_new_tokens]; smallest margin of each answer float32 [B], as `generate` returns it.
    """
    tracing("the prompt pass and decoding of the base model", batch.input_ids)
    model = assemble(graphdef, params)
    sequence = model.sequence(batch)
    rows = last_token(sequence.valid)[:, None]
    out = model(batch, sequence=sequence, rows=rows, keep_kv=True, observe=lambda view: view.hidden)
    cache = cache_of(sequence, out)
    room = with_room(cache, max_new_tokens)
    tokens, _, margin = decode_greedily(model, out.hidden[:, 0], room, max_new_tokens=max_new_tokens)
    return PromptPass.of(batch, sequence, out.observed, cache), tokens, margin


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def answer_cells(
    params: dict,
    shared: PromptPass,
    layer: jax.Array,
    coefficients: jax.Array,
    graphdef: Any,
    grouping: Grouping,
    max_new_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """Answers under all coefficients in one layer; one compiled program serves all layers.

    Args:
        layer: int32 [].
        coefficients: float32 [C, G].

    Returns:
        tokens int32 [B, C, max_new_tokens]; smallest margin of each answer float32 [B, C].
    """
    tracing("the cells of a layer", shared.batch.input_ids)
    model = assemble(graphdef, params)
    hidden, cache = resume_cells(model, shared, layer, coefficients, grouping, room=max_new_tokens)
    tokens, _, margin = decode_greedily(model, hidden, cache, max_new_tokens=max_new_tokens)
    shape = (-1, len(coefficients))
    return tokens.reshape(*shape, max_new_tokens), margin.reshape(shape)


def resume_cells(
    model: MethodModel, shared: PromptPass, layer: jax.Array, coefficients: jax.Array, grouping: Grouping, *, room: int
) -> tuple[jax.Array, KVCache]:
    """The prompt passes of one layer's cells, from that layer on; row b C + c is question b under coefficients c.

    Args:
        room: empty slots appended to the cache.

    Returns:
        hidden [B C, D] at the last token of each prompt, before the final norm; cache of B C rows.
    """
    # the cells of a question are adjacent rows, so that they stay on its device
    repeat = functools.partial(jnp.repeat, repeats=len(coefficients))
    by_row, by_layer = functools.partial(repeat, axis=0), functools.partial(repeat, axis=1)
    added = shared.sequence.added
    alone = shared.sequence.replace(added=None)  # type: ignore[attr-defined]
    batch, visual, sequence = jax.tree.map(by_row, (shared.batch, shared.visual, alone))
    count = batch.input_ids.shape[0]
    scaling = scale_layer(
        model,
        batch,
        visual,
        jnp.broadcast_to(layer, count),
        jnp.tile(coefficients, (count // len(coefficients), 1)),
        grouping,
    )
    kept = with_room(shared.cache, room)  # before the cells, which are many times its size
    offset = None if kept.offset is None else by_row(kept.offset)
    cache = KVCache(by_layer(kept.key), by_layer(kept.value), by_row(kept.valid), offset=offset)
    entering = jax.lax.dynamic_index_in_dim(shared.boundaries, layer, keepdims=False)
    rows = last_token(sequence.valid)[:, None]
    added = None if added is None else by_layer(added)
    resumed = sequence.replace(x=by_row(entering), visual=visual, added=added)
    hidden, cache = model.language_model.resume(resumed, cache, scaling, layer, rows=rows)
    return hidden[:, 0], cache


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def answer_alone(
    params: dict,
    batch: Batch,
    layer: jax.Array,
    coefficients: jax.Array,
    graphdef: Any,
    grouping: Grouping,
    max_new_tokens: int,
) -> jax.Array:
    """Answers of one cell in each row, from a full prompt pass, as a separate run with fixed coefficients computes them.

    Args:
        layer: int32 [B], NO_LAYER for the base model.
        coefficients: float32 [B, G].

    Returns:
        tokens int32 [B, max_new_tokens].
    """
    tracing("answers of separate cells", batch.input_ids)
    model = assemble(graphdef, params)
    sequence = model.sequence(batch)
    assert sequence.visual is not None
    scaling = scale_layer(model, batch, sequence.visual, layer, coefficients, grouping)
    rows = last_token(sequence.valid)[:, None]
    out = model.language_model(sequence, scaling, rows=rows, keep_kv=True)
    cache = with_room(cache_of(sequence, out), max_new_tokens)
    return decode_greedily(model, out.hidden[:, 0], cache, max_new_tokens=max_new_tokens)[0]


def scale_layer(
    model: MethodModel, batch: Batch, visual: VisualTokens, layer: jax.Array, coefficients: jax.Array, grouping: Grouping
) -> KeyScaling:
    """Key scales that differ from 1 in a single layer of each row.

    Args:
        layer: int32 [B].
        coefficients: float32 [B, G].
    """
    layers = jnp.arange(model.config.text.num_layers)
    by_layer = jnp.where((layers[:, None] == layer)[..., None], coefficients, 1.0)
    everywhere = jnp.ones(layers.shape, bool)  # multiplying by 1 is exact
    gate = GateConfig(layers=(0,), grouping=grouping)
    return KeyScaling.for_batch(batch, visual, gate, model.config.sinks, source=by_layer, enabled=everywhere)
