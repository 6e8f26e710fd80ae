"""Greedy generation: one prefill, then a compiled loop over a cache of static shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lsg_jax.model.llava import Llava
from lsg_jax.types import Array, Batch, KVCache


def generate(model: Llava, batch: Batch, *, max_new_tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Greedy continuation of each row; padding may be on either side.

    The gates are read once, at prefill; the scaled keys stay in the cache, so decoding costs what it costs without gates.

    Returns:
        tokens int32 [B, N = max_new_tokens], pad_token_id after the end-of-sequence token;
        the number of columns that were generated, int32 []: the loop stops when every row has ended;
        the smallest lead of a chosen token over the next best, float32 [B], in logits: where it is as small as rounding errors,
        a computation of another shape might have chosen otherwise.
    """
    config = model.config
    model.language_model.check_length(batch.input_ids.shape[1] + max_new_tokens)
    merged = model.merge(batch)
    valid = merged.valid
    out = model(batch, merged=merged, keep_kv=True, rows=last_token(valid)[:, None])
    room = [(0, 0)] * 3 + [(0, max_new_tokens), (0, 0)]
    cache = KVCache(jnp.pad(out.key, room), jnp.pad(out.value, room), jnp.pad(valid, room[2:4]))
    prompt_length = valid.sum(1).astype(jnp.int32)
    slots = valid.shape[1]
    eos = jnp.array(config.eos_token_ids)

    def pick(hidden: jax.Array, done: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.language_model.logits(hidden)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        others = jnp.where(jnp.arange(logits.shape[-1]) == token[:, None], -jnp.inf, logits)
        lead = logits.max(-1) - others.max(-1)
        return jnp.where(done, config.pad_token_id, token), jnp.where(done, jnp.inf, lead)

    def ended(token: jax.Array) -> jax.Array:
        return (token[:, None] == eos).any(-1)

    token, lead = pick(out.hidden[:, 0], jnp.zeros(valid.shape[0], bool))
    tokens = jnp.full((valid.shape[0], max_new_tokens), config.pad_token_id, jnp.int32).at[:, 0].set(token)

    def cond(carry: tuple) -> jax.Array:
        step, _, done, *_ = carry
        return (step < max_new_tokens) & ~done.all()

    def body(carry: tuple) -> tuple:
        step, token, done, tokens, lead, cache = carry
        hidden, cache = model.language_model.decode(token, prompt_length + step - 1, slots + step - 1, cache)
        token, new_lead = pick(hidden, done)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
        return step + 1, token, done | ended(token), tokens, jnp.minimum(lead, new_lead), cache

    step, _, _, tokens, lead, _ = jax.lax.while_loop(cond, body, (jnp.int32(1), token, ended(token), tokens, lead, cache))
    return tokens, step, lead


def last_token(valid: Array) -> jax.Array:
    """Index of the last unpadded token of each row: bool [B, T] -> int32 [B]."""
    length = valid.shape[1]
    return (length - 1 - jnp.argmax(valid[:, ::-1], axis=1)).astype(jnp.int32)
