"""A tiny model whose sinks are known: two patches that the ViT raises, two that the language model raises.

They come about as in trained models. Position embeddings mark the patches. In the second ViT layer a neuron that knows the mark
of the V-sinks writes a spike into one feature dimension. The projector hands the mark of the L-sinks on; BOS carries the same
mark, and in the second decoder layer a neuron that knows it writes a spike into two dimensions of the residual stream. The keys
of raised tokens then draw the attention of every query. Widths are 512, since |h| / rms(h) cannot exceed the root of the width
and `dim_rms` asks for 20; everything else is small.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from lsg_jax.config import ModelConfig, RopeConfig, SinkConfig
from lsg_jax.methods.method_model import abstract_model
from lsg_jax.opening import load_backbone
from lsg_jax.vlm import VLM

WIDTH = 512
WRITER = 1  # the layer, in both parts, whose MLP writes the spike
MARK, LOUD = 10.0, 40.0  # size of a mark against order 1; slope of the neurons that look for one


@dataclass(frozen=True)
class Planted:
    """Where the sinks of every image are.

    Attributes:
        v_sinks, l_sinks: patch indices.
        vit_dim: the feature dimension that V-sinks raise to about 150.
        llm_dims: dimensions of the residual stream that L-sinks and BOS raise, to about 400 and 120.
        first_layer: the first decoder layer whose input holds the L-sinks' spike.
    """

    v_sinks: tuple[int, ...] = (8, 40)
    l_sinks: tuple[int, ...] = (17, 30)
    vit_dim: int = 300
    llm_dims: tuple[int, ...] = (100, 377)
    first_layer: int = WRITER + 1


def planted_model(folder: Path, *, planted: bool = True, seed: int = 0) -> tuple[VLM, Planted]:
    """A model of 7 x 7 patches and 6 decoder layers whose config knows the sink dimensions.

    Args:
        folder: a converted tiny model; its tokenizer, image settings and number of layers are used.
        planted: False for the same model without sinks, marks and known dimensions.
    """
    base, truth = load_backbone(folder, verify=False), Planted()
    config = _widened(base.config)
    if planted:
        sinks = SinkConfig(vit_dims=(truth.vit_dim,), llm_dims=truth.llm_dims)
        config = dataclasses.replace(config, sinks=sinks)
    _, shapes = abstract_model(config)
    rng = np.random.default_rng(seed)
    params = jax.tree.map_with_path(lambda path, leaf: _random(rng, [key.key for key in path], leaf.shape), shapes)
    if planted:
        v_mark, l_mark, token_mark = rng.choice([-1.0, 1.0], (3, WIDTH)).astype(np.float32)
        v_mark[truth.vit_dim] = l_mark[truth.vit_dim] = 0.0
        _plant_v_sinks(params, truth, v_mark)
        _plant_l_sinks(params, truth, l_mark, token_mark, bos=base.processor.tokenizer.bos_token_id)
    return VLM(config, jax.tree.map(jax.numpy.asarray, params), folder=folder, digest="planted"), truth


def _widened(config: ModelConfig) -> ModelConfig:
    """Wide streams with narrow heads and MLPs. Only a part of each head is rotated: what draws attention must not be."""
    vision = dataclasses.replace(config.vision, hidden_size=WIDTH, intermediate_size=64, num_layers=4)
    rope = RopeConfig(theta=10000.0, rotary_dim=8)
    text = dataclasses.replace(config.text, hidden_size=WIDTH, intermediate_size=64, head_dim=16, rope=rope, qkv_bias=True)
    return dataclasses.replace(config, vision=vision, text=text)


def _random(rng: np.random.Generator, path: list[str], shape: tuple[int, ...]) -> np.ndarray:
    """Streams of order 0.1 into which the layers write little, so that a spike of 100 is a thousand times the median."""
    name = "/".join(path)
    if path[-1] == "scale":
        return np.full(shape, 0.1 if "pre_norm" in name else 1.0, np.float32)
    if path[-1] == "bias":
        return np.zeros(shape, np.float32)
    if path[-1] in ("position_embedding", "class_embedding"):
        size = 1.0
    elif path[-1] == "embed_tokens" or path[-2] == "patch_embedding":
        size = 0.1
    elif path[-2] in ("out_proj", "o_proj", "fc2", "down_proj"):
        size = 0.002
    else:
        size = WIDTH**-0.5
    return (size * rng.standard_normal(shape)).astype(np.float32)


def _plant_v_sinks(params: dict, truth: Planted, mark: np.ndarray) -> None:
    tower = params["vision_tower"]
    positions = 1 + np.array(truth.v_sinks)  # after the class token
    tower["position_embedding"][positions] = MARK * mark
    layers = tower["layers"]
    # a normalised marked token gives LOUD, others up to a fifth of it; the bias lets only the first through
    layers["fc1"]["kernel"][WRITER, :, 0] = LOUD * mark / WIDTH
    layers["fc1"]["bias"][WRITER, 0] = -LOUD / 2
    layers["fc2"]["kernel"][WRITER, 0] = 0.0
    layers["fc2"]["kernel"][WRITER, 0, truth.vit_dim] = 150.0 / (LOUD / 2)
    attention = layers["attention"]
    for later in range(WRITER + 1, attention["q_proj"]["bias"].shape[0]):
        attention["q_proj"]["bias"][later, :, 0] = 4.0
        attention["k_proj"]["kernel"][later, truth.vit_dim, :, 0] = 1.0  # the normalised spike is about 20


def _plant_l_sinks(params: dict, truth: Planted, mark: np.ndarray, token_mark: np.ndarray, *, bos: int) -> None:
    params["vision_tower"]["position_embedding"][1 + np.array(truth.l_sinks)] = MARK * mark
    projector = params["projector"]
    # features are 0.1 of a normalised stream; the V-sinks' spike must not pass for the mark
    projector["linear_1"]["kernel"][:, 0] = LOUD * mark / (0.1 * WIDTH)
    projector["linear_1"]["bias"][0] = -LOUD / 2
    projector["linear_1"]["kernel"][truth.vit_dim] *= 0.3
    projector["linear_1"]["kernel"][truth.vit_dim, 0] = 0.0
    language_model = params["language_model"]
    for table in (projector["linear_2"]["kernel"], language_model["embed_tokens"]):
        table -= np.outer(table @ token_mark, token_mark) / WIDTH  # the neuron squares what it sees: nothing, in other tokens
    projector["linear_2"]["kernel"][0] = 0.5 * token_mark / (LOUD / 2)
    language_model["embed_tokens"][bos] += 0.5 * token_mark
    mlp = language_model["layers"]["mlp"]
    for part in ("gate_proj", "up_proj"):
        mlp[part]["kernel"][WRITER, :, 0] = LOUD * token_mark / WIDTH
    mlp["down_proj"]["kernel"][WRITER, 0] = 0.0
    mlp["down_proj"]["kernel"][WRITER, 0, list(truth.llm_dims)] = np.array([400.0, -120.0]) / LOUD**2
    attention = language_model["layers"]["attention"]
    attention["q_proj"]["bias"][truth.first_layer :, :, -1] = 4.0
    attention["k_proj"]["kernel"][truth.first_layer :, truth.llm_dims[0], :, -1] = 1.0
