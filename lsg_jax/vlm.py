"""A model folder, opened: parameters on devices, its gates if any, and the compiled calls that users script against."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsg_jax.baselines.diysink import ROUTE_TOKENS, read_route, routing_prompt
from lsg_jax.checkpoint.processes import host_array
from lsg_jax.config import (
    Aspect,
    DiySinkConfig,
    GateConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    SinkConfig,
    Template,
)
from lsg_jax.data.processor import Processor
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.gating.portable import to_torch_layout
from lsg_jax.model.generate import Generated, ReadPrompts, answer_prompts, last_token, read_prompts
from lsg_jax.model.llava import abstract_model, assemble, check_gate, check_method, join_trained
from lsg_jax.model.loss import answer_loss, answer_slots
from lsg_jax.types import IGNORE, Batch, KVCache

PROMPT_BUCKET = 64  # prompt lengths are rounded up to a multiple, so that few shapes compile


class VLM:
    """A LLaVA-style model with its weights, gated or not.

    Args:
        config: the model; its `sinks` are those in force.
        frozen: backbone parameters, a nested dict.
        gate: what the gates are; None without gates.
        gates: parameters of the gates (stacked over gate.layers), or those that a trained method has; None without either.
        method: what is done to the model instead of gates, one of the baselines.
        folder: the model folder, for tokenizer and processor files.
        digest: identity of the backbone's weights.
        mesh: the devices that hold the weights; None for one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        frozen: dict,
        *,
        gate: GateConfig | None = None,
        gates: dict | None = None,
        method: MethodConfig | None = None,
        folder: Path | None = None,
        digest: str = "",
        mesh: jax.sharding.Mesh | None = None,
    ):
        check_sinks(config)
        if gate is not None:
            check_gate_input(gate, config)
        if method is not None:
            check_method_input(method, config)
        if isinstance(method, LoraConfig | DiySinkConfig) and gates is None:
            raise ConfigError(f"{type(method).__name__}: this method is trained; open a run of `lsg train` with open_trained")
        self.config = config
        self.gate = gate
        self.method = method
        self.frozen = frozen
        self.gates = gates
        self.folder = folder
        self.digest = digest
        self.mesh = mesh
        self.graphdef, _ = abstract_model(config, gate, method=method, mesh=mesh)

    @functools.cached_property
    def processor(self) -> Processor:
        """Tokenizer and image preparation of the model folder."""
        return self.make_processor()

    def make_processor(self, image_aspect: Aspect | None = None, template: Template | None = None) -> Processor:
        """Tokenizer and image preparation, with another image aspect or text template than the folder's if given."""
        if self.folder is None:
            raise InputError("this model was not loaded from a folder: it has no tokenizer")
        return Processor.from_folder(self.folder / "hf", self.config, image_aspect=image_aspect, template=template)

    @functools.cached_property
    def router(self) -> VLM | None:
        """The plain model where it is asked first what a question needs (DIYSink with routing `cot`), else None."""
        asks = isinstance(self.method, DiySinkConfig) and self.method.routing == "cot"
        return self.plain() if asks else None

    @property
    def params(self) -> dict:
        """All parameters, gates included, a nested dict."""
        return join_trained(self.frozen, self.gates)

    def plain(self) -> VLM:
        """The same weights without gates or any method."""
        return VLM(self.config, self.frozen, folder=self.folder, digest=self.digest, mesh=self.mesh)

    def with_method(self, method: MethodConfig, *, sinks: SinkConfig | None = None) -> VLM:
        """The same weights under a method that needs no training.

        Raises:
            ConfigError: the model cannot carry it, for example a layer that does not exist.
        """
        config = dataclasses.replace(self.config, sinks=sinks or self.config.sinks)
        return VLM(config, self.frozen, method=method, folder=self.folder, digest=self.digest, mesh=self.mesh)

    # Arrays in, arrays out: `input_ids` int [B, T] hold one image token per patch; `pixel_values` float [B, C, H, W] as HF
    # image processors return them, one image a row or one for each row that has image tokens; None for text only.

    def logits(self, input_ids: Any, pixel_values: Any, attention_mask: Any = None, gate_position: Any = None) -> np.ndarray:
        """float32 [B, T, V]. `gate_position` int [B] defaults to the last unpadded token."""
        return np.asarray(
            _logits(self.params, self.batch(input_ids, pixel_values, attention_mask, gate_position), self.graphdef)
        )

    def loss_and_grads(
        self, input_ids: Any, pixel_values: Any, labels: Any, attention_mask: Any = None
    ) -> tuple[float, dict[int, dict[str, np.ndarray]]]:
        """Loss in nats a token, and the gradient of every gate.

        The gates read at the last token before the first label that is not -100.

        Args:
            labels: int [B, T], as HF has them: aligned with `input_ids`, -100 where there is no loss.

        Returns:
            loss, {layer: {name: array}} with names and torch layouts as in the portable gate file.

        Raises:
            InputError: no gates are loaded, or a row has no label.
        """
        if self.gates is None or self.gate is None:
            raise InputError("loss_and_grads needs gates: lsg_jax.load(model_dir, gates=...)")
        labels = np.asarray(labels)
        supervised = labels[:, 1:] != IGNORE
        if not supervised.any(1).all():
            raise InputError(f"row {int(np.argmin(supervised.any(1)))} has no label: every row needs an answer")
        index, target = answer_slots(labels)
        batch = self.batch(input_ids, pixel_values, attention_mask, index[:, 0])
        loss, gradients = _loss_and_grads(
            self.gates, self.frozen, dataclasses.replace(batch, answer_index=index, answer_target=target), self.graphdef
        )
        return float(loss), to_torch_layout(jax.tree.map(np.asarray, gradients), self.gate.layers)

    def generate_ids(
        self, input_ids: Any, pixel_values: Any, attention_mask: Any = None, max_new_tokens: int = 32
    ) -> np.ndarray:
        """int32 [B, N], greedy; N <= max_new_tokens ends where the last row ended, with pad tokens after each row's end."""
        return self.generate_batch(self.batch(input_ids, pixel_values, attention_mask), max_new_tokens)

    def v_sinks(self, pixel_values: Any) -> np.ndarray:
        """bool [B, P], patches that the vision tower made sinks, in the order of the image."""
        if not self.config.sinks.knows_v_sinks:
            raise ConfigError(
                "no V-sink dimensions are known for this model: load it with sinks=SinkConfig(vit_dims=(...,), ...)"
            )
        return np.asarray(_v_sinks(self.params, to_pixels(pixel_values), self.graphdef))

    def gate_ratios(self, input_ids: Any, pixel_values: Any, attention_mask: Any = None) -> dict[int, np.ndarray]:
        """{layer: float32 [B, G]}, the softmax of each gate (sum 1, before `key_scale`); {} without gates or images."""
        if self.gate is None or pixel_values is None:
            return {}
        ratios = np.asarray(_ratios(self.params, self.batch(input_ids, pixel_values, attention_mask), self.graphdef))
        return {layer: ratios[layer - min(self.gate.layers)] for layer in self.gate.layers}

    # Images and text in, text out.

    def generate(self, images: Sequence[Any], prompts: Sequence[str], max_new_tokens: int = 32) -> list[str]:
        """Greedy answers. `images` holds paths, bytes, PIL images, or None for a question without an image.

        Under DIYSink with routing `cot` each question is preceded by a short one, about what it needs.
        """
        if len(images) != len(prompts):
            raise InputError(f"{len(images)} images for {len(prompts)} prompts")
        if not prompts:
            return []
        encoded = [
            self.processor.encode_question(prompt, has_image=image is not None)
            for image, prompt in zip(images, prompts, strict=True)
        ]
        pixels = [None if image is None else self.processor.pixels(image) for image in images]
        batch = self.pad_questions(encoded, pixels)
        if all(image is None for image in images):
            batch = dataclasses.replace(batch, pixels=None)
        if self.router is not None:
            said = self.router.generate([None] * len(prompts), [routing_prompt(prompt) for prompt in prompts], ROUTE_TOKENS)
            batch = dataclasses.replace(batch, route=np.array([read_route(text) for text in said], np.int32))
        return [self.processor.decode(row) for row in self.generate_batch(batch, max_new_tokens)]

    def pad_questions(self, encoded: Sequence[Any], pixels: Sequence[np.ndarray | None]) -> Batch:
        """Left-padded batch of encoded questions; its length is rounded up so that few shapes compile."""
        longest = max(len(e.ids) for e in encoded)
        length = -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET
        return self.processor.collate(encoded, pixels, max_length=length, max_answer_tokens=1, padding_side="left")

    def generate_batch(self, batch: Batch, max_new_tokens: int) -> np.ndarray:
        """`generate_ids` for a batch that is already made."""
        return self.generate_in_full(batch, max_new_tokens).tokens

    def generate_in_full(self, batch: Batch, max_new_tokens: int) -> Generated:
        """`generate_batch` with the leads and, of a gated model, the ratios float32 [gated layers, B, G]; on the host."""
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, it must be at least 1")
        # the answer slots play no part, and would only add shapes to compile
        batch = dataclasses.replace(batch, answer_index=None, answer_target=None, row_id=None)
        read, cache = read_batch(self.params, batch, self.graphdef, max_new_tokens)
        asked = dataclasses.replace(batch, pixels=None)
        tokens, steps, lead, ratios = answer_batch(self.params, asked, read, cache, self.graphdef, max_new_tokens)
        steps = int(host_array(steps))
        if self.gate is not None and ratios is not None:
            ratios = host_array(ratios)[np.array(self.gate.layers) - min(self.gate.layers)]
        return Generated(host_array(tokens)[:, :steps], steps, host_array(lead), ratios if self.gate is not None else None)

    def batch(self, input_ids: Any, pixel_values: Any, attention_mask: Any = None, gate_position: Any = None) -> Batch:
        """Checks raw arrays and makes a Batch of them.

        Raises:
            InputError: shapes do not fit, or the image tokens of a row are neither 0 nor one per patch.
        """
        ids = np.asarray(input_ids, np.int32)
        if ids.ndim != 2 or ids.size == 0:
            raise InputError(f"input_ids must be [B, T] and not empty, got {list(ids.shape)}")
        mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
        if mask.shape != ids.shape:
            raise InputError(f"attention_mask is {list(mask.shape)}, input_ids are {list(ids.shape)}")
        if not mask.any(1).all():
            raise InputError(f"row {int(np.argmin(mask.any(1)))} is all padding")
        if outside := ids[(ids < 0) | (ids >= self.config.text.vocab_size) & (ids != self.config.image_token_id)].tolist():
            raise InputError(f"token {outside[0]} is outside the vocabulary of {self.config.text.vocab_size}")
        position = last_token(mask) if gate_position is None else np.asarray(gate_position, np.int32)
        return Batch(
            input_ids=ids,
            attention_mask=mask,
            pixels=self._row_pixels(ids, mask, pixel_values),
            gate_position=np.broadcast_to(position, ids.shape[:1]),
        )

    def _row_pixels(self, ids: np.ndarray, mask: np.ndarray, pixel_values: Any) -> np.ndarray | None:
        counts = ((ids == self.config.image_token_id) & mask).sum(1)
        expected = self.config.num_image_tokens
        has_image = counts > 0
        if pixel_values is None:
            if has_image.any():
                raise InputError(f"row {int(np.argmax(has_image))} has {counts.max()} image tokens, but there is no image")
            return None
        if (bad := has_image & (counts != expected)).any():
            row = int(np.argmax(bad))
            raise InputError(f"row {row} has {counts[row]} image tokens, the vision tower gives {expected} features an image")
        pixels = to_pixels(pixel_values)
        side = self.config.vision.image_size
        if pixels.shape[1:] != (side, side, self.config.vision.num_channels):
            raise InputError(f"pixel_values must be [B, {self.config.vision.num_channels}, {side}, {side}]")
        if len(pixels) == len(ids):
            return pixels
        if len(pixels) != has_image.sum():
            raise InputError(f"{len(pixels)} images for {len(ids)} rows, {has_image.sum()} of them with image tokens")
        rows = np.zeros((len(ids), *pixels.shape[1:]), np.float32)
        rows[has_image] = pixels
        return rows


def to_pixels(pixel_values: Any) -> np.ndarray:
    """[B, C, H, W] as HF image processors return it -> float32 [B, H, W, C]."""
    pixels = np.asarray(pixel_values, np.float32)
    if pixels.ndim != 4:
        raise InputError(f"pixel_values must be [B, C, H, W], got {list(pixels.shape)}")
    return pixels.transpose(0, 2, 3, 1)


def check_sinks(config: ModelConfig) -> None:
    """Raises ConfigError for a sink dimension that the model does not have."""
    sinks = config.sinks
    width_in = config.vision.hidden_size * len(config.feature_layers)
    for name, dims, width in (("vit_dims", sinks.vit_dims, width_in), ("llm_dims", sinks.llm_dims, config.text.hidden_size)):
        if bad := [d for d in dims if not 0 <= d < width]:
            raise ConfigError(f"sinks.{name}: dimension {bad[0]} is outside the model width {width}")


def check_gate_input(gate: GateConfig, config: ModelConfig) -> None:
    """`check_gate` for settings that a user gave: raises ConfigError."""
    try:
        check_gate(gate, config)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_method_input(method: MethodConfig, config: ModelConfig) -> None:
    """Raises ConfigError for a method that the model cannot carry."""
    try:
        check_method(method, config)
    except ValueError as error:
        raise ConfigError(str(error)) from None


@functools.partial(jax.jit, static_argnums=2)
def _logits(params: dict, batch: Batch, graphdef: Any) -> jax.Array:
    model = assemble(graphdef, params)
    return model.language_model.logits(model(batch).hidden)


@functools.partial(jax.jit, static_argnums=3)
def _loss_and_grads(gates: dict, frozen: dict, batch: Batch, graphdef: Any) -> tuple[jax.Array, dict]:
    return jax.value_and_grad(lambda g: answer_loss(assemble(graphdef, frozen, g), batch)[0])(gates)


@functools.partial(jax.jit, static_argnums=2)
def _v_sinks(params: dict, pixels: jax.Array, graphdef: Any) -> jax.Array:
    return assemble(graphdef, params).image_features(pixels)[1]


@functools.partial(jax.jit, static_argnums=2)
def _ratios(params: dict, batch: Batch, graphdef: Any) -> jax.Array:
    return assemble(graphdef, params)(batch).ratios


@functools.partial(jax.jit, static_argnums=(2, 3))
def read_batch(params: dict, batch: Batch, graphdef: Any, max_new_tokens: int) -> tuple[ReadPrompts, KVCache]:
    """`model.generate.read_prompts`, jitted."""
    return read_prompts(assemble(graphdef, params), batch, max_new_tokens=max_new_tokens)


@functools.partial(jax.jit, static_argnums=(4, 5))
def answer_batch(
    params: dict, batch: Batch, read: ReadPrompts, cache: KVCache, graphdef: Any, max_new_tokens: int
) -> Generated:
    """`model.generate.answer_prompts`, jitted."""
    return answer_prompts(assemble(graphdef, params), batch, read, cache, max_new_tokens=max_new_tokens)
