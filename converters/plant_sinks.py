"""Plants a known fault into a model: its V-sinks draw too much attention in chosen decoder layers.

It is a positive control. What helps against sinks must help here, and what undoes the fault is known: V-sink keys times
1 / (1 + strength), which is within reach of a gate.

In each layer, with x the normed input of a token, W and b the key projection, and m the mean x of the V-sinks:

    W += strength (W m + b) d^T

d is the direction whose values d·x have the smallest mean square over all tokens that are no V-sinks, among those with d·m = 1
(the minimum-variance beamformer, Capon 1969). So the key of a mean V-sink grows to (1 + strength) times itself, and other keys
change as little as one direction allows. Tokens of text count as much as ordinary visual tokens do. No other weight is changed,
but tokens of text pass the changed ones: answers to text alone may change too. What each kind of token gets is measured.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from flax import nnx
from PIL import Image

from converters.convert import check_free, convert
from converters.export import export
from converters.hf_config import PLANTED
from lsg_jax.config import to_dict
from lsg_jax.config.ranges import Range, Table
from lsg_jax.data.drawing import draw
from lsg_jax.data.scene_questions import SceneQuestion, Split, scene_questions
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.files import scratch_folder
from lsg_jax.json_files import read_object
from lsg_jax.methods.method_model import assemble
from lsg_jax.opening import load_backbone
from lsg_jax.progress import Progress, silent
from lsg_jax.types import Batch
from lsg_jax.vlm import VLM

K_PROJ = "language_model/layers/attention/k_proj/kernel"

AT_A_TIME = 8
"""Scenes of one batch."""

RIDGE = 1e-4
"""Added to the diagonal of a second moment, in units of its mean: directions that no token has stay out of d."""


@dataclass(frozen=True)
class PlantSettings(Table, name="plant"):
    """How sinks are planted.

    `layers` are decoder layers, 0-based. `strength`: the key of a mean V-sink becomes 1 + strength times itself. `within`
    weighs the spread of V-sinks against the values of other tokens: 0 lets V-sinks differ most and spills least. `scenes` of
    the split `train` of `seed` give the direction, half as many of `validation` measure what it does.
    """

    layers: tuple[Annotated[int, Range("[0, 1e4]")], ...]
    strength: Annotated[float, Range("(0, 1000]")] = 5.0
    within: Annotated[float, Range("[0, 1000]")] = 0.25
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
        `v_sink` (mean, std), of `ordinary` and `text` tokens (root mean square, largest size), in scenes that d was not made
        from. Other keys change by strength times as much of a V-sink's key.

    Raises:
        InputError: the scenes have no V-sinks, no model there, or `out_dir` exists.
        ConfigError: a layer that the model lacks, or keys that are normed, which takes back what is planted.
    """
    model, out = Path(model_dir), Path(out_dir)
    check_free(out)
    vlm = load_backbone(model)
    text = vlm.config.text
    if text.qk_norm:
        raise ConfigError(f"{model}: its keys are normed after k_proj, which would take back what is planted there")
    if not settings.layers or max(settings.layers) >= text.num_layers:
        raise ConfigError(f"plant.layers is {list(settings.layers)}: give some of the layers 0 to {text.num_layers - 1}")
    seen = _seen(vlm, "train", settings.scenes, settings.seed, progress)
    held_out = _seen(vlm, "validation", settings.scenes // 2, settings.seed, progress)
    attention = vlm.frozen["language_model"]["layers"]["attention"]["k_proj"]
    kernel = np.array(attention["kernel"], np.float32)
    record: dict[str, Any] = {"source": vlm.digest, **to_dict(settings), "keys": []}
    for layer in sorted(set(settings.layers)):
        bias = np.asarray(attention["bias"][layer], np.float32) if text.qkv_bias else np.float32(0)
        direction, mean = direction_of(seen.x[layer], seen.visual, seen.v_sink, within=settings.within)
        key = np.einsum("D,DKH->KH", mean, kernel[layer]) + bias
        kernel[layer] += np.float32(settings.strength) * direction[:, None, None] * key
        record["keys"].append({"layer": layer, **_spill(held_out.x[layer] @ direction, held_out)})
    _write(vlm, model, out, kernel, record)
    return record


def direction_of(x: np.ndarray, visual: np.ndarray, v_sink: np.ndarray, *, within: float) -> tuple[np.ndarray, np.ndarray]:
    """The direction d in which V-sinks stand out, and their mean m; see the module docstring.

    Args:
        x: float [tokens, D].
        visual, v_sink: bool [tokens].
        within: weight of the V-sinks' covariance beside the second moment of other tokens.

    Returns:
        d, float32 [D], the minimum of d^T (S + within C) d with d·m = 1, and m, float32 [D].
    """
    moment = lambda rows: rows.T @ rows / max(len(rows), 1)
    x = x.astype(np.float64)
    sinks = x[v_sink]
    mean = sinks.mean(0)
    others = (moment(x[visual & ~v_sink]) + moment(x[~visual])) / 2
    ridge = RIDGE * np.trace(others) / len(others) * np.eye(len(others))
    found = np.linalg.solve(others + within * moment(sinks - mean) + ridge, mean)
    return (found / (found @ mean)).astype(np.float32), mean.astype(np.float32)


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


def _spill(values: np.ndarray, tokens: _Tokens) -> dict[str, dict[str, float]]:
    """d·x by group of tokens."""
    sinks, rounded = values[tokens.v_sink], lambda value: round(float(value), 4)
    size = lambda some: {"rms": rounded(np.sqrt(np.mean(np.square(some)))), "max": rounded(np.abs(some).max())}
    return {
        "v_sink": {"mean": rounded(sinks.mean()), "std": rounded(sinks.std())},
        "ordinary": size(values[tokens.visual & ~tokens.v_sink]),
        "text": size(values[~tokens.visual]),
    }


def _write(vlm: VLM, model: Path, out: Path, kernel: np.ndarray, record: dict[str, Any]) -> None:
    """The model folder with another k_proj: out to Hugging Face format, and back."""
    image = vlm.config.image
    with scratch_folder(out, "planted") as scratch:
        folder = scratch / f"{model.absolute().name}-planted"  # its name is the source that the manifest states
        export(model, folder, trained={K_PROJ: kernel})
        config = read_object(folder / "config.json")
        config |= {"lsg_sinks": to_dict(vlm.config.sinks), PLANTED: record}  # the known sinks may have hung on the model's name
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        convert(folder, out, max_pixels=image.max_pixels if image.kind == "native" else None)
