"""Find, understand and tame attention sinks in vision-language models."""

from lsg_jax.api import load
from lsg_jax.config import GateConfig, SinkConfig
from lsg_jax.vlm import VLM

__version__ = "0.1.0"

__all__ = ["VLM", "GateConfig", "SinkConfig", "load"]
