"""`lsg stack`: combines separately trained gates greedily, in the order of what each of them gains alone (paper.md)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from lsg_jax.analysis.scores import Score, Selection, score_rows, selection
from lsg_jax.checkpoint import read_manifest
from lsg_jax.checkpoint.processes import on_primary
from lsg_jax.config import SinkConfig, to_dict
from lsg_jax.config.ranges import Range, Table
from lsg_jax.data.records import open_records
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.eval.benchmark import gain
from lsg_jax.eval.results import BASE, EvaluationResult
from lsg_jax.eval.runner import Asked, ask_all, evaluate
from lsg_jax.gating.portable import PortableGates, check_width, choose_gates, combine_gates, write_gates
from lsg_jax.json_files import write_sealed
from lsg_jax.opening import open_gates, open_to_answer, with_gates
from lsg_jax.progress import Progress, silent, training_progress
from lsg_jax.run_config import RunConfig
from lsg_jax.train.loop import train
from lsg_jax.vlm import VLM

RESULT = "stack.json"
GATES = "stack.safetensors"
JOINT = "joint"

Row = dict[str, Any]

SAME = 9  # decimals; smaller differences between changes are rounding errors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StackConfig(Table, name="stack"):
    """How a stack is chosen.

    Attributes:
        select: the benchmark that selects; None for the mean change over all benchmarks.
        max_gates: size of the largest stack that is tried.
        joint: whether to train the gates of the chosen layers jointly from scratch, too.
    """

    select: str | None = None
    max_gates: Annotated[int, Range("[1, 1e4]")] = 5
    joint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.joint and self.max_gates == 1:
            raise ConfigError("--joint trains several gates together: raise --max-gates, which is 1")


def greedy_stacks(gains: Mapping[int, float], max_gates: int) -> list[list[int]]:
    """The stacks to try: the best single layer, then one more gate each time, in the order of their gains alone.

    Args:
        gains: layer -> change over the base model; of equal gains the lower layer comes first.

    Returns:
        For each size, at most the number of layers, the layers in the order in which they are added.
    """
    order = sorted(gains, key=lambda layer: (-round(gains[layer], SAME), layer))
    return [order[:size] for size in range(1, min(max_gates, len(order)) + 1)]


def first_best(changes: Sequence[float]) -> int:
    """Index of the greatest change, the first of equal ones."""
    rounded = [round(change, SAME) for change in changes]
    return rounded.index(max(rounded))


def open_singles(
    sources: Sequence[str], *, backbone: str, sinks: SinkConfig | None = None
) -> tuple[dict[int, PortableGates], dict[str, str]]:
    """Reads the gate of every layer from run folders and gate files.

    Args:
        backbone: digest of the model that the gates must belong to.
        sinks: overrides the sink settings of the gates.

    Returns:
        {layer: its gate}, {layer as text: its source}, in ascending order.

    Raises:
        InputError: there are no gates, two for one layer, or gates that cannot be combined.
        CheckpointError: a run of another model.
    """
    if not sources:
        raise InputError("no gates to stack: give run folders or gate files as --gates")
    gates: dict[int, PortableGates] = {}
    origin: dict[str, str] = {}
    for source in sources:
        found = open_gates(source, backbone=backbone)
        if len(found.gate.layers) > 1 and Path(source).is_dir() and not found.gate.independent:
            logger.warning(
                "%s: its gates were trained together; the study takes each of them as if it were trained alone", source
            )
        for layer in found.gate.layers:
            if layer in gates:
                raise InputError(f"layer {layer} has two gates, in {origin[str(layer)]} and in {source}: name one of them")
            gates[layer] = replace(choose_gates(found, [layer], where=source), sinks=sinks or found.sinks)
            origin[str(layer)] = found.origin or source
    combine_gates(list(gates.values()))  # raises unless any of them can be combined
    return {layer: gates[layer] for layer in sorted(gates)}, {str(layer): origin[str(layer)] for layer in sorted(gates)}


def stack_study(
    config: RunConfig,
    sources: Sequence[str],
    settings: StackConfig,
    out: Path,
    *,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Evaluates every gate alone, then the greedy stack at every size, and keeps the best size; every process must call it.

    Gates are not trained again. Gates without a gain of their own are tried, too, since the paper's rule does not exclude them.
    The change on the benchmark that selects is optimistic.

    Writes into `out`: `stack.json`, `stack.safetensors` (the chosen stack), and the files of `evaluate`, whose answer logs let
    an interrupted study resume. A joint run is in `out/joint/<layers>`.

    Args:
        config: model, benchmarks (`eval`) and, for joint training, `data` and `train`.
        sources: run folders and gate files with one gate for each layer to consider.
        progress: counts the questions of each benchmark and method, and the steps of joint training.

    Returns:
        The content of stack.json.

    Raises:
        ConfigError, InputError, CheckpointError: wrong settings, gates or questions; raised before anything is computed.
        Preempted: SIGTERM or SIGINT was received; finished training and answers are kept.
    """
    singles, origin = _open_checked(config, sources)
    if settings.joint:
        _check_training(config)
    asked = ask_all(config.eval)
    study = _Study(config, out, asked, selection(asked, settings.select), progress)
    alone, steps = study.grow(singles, settings.max_gates)
    chosen = steps[first_best([gain(study.decides.metric, step["change"]) for step in steps])]["layers"]
    stack = study.gates[stack_name(chosen)]
    on_primary(lambda: write_gates(out / GATES, stack))
    joint = {"joint": study.train_together(chosen)} if settings.joint else {}
    result = study.result
    written = {
        "format": "lsg-stack-1",
        "model": result.model,
        "backbone": result.backbone,
        "selection": study.decides.name,
        "metric": study.decides.metric,
        "singles": alone,
        "steps": steps,
        "chosen": chosen,
        **joint,
        "by_benchmark": score_rows(result, asked),
        "settings": {**to_dict(settings), "gates": origin, "eval": result.settings},
        "gate": to_dict(stack.gate),
        "sinks": to_dict(stack.sinks),
        "versions": result.versions,
        "devices": result.devices,
    }
    on_primary(lambda: write_sealed(out / RESULT, written))
    return written


class _Study:
    """The questions, and the gates that have answered them.

    Attributes:
        gates: method -> gates.
        result: of the last evaluation, of all gates so far; earlier answers are read from the logs.
    """

    def __init__(self, config: RunConfig, out: Path, asked: dict[str, Asked], decides: Selection, progress: Progress):
        self.config, self.out, self.asked, self.decides, self.progress = config, out, asked, decides, progress
        self.gates: dict[str, PortableGates] = {}
        self.result: EvaluationResult

    def grow(self, singles: Mapping[int, PortableGates], max_gates: int) -> tuple[list[Row], list[Row]]:
        """Evaluates every gate alone, then the stacks. Returns a row for each layer, and a row for each size."""
        models = {BASE: self._open()}
        self._ask(models, {stack_name([layer]): gates for layer, gates in singles.items()})
        alone = [{"layer": layer, **self._score(stack_name([layer]))} for layer in singles]
        gains = {row["layer"]: gain(self.decides.metric, row["change"]) for row in alone}
        stacks = greedy_stacks(gains, max_gates)
        self._ask(models, {stack_name(layers): combine_gates([singles[i] for i in layers]) for layers in stacks})
        return alone, [{"layers": layers, **self._score(stack_name(layers))} for layers in stacks]

    def train_together(self, chosen: list[int]) -> Row:
        """Trains gates like those of the stack jointly from scratch; returns their row, without values for a single gate."""
        if len(chosen) == 1:
            nothing = dict.fromkeys(("value", "change", "low", "high"))
            return {"layers": chosen, **nothing, "reason": "one gate was chosen, and that was trained alone as it is"}
        stack = self.gates[stack_name(chosen)]
        # a gate file does not say whether there are biases
        gate = replace(stack.gate, biases=self.config.gate.biases)
        config = replace(
            self.config.with_settings(gate),
            output=str(self.out / JOINT / stack_name(stack.gate.layers)),
            method="lsg",
            sinks=stack.sinks,
        )
        run = train(config, on_step=training_progress(self.progress, f"training {JOINT}"))
        self._ask({BASE: self._open()}, {JOINT: open_gates(run)})
        return {"layers": chosen, **self._score(JOINT)}

    def _open(self) -> VLM:
        """The model without gates. It is not kept: training loads its own, and memory may not suffice for two."""
        return open_to_answer(self.config)

    def _ask(self, models: dict[str, VLM], more: Mapping[str, PortableGates]) -> None:
        """Adds gates to the study and missing models to `models`, and evaluates all of them."""
        self.gates |= more
        for method in self.gates.keys() - models.keys():
            models[method] = with_gates(models[BASE], self.gates[method])
        ordered = {method: models[method] for method in (BASE, *self.gates)}
        self.result = evaluate(ordered, self.config.eval, self.out, asked=self.asked, progress=self.progress)

    def _score(self, method: str) -> Score:
        return self.decides.score(self.result, method)


def stack_name(layers: Sequence[int]) -> str:
    """Name of a stack in tables and files, such as `L3+L7`: layers in the order in which gates are added."""
    return "+".join(f"L{layer}" for layer in layers)


def _open_checked(config: RunConfig, sources: Sequence[str]) -> tuple[dict[int, PortableGates], dict[str, str]]:
    """`open_singles`, with gates checked against the model before its weights are loaded."""
    manifest = read_manifest(config.model)
    model = manifest.config
    singles, origin = open_singles(sources, backbone=manifest.digest, sinks=config.sinks)
    for gates in singles.values():
        check_width(gates, model.text.hidden_size, model.text.num_layers)
    return singles, origin


def _check_training(config: RunConfig) -> None:
    if config.train.seeds > 1:
        raise ConfigError("train.seeds: `lsg stack --joint` trains one seed: set it to 1, and `seed` to name another")
    if not config.data.records:
        raise ConfigError("--joint trains, but data.records is empty: name a folder that `lsg prepare` wrote")
    open_records(config.data.records)
