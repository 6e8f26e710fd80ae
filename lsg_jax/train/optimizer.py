"""The optimiser, with warm-up, cosine decay and clipping, on what is trained only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lsg_jax.config import TrainConfig
from lsg_jax.methods.method_model import TRAINED, join_trained


def learning_rate(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_fraction` of the steps, then cosine decay to `final_lr_fraction` of the peak."""
    warmup = min(round(config.warmup_fraction * total_steps), total_steps - 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),  # the first step moves already
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(total_steps, 1),
        end_value=config.final_lr_fraction * config.learning_rate,
    )


def freeze_mask(frozen: Any, trained: Any) -> Any:
    """True for every leaf that is not trained; the tree of all parameters."""
    return join_trained(jax.tree.map(lambda _: True, frozen), jax.tree.map(lambda _: False, trained))


def make_optimizer(config: TrainConfig, total_steps: int, frozen: Any, trained: Any) -> optax.GradientTransformation:
    """The optimiser over the full parameter tree; frozen leaves have no slot and an update of zero.

    Args:
        frozen, trained: all parameters, as `join_trained` takes them, abstract or real; only the trees' structure is used.
    """
    rate = learning_rate(config, total_steps)
    if config.optimizer == "adamw":
        rule = optax.adamw(rate, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay)
    else:
        rule = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(rate, momentum=config.beta1))
    inner = optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)
    return optax.selective_transform(inner, freeze_mask=freeze_mask(frozen, trained))


def trained_updates(
    optimizer: optax.GradientTransformation, gradients: Any, opt_state: Any, frozen: Any, trained: Any
) -> tuple[Any, Any]:
    """Applies the full-tree optimiser where only gradients of what is trained exist.

    Scalars of zero stand for the frozen leaves, which the optimiser does not read, so no array of a frozen shape is made.

    Returns:
        updates of what is trained, new optimiser state.
    """
    nothing = jax.tree.map(lambda _: jnp.zeros(()), frozen)
    updates, opt_state = optimizer.update(join_trained(nothing, gradients), opt_state, join_trained(nothing, trained))
    return (updates[TRAINED] if TRAINED in updates else {part: updates[part] for part in trained}), opt_state
