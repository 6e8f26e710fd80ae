"""A run that is ready to step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lsg_jax.checkpoint import RunFolder, StepMeta
from lsg_jax.data.pipeline import TrainingData
from lsg_jax.run_config import RunConfig
from lsg_jax.train.goodput import Goodput
from lsg_jax.train.seeds import SeedFolders
from lsg_jax.types import Batch, TrainState
from lsg_jax.vlm import VLM


@dataclass
class Trainer:
    """A run that is ready to step; `state` is the last saved or the initial one.

    Attributes:
        step: jitted (state, frozen, batch) -> (state, metrics); donates the state.
        total_steps: the step at which the run is complete.
        goodput: time by activity, since the start of this process or of `train`.
    """

    config: RunConfig
    vlm: VLM
    data: TrainingData
    step: Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Any]]]
    state: TrainState
    total_steps: int
    run: RunFolder | SeedFolders
    goodput: Goodput

    def save(self) -> None:
        """Saves what is trained, the optimiser state, counters and the data position under the current step."""
        self.run.save(int(self.state.step), self.state, meta=StepMeta(self.data.get_state(), self.vlm.digest))
