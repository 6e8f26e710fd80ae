"""FLOPs of Pallas kernels: a compiled program shows their operands, but not what they compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lsg_jax.plan.hlo_text import Array


@dataclass(frozen=True)
class Kernel:
    """A kernel as a program calls it.

    Attributes:
        name: for example `splash_mha_fwd_segmented_residuals.2`.
        operands, results: on one device.
        settings: block sizes and the like.
    """

    name: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    settings: Mapping[str, int]


FLOATS = ("bf16", "f32", "bfloat16", "float32")  # as HLO and as JAX name them
# products of a block of queries with a block of keys; those of the backward pass compute the scores again
SPLASH_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}
FUSED_BACKWARD = 5  # all three gradients in one kernel


def kernel_flops(kernel: Kernel) -> float:
    """FLOPs of splash attention with the causal mask of `model.splash_attention`: blocks on and below the diagonal.

    Raises:
        ValueError: another kernel.
    """
    for part, products in SPLASH_PRODUCTS.items():
        if f"splash_mha_{part}" in kernel.name:
            queries = next(array.shape for array in kernel.operands if array.dtype in FLOATS and len(array.shape) > 2)
            if part == "dkv" and any(len(array.shape) > len(queries) for array in kernel.results):
                products = FUSED_BACKWARD  # the gradient of the queries comes in parts, to be summed
            *rows, heads, length, width = queries
            suffix = {"fwd": "", "dkv": "_dkv", "dq": "_dq"}[part]
            high, wide = (kernel.settings[f"block_{side}{suffix}"] for side in ("q", "kv"))
            visited = sum(min(length, -(-(start + high) // wide) * wide) for start in range(0, length, high))
            return 2.0 * math.prod(rows) * heads * products * high * visited * width
    raise ValueError(f"kernel {kernel.name}: nobody has said what it computes")
