"""Trains the vision tower of the embedded model from random weights, on fully labelled scenes.

There are two objectives. Each patch predicts the attributes of the shape whose centre lies in it. And in every image a fixed
number of empty patches become V-sinks: they predict the attributes of the whole scene and raise one feature dimension. Large
towers grow such registers by themselves to store global information in uninformative patches; small ones do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lsg_jax.checkpoint import RunFolder
from lsg_jax.config import MeshConfig, ModelConfig
from lsg_jax.data.images import to_patches
from lsg_jax.data.shapes import CORNERS, LETTERS
from lsg_jax.model.layers import Linear
from lsg_jax.model.vision_tower import VisionTower
from lsg_jax.sharding import make_mesh, place_rows, replicated
from lsg_jax.types import VisualInput
from recipes.embedded_model.labelled_scenes import LabelledScenes
from recipes.embedded_model.labels import PATCH, SCENE

CORNER_CLASSES = len(LETTERS) + 1

OnStep = Callable[[int, int, dict[str, float]], None]
Params = dict[str, Any]
State = tuple[Params, optax.OptState]


@dataclass(frozen=True)
class SinkLesson:
    """The objective for V-sinks.

    Attributes:
        dimension: the feature that V-sinks raise.
        count: V-sinks in an image.
        high: lower bound of that feature in V-sinks. low: upper bound of its absolute value elsewhere.
    """

    dimension: int = 40
    count: int = 2
    high: float = 60.0
    low: float = 6.0


@dataclass(frozen=True)
class TowerRecipe:
    """How the tower is trained: AdamW with warm-up and cosine decay."""

    scenes: int = 40_000
    steps: int = 4000
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: int = 200
    save_every: int = 500
    seed: int = 0
    sinks: SinkLesson = SinkLesson()


class TowerWithHeads(nnx.Module):
    """The tower, and linear heads that are discarded after training."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.tower = VisionTower(config.vision, rngs=rngs, dtype=jnp.float32)
        make = functools.partial(Linear, (config.vision.hidden_size,), bias=True, rngs=rngs, dtype=jnp.float32)
        self.present = make((1,))
        self.place = make((2,))
        self.patch = nnx.Dict({name: make((classes,)) for name, classes in PATCH.items()})
        self.corner = make((CORNER_CLASSES,))
        self.scene = nnx.Dict({name: make(shape) for name, shape in SCENE.items()})

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3] -> features [B, P, D] of the last layer."""
        image = self.config.image
        pixels = (images.astype(jnp.float32) / 255 - jnp.array(image.mean)) / jnp.array(image.std)
        cut: Any = functools.partial(to_patches, patch_size=self.config.vision.patch_size)
        patches = jax.vmap(cut)(pixels)
        (*_, features), _ = self.tower(VisualInput(patches), self.config.feature_layers)
        return features[:, 1:]


def train_tower(
    config: ModelConfig, scenes: LabelledScenes, run: RunFolder, recipe: TowerRecipe, *, on_step: OnStep | None = None
) -> dict[str, Any]:
    """Trains a tower, or resumes `run`, and returns its parameters.

    Args:
        on_step: called every 50 steps with (step, number of steps, metrics of the training batch as in `losses`).
    """
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1))
    graphdef, initial = nnx.split(_initial(config, recipe.seed))
    params = nnx.to_pure_dict(initial)
    rate = optax.warmup_cosine_decay_schedule(
        recipe.learning_rate / 20, recipe.learning_rate, recipe.warmup, recipe.steps, recipe.learning_rate / 50
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=recipe.weight_decay))
    state = jax.device_put((params, optimizer.init(params)), replicated(mesh))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=replicated(mesh))
    def step(state: State, images: jax.Array, labels: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        def loss(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            parts = losses(nnx.merge(graphdef, params), images, labels, recipe.sinks)
            return total(parts), parts

        params, slots = state
        gradients, parts = jax.grad(loss, has_aux=True)(params)
        updates, slots = optimizer.update(gradients, slots, params)
        return (optax.apply_updates(params, updates), slots), parts

    with run.lock():
        restored = run.latest(state)
        state, first = (restored.state, restored.step) if restored else (state, 0)
        for number in range(first + 1, recipe.steps + 1):
            batch = place_rows(scenes.batch(number - 1, recipe.batch_size, recipe.seed), mesh, recipe.batch_size)
            state, parts = step(state, *batch)
            if on_step and number % 50 == 0:
                on_step(number, recipe.steps, {name: float(value) for name, value in parts.items()})
            if number % recipe.save_every == 0 or number == recipe.steps:
                run.save(number, state)
    return jax.device_get(state[0]["tower"])


def _initial(config: ModelConfig, seed: int) -> TowerWithHeads:
    """Random weights, and two-dimensional sinusoidal position embeddings, which a small model would learn slowly."""
    model = TowerWithHeads(config, rngs=nnx.Rngs(seed))
    grid = config.vision.image_size // config.vision.patch_size
    angles = np.arange(grid)[:, None] / 50 ** (np.arange(quarter := config.vision.hidden_size // 4) / quarter)
    wave = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows, columns = np.repeat(wave, grid, axis=0), np.tile(wave, (grid, 1))
    positions = np.concatenate([np.zeros((1, 4 * quarter)), np.concatenate([rows, columns], axis=1)])
    model.tower.position_embedding[...] = jnp.asarray(positions, jnp.float32)
    return model


def losses(model: TowerWithHeads, images: jax.Array, labels: dict[str, jax.Array], lesson: SinkLesson) -> dict[str, jax.Array]:
    """The terms of the loss, each a float32 scalar, and accuracies `right_*`.

    Args:
        images: uint8 [B, H, W, 3]. labels: as `labels.labels` gives them.
    """
    features = model(images)
    raised = features[..., lesson.dimension]
    content = features * (jnp.arange(features.shape[-1]) != lesson.dimension)
    out: dict[str, jax.Array] = {}

    centre = labels["shape"] >= 0
    out["present"] = jnp.mean(optax.sigmoid_binary_cross_entropy(model.present(content)[..., 0], centre.astype(jnp.float32)))
    out["place"] = _mean(jnp.abs(model.place(content) - labels["place"]).sum(-1), centre)
    for name, head in model.patch.items():
        out[name], out[f"right_{name}"] = _classified(head(content), labels[name], centre)
    grid = round(features.shape[1] ** 0.5)
    corners = [(grid - 1) * grid * name.startswith("bottom") + (grid - 1) * name.endswith("right") for name in CORNERS]
    logits = model.corner(jnp.stack([content[:, patch] for patch in corners], axis=1))
    out["corner"], out["right_corner"] = _classified(logits, labels["corner"], jnp.ones(logits.shape[:2], bool))

    # of the empty patches those with the largest values; while no patch is raised, those with the most room around them
    empty = jnp.where(labels["room"] > 0, raised + lesson.low * labels["room"], -jnp.inf)
    chosen = jax.lax.top_k(empty, lesson.count)[1]
    picked = jax.nn.one_hot(chosen, raised.shape[1])  # [B, count, P]
    is_sink = picked.sum(1) > 0
    out["high"] = _mean(jnp.square(jnp.maximum(1 - raised / lesson.high, 0)), is_sink)
    out["low"] = _mean(jnp.square(jnp.maximum(jnp.abs(raised) / lesson.low - 1, 0)), ~is_sink)
    flagged = raised >= (lesson.high + lesson.low) / 2
    out["right_sinks"] = jnp.mean((flagged == is_sink).all(-1))
    sinks = picked @ content  # [B, count, D]
    for name, head in model.scene.items():
        logits = head(sinks)
        logits = logits if logits.ndim == 4 else logits[:, :, None]
        wanted = jnp.broadcast_to(labels[name][:, None], logits.shape[:3])
        out[name], out[f"right_{name}"] = _classified(logits, wanted, jnp.ones(wanted.shape, bool))
    return out


def total(parts: dict[str, jax.Array]) -> jax.Array:
    """The loss: the sum of all terms, without the accuracies."""
    return sum((value for name, value in parts.items() if not name.startswith("right_")), jnp.zeros(()))


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.sum(values * where) / jnp.maximum(jnp.sum(where), 1)


def _classified(logits: jax.Array, labels: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and accuracy, averaged over the entries where `where` is true."""
    labels = jnp.maximum(labels, 0).astype(jnp.int32)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return _mean(entropy, where), _mean(jnp.argmax(logits, -1) == labels, where)
