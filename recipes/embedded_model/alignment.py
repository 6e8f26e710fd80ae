"""Aligns the projector with the word embeddings of the language model, as LLaVA's first stage does.

The content of each patch is known, so the target is the sum of the embeddings of the words for it. The language model can then
match a patch with the words of a question from the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lsg_jax.config import ModelConfig
from lsg_jax.data.shapes import COLOURS, CORNERS, LETTERS, MAX_ITEMS, PATTERNS, SHAPES, SIZES
from lsg_jax.model.projector import Projector
from recipes.embedded_model.labels import MOST

PATCH_WORDS = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES), "letter": ("", *LETTERS)}
NUMBERS = tuple(str(number) for number in range(1, MAX_ITEMS + 1))

WORDS = frozenset(
    (*COLOURS, *SHAPES, *SIZES, *LETTERS, *PATTERNS, *NUMBERS, "background", "corner", *" ".join(CORNERS).split())
)
"""All words that `targets` uses."""


@dataclass(frozen=True)
class AlignmentRecipe:
    """How the projector is trained: Adam with cosine decay, `patches` random patches a step."""

    scenes: int = 4000
    steps: int = 2000
    patches: int = 2048
    learning_rate: float = 2e-3
    seed: int = 0


def targets(labels: Mapping[str, np.ndarray], v_sinks: np.ndarray, words: Mapping[str, np.ndarray]) -> np.ndarray:
    """Target outputs of the projector for the patches of B scenes, as sums of word embeddings.

    | patch | sum of |
    |---|---|
    | centre of a shape | its colour, shape, size and letter; x times (right - left), y times (bottom - top) |
    | V-sink | count and pattern; each colour and kind of shape, weighted by its count / MOST |
    | corner with a letter | letter, "corner" and the corner's name |
    | touched by nothing | "background" |
    | other, with parts of shapes | nothing: zero |

    Args:
        labels: as `labels.labels` gives them. v_sinks: bool [B, P]. words: embedding float32 [D] of each of WORDS.

    Returns:
        float32 [B, P, D].
    """
    words = {"": np.zeros_like(next(iter(words.values()))), **words}
    table = lambda names: np.stack([words[name] for name in names])
    wanted = np.zeros((*v_sinks.shape, table([""]).shape[-1]), np.float32)
    grid = round(v_sinks.shape[1] ** 0.5)

    empty = (labels["room"] > 0) & ~v_sinks
    wanted[empty] = words["background"]
    letters = table(PATCH_WORDS["letter"])
    for number, (name, (row, column)) in enumerate(zip(CORNERS, _corner_patches(grid), strict=True)):
        there = labels["corner"][:, number] > 0
        place = words["corner"] + table(name.split()).sum(0)
        wanted[there, row * grid + column] = letters[labels["corner"][there, number]] + place
    whole = table(NUMBERS)[labels["count"][:, 0]] + table(PATTERNS)[labels["pattern"][:, 0]]
    whole = whole + (labels["colours"] @ table(COLOURS) + labels["shapes"] @ table(SHAPES)) / MOST
    wanted[v_sinks] = np.broadcast_to(whole[:, None], wanted.shape)[v_sinks]
    centre = labels["shape"] >= 0
    wanted[centre] = sum(table(names)[labels[what][centre]] for what, names in PATCH_WORDS.items())
    patch = np.nonzero(centre)[1]
    place = (np.stack([patch % grid, patch // grid], axis=-1) + labels["place"][centre]) / grid - 0.5  # (x, y), -1/2 to 1/2
    axes = np.stack([words["right"] - words["left"], words["bottom"] - words["top"]])
    wanted[centre] += place.astype(np.float32) @ axes
    return wanted


def patch_kinds(labels: Mapping[str, np.ndarray], v_sinks: np.ndarray) -> np.ndarray:
    """int [B, P]: 0 centre of a shape, 1 V-sink, 2 empty, 3 letter in a corner, 4 part of a shape."""
    grid = round(v_sinks.shape[1] ** 0.5)
    letter = np.zeros_like(v_sinks)
    for number, (row, column) in enumerate(_corner_patches(grid)):
        letter[:, row * grid + column] = labels["corner"][:, number] > 0
    return np.select([labels["shape"] >= 0, v_sinks, labels["room"] > 0, letter], [0, 1, 2, 3], 4)


def _corner_patches(grid: int) -> list[tuple[int, int]]:
    """(row, column) of the patch of each of CORNERS."""
    return [((grid - 1) * name.startswith("bottom"), (grid - 1) * name.endswith("right")) for name in CORNERS]


def align_projector(
    config: ModelConfig,
    projector: dict[str, Any],
    features: np.ndarray,
    wanted: np.ndarray,
    kinds: np.ndarray,
    recipe: AlignmentRecipe,
) -> tuple[dict[str, Any], float]:
    """Trains a projector to map `features` to `wanted`, by mean squared error.

    Args:
        features: float32 [N, F], inputs of the projector. wanted: float32 [N, D].
        kinds: int [N]; patches are sampled so that each kind is equally frequent.

    Returns:
        Its parameters, and the share of the variance of `wanted` that it explains, averaged over the last tenth of the steps.
    """
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Projector(config, rngs=nnx.Rngs(0), dtype=jnp.float32)))
    optimizer = optax.adam(optax.cosine_decay_schedule(recipe.learning_rate, recipe.steps))
    chance = 1 / np.bincount(kinds)[kinds]
    rng = np.random.default_rng(recipe.seed)
    drawn = rng.choice(len(kinds), (recipe.steps, recipe.patches), p=chance / chance.sum())

    @jax.jit
    def step(state: Any, inputs: jax.Array, targets: jax.Array) -> tuple[Any, jax.Array]:
        params, slots = state
        error = lambda params: jnp.mean(jnp.square(nnx.merge(graphdef, params)(inputs) - targets))
        value, gradients = jax.value_and_grad(error)(params)
        updates, slots = optimizer.update(gradients, slots, params)
        return (optax.apply_updates(params, updates), slots), value / jnp.var(targets)

    state = (projector, optimizer.init(projector))
    unexplained = []
    for chosen in drawn:
        state, value = step(state, features[chosen], wanted[chosen])
        unexplained.append(value)
    return jax.device_get(state[0]), 1 - float(np.mean(jax.device_get(unexplained[-max(1, recipe.steps // 10) :])))
