"""Configuration: frozen dataclasses, strict TOML, dotted overrides.

`ModelConfig` (model.py) describes a converted checkpoint and lives in its manifest. run.py and gates.py hold tables of a run's
TOML file; other methods have theirs in lsg_jax/methods/, and lsg_jax/run_config.py is the whole. Every number states its range
beside it (ranges.py). Every unknown field, wrong type and impossible value is a `ConfigError` of one line.
"""

from lsg_jax.config.gates import (
    GateConfig,
    Grouping,
    Part,
    Signal,
)
from lsg_jax.config.loading import apply_override, from_dict, to_dict
from lsg_jax.config.model import (
    Activation,
    Aspect,
    Canvas,
    Criterion,
    ImageConfig,
    ModelConfig,
    RopeConfig,
    SinkConfig,
    SinkSources,
    TextConfig,
    VisionConfig,
    Weights,
    identity,
    is_scale,
)
from lsg_jax.config.run import (
    BatchSize,
    BenchmarkKind,
    DataConfig,
    EvalConfig,
    MeshConfig,
    Protocol,
    Remat,
    Template,
    TrainConfig,
)

__all__ = [
    "Activation",
    "Aspect",
    "BatchSize",
    "BenchmarkKind",
    "Canvas",
    "Criterion",
    "DataConfig",
    "EvalConfig",
    "GateConfig",
    "Grouping",
    "ImageConfig",
    "MeshConfig",
    "ModelConfig",
    "Part",
    "Protocol",
    "Remat",
    "RopeConfig",
    "Signal",
    "SinkConfig",
    "SinkSources",
    "Template",
    "TextConfig",
    "TrainConfig",
    "VisionConfig",
    "Weights",
    "apply_override",
    "from_dict",
    "identity",
    "is_scale",
    "to_dict",
]
