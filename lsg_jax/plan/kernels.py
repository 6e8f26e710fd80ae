"""FLOPs of Pallas kernels: a compiled program shows the operands of a kernel, but not its computation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lsg_jax.plan.hlo_text import Array


@dataclass(frozen=True)
class Kernel:
    """A kernel call.

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
# matrix products per pair of query and key blocks; the backward pass recomputes the scores
SPLASH_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}
FUSED_BACKWARD = 5  # all three gradients in one kernel


def kernel_flops(kernel: Kernel) -> float:
    """FLOPs of splash attention with the causal mask of `model.splash_attention`: the blocks on and below the diagonal.

    With a sliding window the kernel skips blocks that are counted here.

    Raises:
        ValueError: another kernel.
    """
    for part, products in SPLASH_PRODUCTS.items():
        if f"splash_mha_{part}" in kernel.name:
            queries = next(array.shape for array in kernel.operands if array.dtype in FLOATS and len(array.shape) > 2)
            if part == "dkv" and any(len(array.shape) > len(queries) for array in kernel.results):
                products = FUSED_BACKWARD  # the query gradient comes in parts that are summed later
            *rows, heads, length, width = queries
            suffix = {"fwd": "", "dkv": "_dkv", "dq": "_dq"}[part]
            high, wide = (kernel.settings[f"block_{side}{suffix}"] for side in ("q", "kv"))
            visited = sum(min(length, -(-(start + high) // wide) * wide) for start in range(0, length, high))
            return 2.0 * math.prod(rows) * heads * products * high * visited * width
    raise ValueError(f"kernel {kernel.name}: its FLOPs are unknown")
