"""8-bit weights: symmetric int8, with one float32 scale for each output channel of a kernel (`lsg_jax.model.layers.Linear`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lsg_jax.config import is_scale
from lsg_jax.model.layers import LARGEST


def scale_of(kernel: str) -> str:
    """The leaf that scales the kernel of this name."""
    return f"{kernel}_scale"


def scales(leaves: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Name of each int8 kernel among the leaves of a model -> shape of its scale, with the layer axis."""
    return {name.removesuffix("_scale"): shape for name, shape in leaves.items() if is_scale(name)}


def quantize(kernel: np.ndarray, in_axes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a kernel to int8.

    Args:
        kernel: float32 [*in_shape, *out_shape]. in_axes: number of its input axes.

    Returns:
        int8 like the kernel, in -127 to 127, and the scales float32 [*out_shape]: kernel = int8 * scale, up to scale / 2.
    """
    inputs = tuple(range(in_axes))
    largest = np.maximum(kernel.max(inputs), -kernel.min(inputs))
    scale = np.where(largest > 0, largest / np.float32(LARGEST), np.float32(1)).astype(np.float32)
    scaled = kernel / scale
    return np.rint(scaled, out=scaled).astype(np.int8), scale


def dequantize(kernel: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 kernel of the int8 one and its scales."""
    return kernel * scale  # int8 * float32 is float32
