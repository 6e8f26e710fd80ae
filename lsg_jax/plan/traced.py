"""FLOPs of a function from its jaxpr: the work of the algorithm, on all devices together, without compiling."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from lsg_jax.plan.convolution import convolution_flops
from lsg_jax.plan.hlo_text import Array
from lsg_jax.plan.kernels import Kernel, kernel_flops


def traced_flops(
    function: Callable[..., Any],
    *arguments: Any,
    trips: Mapping[str, float] | None = None,
    kernels: Callable[[Kernel], float] = kernel_flops,
) -> float:
    """Multiplications and additions of the matrix products, convolutions and kernels of a function, without dead code.

    Args:
        arguments: arrays or ShapeDtypeStructs.
        trips, kernels: as `hlo.analyse` takes them.

    Raises:
        ValueError: a loop of unknown length that `trips` does not name, or a kernel that `kernels` does not know.
    """
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    jaxpr = jitted.trace(*arguments).jaxpr.jaxpr
    return _Count(dict(trips or {}), kernels).of(jaxpr)


class _Count:
    def __init__(self, trips: dict[str, float], kernels: Callable[[Kernel], float]):
        self.trips, self.kernels = trips, kernels

    def of(self, jaxpr: Jaxpr) -> float:
        used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # loop bodies are not changed by it
        return sum(map(self.equation, used.eqns))

    def equation(self, equation: Any) -> float:
        name, params = equation.primitive.name, equation.params
        shapes = [value.aval.shape for value in equation.invars if hasattr(value.aval, "shape")]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[0][axis] for axis in contracted)
        if name == "conv_general_dilated":
            return _convolution(shapes[0], shapes[1], equation.outvars[0].aval.shape, params)
        if name == "pallas_call":
            return self.kernels(_kernel(equation))
        inner = [self.of(inside) for inside in jaxprs_in_params(params)]
        if name == "cond":
            return max(inner)
        return self.times(equation) * sum(inner)

    def times(self, equation: Any) -> float:
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            return params["length"]
        if name == "shard_map":  # the body has the shapes of one device
            return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        if name != "while":
            return 1
        if not any(map(self.of, jaxprs_in_params(params))):
            return 0
        traceback = equation.source_info.traceback
        for frame in traceback.frames if traceback is not None else []:
            if (function := frame.function_name.rpartition(".")[2]) in self.trips:
                return self.trips[function]
        raise ValueError(f"a loop of unknown length ({equation.source_info.name_stack}): state how often it runs")


def _convolution(left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], params: Mapping[str, Any]) -> float:
    layout = params["dimension_numbers"]
    return convolution_flops(
        rows=left[layout.lhs_spec[0]] // params["batch_group_count"],
        features=right[layout.rhs_spec[1]],
        out_features=out[layout.out_spec[1]],
        axes=[
            (left[i], out[o], right[k], stride, low, base, dilation)
            for i, o, k, stride, (low, _), base, dilation in zip(
                layout.lhs_spec[2:],
                layout.out_spec[2:],
                layout.rhs_spec[2:],
                params["window_strides"],
                params["padding"],
                params["lhs_dilation"],
                params["rhs_dilation"],
                strict=True,
            )
        ],
    )


def _kernel(equation: Any) -> Kernel:
    operands, results = (
        tuple(Array(str(v.aval.dtype), v.aval.shape) for v in side) for side in (equation.invars, equation.outvars)
    )
    noted = str(dict(equation.params.get("metadata") or {}).get("xprof_metadata", ""))
    settings = {name: int(value) for name, value in re.findall(r'"(\w+)": (\d+)', noted)}
    return Kernel(equation.params["name"] or "", operands, results, settings)
