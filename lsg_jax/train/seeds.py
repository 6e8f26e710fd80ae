"""Several seeds of a method (`train.seeds`): each a run folder of its own, trained together or one after the other.

A seed decides the initial values and, where the seeds have orders of their own (`data.order`), the order of the records. In
one order they are trained together: vision tower, connector and the layers below the lowest change run once a batch for all of
them, and everything above in one call with an axis of seeds. A method that trains what the decoder reads (`trains_inputs`) has
nothing to share but much to hold, so its seeds follow each other, and then each may as well have an order of its own.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from lsg_jax.checkpoint import RunFolder, StepMeta, read_seeds, seed_folder, write_seeds
from lsg_jax.checkpoint.processes import on_primary
from lsg_jax.checkpoint.run import Restored
from lsg_jax.checkpoint.run_record import RUN
from lsg_jax.errors import CheckpointError, ConfigError
from lsg_jax.files import check_only
from lsg_jax.run_config import RunConfig
from lsg_jax.train.run_record import BESIDE_A_RUN
from lsg_jax.types import TrainState

OVER_SEEDS = TrainState(trained=0, opt_state=0, step=None, skipped=0)
"""The axis of seeds in a state of several; they have taken the same steps."""


def together(config: RunConfig) -> bool:
    """Whether there are several seeds that share their passes over the model."""
    return config.train.seeds > 1 and not config.get_method().trains_inputs and config.data.order != -1


def seed_runs(config: RunConfig) -> dict[int, RunConfig]:
    """The run of each seed, which `train` would do alone as well."""
    order = config.order_seed if together(config) else None if config.data.order == -1 else config.data.order
    alone = replace(config, data=replace(config.data, order=order), train=replace(config.train, seeds=1))
    seeds = range(config.seed, config.seed + config.train.seeds)
    return {seed: replace(alone, seed=seed, output=str(seed_folder(config.output, seed))) for seed in seeds}


def members(run: RunFolder | SeedFolders, config: RunConfig) -> list[tuple[RunFolder, RunConfig]]:
    """Each run folder, with the configuration of its run."""
    if isinstance(run, RunFolder):
        return [(run, config)]
    return list(zip(run.folders, seed_runs(config).values(), strict=True))


def claim(config: RunConfig) -> None:
    """Makes the output folder one of these seeds; a collective.

    Raises:
        ConfigError: it holds other seeds, or a run of one. InputError: it holds something else.
    """
    path, seeds = Path(config.output), tuple(seed_runs(config))

    def compare() -> None:
        if (path / RUN).exists():
            raise ConfigError(f"{path}: holds a run of one seed; choose another output, or set train.seeds to 1")
        found = read_seeds(path)
        if not found:
            check_only(path, BESIDE_A_RUN, "run folder")
        if not any((seed_folder(path, seed) / RUN).exists() for seed in found):  # nothing there, or a start that failed
            write_seeds(path, seeds)
        elif found != seeds:
            there, asked = (", ".join(map(str, which)) for which in (found, seeds))
            raise ConfigError(f"{path}: holds the seeds {there}, not {asked}; choose another output, or undo the change")

    on_primary(compare)


class SeedFolders:
    """The run folders of seeds that are trained together, used as one `RunFolder`: all or none of them hold a step.

    Attributes:
        path: the folder of all.
        folders: one for each seed.
    """

    def __init__(self, config: RunConfig):
        self.path = Path(config.output)
        self.folders = [RunFolder(run.output, keep=run.train.keep) for run in seed_runs(config).values()]

    @contextlib.contextmanager
    def lock(self) -> Iterator[SeedFolders]:
        """Holds the locks of all; errors as `RunFolder.lock`."""
        with contextlib.ExitStack() as stack:
            for folder in self.folders:
                stack.enter_context(folder.lock())
            yield self

    def save(self, step: int, state: TrainState, *, meta: StepMeta) -> None:
        """Saves a step of every seed, and only then deletes old ones; arguments and errors as of `RunFolder.save`."""
        for folder, own in zip(self.folders, _split(state, len(self.folders)), strict=True):
            folder.write(step, own, meta=meta)
        for folder in self.folders:
            folder.delete_old()

    def latest(self, abstract: TrainState) -> Restored | None:
        """Restores the newest step that all seeds hold undamaged; later ones, of a save that was cut short, are deleted.

        Raises:
            CheckpointError: as of `RunFolder.latest`, or they hold steps, but none in common.
        """
        parts, common = _split(abstract, len(self.folders)), None
        while True:
            pairs = zip(self.folders, parts, strict=True)
            found = [folder.latest(part, up_to=common) for folder, part in pairs]
            steps = [0 if restored is None else restored.step for restored in found]
            if len(set(steps)) == 1:
                break
            common = min(steps)
        if found[0] is None:
            on_primary(self._check_first)
        for folder in self.folders:
            folder.delete_after(steps[0])
        if found[0] is None:
            return None
        state = stack_seeds([restored.state for restored in found if restored])
        return replace(found[0], state=jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), state, abstract))

    def _check_first(self) -> None:
        """Only a first save that was cut short leaves no step in common and is begun again."""
        if any(len(folder.steps()) > 1 for folder in self.folders):
            raise CheckpointError(f"{self.path}: the seeds hold no saved step in common; choose another output")


def stack_seeds(states: list[TrainState]) -> TrainState:
    """The state of several seeds at one step, with an axis of seeds (OVER_SEEDS)."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return stacked.replace(step=states[0].step)  # type: ignore[no-any-return]


@functools.partial(jax.jit, static_argnums=1)
def _split(state: TrainState, seeds: int) -> list[TrainState]:
    """The state of each seed."""
    each = state.replace(step=jnp.broadcast_to(state.step, seeds))  # type: ignore[attr-defined]
    return [jax.tree.map(operator.itemgetter(slot), each) for slot in range(seeds)]
