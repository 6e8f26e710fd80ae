"""Compiled programs of the server: the pass over a batch of prompts with the first token of each answer, and more steps."""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lsg_jax.methods.method_model import MethodModel, assemble
from lsg_jax.model.generate import heads_apart, is_sound, next_position, read_prompts
from lsg_jax.progress import tracing
from lsg_jax.types import Array, Batch, KVCache, Sequence, VisualTokens

NUCLEUS_ERROR = 1e-4
"""Error of a sum of probabilities within which a token may lie on either side of `top_p`."""


@flax.struct.dataclass
class Choosing:
    """How the tokens of each row are chosen.

    Attributes:
        temperature: float32 [B], 0 for the token of the largest logit.
        top_p: float32 [B], in [0, 1]: only the most probable tokens, which together have this probability, are drawn.
        key: uint32 [B, 2], random key of the row. A draw depends on the key and on the number of the token alone.
        limit: int32 [B], tokens of the answer; 0 for a row that only fills the batch.
    """

    temperature: Array
    top_p: Array
    key: Array
    limit: Array


@flax.struct.dataclass
class Running:
    """A batch whose answers are being decoded.

    Attributes:
        batch: its prompts, without images.
        visual: the visual tokens of the prompts; None for text only.
        cache: keys and values of the prompts and of the tokens so far.
        first: int32 [B], rotary position of the first token of each answer.
        token: int32 [B], the newest.
        done: bool [B], answers that have ended.
        step: int32 [], tokens of each answer so far.
    """

    batch: Batch
    visual: VisualTokens | None
    cache: KVCache
    first: jax.Array
    token: jax.Array
    done: jax.Array
    step: jax.Array


@flax.struct.dataclass
class Made:
    """New tokens of a batch.

    Attributes:
        tokens: int32 [B, n].
        margin: float32 [B, n], how close each choice was, in logits, to another token; NaN where logits are not finite.
        count: int32 [], columns that were computed: the steps end when every answer has.
    """

    tokens: jax.Array
    margin: jax.Array
    count: jax.Array


@functools.partial(jax.jit, static_argnums=(3, 4))
def begin(params: dict, batch: Batch, choosing: Choosing, graphdef: Any, room: int) -> tuple[Running, Made]:
    """Reads the prompts, with `room` for the tokens of the longest answer, and chooses the first token of each answer."""
    tracing("the prompt pass of a served batch", batch.input_ids)
    model = assemble(graphdef, params)
    read, cache = read_prompts(model, batch, max_new_tokens=room)
    first = next_position(cache)
    token, margin = _choose(model, read.hidden, choosing, jnp.int32(0))
    done = _ended(model, token, choosing, jnp.int32(1))
    running = Running(batch.without_images(), read.visual, cache, first, token, done, jnp.int32(1))
    return running, Made(token[:, None], margin[:, None], jnp.int32(1))


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=1)
def go_on(
    params: dict, running: Running, choosing: Choosing, stopped: Array, graphdef: Any, steps: int
) -> tuple[Running, Made]:
    """Up to `steps` more tokens of each answer.

    Args:
        stopped: bool [B], answers that need no more tokens.
    """
    tracing(f"{steps} steps of a served batch", running.cache.valid)
    model, size = assemble(graphdef, params), running.token.shape[0]
    prompt = running.batch.input_ids.shape[1]
    valid = running.cache.valid[:, :prompt]
    intervention = model.intervention(running.batch, Sequence(x=None, valid=valid, visual=running.visual))
    start = running.step

    def unfinished(carry: tuple[Any, ...]) -> Any:
        step, done = carry[0], carry[2]
        return (step < start + steps) & ~done.all()

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, done, tokens, margins, cache = carry
        slot = prompt + step - 1
        now = None if intervention is None else intervention.while_decoding(cache, slot)
        hidden, cache = model.language_model.decode(token, running.first + step - 1, slot, cache, now)
        token, margin = _choose(model, hidden, choosing, step)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step - start, axis=1)
        margins = jax.lax.dynamic_update_slice_in_dim(margins, margin[:, None], step - start, axis=1)
        return step + 1, token, done | _ended(model, token, choosing, step + 1), tokens, margins, cache

    nothing = jnp.zeros((size, steps), jnp.int32), jnp.zeros((size, steps), jnp.float32)
    cache = heads_apart(running.cache, model.mesh)
    carry = (start, running.token, running.done | stopped, *nothing, cache)
    step, token, done, tokens, margins, cache = jax.lax.while_loop(unfinished, body, carry)
    left = running.replace(cache=cache, token=token, done=done, step=step)  # type: ignore[attr-defined]
    return left, Made(tokens, margins, step - start)


def _ended(model: MethodModel, token: jax.Array, choosing: Choosing, count: jax.Array) -> jax.Array:
    """bool [B], whether the answers end with this token, the last of `count`."""
    return (token[:, None] == jnp.array(model.config.eos_token_ids)).any(-1) | (count >= choosing.limit)


def _choose(model: MethodModel, hidden: jax.Array, choosing: Choosing, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 [B] number `step` of the answers, from states [B, D] of the last layer, and their margins float32 [B].

    A token is drawn as the largest of logits + temperature x Gumbel noise: at temperature 0 it is that of the largest logit,
    and a margin is in logits at any temperature.
    """
    logits = model.language_model.logits(hidden)
    greedy = lambda: (jnp.argmax(logits, -1).astype(jnp.int32), _margin(logits))
    token, margin = jax.lax.cond((choosing.temperature > 0).any(), lambda: _draw(logits, choosing, step), greedy)
    sound = is_sound(hidden) & jnp.isfinite(logits.max(-1))
    return token, jnp.where(sound, margin, jnp.nan)


def _draw(logits: jax.Array, choosing: Choosing, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`_choose` of logits float32 [B, V]."""
    temperature = choosing.temperature[:, None]

    def noise(key: jax.Array) -> jax.Array:
        drawn = jax.random.wrap_key_data(key, impl="threefry2x32")  # of which a row's draw does not depend on the others
        return jax.random.gumbel(jax.random.fold_in(drawn, step), logits.shape[-1:])

    # the noise of rows at temperature 0 is finite, and so is its product with 0
    scores = logits + temperature * jax.vmap(noise)(choosing.key)

    def nucleus() -> tuple[jax.Array, jax.Array]:
        found = [jnp.where(kept, scores, -jnp.inf) for kept in _nuclei(logits, choosing)]
        token, below, above = (jnp.argmax(each, -1).astype(jnp.int32) for each in found)
        return token, jnp.where((below == token) & (above == token), _margin(found[0]), 0.0)

    whole = lambda: (jnp.argmax(scores, -1).astype(jnp.int32), _margin(scores))
    return jax.lax.cond(((choosing.top_p < 1) & (choosing.temperature > 0)).any(), nucleus, whole)


def _nuclei(logits: jax.Array, choosing: Choosing) -> list[jax.Array]:
    """bool [B, V] each, the tokens that `top_p` keeps, and those that slightly smaller and larger values keep.

    They are the most probable tokens up to the one with which they reach `top_p`, and all that are as probable as that.
    """
    hot = choosing.temperature > 0
    below = logits - logits.max(-1, keepdims=True)  # so that at the smallest temperatures the largest stays finite
    probability = jax.nn.softmax(below / jnp.where(hot, choosing.temperature, 1.0)[:, None], axis=-1)
    ordered = jnp.sort(probability, axis=-1, descending=True)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    kept = []
    for error in (0.0, -NUCLEUS_ERROR, NUCLEUS_ERROR):
        least = jnp.where(before < (choosing.top_p + error)[:, None], ordered, jnp.inf).min(-1)
        least = jnp.minimum(least, ordered[:, 0])  # the first stays, however small `top_p` is
        everything = (choosing.top_p >= 1) | ~hot
        kept.append((probability >= least[:, None]) | everything[:, None])
    return kept


def _margin(scores: jax.Array) -> jax.Array:
    """float32 [B], by how much the largest of scores [B, V] exceeds the next."""
    best, second = jnp.moveaxis(jax.lax.top_k(scores, 2)[0], -1, 0)
    return best - second
