"""FLOPs of a convolution."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

Axis = tuple[int, int, int, int, int, int, int]
"""One spatial dimension: inputs, outputs, window size, stride, padding before, dilation of inputs and of the window."""


def convolution_flops(*, rows: int, features: int, out_features: int, axes: Sequence[Axis]) -> float:
    """FLOPs without window positions on padding or between dilated values.

    XLA for TPUs writes every matrix product as a convolution, whose window often covers one value and otherwise padding.

    Args:
        rows: batch size divided by the number of batch groups.
        features: input features divided by the number of feature groups.
    """
    return 2.0 * rows * features * out_features * math.prod(_taps(*axis) for axis in axes)


@functools.cache
def _taps(inputs: int, outputs: int, size: int, stride: int, pad: int, base: int, dilation: int) -> int:
    """Number of (output o, window position t) whose input position, o stride + t dilation - pad, holds a value."""
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
