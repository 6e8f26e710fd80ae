"""The plug-in for lmms-eval (extra `lmms`). Its entry point loads this file, so it imports nothing heavy."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` that registers `--model lsg_jax` in lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="lsg_jax", simple_class_path="lsg_jax.eval.lmms.model.LsgJax")
