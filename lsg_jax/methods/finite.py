"""Values that become NaN or infinite on the way: an error that names the question and what was done to the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lsg_jax.errors import NonFiniteError
from lsg_jax.methods.method import BASE, Method
from lsg_jax.methods.registry import name_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


def check_finite(values: NDArray[np.floating], names: Sequence[str], method: Method) -> None:
    """Refuses results that are not finite, before anything is kept of them.

    Args:
        values: [B, ...], a row for each question.
        names: of the questions, for the error.

    Raises:
        NonFiniteError: names the first question and the method.
    """
    sound = np.isfinite(values).all(tuple(range(1, values.ndim)))
    if not sound.all():
        raise NonFiniteError(
            f"{names[int(np.argmin(sound))]}: {_under(method)} computes NaN or infinity, so its answer is not kept; "
            'check what was trained, or take dtype = "float32"'
        )


def _under(method: Method) -> str:
    """`the base model`, `the model with gates at layers [3, 6]`, `the model under lora`."""
    if method.gate is not None:
        return f"the model with gates at layers {list(method.gate.layers)}"
    return "the base model" if method == BASE else f"the model under {name_of(method)}"
