"""Find, understand and tame attention sinks in vision-language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lsg_jax.config import GateConfig, SinkConfig

if TYPE_CHECKING:
    from lsg_jax.api import load
    from lsg_jax.vlm import VLM

__version__ = "0.1.0"

__all__ = ["VLM", "GateConfig", "SinkConfig", "load"]


def __getattr__(name: str) -> Any:
    """Imports `load` and `VLM`, and JAX with them, when they are first used: commands that need no JAX start without it."""
    if name == "load":
        from lsg_jax.api import load

        return load
    if name == "VLM":
        from lsg_jax.vlm import VLM

        return VLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
