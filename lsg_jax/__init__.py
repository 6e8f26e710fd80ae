"""Find, understand and tame attention sinks in vision-language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsg_jax.api import load
    from lsg_jax.config import GateConfig, SinkConfig
    from lsg_jax.vlm import VLM

__version__ = "0.1.0"

__all__ = ["VLM", "GateConfig", "SinkConfig", "load"]


def __getattr__(name: str) -> Any:
    """Imports what is used when it is first used: `lsg` handles signals before it imports anything, and JAX only if needed."""
    if name == "load":
        from lsg_jax.api import load

        return load
    if name == "VLM":
        from lsg_jax.vlm import VLM

        return VLM
    if name in ("GateConfig", "SinkConfig"):
        from lsg_jax import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
