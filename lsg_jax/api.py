"""The public API: `lsg_jax.load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from lsg_jax.config import SinkConfig, Template
from lsg_jax.opening import load_backbone, open_trained
from lsg_jax.vlm import VLM


def load(
    model_dir: str | Path,
    gates: Any = None,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    sinks: SinkConfig | None = None,
    template: Template | None = None,
) -> VLM:
    """Opens a converted model, with gates, or what else a run has trained, if given.

    Args:
        model_dir: folder written by `lsg convert`.
        gates: run folder of `lsg train` (`RUN@10` for the gate of layer 10 only), portable gate file, Hub id of gates
            (`owner/name` or `owner/name@revision`, unless there is such a path here), PortableGates, or None.
        dtype: of the weights: "float32", "bfloat16" or "float16"; None keeps them as stored. 8-bit weights stay 8-bit, and
            "int8" demands a folder of them.
        mesh: devices to spread the weights over (lsg_jax.sharding.make_mesh); None for one device.
        sinks: what counts as a sink; None takes what the gates were trained with, else what the model folder says.
        template: the text template of prompts, by the names of `data.template`; None takes the checkpoint's own.

    Raises:
        InputError, ConfigError, CheckpointError: each with one line that says what, where and what to do.
    """
    vlm = load_backbone(model_dir, dtype=dtype, sinks=sinks, mesh=mesh, template=template)
    return vlm if gates is None else open_trained(vlm, gates, sinks=sinks)
