"""Where the parts of PyTorch models of each family are, and which visual token each patch becomes (extra [torch])."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma3ForConditionalGeneration,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    SmolVLMForConditionalGeneration,
    VipLlavaForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.vision_utils import get_vision_window_index

from lsg_jax.errors import InputError


class Stack:
    """LLaVA-1.5 and ViP-LLaVA: each patch is one token.

    Attributes:
        connector: the module whose input are the patches that become tokens.
        decoder: the language model.
        key_axis: where the token axis is in the output of the last module that makes keys.
    """

    key_axis = 1

    def __init__(self, model: Any):
        self.model = model
        self.decoder = model.model.language_model

    @property
    def connector(self) -> nn.Module:
        """See the class."""
        return self.model.model.multi_modal_projector

    def before_model(self, kwargs: dict[str, Any]) -> None:
        """Checks the arguments of a forward pass. Raises InputError for what gates cannot follow."""

    def patches(self, given: torch.Tensor) -> list[torch.Tensor]:
        """The input of the connector as features [P, D] of each square or image."""
        return list(given)

    def tokens(self, marks: list[torch.Tensor], kwargs: dict[str, Any]) -> torch.Tensor:
        """For each image token, in order: above 0 where a patch behind it is marked, -1 for a newline.

        Args:
            marks: float [P] in [0, 1], one a square or image.
            kwargs: of the model's forward.
        """
        return torch.cat(marks)


class Tiled(Stack):
    """LLaVA-NeXT and OneVision: tiles of a canvas, with newlines."""

    def tokens(self, marks: list[torch.Tensor], kwargs: dict[str, Any]) -> torch.Tensor:
        stacked = torch.stack(marks)[..., None]
        inner, config = self.model.model, self.model.config
        if (videos := kwargs.get("pixel_values_videos")) is not None:  # all of one length, as the model takes them
            pooled = inner.apply_pooling(stacked)[..., 0].reshape(len(videos), -1)
            return nn.functional.pad(pooled, (0, 1), value=-1.0).flatten()
        onevision = isinstance(self.model, LlavaOnevisionForConditionalGeneration)
        sizes = kwargs["image_sizes"]
        numbers = kwargs.get("batch_num_images")
        numbers = [1] * len(sizes) if numbers is None else [int(number) for number in numbers]
        alone = [number == 1 for number in numbers for _ in range(number)]
        tiles = [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            if single or not onevision
            else 1
            for size, single in zip(sizes, alone, strict=True)
        ]
        how = "vision_aspect_ratio" if onevision else "vision_feature_select_strategy"
        packed, _ = inner.pack_image_features(
            torch.split(stacked, tiles),
            sizes,
            image_newline=-torch.ones_like(stacked[0, :1, 0]),
            **{how: getattr(config, how)},
        )
        return torch.cat(packed)[:, 0]


class Shuffled(Stack):
    """InternVL: the connector gets patches that were already put side by side along the channels."""

    def patches(self, given: torch.Tensor) -> list[torch.Tensor]:
        return list(given.reshape(len(given), -1, self.model.config.vision_config.hidden_size))

    def tokens(self, marks: list[torch.Tensor], kwargs: dict[str, Any]) -> torch.Tensor:
        merged = round(1 / self.model.config.downsample_ratio) ** 2
        return torch.cat(marks).reshape(-1, merged).amax(-1)


class Squares(Stack):
    """Gemma 3: a square of patches becomes a token."""

    key_axis = 2

    @property
    def side(self) -> int:
        """Patches of the square behind one token, along a side."""
        projector: Any = self.connector
        return projector.kernel_size

    def tokens(self, marks: list[torch.Tensor], kwargs: dict[str, Any]) -> torch.Tensor:
        grid = round(len(marks[0]) ** 0.5)
        squares = torch.stack(marks).reshape(-1, grid // self.side, self.side, grid // self.side, self.side)
        return squares.amax((2, 4)).flatten()


class SmolVLM(Squares):
    """SmolVLM: the same, and the parts have other names."""

    key_axis = 1

    def __init__(self, model: Any):
        self.model = model
        self.decoder = model.model.text_model

    @property
    def connector(self) -> nn.Module:
        return self.model.model.connector

    @property
    def side(self) -> int:
        return self.model.config.scale_factor


class Qwen(Stack):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, whose patches come square by square."""

    @property
    def connector(self) -> nn.Module:
        return self.model.model.visual.merger

    def before_model(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("pixel_values_videos") is not None:
            raise InputError("gates do not follow videos of Qwen-VL: give images")

    def patches(self, given: torch.Tensor) -> list[torch.Tensor]:
        return list(given.split(self._grid.prod(-1).tolist()))

    def tokens(self, marks: list[torch.Tensor], kwargs: dict[str, Any]) -> torch.Tensor:
        vision = self.model.config.vision_config
        merged = torch.cat(marks).reshape(-1, vision.spatial_merge_size**2).amax(-1)
        if not hasattr(vision, "window_size"):
            return merged
        # the merger of Qwen2.5-VL gets them window by window
        index, _ = get_vision_window_index(self._grid, vision.spatial_merge_size, vision.window_size, vision.patch_size)
        return merged[torch.argsort(index).to(merged.device)]

    def before_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook that notes the grids of the images, int [n, 3]."""
        self._grid: torch.Tensor = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]


STACKS: dict[type, type[Stack]] = {
    LlavaForConditionalGeneration: Stack,
    VipLlavaForConditionalGeneration: Stack,
    LlavaNextForConditionalGeneration: Tiled,
    LlavaOnevisionForConditionalGeneration: Tiled,
    InternVLForConditionalGeneration: Shuffled,
    Gemma3ForConditionalGeneration: Squares,
    SmolVLMForConditionalGeneration: SmolVLM,
    Qwen2VLForConditionalGeneration: Qwen,
    Qwen2_5_VLForConditionalGeneration: Qwen,
    Qwen3VLForConditionalGeneration: Qwen,
}
"""The model's class in transformers -> its parts."""


def stack_of(model: Any) -> Stack:
    """The parts of a model. Raises InputError for a class that gates do not attach to."""
    for kind, stack in STACKS.items():
        if isinstance(model, kind):
            return stack(model)
    kinds = ", ".join(kind.__name__ for kind in STACKS)
    raise InputError(f"gates attach to {kinds}, not to {type(model).__name__}")
