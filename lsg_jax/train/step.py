"""One optimiser step, pure: (state, frozen parameters, batch) -> (state, metrics)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lsg_jax.config import TrainConfig
from lsg_jax.methods.method_model import assemble, join_trained
from lsg_jax.model.loss import answer_loss, has_image
from lsg_jax.progress import tracing
from lsg_jax.sharding import compiler_options, replicated, state_shardings
from lsg_jax.train.independent import losses_and_gradients
from lsg_jax.train.optimizer import make_optimizer, trained_updates
from lsg_jax.train.seeds import OVER_SEEDS
from lsg_jax.types import IGNORE, Batch, TrainState


def init_state(trained: Any, frozen: Any, *, config: TrainConfig, total_steps: int, independent: bool = False) -> TrainState:
    """The state before the first step. `frozen` may be abstract: only its tree matters.

    Args:
        independent: n gates [n, ...] are trained, each as if alone: every leaf of the optimiser state, and `skipped`, has a
            leading axis of n.
    """

    def init(trained: Any) -> tuple[Any, jax.Array]:
        return make_optimizer(config, total_steps, frozen, trained).init(join_trained(frozen, trained)), jnp.int32(0)

    opt_state, skipped = (jax.vmap(init) if independent else init)(trained)
    return TrainState(trained=trained, opt_state=opt_state, step=jnp.int32(0), skipped=skipped)


def train_step(
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    graphdef: Any,
    config: TrainConfig,
    total_steps: int,
    independent: bool = False,
) -> tuple[TrainState, dict[str, Any]]:
    """Updates what is trained; a step with a non-finite loss or gradient changes nothing but the counters.

    Args:
        frozen: the backbone's parameters, a nested dict; not differentiated, not changed.
        graphdef: graph definition of the whole model (methods.method_model.abstract_model).
        total_steps: length of the learning-rate schedule.
        independent: each of n gates has its own loss, gradient norm, optimiser and guard, as if it were trained alone.

    Returns:
        The new state, and metrics: loss (nats a token), tokens, correct, visual_tokens, v_sinks, grad_norm (before clipping),
        finite, padding (share of the positions) and, of gates,
        `gate_norm` and `gate_grad_norm` float32 [gated layers] of the gates that the step started from, and `ratios` float32
        [gated layers, G] as means over rows with an image. Of independent gates, loss, correct, grad_norm and finite are [n].
    """
    tracing("the training step", batch.input_ids)
    differentiate = losses_and_gradients if independent else functools.partial(_loss_and_gradients, remat=config.remat)
    loss, metrics, gradients = in_parts(differentiate, graphdef, frozen, state.trained, batch, parts=config.accumulate)
    update = functools.partial(_update, frozen=frozen, config=config, total_steps=total_steps)
    before = (state.trained, state.opt_state, state.skipped)
    (trained, opt_state, skipped), measured = (jax.vmap(update) if independent else update)(before, gradients, loss)
    measured["padding"] = 1 - batch.attention_mask.sum() / batch.attention_mask.size
    if "ratios" in metrics:
        measured |= {"gate_norm": _layer_norms(state.trained), "gate_grad_norm": _layer_norms(gradients)}
    return TrainState(trained=trained, opt_state=opt_state, step=state.step + 1, skipped=skipped), {
        "loss": loss,
        **metrics,
        **measured,
    }


def _loss_and_gradients(
    graphdef: Any, frozen: Any, trained: Any, batch: Batch, *, remat: str
) -> tuple[jax.Array, dict[str, Any], Any]:
    """Loss and metrics of `answer_loss`, and the gradient of what is trained."""

    def loss_of(trained: Any) -> tuple[jax.Array, dict[str, Any]]:
        return answer_loss(assemble(graphdef, frozen, trained), batch, remat=remat)

    (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
    return loss, metrics, gradients


def in_parts(
    differentiate: Any, graphdef: Any, frozen: Any, trained: Any, batch: Batch, *, parts: int
) -> tuple[jax.Array, dict[str, Any], Any]:
    """`differentiate` over parts of the batch, one after the other: gradient accumulation.

    Each part is weighted by its answer tokens, so the result equals that of the whole batch.
    """
    if parts == 1:
        return differentiate(graphdef, frozen, trained, batch)
    # part i has the rows i, parts + i, ...: some of each device's
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1), batch)
    tokens = (batch.answer_target != IGNORE).sum()
    images = has_image(batch).sum()

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        loss, metrics, gradients = differentiate(graphdef, frozen, trained, part)
        share = metrics["tokens"] / jnp.maximum(tokens, 1)
        shown = has_image(part).sum() / jnp.maximum(images, 1)
        metrics |= {"ratios": metrics["ratios"] * shown} if "ratios" in metrics else {}
        weighted = share * loss, metrics, jax.tree.map(lambda leaf: share * leaf, gradients)
        return jax.tree.map(jnp.add, total, weighted), None

    shapes = jax.eval_shape(differentiate, graphdef, frozen, trained, jax.tree.map(lambda leaf: leaf[0], rows))
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, nothing, rows)[0]


def _update(
    before: tuple[Any, Any, jax.Array], gradients: Any, loss: jax.Array, *, frozen: Any, config: TrainConfig, total_steps: int
) -> tuple[tuple[Any, Any, jax.Array], dict[str, jax.Array]]:
    """(trained, optimiser state, skipped) after the step, and `grad_norm` and `finite`."""
    trained, opt_state, skipped = before
    grad_norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    optimizer = make_optimizer(config, total_steps, frozen, trained)
    updates, new_opt_state = trained_updates(optimizer, gradients, opt_state, frozen, trained)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    after = (
        keep(optax.apply_updates(trained, updates), trained),
        keep(new_opt_state, opt_state),
        jnp.where(finite, 0, skipped + 1),
    )
    return after, {"grad_norm": grad_norm, "finite": finite}


@functools.cache
def compiled_step(graphdef: Any, config: TrainConfig, total_steps: int, mesh: Mesh, *, independent: bool = False) -> Any:
    """`train_step`, jitted: (state, frozen, batch) -> (state, metrics), the state donated, the metrics on every device.

    One function for equal settings, so that a run resumed in the same process does not compile again. With several seeds
    (`config.seeds`) state and metrics have an axis of them in front; what no seed changes is computed once.
    """
    options: dict[str, Any] = {"config": config, "total_steps": total_steps, "independent": independent}
    take: Any = functools.partial(train_step, graphdef=graphdef, **options)
    if config.seeds > 1:
        take = jax.vmap(take, in_axes=(OVER_SEEDS, None, None), out_axes=(OVER_SEEDS, 0))

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        state, metrics = take(state, frozen, batch)
        return jax.lax.with_sharding_constraint((state, metrics), (state_shardings(state, mesh), replicated(mesh)))

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(mesh))


def _layer_norms(trained: Any) -> jax.Array:
    """Euclidean norm of each layer's gate: leaves [n, ...] -> float32 [n]."""
    squares = [jnp.sum(jnp.square(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(trained)]
    return jnp.sqrt(sum(squares))  # type: ignore[arg-type]
