"""Plants a known fault into a model: its V-sinks draw too much attention in chosen decoder layers.

It is a positive control. What helps against sinks must help here, and what undoes the fault is known: V-sink keys times
1 / (1 + strength), which is within reach of a gate.

In each layer, with x the normed input of a token, W and b the key projection, and m the mean x of the V-sinks:

    W += strength (W m + b) d^T

d is the direction whose values d·x have the smallest mean square over all tokens that are no V-sinks, among those with d·m = 1
(the minimum-variance beamformer, Capon 1969). So the key of a mean V-sink grows to (1 + strength) times itself, and other keys
change as little as one direction allows. Tokens of text pass the changed weights too: `text` says how much they count beside
ordinary visual tokens, and what each kind of token gets is measured.

In a narrow model one direction tells V-sinks badly from the rest: a tenth of their key spills on other tokens, which no
scaling of V-sinks takes back. With `mark`, V-sinks are marked first. The hidden unit of the projector that contributes least
to visual tokens gets another task: with e the direction of V-sinks among the features of patches, found in the same way,

    unit = GELU(SHARP (e·f - 1/2)),    token += mark r u unit / (SHARP / 2)

r is the mean norm of the tokens of V-sinks, u the direction in which the inputs of all layers are smallest. A patch below half
of a V-sink gets nothing, and text does not pass the projector. No other weight is changed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from converters.convert import check_free, convert
from converters.export import export
from lsg_jax.activations import ACTIVATIONS
from lsg_jax.checkpoint.tree import flatten, nest
from lsg_jax.config import to_dict
from lsg_jax.config.model import PLANTED
from lsg_jax.config.ranges import Range, Table
from lsg_jax.data.drawing import draw
from lsg_jax.data.scene_questions import SceneQuestion, Split, scene_questions
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.files import scratch_folder
from lsg_jax.json_files import read_object
from lsg_jax.methods.method_model import assemble
from lsg_jax.opening import load_backbone
from lsg_jax.progress import Progress, silent
from lsg_jax.types import Batch, VisualInput
from lsg_jax.vlm import VLM

K_PROJ = "language_model/layers/attention/k_proj/kernel"

AT_A_TIME = 8
"""Scenes of one batch."""

SHARP = 16.0
"""A mean V-sink reaches half of it, where GELU is linear; an ordinary patch minus half of it, where it is 0."""

RIDGE = 1e-4
"""Added to the diagonal of a second moment, in units of its mean: directions that no token has stay out of d."""


@dataclass(frozen=True)
class PlantSettings(Table, name="plant"):
    """How sinks are planted.

    `layers` are decoder layers, 0-based. `strength`: the key of a mean V-sink becomes 1 + strength times itself. `within`
    weighs the spread of V-sinks against the values of other tokens: 0 lets V-sinks differ most and spills least; `text` weighs
    tokens of text against ordinary visual tokens. `scenes` of
    the split `train` of `seed` give the direction, half as many of `validation` measure what it does. `mark` is the size of the
    mark in units of the mean norm of a V-sink's token; 0 leaves the projector as it is.
    """

    layers: tuple[Annotated[int, Range("[0, 1e4]")], ...]
    strength: Annotated[float, Range("(0, 1000]")] = 5.0
    within: Annotated[float, Range("[0, 1000]")] = 0.25
    text: Annotated[float, Range("[0, 1e6]")] = 1.0
    mark: Annotated[float, Range("[0, 100]")] = 0.0
    scenes: Annotated[int, Range("[8, 1e6]")] = 160
    seed: Annotated[int, Range("[0, 4294967295]")] = 0


@dataclass(frozen=True)
class _Tokens:
    """Tokens of many scenes. x: float32 [L, tokens, D], the normed input of each layer; visual, v_sink: bool [tokens]."""

    x: np.ndarray
    visual: np.ndarray
    v_sink: np.ndarray


def plant(
    model_dir: str | Path, out_dir: str | Path, settings: PlantSettings, *, progress: Progress = silent
) -> dict[str, Any]:
    """Writes a copy of a model folder with planted sinks; the same settings give the same bytes on one machine.

    Args:
        out_dir: the model folder to make; must not exist, or be empty.
        progress: counts scenes.

    Returns:
        What the field `lsg_planted_sinks` of its config.json holds: digest of the model, settings, and for each layer d·x of
        `v_sink` (mean, std), of `ordinary` and `text` tokens (root mean square, largest size), in the planted model and in
        scenes that d was not made from. Other keys change by strength times as much of a V-sink's key. With a mark also `unit`,
        which one it took, and `unit_share`, the part of the norm of a token that it contributed before (root mean square).

    Raises:
        InputError: the scenes have no V-sinks, no model there or a planted one, or `out_dir` exists.
        ConfigError: 8-bit weights, a layer that the model lacks or that is named twice, keys that are normed, which takes back
            what is planted, or a mark for a projector that is not two linear maps of a patch a token.
    """
    model, out = Path(model_dir), Path(out_dir)
    check_free(out)
    vlm = load_backbone(model)
    if (file := model / "hf" / "config.json").is_file() and PLANTED in read_object(file):
        raise InputError(f"{model}: sinks were planted there already; plant into the model that it was made from")
    text = vlm.config.text
    if text.weights == "int8":
        raise ConfigError(f"{model}: has 8-bit weights; plant sinks in the same model at bfloat16 or float32")
    if text.qk_norm:
        raise ConfigError(f"{model}: its keys are normed after k_proj, which would take back what is planted there")
    if not settings.layers or max(settings.layers) >= text.num_layers:
        raise ConfigError(f"plant.layers is {list(settings.layers)}: give some of the layers 0 to {text.num_layers - 1}")
    if list(settings.layers) != sorted(set(settings.layers)):
        raise ConfigError(f"plant.layers must ascend and name no layer twice: {list(settings.layers)}")
    record: dict[str, Any] = {"source": vlm.digest, **to_dict(settings)}
    seen = _seen(vlm, "train", settings.scenes, settings.seed, progress)
    changed: dict[str, np.ndarray] = {}
    if settings.mark:
        projector, noted = _marked(vlm, seen, settings)
        changed |= {f"projector/{name}": leaf for name, leaf in flatten(projector).items()}
        record |= noted
        vlm = VLM(vlm.config, {**vlm.frozen, "projector": projector}, folder=vlm.folder)
        seen = _seen(vlm, "train", settings.scenes, settings.seed, progress)
    attention = vlm.frozen["language_model"]["layers"]["attention"]["k_proj"]
    kernel, directions = np.array(attention["kernel"], np.float32), {}
    for layer in settings.layers:
        bias = np.asarray(attention["bias"][layer], np.float32) if text.qkv_bias else np.float32(0)
        direction, mean = direction_of(seen.x[layer], seen.visual, seen.v_sink, within=settings.within, text=settings.text)
        key = np.einsum("D,DKH->KH", mean, kernel[layer]) + bias
        kernel[layer] += np.float32(settings.strength) * direction[:, None, None] * key
        directions[layer] = direction
    # sinks in a layer change what enters those above it
    held_out = _seen(_with_keys(vlm, kernel), "validation", settings.scenes // 2, settings.seed, progress)
    record["keys"] = [
        {"layer": layer, **_spill(held_out.x[layer] @ direction, held_out)} for layer, direction in directions.items()
    ]
    _write(vlm, model, out, changed | {K_PROJ: kernel}, record)
    return record


def direction_of(
    x: np.ndarray, visual: np.ndarray, v_sink: np.ndarray, *, within: float, text: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The direction d in which V-sinks stand out, and their mean m; see the module docstring.

    Args:
        x: float [tokens, D].
        visual, v_sink: bool [tokens].
        within: weight of the V-sinks' covariance C beside the second moment S of other tokens.
        text: weight of tokens of text in S, where that of ordinary visual tokens is 1.

    Returns:
        d, float32 [D], the minimum of d^T (S + within C) d with d·m = 1, and m, float32 [D].
    """
    sinks = x[v_sink].astype(np.float64)
    mean, others = sinks.mean(0), _second_moment(x, visual, v_sink, text)
    found = np.linalg.solve(others + within * _moment(sinks - mean), mean)
    return (found / (found @ mean)).astype(np.float32), mean.astype(np.float32)


def _second_moment(x: np.ndarray, visual: np.ndarray, v_sink: np.ndarray, text: float) -> np.ndarray:
    """S, float64 [D, D], of tokens that are no V-sinks, with a ridge."""
    x = x.astype(np.float64)
    others = (_moment(x[visual & ~v_sink]) + text * _moment(x[~visual])) / 2
    return np.asarray(others + RIDGE * np.trace(others) / len(others) * np.eye(len(others)))


def _moment(rows: np.ndarray) -> np.ndarray:
    return rows.T @ rows / max(len(rows), 1)


def _seen(vlm: VLM, split: Split, count: int, seed: int, progress: Progress) -> _Tokens:
    """The tokens of the first questions of a split, padding left out."""
    questions = scene_questions(split, count, seed=seed)
    x, visual, v_sink = [], [], []
    for start in range(0, count, AT_A_TIME):
        batch = _batch(vlm, questions[start : start + AT_A_TIME])
        states, masks = jax.tree.map(np.asarray, _observe(vlm.params, batch, vlm.graphdef))
        shown = np.asarray(batch.attention_mask, bool)
        x.append(states[:, shown].astype(np.float32))
        visual.append(masks.mask[shown])
        v_sink.append(masks.v_sink[shown])
        progress(min(start + AT_A_TIME, count), count, f"scenes of {split}")
    found = _Tokens(np.concatenate(x, axis=1), np.concatenate(visual), np.concatenate(v_sink))
    if not found.v_sink.any():
        raise InputError(
            f"{vlm.folder}: no V-sinks in {count} scenes, so there is nothing to plant; `lsg calibrate` may find dimensions"
        )
    if not (found.visual & ~found.v_sink).any():
        raise InputError(f"{vlm.folder}: every visual token is a V-sink: the threshold is far too low; see `lsg calibrate`")
    return found


def _batch(vlm: VLM, questions: Sequence[SceneQuestion]) -> Batch:
    pictures = [[Image.fromarray(draw(question.scene))] for question in questions]
    return vlm.questions(pictures, [question.prompt for question in questions])


@functools.partial(jax.jit, static_argnums=2)
def _observe(params: dict, batch: Batch, graphdef: Any) -> tuple[jax.Array, Any]:
    """The normed input of every layer [L, B, T, D], and the visual tokens."""
    model = assemble(graphdef, params)
    sequence = model.sequence(batch)
    hidden = model(batch, sequence=sequence, observe=lambda view: view.hidden).observed
    norm, scales = nnx.split(model.language_model.layers.input_norm)
    return jax.vmap(lambda scale, states: nnx.merge(norm, scale)(states))(scales, hidden), sequence.visual


def _with_keys(vlm: VLM, kernel: np.ndarray) -> VLM:
    """The model with other key projections float32 [L, D, K, H], rounded as they will be stored."""
    leaves = flatten(vlm.frozen)
    return VLM(vlm.config, nest(leaves | {K_PROJ: kernel.astype(leaves[K_PROJ].dtype)}), folder=vlm.folder)


def _spill(values: np.ndarray, tokens: _Tokens) -> dict[str, dict[str, float]]:
    """d·x by group of tokens."""
    sinks, rounded = values[tokens.v_sink], lambda value: round(float(value), 4)
    size = lambda some: {"rms": rounded(np.sqrt(np.mean(np.square(some)))), "max": rounded(np.abs(some).max())}
    return {
        "v_sink": {"mean": rounded(sinks.mean()), "std": rounded(sinks.std())},
        "ordinary": size(values[tokens.visual & ~tokens.v_sink]),
        "text": size(values[~tokens.visual]),
    }


def _marked(vlm: VLM, seen: _Tokens, settings: PlantSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The projector with a unit that marks V-sinks (see the module docstring), and what the record says of it."""
    config = vlm.config
    if config.projector_layers != 2 or config.merge > 1 or config.deepstack or config.projector_norm_eps is not None:
        raise ConfigError(f"{vlm.folder}: plant.mark needs a projector of two linear maps, without a norm, of a patch a token")
    features, v_sink = _patches(vlm, settings)
    first, second = (jax.tree.map(np.array, vlm.frozen["projector"][f"linear_{i}"]) for i in (1, 2))
    direction = direction_of(features, np.ones_like(v_sink), v_sink, within=settings.within)[0]
    activation = ACTIVATIONS[config.projector_hidden_act]
    hidden = np.asarray(activation(jnp.asarray(features @ first["kernel"] + first["bias"])))
    tokens = hidden @ second["kernel"] + second["bias"]
    contributed = hidden.std(0) * np.linalg.norm(second["kernel"], axis=1)
    unit = int(contributed.argmin())
    second["bias"] += hidden[:, unit].mean() * second["kernel"][unit]  # what it contributed to all alike
    first["kernel"][:, unit], first["bias"][unit] = SHARP * direction, -SHARP / 2
    reached = np.linalg.norm(tokens[v_sink], axis=1).mean() / float(activation(jnp.float32(SHARP / 2)))
    second["kernel"][unit] = settings.mark * reached * _quiet_direction(seen, settings.text)
    share = float(contributed[unit] / np.sqrt(np.square(tokens).sum(1).mean()))
    return {"linear_1": first, "linear_2": second}, {"unit": unit, "unit_share": float(f"{share:.3g}")}


def _quiet_direction(seen: _Tokens, text: float) -> np.ndarray:
    """The unit vector [D] along which tokens that are no V-sinks are smallest, each layer counted alike."""
    moments = [_second_moment(x, seen.visual, seen.v_sink, text) for x in seen.x]
    least = np.linalg.eigh(sum(each / np.trace(each) for each in moments))[1][:, 0]
    return np.asarray(least * np.sign(least[np.abs(least).argmax()]), np.float32)  # eigenvectors have no sign of their own


def _patches(vlm: VLM, settings: PlantSettings) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [patches, Dv] of the training scenes, where they enter the projector, and which are V-sinks."""
    questions, found = scene_questions("train", settings.scenes, seed=settings.seed), []
    for start in range(0, len(questions), AT_A_TIME):
        images = _batch(vlm, questions[start : start + AT_A_TIME]).images
        features, v_sink = jax.tree.map(np.asarray, _features(vlm.params, images, vlm.graphdef))
        found.append((features.reshape(-1, features.shape[-1]), v_sink.reshape(-1)))
    return np.concatenate([features for features, _ in found]), np.concatenate([v_sink for _, v_sink in found])


@functools.partial(jax.jit, static_argnums=2)
def _features(params: dict, images: VisualInput, graphdef: Any) -> tuple[jax.Array, jax.Array]:
    return assemble(graphdef, params).image_features(images)


def _write(vlm: VLM, model: Path, out: Path, changed: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    """The model folder with other leaves: out to Hugging Face format, and back."""
    image = vlm.config.image
    with scratch_folder(out, "planted") as scratch:
        folder = scratch / f"{model.absolute().name}-planted"  # its name is the source that the manifest states
        export(model, folder, trained=changed)
        config = read_object(folder / "config.json")
        config |= {"lsg_sinks": to_dict(vlm.config.sinks), PLANTED: record}  # the known sinks may have hung on the model's name
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        convert(folder, out, max_pixels=image.max_pixels if image.kind == "native" else None)
