"""Greedy generation: one prefill, then a compiled loop over a cache of static shape."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsg_jax.model.attention import take_rows
from lsg_jax.model.contrast import contrasted_positions
from lsg_jax.model.language_model import DecoderOutput
from lsg_jax.model.multimodal import ImageFeatures, VisionLanguageModel
from lsg_jax.model.rotary import position_offset
from lsg_jax.sharding import ROWS, constrain
from lsg_jax.types import Array, Batch, Intervention, KVCache, Sequence, VisualTokens


class Generated(NamedTuple):
    """Greedy answers.

    Attributes:
        tokens: int32 [B, N = max_new_tokens], pad_token_id after the end-of-sequence token.
        steps: int32 [], the number of columns that were generated: the loop stops when every row has ended.
        margin: float32 [B], the smallest margin between the logits of a chosen token and the next best. Where it is as small as
            rounding errors, a computation of another shape might choose another token. NaN where logits were not finite.
            Of contrasted logits, Contrasted.margin.
        ratios: float32 [L - first gated layer, B, G], or None without key gating.
    """

    tokens: Array
    steps: Array
    margin: Array
    ratios: Array


@flax.struct.dataclass
class Contrast:
    """The pass over the prompts as `VisionLanguageModel.contrast` has them; attributes as `decode_greedily` takes them.

    Attributes:
        rows: bool [B], rows whose logits are contrasted.
    """

    hidden: Array
    cache: KVCache
    rows: Array


@flax.struct.dataclass
class ReadPrompts:
    """Results of the pass over a batch of prompts, from which their answers are decoded.

    Attributes:
        hidden: [B, D], output of the last layer at the last token of each prompt, before the final norm.
        visual: the visual tokens of the prompts; None for a batch without images.
        ratios: float32 [L - first gated layer, B, G], or None without key gating.
        contrast: None for a model that contrasts no logits.
    """

    hidden: Array
    visual: VisualTokens | None
    ratios: Array
    contrast: Contrast | None = None


@flax.struct.dataclass
class Prefix:
    """What the unchanged model computed of a batch of prompts with images, for models that change it in higher layers only.

    Attributes:
        encoded: of the images.
        sequence: what the decoder ran on.
        states: [B, T, D] each, what enters the layers `starts`.
        key, value: [max(starts), B, K, S, H], of the layers below the last of them.
        starts: ascending, the first of them 0. Static.
    """

    encoded: ImageFeatures
    sequence: Sequence
    states: tuple[jax.Array, ...]
    key: jax.Array
    value: jax.Array
    starts: tuple[int, ...] = flax.struct.field(pytree_node=False)


def generate(model: VisionLanguageModel, batch: Batch, *, max_new_tokens: int) -> Generated:
    """Greedy continuation of each row; padding may be on either side.

    Gates run once, in prefill. The scaled keys stay in the cache, so decoding has no extra cost. Edits of the attention and
    low-rank updates apply to every token.
    """
    read, cache = read_prompts(model, batch, max_new_tokens=max_new_tokens)
    return answer_prompts(model, batch, read, cache, max_new_tokens=max_new_tokens)


def read_prompts(model: VisionLanguageModel, batch: Batch, *, max_new_tokens: int) -> tuple[ReadPrompts, KVCache]:
    """The first half of `generate`: the pass over the prompts, and a cache with room for their answers."""
    sequence = model.sequence(batch)
    rows = last_token(sequence.valid)[:, None]
    out = model(batch, sequence=sequence, keep_kv=True, room=max_new_tokens, rows=rows)
    return _read(model, batch, sequence, out, max_new_tokens)


def read_with_prefix(
    model: VisionLanguageModel, batch: Batch, *, max_new_tokens: int, starts: tuple[int, ...]
) -> tuple[ReadPrompts, KVCache, Prefix]:
    """`read_prompts` of the unchanged model, which also keeps what other models go on from (`read_from`).

    Args:
        batch: with images.
        starts: `Prefix.starts`.
    """
    assert batch.images is not None
    encoded, room = model.encode_images(batch.images), max_new_tokens
    sequence = model.sequence(batch, encoded)
    kv, states = model.language_model.empty_kv(sequence.x, room), [sequence.x]
    for begin, end in itertools.pairwise(starts):
        entering = sequence.replace(x=states[-1])  # type: ignore[attr-defined]
        below = model.language_model(entering, start=begin, stop=end, keep_kv=True, room=room, kv=kv)
        assert below.key is not None and below.value is not None
        kv = below.key, below.value
        states.append(below.hidden)
    entering = sequence.replace(x=states[-1])  # type: ignore[attr-defined]
    rows = last_token(sequence.valid)[:, None]
    key, value = (of[: starts[-1]] for of in kv)
    out = model.language_model(entering, rows=rows, start=starts[-1], keep_kv=True, room=room, kv=kv)
    return *_read(model, batch, sequence, out, room), Prefix(encoded, sequence, tuple(states), key, value, starts)


def read_from(
    model: VisionLanguageModel, batch: Batch, prefix: Prefix, *, max_new_tokens: int, start: int | None
) -> tuple[ReadPrompts, KVCache]:
    """`read_prompts` of a model that changes nothing below layer `start`, from there on.

    Args:
        prefix: of the unchanged model, from the same batch.
        start: one of `prefix.starts`; None for a model that makes other tokens of the same features.
    """
    sequence, room = prefix.sequence, max_new_tokens
    rows = last_token(sequence.valid)[:, None]
    if start is None:
        sequence = model.sequence(batch, prefix.encoded)
        return _read(model, batch, sequence, model(batch, sequence=sequence, keep_kv=True, room=room, rows=rows), room)
    key, value = model.language_model.empty_kv(sequence.x, room)
    kv = key.at[:start].set(prefix.key[:start]), value.at[:start].set(prefix.value[:start])
    entering = sequence.replace(x=prefix.states[prefix.starts.index(start)])  # type: ignore[attr-defined]
    change = model.intervention(batch, sequence)
    out = model.language_model(entering, change, rows=rows, start=start, keep_kv=True, room=room, kv=kv)
    return _read(model, batch, sequence, out, room)


def _read(
    model: VisionLanguageModel, batch: Batch, sequence: Sequence, out: DecoderOutput, room: int
) -> tuple[ReadPrompts, KVCache]:
    """What is kept of a pass over prompts, with the pass that its logits are contrasted with."""
    rows = last_token(sequence.valid)[:, None]
    contrast = None
    if (other := model.contrast(batch, sequence)) is not None:
        where, places = (take_rows(of, rows) for of in contrasted_positions(sequence, other, rows[:, 0]))
        beside = model.language_model(other, keep_kv=True, room=room, rows=places)
        contrast = Contrast(beside.hidden[:, 0], cache_of(other, beside, room=room), where[:, 0])
    return ReadPrompts(out.hidden[:, 0], sequence.visual, out.ratios, contrast), cache_of(sequence, out, room=room)


def answer_prompts(
    model: VisionLanguageModel, batch: Batch, read: ReadPrompts, cache: KVCache, *, max_new_tokens: int
) -> Generated:
    """The second half of `generate`. Compiled apart, each half needs less memory than both in one program.

    Args:
        batch: that of the prompts; its images are not used.
    """
    valid = cache.valid[:, : batch.input_ids.shape[1]]
    intervention = model.intervention(batch, Sequence(x=None, valid=valid, visual=read.visual))
    tokens, steps, margin = decode_greedily(
        model, read.hidden, cache, max_new_tokens=max_new_tokens, intervention=intervention, contrast=read.contrast
    )
    return Generated(tokens, steps, margin, read.ratios)


def cache_of(sequence: Sequence, out: DecoderOutput, *, room: int = 0) -> KVCache:
    """The cache after a pass over whole sequences, whose keys and values were kept with that room."""
    offset = position_offset(sequence.positions, sequence.valid)
    return KVCache(out.key, out.value, _pad_slots(sequence.valid, room), _pad_slots(out.kept, room), offset)


def with_room(cache: KVCache, slots: int) -> KVCache:
    """The cache with `slots` empty ones appended."""
    room = [(0, 0)] * 3 + [(0, slots), (0, 0)]
    valid, kept = _pad_slots(cache.valid, slots), _pad_slots(cache.kept, slots)
    return KVCache(jnp.pad(cache.key, room), jnp.pad(cache.value, room), valid, kept, cache.offset)


def _pad_slots(found: jax.Array | None, slots: int) -> jax.Array | None:
    """[..., S] with `slots` more columns of zeros, or of False."""
    return None if found is None else jnp.pad(found, [(0, 0)] * (found.ndim - 1) + [(0, slots)])


def decode_greedily(
    model: VisionLanguageModel,
    hidden: jax.Array,
    cache: KVCache,
    *,
    max_new_tokens: int,
    intervention: Intervention | None = None,
    contrast: Contrast | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Greedy continuation of prompts that were already run.

    Args:
        hidden: [B, D], output of the last layer at the last token of each prompt.
        cache: of the prompts, its last `max_new_tokens` slots empty.
        intervention: what was done to the prompts.
        contrast: what their logits are contrasted with, its cache of the same size.

    Returns:
        tokens, steps and margin, as in Generated.
    """
    config = model.config
    states = [hidden] if contrast is None else [hidden, contrast.hidden]
    caches = [heads_apart(each, model.mesh) for each in ([cache] if contrast is None else [cache, contrast.cache])]
    next_positions = [next_position(each) for each in caches]
    batch, slots = cache.valid.shape[0], cache.valid.shape[1] - max_new_tokens
    eos = jnp.array(config.eos_token_ids)

    def pick(states: list[jax.Array], done: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.language_model.logits(states[0])
        if contrast is not None:
            both = model.contrasted(logits, model.language_model.logits(states[1])).where(contrast.rows, logits)
            logits = both.logits
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        others = jnp.where(jnp.arange(logits.shape[-1]) == token[:, None], -jnp.inf, logits)
        margin = logits.max(-1) - others.max(-1) if contrast is None else both.margin(token)
        sound = functools.reduce(jnp.logical_and, map(is_sound, states), jnp.isfinite(logits.max(-1)))
        margin = jnp.where(sound, margin, jnp.nan)
        return jnp.where(done, config.pad_token_id, token), jnp.where(done, jnp.inf, margin)

    ended = lambda token: (token[:, None] == eos).any(-1)
    token, margin = pick(states, jnp.zeros(batch, bool))
    tokens = jnp.full((batch, max_new_tokens), config.pad_token_id, jnp.int32).at[:, 0].set(token)

    def cond(carry: tuple[Any, ...]) -> Any:
        return (carry[0] < max_new_tokens) & ~carry[2].all()  # steps, and rows that are done

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, done, tokens, margin, caches = carry
        slot = slots + step - 1
        now = None if intervention is None else intervention.while_decoding(caches[0], slot)
        ran = [
            model.language_model.decode(token, first + step - 1, slot, each, change)
            for first, each, change in zip(next_positions, caches, (now, None), strict=False)
        ]
        token, new_margin = pick([hidden for hidden, _ in ran], done)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
        return step + 1, token, done | ended(token), tokens, jnp.minimum(margin, new_margin), [each for _, each in ran]

    step, _, _, tokens, margin, _ = jax.lax.while_loop(cond, body, (jnp.int32(1), token, ended(token), tokens, margin, caches))
    return tokens, step, margin


def heads_apart(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """The cache with its heads sharded along `tensor`, as steps of decoding read it."""
    apart = lambda x: constrain(x, mesh, None, ROWS, "tensor")
    return cache.replace(key=apart(cache.key), value=apart(cache.value))  # type: ignore[attr-defined, no-any-return]


def next_position(cache: KVCache) -> jax.Array:
    """Rotary position of the token after those in the cache: int32 [B]."""
    position: jax.Array = cache.valid.sum(1).astype(jnp.int32) + (0 if cache.offset is None else cache.offset)
    return position


def is_sound(hidden: jax.Array) -> jax.Array:
    """bool [...], whether states [..., D] have a finite norm. Beyond float32 a norm layer would make zeros of them, unseen."""
    return jnp.isfinite(jnp.square(hidden.astype(jnp.float32)).sum(-1))


def last_token(valid: Array) -> jax.Array:
    """Index of the last unpadded token of each row: bool [B, T] -> int32 [B]."""
    length = valid.shape[1]
    last: jax.Array = (length - 1 - jnp.argmax(valid[:, ::-1], axis=1)).astype(jnp.int32)
    return last
