"""FLOPs of a convolution."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

Axis = tuple[int, int, int, int, int, int, int]
"""One spatial dimension: inputs, outputs, taps of the window, stride, padding before, dilation of inputs and of the window."""


def convolution_flops(*, rows: int, features: int, out_features: int, axes: Sequence[Axis]) -> float:
    """Without the taps that fall on padding or between dilated values.

    A TPU runs every matrix product as a convolution, whose windows often cover one value and else only padding.

    Args:
        rows: of the batch; divided by the number of batch groups.
        features: that enter one output feature: divided by the number of feature groups.
    """
    return 2.0 * rows * features * out_features * math.prod(_taps(*axis) for axis in axes)


@functools.cache
def _taps(inputs: int, outputs: int, size: int, stride: int, pad: int, base: int, dilation: int) -> int:
    """(output, tap) pairs that meet a value of the input: output o and tap t meet position o stride + t dilation - pad."""
    count = 0
    for tap in range(size):
        offset = tap * dilation - pad
        if base == 1:
            first, last = max(0, math.ceil(-offset / stride)), min(outputs - 1, (inputs - 1 - offset) // stride)
            count += max(0, last - first + 1)
        else:
            met = (o * stride + offset for o in range(outputs))
            count += sum(position % base == 0 and 0 <= position // base < inputs for position in met)
    return count
