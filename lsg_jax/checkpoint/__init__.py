"""Stored parameters: the read-only backbone of a model folder and the steps of a run folder.

Only this package imports Orbax and TensorStore. It adds what they lack: every leaf has a digest that is checked when it is
read; a difference in name, shape or dtype is an error, never a cast; a step is deleted only after a newer one was read back.
"""

from lsg_jax.checkpoint.base import hf_problems, iter_base, load_base, verify_base
from lsg_jax.checkpoint.lock import FolderLock
from lsg_jax.checkpoint.manifest import MANIFEST, LeafEntry, Manifest, ModelSource, read_manifest, write_manifest
from lsg_jax.checkpoint.problem import Problem
from lsg_jax.checkpoint.run import Restored, RunFolder, read_step
from lsg_jax.checkpoint.run_record import Computation, RunRecord, read_run
from lsg_jax.checkpoint.seeds import SEEDS, read_seeds, seed_folder, write_seeds
from lsg_jax.checkpoint.step_log import METRICS, read_steps
from lsg_jax.checkpoint.steps import StepMeta
from lsg_jax.checkpoint.writer import BaseWriter, LeafSpec

__all__ = [
    "MANIFEST",
    "METRICS",
    "SEEDS",
    "BaseWriter",
    "Computation",
    "FolderLock",
    "LeafEntry",
    "LeafSpec",
    "Manifest",
    "ModelSource",
    "Problem",
    "Restored",
    "RunFolder",
    "RunRecord",
    "StepMeta",
    "hf_problems",
    "iter_base",
    "load_base",
    "read_manifest",
    "read_run",
    "read_seeds",
    "read_step",
    "read_steps",
    "seed_folder",
    "verify_base",
    "write_manifest",
    "write_seeds",
]
