"""A vision-language model with its weights on devices, and the compiled calls that users script against."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from PIL import Image

from lsg_jax.answer_programs import answer_batch, read_batch
from lsg_jax.checkpoint.processes import host_array
from lsg_jax.config import Aspect, GateConfig, ModelConfig, SinkConfig, Template
from lsg_jax.config.ranges import Range
from lsg_jax.data.conversation import IMAGE_TAG, RecordError
from lsg_jax.data.encoded import Encoded
from lsg_jax.data.images import opened_images, to_patches
from lsg_jax.data.native import arrange, native_fields, patch_bucket, place_patches
from lsg_jax.data.pixel_arrays import native_grids, native_images, to_tiles
from lsg_jax.data.processor import Processor
from lsg_jax.data.rows import Pixels
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.gating.portable import to_torch_layout
from lsg_jax.memory import check_answers
from lsg_jax.methods.finite import check_finite
from lsg_jax.methods.first_questions import FirstQuestion, routes
from lsg_jax.methods.method import BASE, Method
from lsg_jax.methods.method_model import abstract_model, assemble, join_trained
from lsg_jax.methods.registry import name_of
from lsg_jax.model.generate import Generated, ReadPrompts
from lsg_jax.model.loss import answer_loss, answer_slots
from lsg_jax.model_inputs import is_visual, make_batch
from lsg_jax.types import IGNORE, Batch, KVCache, VisualInput, VisualTokens

if TYPE_CHECKING:
    from lsg_jax.look import Look

PROMPT_BUCKET = 64  # prompt lengths are rounded up to a multiple, so that few shapes compile
REPLY_TOKENS = 8  # longest reply to a method's first question; one word is expected


class VLM:
    """A vision-language model with its weights, with or without a method.

    Args:
        config: the model; its `sinks` are the settings used.
        frozen: backbone parameters, a nested dict.
        method: what is done to the model.
        trained: parameters of a trained method, such as gates stacked over their layers; None for other methods.
        folder: the model folder, for tokenizer and processor files.
        digest: identity of the backbone's weights.
        mesh: the devices that hold the weights; None for one device.
        template: the text template of prompts; None for the checkpoint's own.
        origin: `owner/name@commit` of `trained`, if it was fetched from the Hugging Face Hub.

    Raises:
        ConfigError: the method does not fit the model, or a sink dimension does not exist.
    """

    def __init__(
        self,
        config: ModelConfig,
        frozen: dict,
        *,
        method: Method = BASE,
        trained: dict | None = None,
        folder: Path | None = None,
        digest: str = "",
        mesh: jax.sharding.Mesh | None = None,
        template: Template | None = None,
        origin: str = "",
    ):
        check_sinks(config)
        method = method.for_model(config)
        if method.trains and trained is None:
            raise ConfigError(f"method {name_of(method)} is trained: open a run of `lsg train` with it")
        self.config = config
        self.method = method
        self.frozen = frozen
        self.trained = trained
        self.folder = folder
        self.digest = digest
        self.mesh = mesh
        self.template = template
        self.origin = origin
        self.graphdef, _ = abstract_model(config, method, mesh=mesh)

    @property
    def gate(self) -> GateConfig | None:
        """The gates of the model; None without any."""
        return self.method.gate

    @functools.cached_property
    def processor(self) -> Processor:
        """Tokenizer and image preparation of the model folder."""
        return self.make_processor()

    def make_processor(self, image_aspect: Aspect | None = None, template: Template | None = None) -> Processor:
        """Tokenizer and image preparation, with another image aspect or text template than the model's if given."""
        if self.folder is None:
            raise InputError("this model was not loaded from a folder: it has no tokenizer")
        choices: dict[str, Any] = {"image_aspect": image_aspect, "template": template or self.template}
        choices |= {"bos": not self.method.without_bos, "words": self.method.reads_words}
        return Processor.from_folder(self.folder / "hf", self.config, **choices)

    @property
    def params(self) -> dict:
        """All parameters, those of the method included, a nested dict."""
        return join_trained(self.frozen, self.trained)

    def plain(self) -> VLM:
        """The same weights without any method."""
        return self.with_method(BASE)

    def with_method(
        self, method: Method, trained: dict | None = None, *, sinks: SinkConfig | None = None, origin: str = ""
    ) -> VLM:
        """The same backbone under another method; `trained` holds its parameters, for a method that is trained, from `origin`.

        Raises:
            ConfigError: the method does not fit the model, for example a layer that does not exist.
        """
        config = dataclasses.replace(self.config, sinks=sinks or self.config.sinks)
        return VLM(
            config,
            self.frozen,
            method=method,
            trained=trained,
            folder=self.folder,
            digest=self.digest,
            mesh=self.mesh,
            template=self.template,
            origin=origin,
        )

    # Arrays in, arrays out, as the family's HF processor returns them; `more` are its other fields (model_inputs.make_batch).
    # `input_ids` int [B, T] hold one image token per visual token and newline; `pixel_values` is None for text only.

    def logits(
        self, input_ids: Any, pixel_values: Any = None, attention_mask: Any = None, gate_position: Any = None, **more: Any
    ) -> np.ndarray:
        """float32 [B, T, V]. `gate_position` int [B] defaults to the last unpadded token."""
        batch = self.batch(input_ids, pixel_values, attention_mask, gate_position, **more)
        return np.asarray(_logits(self.params, batch, self.graphdef))

    def loss_and_grads(
        self, input_ids: Any, pixel_values: Any, labels: Any, attention_mask: Any = None, **more: Any
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
        if self.trained is None or self.gate is None:
            raise InputError("loss_and_grads needs gates: lsg_jax.load(model_dir, gates=...)")
        labels = np.asarray(labels)
        supervised = labels[:, 1:] != IGNORE
        if not supervised.any(1).all():
            raise InputError(f"row {int(np.argmin(supervised.any(1)))} has no label: every row needs an answer")
        index, target = answer_slots(labels)
        batch = self.batch(input_ids, pixel_values, attention_mask, index[:, 0], **more)
        loss, gradients = _loss_and_grads(
            self.trained, self.frozen, dataclasses.replace(batch, answer_index=index, answer_target=target), self.graphdef
        )
        return float(loss), to_torch_layout(jax.tree.map(np.asarray, gradients), self.gate.layers)

    def generate_ids(
        self, input_ids: Any, pixel_values: Any = None, attention_mask: Any = None, max_new_tokens: int = 32, **more: Any
    ) -> np.ndarray:
        """int32 [B, N], greedy; N <= max_new_tokens ends where the last row ended, with pad tokens after each row's end."""
        return self.generate_batch(self.batch(input_ids, pixel_values, attention_mask, **more), max_new_tokens)

    def v_sinks(self, pixel_values: Any, image_grid_thw: Any = None) -> np.ndarray:
        """bool [images, P], patches that the vision tower made sinks, tile by tile in the order of the image.

        Of native images, bool [n] of the patches of all, in the order of `pixel_values` [n, C frames h w]; of InternVL,
        [tiles, P].
        """
        if not self.config.sinks.knows_v_sinks:
            raise ConfigError(
                "no V-sink dimensions are known for this model: load it with sinks=SinkConfig(vit_dims=(...,), ...)"
            )
        if self.config.vision.native:
            return self._native_v_sinks(pixel_values, image_grid_thw)
        patches = to_patches(to_tiles(pixel_values, self.config), self.config.vision.patch_size)
        return np.asarray(_v_sinks(self.params, VisualInput(patches), self.graphdef))

    def _native_v_sinks(self, pixel_values: Any, image_grid_thw: Any) -> np.ndarray:
        """`v_sinks` of native images: each is a row of its own."""
        config, grids = self.config, native_grids(image_grid_thw, self.config)
        patches = native_images(pixel_values, grids, config)
        length = patch_bucket(max((arrange(grid, config).length for grid in grids), default=1), config)
        placed = place_patches(patches, grids, len(grids), length, config)
        fields = native_fields(grids, len(grids), length, config)
        images = VisualInput(placed[:, None], **{name: field[:, None] for name, field in fields.items()})
        mask = np.asarray(_v_sinks(self.params, images, self.graphdef)).reshape(len(grids), length)
        return np.concatenate([row[arrange(grid, config).index] for row, grid in zip(mask, grids, strict=True)])

    def visual_tokens(
        self, input_ids: Any, pixel_values: Any = None, attention_mask: Any = None, gate_position: Any = None, **more: Any
    ) -> VisualTokens:
        """Where the visual tokens are, which of them are V-sinks, and where each lies in its image.

        Args:
            more: `image_sizes` among others; without it, boxes refer to the prepared square (LLaVA-NeXT and OneVision need it),
                and are NaN for InternVL's tiles.

        Returns:
            mask bool [B, T]; v_sink bool [B, T], False where no V-sink dimensions are known; box float32 [B, T, 4], the corners
            x0, y0, x1, y1 in units of the original image's sides, 0 outside `mask`. Patches of padding lie outside [0, 1].
        """
        batch, layouts = make_batch(self.config, input_ids, pixel_values, attention_mask, gate_position, **more)
        box = np.zeros((*batch.input_ids.shape, 4), np.float32)
        if batch.images is None:
            nothing = np.zeros(batch.input_ids.shape, bool)
            return VisualTokens(mask=nothing, v_sink=nothing, box=box)
        mask, v_sink, order = jax.tree.map(np.asarray, _visual_tokens(self.params, batch, self.graphdef))
        is_image = is_visual(batch, self.config)
        for row, images in enumerate(layouts):
            boxes = np.concatenate([layout.box for layout in images]) if images else np.zeros((0, 4), np.float32)
            box[row, is_image[row]] = boxes if order is None else boxes[order[row, : len(boxes)]]
        box[~mask] = 0
        return VisualTokens(mask=mask, v_sink=v_sink, box=box)

    def gate_ratios(
        self, input_ids: Any, pixel_values: Any = None, attention_mask: Any = None, **more: Any
    ) -> dict[int, np.ndarray]:
        """{layer: float32 [B, G]}, the softmax of each gate (sum 1, before `key_scale`); {} without gates or images."""
        batch = self.batch(input_ids, pixel_values, attention_mask, **more)
        if self.gate is None or batch.images is None:
            return {}
        ratios = np.asarray(_ratios(self.params, batch, self.graphdef))
        return {layer: ratios[layer - min(self.gate.layers)] for layer in self.gate.layers}

    # Images and text in, text out.

    def generate(self, images: Sequence[Any], prompts: Sequence[str], max_new_tokens: int = 32) -> list[str]:
        """Greedy answers.

        A method that asks first questions (`Method.first_questions`) has them answered by the plain model.

        Args:
            images: for each prompt a path, bytes, a PIL image, a list of these, or None for a question without an image.
            prompts: tags `<image>` say where several images stand, in order. Without any, the images come first.

        Raises:
            InputError: an image cannot be read, there is not an entry of `images` for each prompt, or a prompt is no text, is
                too long or has some tags, but not one for each of its images.
        """
        check_questions(images, prompts)
        if not prompts:
            return []
        batch = self.questions([opened_images(entry) for entry in images], prompts)
        return [self.processor.decode(row) for row in self.generate_batch(batch, max_new_tokens)]

    def look(
        self,
        images: Any,
        prompt: str,
        max_new_tokens: int = 32,
        maps: Sequence[str] = ("raw", "no_sinks"),
        *,
        layers: Sequence[int] = (),
    ) -> Look:
        """Where the model looks while it answers greedily, with whatever method it carries.

        A map takes 4 A L N V bytes, on the device and on the host: 0.4 GB for 32 answer tokens of a 7B model with 2,880 visual
        tokens. `lsg plan --programs look` counts it.

        Args:
            images: a path, bytes, a PIL image, or a list of these.
            maps: `raw`, `no_sinks` and `relative`, as `Look` describes them; `raw` is always made.
            layers: decoder layers whose hidden states and whole attention [N, T, T] are wanted too.

        Raises:
            InputError: as `generate`, or there is no image, a map or layer does not exist, or `max_new_tokens` is below 1.
        """
        from lsg_jax.look.compute import look

        return look(self, images, prompt, max_new_tokens, maps=maps, layers=layers)

    def questions(self, images: Sequence[Sequence[Image.Image]], prompts: Sequence[str]) -> Batch:
        """A left-padded batch of questions, each with its images; see `generate`."""
        encoded = [self._encoded(number, *entry) for number, entry in enumerate(zip(prompts, images, strict=True), start=1)]
        batch = self.pad_questions(encoded, list(map(self.processor.all_pixels, images)))
        if not any(images):
            batch = batch.without_images()
        if first := self.first_questions(prompts, list(map(bool, images))):
            asked = [(list(images[i]) if question.sees_image else None, question.text) for i, question in first]
            replies = self.plain().generate([shown for shown, _ in asked], [text for _, text in asked], REPLY_TOKENS)
            batch = dataclasses.replace(batch, route=routes(self.method, first, replies, range(len(prompts))))
        return batch

    def _encoded(self, number: int, prompt: str, images: Sequence[Image.Image]) -> Encoded:
        """The tokens of a prompt; its number, from 1, is for errors."""
        if not isinstance(prompt, str):
            raise InputError(f"prompt {number} is of type {type(prompt).__name__}; give a text")
        try:
            return self.processor.encode_question(prompt, image_sizes=[image.size for image in images])
        except RecordError as error:
            raise InputError(f"prompt {number}: {error}") from None

    def first_questions(self, prompts: Sequence[str], has_image: Sequence[bool]) -> list[tuple[int, FirstQuestion]]:
        """Index of a prompt with an image, and what the plain model is asked before it, for methods that ask."""
        shown = [(i, prompt.replace(IMAGE_TAG, "")) for i, prompt in enumerate(prompts) if has_image[i]]
        return [(i, question) for i, prompt in shown for question in self.method.first_questions(prompt)]

    def pad_questions(self, encoded: Sequence[Any], pixels: Sequence[Pixels | None]) -> Batch:
        """Left-padded batch of encoded questions; its length is rounded up so that few shapes compile."""
        longest = max(len(e.ids) for e in encoded)
        length = -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET
        return self.processor.collate(encoded, pixels, max_length=length, max_answer_tokens=1, padding_side="left")

    def generate_batch(self, batch: Batch, max_new_tokens: int) -> np.ndarray:
        """`generate_ids` for a batch that is already made. Raises NonFiniteError where logits are not finite."""
        made = self.generate_in_full(batch, max_new_tokens)
        check_finite(made.margin, [f"prompt {row}" for row in range(1, len(made.margin) + 1)], self.method)
        return made.tokens

    def generate_in_full(self, batch: Batch, max_new_tokens: int) -> Generated:
        """`generate_batch` with the margins and, of a gated model, the ratios float32 [gated layers, B, G]; on the host."""
        batch = self.as_asked(batch, max_new_tokens)
        read, cache = read_batch(self.params, batch, self.graphdef, max_new_tokens)
        return self.answer_read(batch, read, cache, max_new_tokens)

    def as_asked(self, batch: Batch, max_new_tokens: int) -> Batch:
        """The batch as the programs of `answer_programs` take it.

        Raises:
            ConfigError: the model has too few positions for the answers, or their keys and values do not fit.
        """
        Range(f"[1, {self.config.text.max_positions}]").check(max_new_tokens, "max_new_tokens", int)  # positions of the model
        rows, length = batch.input_ids.shape
        check_answers(self, rows, length + max_new_tokens, "lower max_new_tokens or the batch size")
        # the answer slots are not used, and would only add shapes to compile
        return dataclasses.replace(batch, answer_index=None, answer_target=None, row_id=None)

    def answer_read(self, batch: Batch, read: ReadPrompts, cache: KVCache, max_new_tokens: int) -> Generated:
        """The answers to prompts that were read, as `generate_in_full` returns them."""
        asked = batch.without_images()
        tokens, steps, margin, ratios = answer_batch(self.params, asked, read, cache, self.graphdef, max_new_tokens)
        steps = int(host_array(steps))
        if self.gate is not None and ratios is not None:
            ratios = host_array(ratios)[np.array(self.gate.layers) - min(self.gate.layers)]
        return Generated(host_array(tokens)[:, :steps], steps, host_array(margin), ratios if self.gate is not None else None)

    def batch(
        self, input_ids: Any, pixel_values: Any = None, attention_mask: Any = None, gate_position: Any = None, **more: Any
    ) -> Batch:
        """`model_inputs.make_batch`."""
        return make_batch(self.config, input_ids, pixel_values, attention_mask, gate_position, **more)[0]


def check_questions(images: Any, prompts: Any) -> None:
    """Raises InputError unless both are sequences with an entry for each question."""
    for name, value in (("images", images), ("prompts", prompts)):
        if isinstance(value, str | bytes | os.PathLike) or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
            raise InputError(
                f'{name} must be a list with one entry for each question, as in generate(["photo.jpg"], ["What is it?"])'
            )
    if len(images) != len(prompts):
        several = "; several images of one question are a list within the list"
        raise InputError(f"{len(images)} entries of images for {len(prompts)} prompts: give one for each{several}")


def check_sinks(config: ModelConfig) -> None:
    """Raises ConfigError for a sink dimension that the model does not have."""
    sinks = config.sinks
    width_in = config.vision.hidden_size * len(config.feature_layers)
    for name, dims, width in (("vit_dims", sinks.vit_dims, width_in), ("llm_dims", sinks.llm_dims, config.text.hidden_size)):
        if bad := [d for d in dims if not 0 <= d < width]:
            raise ConfigError(f"sinks.{name}: dimension {bad[0]} is outside the model width {width}")


@functools.partial(jax.jit, static_argnums=2)
def _logits(params: dict, batch: Batch, graphdef: Any) -> jax.Array:
    return assemble(graphdef, params).logits(batch)[0]


@functools.partial(jax.jit, static_argnums=3)
def _loss_and_grads(trained: dict, frozen: dict, batch: Batch, graphdef: Any) -> tuple[jax.Array, dict]:
    return jax.value_and_grad(lambda t: answer_loss(assemble(graphdef, frozen, t), batch)[0])(trained)


@functools.partial(jax.jit, static_argnums=2)
def _v_sinks(params: dict, images: VisualInput, graphdef: Any) -> jax.Array:
    return assemble(graphdef, params).image_features(images)[1]


@functools.partial(jax.jit, static_argnums=2)
def _visual_tokens(params: dict, batch: Batch, graphdef: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Mask and V-sinks bool [B, T], and `ConnectorTokens.order`."""
    model = assemble(graphdef, params)
    visual = model.sequence(batch).visual
    assert visual is not None and batch.images is not None
    order = model.connect(*model.image_features(batch.images), batch, model.language_model.embed(batch.input_ids)).order
    return visual.mask, visual.v_sink, order


@functools.partial(jax.jit, static_argnums=2)
def _ratios(params: dict, batch: Batch, graphdef: Any) -> jax.Array | None:
    return assemble(graphdef, params)(batch).ratios
