"""The plug-in for lmms-eval (extra `lmms`). This file is what its entry point loads: nothing heavy is imported here."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` by which lmms-eval knows `--model lsg_jax`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="lsg_jax", simple_class_path="lsg_jax.eval.lmms.model.LsgJax")
