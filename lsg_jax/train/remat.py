"""`train.remat = "auto"`: the fastest policy whose compiled step fits the memory of a device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax

from lsg_jax.errors import ConfigError
from lsg_jax.memory import GIB, device_bytes
from lsg_jax.model.language_model import REMAT

logger = logging.getLogger(__name__)


def fastest_that_fits(compile_with: Callable[[str], Any], memory: int) -> tuple[str, Any]:
    """Compiles the step under one policy after the other, from the fastest to the smallest, until one fits.

    Args:
        compile_with: policy -> the compiled step (`jax.stages.Compiled`).
        memory: bytes of one device.

    Returns:
        The policy and its compiled step.

    Raises:
        ConfigError: none fits.
    """
    needed = {}
    for policy in REMAT:
        try:
            compiled = compile_with(policy)
            needed[policy] = device_bytes(compiled)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):  # a TPU's compiler refuses what does not fit
                raise
            logger.info("train.remat auto: %s does not fit", policy)
            continue
        if needed[policy] <= memory:
            logger.info("train.remat auto: %s, %.1f of %.1f GiB a device", policy, needed[policy] / GIB, memory / GIB)
            return policy, compiled
        logger.info("train.remat auto: %s needs %.1f of %.1f GiB a device", policy, needed[policy] / GIB, memory / GIB)
    least = f", the smallest needs {min(needed.values()) / GIB:.1f} GiB" if needed else ""
    raise ConfigError(
        f"train.remat: no policy fits {memory / GIB:.1f} GiB a device{least}; lower train.batch_size, raise train.accumulate, "
        "or take more devices"
    )
