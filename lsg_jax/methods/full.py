"""Training of the model itself: all parameters of the named parts, the others frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import jax
import jax.numpy as jnp

from lsg_jax.config import ModelConfig, Part
from lsg_jax.config.ranges import Table
from lsg_jax.errors import ConfigError
from lsg_jax.methods.method import Method


@dataclass(frozen=True)
class FullConfig(Table, name="full"):
    """Training of the model itself: all parameters of the parts that are named, the others frozen.

    LLaVA is made in two stages, with `["projector"]` on captions and the default on conversations.

    Attributes:
        parts: parts of the model that are trained.
    """

    parts: tuple[Part, ...] = ("projector", "language_model")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ConfigError(f"full.parts is {list(self.parts)}: name some of {', '.join(get_args(Part))}, each once")


@dataclass(frozen=True)
class Full(Method):
    """Parts of the model, trained in float32 from the frozen ones."""

    settings: FullConfig = field(default_factory=FullConfig)

    Settings = FullConfig
    trains = True
    trains_inputs = True

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that are trained."""
        return self.settings.parts

    def for_model(self, config: ModelConfig) -> Full:
        """Refuses to train weights that are stored in 8 bits."""
        if "language_model" in self.parts and config.text.weights == "int8":
            raise ConfigError(
                "full.parts names the language model, whose weights are 8-bit here: convert it to bfloat16 or float32"
            )
        return self

    def initial(self, config: ModelConfig, params: dict[str, Any], key: jax.Array) -> dict[str, Any]:
        """The parts as they are."""
        return {part: float32_copy(params[part]) for part in self.parts}


def float32_copy(parameters: Any) -> Any:
    """A float32 copy of a tree of parameters, which training may donate."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), parameters)
