"""Compiled halves of an answer: passes over a batch of prompts, and decoding from what they leave."""

from __future__ import annotations

import functools
from typing import Any

import jax

from lsg_jax.methods.method_model import assemble
from lsg_jax.model.generate import (
    Generated,
    Prefix,
    ReadPrompts,
    answer_prompts,
    read_from,
    read_prompts,
    read_with_prefix,
)
from lsg_jax.progress import tracing
from lsg_jax.types import Batch, KVCache


@functools.partial(jax.jit, static_argnums=(2, 3))
def read_batch(params: dict, batch: Batch, graphdef: Any, max_new_tokens: int) -> tuple[ReadPrompts, KVCache]:
    """`model.generate.read_prompts`, jitted."""
    tracing("the prompt pass", batch.input_ids)
    return read_prompts(assemble(graphdef, params), batch, max_new_tokens=max_new_tokens)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def read_first(
    params: dict, batch: Batch, graphdef: Any, max_new_tokens: int, starts: tuple[int, ...]
) -> tuple[ReadPrompts, KVCache, Prefix]:
    """`model.generate.read_with_prefix`, jitted."""
    tracing("the prompt pass shared by methods", batch.input_ids)
    return read_with_prefix(assemble(graphdef, params), batch, max_new_tokens=max_new_tokens, starts=starts)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def read_rest(
    params: dict, batch: Batch, prefix: Prefix, graphdef: Any, max_new_tokens: int, start: int | None
) -> tuple[ReadPrompts, KVCache]:
    """`model.generate.read_from`, jitted."""
    tracing("the rest of a prompt pass", batch.input_ids)
    return read_from(assemble(graphdef, params), batch, prefix, max_new_tokens=max_new_tokens, start=start)


@functools.partial(jax.jit, static_argnums=(4, 5))
def answer_batch(
    params: dict, batch: Batch, read: ReadPrompts, cache: KVCache, graphdef: Any, max_new_tokens: int
) -> Generated:
    """`model.generate.answer_prompts`, jitted."""
    tracing(f"decoding {max_new_tokens} tokens", batch.input_ids)
    return answer_prompts(assemble(graphdef, params), batch, read, cache, max_new_tokens=max_new_tokens)
