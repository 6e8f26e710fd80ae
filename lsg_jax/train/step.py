"""One optimiser step, pure: (state, frozen parameters, batch) -> (state, metrics)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lsg_jax.config import TrainConfig
from lsg_jax.model.llava import assemble
from lsg_jax.model.loss import answer_loss
from lsg_jax.train.optimizer import gate_updates, make_optimizer
from lsg_jax.types import Batch, TrainState


def init_state(gates: Any, frozen: Any, *, config: TrainConfig, total_steps: int) -> TrainState:
    """The state before the first step. `frozen` may be abstract: only its tree matters."""
    params = {**frozen, "gates": gates}
    opt_state = make_optimizer(config, total_steps, params).init(params)
    return TrainState(gates=gates, opt_state=opt_state, step=jnp.int32(0), skipped=jnp.int32(0))


def train_step(
    state: TrainState, frozen: Any, batch: Batch, *, graphdef: Any, config: TrainConfig, total_steps: int
) -> tuple[TrainState, dict[str, Any]]:
    """Updates the gates; a step with a non-finite loss or gradient changes nothing but the counters.

    Args:
        frozen: the backbone's parameters, a nested dict; not differentiated, not changed.
        graphdef: graph definition of the whole model (model.llava.abstract_model).
        total_steps: length of the learning-rate schedule.

    Returns:
        The new state, and metrics: loss (nats a token), tokens, correct, grad_norm (before clipping), finite, `gate_norm` and
        `gate_grad_norm` float32 [gated layers] of the gates that the step started from, and `ratios` float32 [gated layers, G]
        as means over rows with an image.
    """
    optimizer = make_optimizer(config, total_steps, {**frozen, "gates": state.gates})

    def loss_of(gates: Any) -> tuple[jax.Array, dict[str, Any]]:
        return answer_loss(assemble(graphdef, frozen, gates), batch, remat=config.remat)

    (loss, aux), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.gates)
    grad_norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = gate_updates(optimizer, gradients, state.opt_state, state.gates, frozen)
    gates = optax.apply_updates(state.gates, updates)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    state = TrainState(
        gates=keep(gates, state.gates),
        opt_state=keep(opt_state, state.opt_state),
        step=state.step + 1,
        skipped=jnp.where(finite, 0, state.skipped + 1),
    )
    return state, {
        "loss": loss,
        **aux,
        "grad_norm": grad_norm,
        "finite": finite,
        "gate_norm": _layer_norms(state.gates),
        "gate_grad_norm": _layer_norms(gradients),
    }


@functools.cache
def compiled_step(graphdef: Any, config: TrainConfig, total_steps: int, sharding: Any) -> Any:
    """`train_step`, jitted: (state, frozen, batch) -> (state, metrics), the state donated.

    One function for equal settings, so that a run resumed in the same process does not compile again.

    Args:
        sharding: of the new state and the metrics.
    """
    step = functools.partial(train_step, graphdef=graphdef, config=config, total_steps=total_steps)
    return jax.jit(step, donate_argnums=0, out_shardings=sharding)


def _layer_norms(gates: Any) -> jax.Array:
    """Euclidean norm of each layer's gate: leaves [n, ...] -> float32 [n]."""
    squares = [jnp.sum(jnp.square(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(gates)]
    return jnp.sqrt(sum(squares))  # type: ignore[arg-type]
