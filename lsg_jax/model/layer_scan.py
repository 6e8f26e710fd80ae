"""A scan over layers that is differentiated from one of them on: one forward body for all layers, and one for the way back.

lax.scan keeps something of every layer that it differentiates. To scan the layers below apart saves that, but compiles the
forward body twice, and bodies are what a training step takes long to compile for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from lsg_jax.model.layers import layer_at


def differentiated_from(
    first: int,
    plain: Callable[[Any, Any], tuple[Any, Any]],
    step: Callable[[Any, Any, jax.Array], tuple[Any, Any]],
    walked: Any,
    carry: Any,
) -> tuple[Any, Any]:
    """`plain(walked, carry)`, with a gradient for the floats of `walked`, and none for anything else.

    Args:
        first: the lowest layer that depends on what is differentiated.
        plain: runs the layers where no gradient is asked for: (walked, carry) -> (carry, other floats from `first` on).
        step: runs one layer as `plain` does, and those below `first` too: (its part of `walked`, carry, index int32 []) ->
            (carry, other floats). jax.checkpoint says what it keeps.
        walked: pytree with a leading axis of all layers.
    """
    count, bottom = len(jax.tree.leaves(walked)[0]), jnp.int32(0)
    layer = _TracedLayer(step, carry, bottom, layer_at(walked, bottom))
    traced, shape = jax.make_jaxpr(plain, return_shape=True)(walked, carry)

    # whatever comes from outside is an argument: a rule that closes over it could not be differentiated around a jit
    @jax.custom_vjp
    def run(floats: Any, fixed: Any, carry: Any, constants: tuple[list, list]) -> tuple[Any, Any]:
        leaves = jax.tree.leaves((_filled(floats, fixed), carry))
        return jax.tree.unflatten(jax.tree.structure(shape), _evaluate(traced, constants[0], leaves))

    def forward(floats: Any, fixed: Any, carry: Any, constants: tuple[list, list]) -> tuple[tuple[Any, Any], _Kept]:
        layers = _filled(floats, fixed)
        from_outside = constants[1]

        def one(carry_and_kept: tuple[Any, list], xs: tuple[jax.Array, Any]) -> tuple[tuple[Any, list], Any]:
            carry, kept = carry_and_kept
            (carry, out), new = layer(from_outside, carry, *xs)
            slot = jnp.maximum(xs[0] - first, 0)  # layers below write where the first one will
            return (carry, [jax.lax.dynamic_update_index_in_dim(k, n, slot, 0) for k, n in zip(kept, new, strict=True)]), out

        (carry, kept), out = jax.lax.scan(one, (carry, layer.room(count - first)), (jnp.arange(count), layers))
        return (carry, jax.tree.map(lambda leaf: leaf[first:], out)), layer.kept(kept, from_outside)

    def backward(kept: _Kept, gradient: tuple[Any, Any]) -> tuple[Any, None, None, None]:
        def one(of_carry: Any, xs: tuple[jax.Array, Any]) -> tuple[Any, Any]:
            slot, of_out = xs
            of_walked, of_carry = kept.backward_of(slot)((of_carry, of_out))
            return of_carry, of_walked

        of_carry, of_out = gradient
        _, of_walked = jax.lax.scan(one, of_carry, (jnp.arange(kept.layers), of_out), reverse=True)
        with_those_below = lambda leaf: jnp.pad(leaf, [(first, 0)] + [(0, 0)] * (leaf.ndim - 1))
        return jax.tree.map(with_those_below, of_walked), None, None, None

    run.defvjp(forward, backward)
    return run(_floats(walked), walked, carry, (traced.consts, layer.constants))


@flax.struct.dataclass
class _Kept:
    """What the way back needs of the layers, as the leaves of the functions that jax.vjp gave.

    Attributes:
        own: what each layer leaves, stacked over `layers` layers.
        shared: what is the same for all of them, such as the weights.
        is_own: of each leaf, in their order.
        tree: of the function of one layer.
    """

    own: list[jax.Array]
    shared: list[jax.Array]
    is_own: tuple[bool, ...] = flax.struct.field(pytree_node=False)
    tree: Any = flax.struct.field(pytree_node=False)

    @property
    def layers(self) -> int:
        return len(self.own[0])

    def backward_of(self, slot: jax.Array) -> Callable[[Any], Any]:
        own, shared = iter(layer_at(self.own, slot)), iter(self.shared)
        return jax.tree.unflatten(self.tree, [next(own if is_own else shared) for is_own in self.is_own])


class _TracedLayer:
    """One layer and what it leaves for the way back, traced once to tell which of that has to be kept for each layer."""

    def __init__(self, step: Callable[..., tuple[Any, Any]], carry: Any, index: jax.Array, part: Any):
        def layer(carry: Any, index: jax.Array, part: Any) -> tuple[tuple[Any, Any], Any]:
            return jax.vjp(lambda floats, carry: step(_filled(floats, part), carry, index), _floats(part), carry)

        traced, (result, back) = jax.make_jaxpr(layer, return_shape=True)(carry, index, part)
        self.traced, self.constants = traced, traced.consts
        self.result, self.back = jax.tree.structure(result), jax.tree.structure(back)
        self.results = len(jax.tree.leaves(result))
        places = {id(constant): i for i, constant in enumerate(traced.jaxpr.constvars)}
        leaves = traced.jaxpr.outvars[self.results :]
        self.shared = [places.get(id(leaf)) for leaf in leaves]
        self.own = [leaf.aval for leaf in leaves if id(leaf) not in places]

    def room(self, layers: int) -> list[jax.Array]:
        return [jnp.zeros((layers, *aval.shape), aval.dtype) for aval in self.own]

    def __call__(self, constants: list, carry: Any, index: jax.Array, part: Any) -> tuple[Any, list[jax.Array]]:
        """The layer's results, and what of it belongs into `room`; `constants` are those of the trace, from outside."""
        out = _evaluate(self.traced, constants, jax.tree.leaves((carry, index, part)))
        own = [leaf for leaf, place in zip(out[self.results :], self.shared, strict=True) if place is None]
        return jax.tree.unflatten(self.result, out[: self.results]), own

    def kept(self, own: list[jax.Array], constants: list) -> _Kept:
        shared = [constants[place] for place in self.shared if place is not None]
        return _Kept(own=own, shared=shared, is_own=tuple(place is None for place in self.shared), tree=self.back)


def _evaluate(traced: ClosedJaxpr, constants: list, leaves: list) -> list:
    return jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, constants))(*leaves)


def _floats(tree: Any) -> Any:
    """The leaves that can be differentiated; None for the others."""
    return jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else None, tree)


def _filled(floats: Any, tree: Any) -> Any:
    """`tree` with the leaves of `floats` in the place of its own."""
    return jax.tree.map(lambda new, old: old if new is None else new, floats, tree, is_leaf=lambda leaf: leaf is None)
