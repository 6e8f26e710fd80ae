"""Configuration: frozen dataclasses, strict TOML, dotted overrides.

`ModelConfig` (model.py) describes a converted checkpoint and lives in its manifest. `RunConfig` (run.py; methods.py for what is
done to the model) describes a training or evaluation run and is read from a TOML file (loading.py). Every number states its
range beside it (ranges.py). Every unknown field, wrong type and impossible value is a `ConfigError` of one line.
"""

from lsg_jax.config.loading import apply_override, from_dict, load_run_config, to_dict
from lsg_jax.config.methods import (
    DiySinkConfig,
    FixedConfig,
    FullConfig,
    GateConfig,
    Grouping,
    LoraConfig,
    Method,
    MethodConfig,
    Part,
    Signal,
    SinkFrontConfig,
    VarConfig,
)
from lsg_jax.config.model import (
    Activation,
    Aspect,
    Criterion,
    ImageConfig,
    ModelConfig,
    RopeConfig,
    SinkConfig,
    TextConfig,
    VisionConfig,
)
from lsg_jax.config.run import DataConfig, EvalConfig, MeshConfig, Protocol, Remat, RunConfig, Template, TrainConfig

__all__ = [
    "Activation",
    "Aspect",
    "Criterion",
    "DataConfig",
    "DiySinkConfig",
    "EvalConfig",
    "FixedConfig",
    "FullConfig",
    "GateConfig",
    "Grouping",
    "ImageConfig",
    "LoraConfig",
    "MeshConfig",
    "Method",
    "MethodConfig",
    "ModelConfig",
    "Part",
    "Protocol",
    "Remat",
    "RopeConfig",
    "RunConfig",
    "Signal",
    "SinkConfig",
    "SinkFrontConfig",
    "Template",
    "TextConfig",
    "TrainConfig",
    "VarConfig",
    "VisionConfig",
    "apply_override",
    "from_dict",
    "load_run_config",
    "to_dict",
]
