"""Trains the vision tower of the embedded model from nothing, on scenes of which everything is known.

Two things are taught. Each patch tells what has its centre in it. And a few patches that nothing touches, the same number in
every image, are told to hold what the whole scene is like and to raise one dimension: V-sinks, which towers that are trained
long enough on enough images grow by themselves to keep global information in patches of little use, and small ones do not.
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
from lsg_jax.data.shapes import CORNERS, LETTERS
from lsg_jax.embedded.labels import PATCH, SCENE
from lsg_jax.embedded.lessons import Lessons
from lsg_jax.model.layers import Linear
from lsg_jax.model.vision_tower import VisionTower
from lsg_jax.sharding import make_mesh, place_rows, replicated

CORNER_CLASSES = len(LETTERS) + 1

OnStep = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class SinkLesson:
    """What a V-sink shall be.

    Attributes:
        dimension: the feature that it raises.
        count: V-sinks in an image.
        high: what they must reach there, `low`: what all others must stay below.
    """

    dimension: int = 40
    count: int = 2
    high: float = 60.0
    low: float = 6.0


@dataclass(frozen=True)
class TowerRecipe:
    """How the tower is trained: AdamW, with warm-up and cosine decay."""

    scenes: int = 40_000
    steps: int = 4000
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: int = 200
    save_every: int = 500
    seed: int = 0
    sinks: SinkLesson = SinkLesson()


class Student(nnx.Module):
    """The tower, and linear heads that are thrown away afterwards."""

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
        (*_, features), _ = self.tower(pixels, self.config.feature_layers)
        return features[:, 1:]


def train_tower(
    config: ModelConfig, lessons: Lessons, run: RunFolder, recipe: TowerRecipe, *, on_step: OnStep | None = None
) -> dict[str, Any]:
    """Trains a tower, or goes on where `run` stopped, and returns its parameters.

    Args:
        on_step: called with (step, all steps, what `losses` gives for the training batch) every 50 steps.
    """
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1))
    graphdef, student = nnx.split(_fresh(config, recipe.seed))
    params = nnx.to_pure_dict(student)
    rate = optax.warmup_cosine_decay_schedule(
        recipe.learning_rate / 20, recipe.learning_rate, recipe.warmup, recipe.steps, recipe.learning_rate / 50
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=recipe.weight_decay))
    state = jax.device_put((params, optimizer.init(params)), replicated(mesh))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=replicated(mesh))
    def step(state: Any, images: jax.Array, labels: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        def loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
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
            batch = place_rows(lessons.batch(number - 1, recipe.batch_size, recipe.seed), mesh, recipe.batch_size)
            state, parts = step(state, *batch)
            if on_step and number % 50 == 0:
                on_step(number, recipe.steps, {name: float(value) for name, value in parts.items()})
            if number % recipe.save_every == 0 or number == recipe.steps:
                run.save(number, state, meta={})
    return jax.device_get(state[0]["tower"])


def _fresh(config: ModelConfig, seed: int) -> Student:
    """Random, but for the positions: waves along both axes, which a small model would take long to find."""
    student = Student(config, rngs=nnx.Rngs(seed))
    grid = config.vision.image_size // config.vision.patch_size
    angles = np.arange(grid)[:, None] / 50 ** (np.arange(quarter := config.vision.hidden_size // 4) / quarter)
    wave = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows, columns = np.repeat(wave, grid, axis=0), np.tile(wave, (grid, 1))
    positions = np.concatenate([np.zeros((1, 4 * quarter)), np.concatenate([rows, columns], axis=1)])
    student.tower.position_embedding[...] = jnp.asarray(positions, jnp.float32)
    return student


def losses(student: Student, images: jax.Array, labels: dict[str, jax.Array], lesson: SinkLesson) -> dict[str, jax.Array]:
    """What the student does wrong, part by part, and `right_*`: shares of what it tells rightly.

    Args:
        labels: of embedded.labels.
    """
    features = student(images)
    raised = features[..., lesson.dimension]
    told = features * (jnp.arange(features.shape[-1]) != lesson.dimension)
    out: dict[str, jax.Array] = {}

    centre = labels["shape"] >= 0
    out["present"] = jnp.mean(optax.sigmoid_binary_cross_entropy(student.present(told)[..., 0], centre.astype(jnp.float32)))
    out["place"] = _mean(jnp.abs(student.place(told) - labels["place"]).sum(-1), centre)
    for name, head in student.patch.items():
        out[name], out[f"right_{name}"] = _classified(head(told), labels[name], centre)
    grid = round(features.shape[1] ** 0.5)
    corners = [(grid - 1) * grid * name.startswith("bottom") + (grid - 1) * name.endswith("right") for name in CORNERS]
    logits = student.corner(jnp.stack([told[:, patch] for patch in corners], axis=1))
    out["corner"], out["right_corner"] = _classified(logits, labels["corner"], jnp.ones(logits.shape[:2], bool))

    # the empty patches that raise it most already; before any does, those with the most room around them
    empty = jnp.where(labels["room"] > 0, raised + lesson.low * labels["room"], -jnp.inf)
    chosen = jax.lax.top_k(empty, lesson.count)[1]
    picked = jax.nn.one_hot(chosen, raised.shape[1])  # [B, count, P]
    is_sink = picked.sum(1) > 0
    out["high"] = _mean(jnp.square(jnp.maximum(1 - raised / lesson.high, 0)), is_sink)
    out["low"] = _mean(jnp.square(jnp.maximum(jnp.abs(raised) / lesson.low - 1, 0)), ~is_sink)
    flagged = raised >= (lesson.high + lesson.low) / 2
    out["right_sinks"] = jnp.mean((flagged == is_sink).all(-1))
    sinks = picked @ told  # [B, count, D]
    for name, head in student.scene.items():
        logits = head(sinks)
        logits = logits if logits.ndim == 4 else logits[:, :, None]
        wanted = jnp.broadcast_to(labels[name][:, None], logits.shape[:3])
        out[name], out[f"right_{name}"] = _classified(logits, wanted, jnp.ones(wanted.shape, bool))
    return out


def total(parts: dict[str, jax.Array]) -> jax.Array:
    """The loss: every part counts alike, the shares of what is right not at all."""
    return sum((value for name, value in parts.items() if not name.startswith("right_")), jnp.zeros(()))


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.sum(values * where) / jnp.maximum(jnp.sum(where), 1)


def _classified(logits: jax.Array, labels: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and accuracy where a label counts."""
    labels = jnp.maximum(labels, 0).astype(jnp.int32)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return _mean(entropy, where), _mean(jnp.argmax(logits, -1) == labels, where)
