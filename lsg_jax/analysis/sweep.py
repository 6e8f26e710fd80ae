"""`lsg sweep`: the oracle map of the paper. The effect on each task of fixed coefficients in a single decoder layer.

Every cell (layer, coefficients) has the answers of a separate run with these coefficients in this layer, at about half the
compute (`sweep_cells`) and with one compiled program for all layers. As in `lsg eval`, an answer that rounding errors might
decide (a near tie) is computed again with batch size 1 on its device.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from lsg_jax.analysis.sweep_cells import NO_LAYER, PromptPass, answer_alone, run_prompts
from lsg_jax.analysis.sweep_sizes import answer_in_parts, sweep_sizes
from lsg_jax.analysis.sweep_table import Grader
from lsg_jax.checkpoint.processes import host_array, on_primary
from lsg_jax.config import BatchSize, EvalConfig, GateConfig, Grouping, to_dict
from lsg_jax.config.ranges import Range, Table
from lsg_jax.data.encoded import Encoded
from lsg_jax.data.rows import Pixels
from lsg_jax.digest import text_sha256
from lsg_jax.errors import ConfigError, Preempted
from lsg_jax.eval.answering import Answer, near_tie_of
from lsg_jax.eval.answers import AnswerLog
from lsg_jax.eval.batches import QuestionBatch, batches, encode_item, item_pixels
from lsg_jax.eval.best_cells import WHICH, extreme_cells
from lsg_jax.eval.identity import digests_of, meaning_of, surroundings
from lsg_jax.eval.runner import Asked, ask_all
from lsg_jax.eval.sizes import Size
from lsg_jax.gating.keys import GROUPS
from lsg_jax.json_files import write_sealed
from lsg_jax.memory import check_answers
from lsg_jax.methods.finite import check_finite
from lsg_jax.methods.gates import check_gate
from lsg_jax.progress import Progress, silent
from lsg_jax.sharding import batch_rows, local_rows, place_rows
from lsg_jax.sinks.plausible import implausible
from lsg_jax.stopping import stop_signals
from lsg_jax.types import Batch
from lsg_jax.vlm import PROMPT_BUCKET, VLM

RESULT = "sweep.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepConfig(Table, name="sweep"):
    """The cells to compute.

    Attributes:
        layers: decoder layers, ascending; empty for all.
        coefficients: tuples with one coefficient for each group of `grouping`.
        batch_size: questions at a time on each device, each under all coefficients at once, or in parts where that does not
            fit its memory; "auto" for as many as fit.
    """

    layers: tuple[Annotated[int, Range("[0, 1e4]")], ...]
    coefficients: tuple[tuple[Annotated[float, Range("[-1000, 1000]")], ...], ...]
    grouping: Grouping = "v_sink_rest"
    batch_size: BatchSize = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        groups = GROUPS[self.grouping]
        if not self.coefficients:
            raise ConfigError("no coefficients to sweep: give at least one tuple, for example 0,1")
        for values in self.coefficients:
            text = ",".join(f"{value:g}" for value in values)
            if len(values) != len(groups):
                raise ConfigError(
                    f"coefficients {text}: {len(values)} given, grouping {self.grouping} has {len(groups)}: {', '.join(groups)}"
                )
        if len(set(self.coefficients)) < len(self.coefficients):
            raise ConfigError("coefficients: one tuple is named twice")


@dataclass(frozen=True)
class Cells:
    """One question's answers in one layer: an output for each coefficient tuple, or the base model's single output.

    Attributes:
        alone: number of near ties, which were computed again.
    """

    outputs: tuple[str, ...]
    alone: int


def coefficient_grid(groups: int, step: float) -> tuple[tuple[float, ...], ...]:
    """All grid points >= 0 that sum to 1: for two groups and step 0.1 from (0, 1) to (1, 0), as in the paper.

    Raises:
        ConfigError: `step` is below 0.01, or does not divide 1.
    """
    count = round(1 / step) if 0.01 <= step <= 1 else 0
    if not count or abs(count * step - 1) > 1e-6:
        raise ConfigError(f"the step is {step:g}: it must lie in [0.01, 1] and divide 1, as 0.1 or 0.25 do")
    parts = itertools.product(range(count + 1), repeat=groups - 1)
    return tuple((*(n / count for n in first), (count - sum(first)) / count) for first in parts if sum(first) <= count)


def sweep_batch(questions: BatchSize, coefficients: int) -> BatchSize:
    """Questions of a sweep at a time, as many answers as an evaluation of `eval.batch_size` questions gives."""
    return "auto" if questions == "auto" else max(1, questions // coefficients)


def sweep(
    vlm: VLM,
    settings: SweepConfig,
    config: EvalConfig,
    out: Path,
    *,
    asked: dict[str, Asked] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Answers every question of `config.benchmarks` without gates and under every cell; every process must call it.

    Writes into `out`: `sweep.json`, and `answers/`, the logs from which an interrupted run resumes. A finished layer of a batch
    is not computed again, and the result equals that of an uninterrupted run.

    Args:
        vlm: its gates or method are ignored.
        asked: result of `ask_all(config)`, if the caller has read the files before loading the model.
        progress: counts questions times layers.

    Returns:
        The content of sweep.json.

    Raises:
        ConfigError: a layer does not exist, or the grouping needs sink dimensions that are not known.
        InputError: no benchmarks, or a file that is none; raised before anything is computed.
        Preempted: SIGTERM or SIGINT was received; finished answers are kept.
    """
    vlm, num_layers = vlm.plain(), vlm.config.text.num_layers
    settings = dataclasses.replace(settings, layers=settings.layers or tuple(range(num_layers)))
    check_gate(GateConfig(layers=settings.layers, grouping=settings.grouping), vlm.config, name="sweep")
    asked = ask_all(config) if asked is None else asked
    on_primary(lambda: out.mkdir(parents=True, exist_ok=True))
    result = _header(vlm, settings, config)
    for name, test in asked.items():
        answers = _Answering(vlm, name, test, settings, config, out, progress).run()
        grader = Grader(name, test, [found.outputs[0] for found in answers[NO_LAYER]])
        result["base"] += grader.base_rows()
        for layer, (number, values) in itertools.product(settings.layers, enumerate(settings.coefficients)):
            result["rows"] += grader.cell_rows(layer, values, [found.outputs[number] for found in answers[layer]])
        result["benchmarks"][name] = {
            "files": test.files,
            "protocol": test.rules,
            "questions": len(test.items),
            "of": test.benchmark.size or test.rows,
            "partial": test.partial,
            "score": test.score,
            "prompts_sha256": text_sha256("\0".join(test.prompts)),
            "questions_sha256": test.questions_sha256(),
            "max_new_tokens": test.max_new_tokens,
            "work": work(answers, settings, num_layers),
        }
    result |= {which: extreme_cells(result["rows"], which) for which in WHICH}
    on_primary(lambda: write_sealed(out / RESULT, result))
    return result


def _header(vlm: VLM, settings: SweepConfig, config: EvalConfig) -> dict[str, Any]:
    """What sweep.json states before any answer."""
    return {
        "format": "lsg-sweep-1",
        "model": vlm.folder.name if vlm.folder else None,
        **digests_of(vlm),
        "sinks": to_dict(vlm.config.sinks),
        **to_dict(settings),
        "groups": list(GROUPS[settings.grouping]),
        "settings": {k: v for k, v in to_dict(config).items() if k not in ("benchmarks", "batch_size")}
        | {"decoding": "greedy"},
        "versions": surroundings()["versions"],
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "benchmarks": {},
        "base": [],
        "rows": [],
    }


def work(answers: Mapping[int, Sequence[Cells]], settings: SweepConfig, num_layers: int) -> dict[str, Any]:
    """Decoder layers run in prompt passes, summed over questions: as computed here, and if each cell were a separate run.

    Near ties that were computed again (`answered_alone`) count in both.
    """
    questions, cells = len(answers[NO_LAYER]), len(settings.coefficients)
    alone = sum(found.alone for of_layer in answers.values() for found in of_layer)
    shared = num_layers + cells * sum(num_layers - layer for layer in settings.layers)
    separate = num_layers + cells * num_layers * len(settings.layers)
    run, naive = (questions * count + alone * num_layers for count in (shared, separate))
    return {"layers_run": run, "layers_naive": naive, "share": round(run / naive, 4), "answered_alone": alone}


class _Answering:
    """Answers one benchmark under the base model and all cells, batch by batch and layer by layer."""

    def __init__(
        self,
        vlm: VLM,
        name: str,
        test: Asked,
        settings: SweepConfig,
        config: EvalConfig,
        out: Path,
        progress: Progress,
    ):
        self.vlm, self.name, self.test, self.settings, self.config = vlm, name, test, settings, config
        self.out, self.progress = out, progress
        self.processor = vlm.make_processor(config.image_aspect, config.template)
        self.coefficients = np.array(settings.coefficients, np.float32)
        self.layers = (NO_LAYER, *settings.layers)
        self.logs = {layer: self._log(layer) for layer in self.layers}
        self.known = {layer: _read(log) for layer, log in self.logs.items()}
        self.total = len(self.layers) * len(test.items)
        self.warned = settings.grouping == "l_sink_rest"

    def run(self) -> dict[int, list[Cells]]:
        """{layer: cells of every question}; the base model is at NO_LAYER."""
        items, prompts, limit = self.test.items, self.test.prompts, self.config.max_length
        encode = lambda i, sizes: encode_item(self.processor, items[i], prompts[i], sizes, limit)
        groups, batch_size, new_tokens = batch_rows(self.vlm.mesh), self.settings.batch_size, self.test.max_new_tokens
        least = groups * (1 if batch_size == "auto" else batch_size), PROMPT_BUCKET + new_tokens
        check_answers(self.vlm, *least, "lower --batch-size, eval.max_new_tokens, or take more devices")
        grouping = self.settings.grouping
        sizes = sweep_sizes(self.vlm, batch_size, new_tokens, self.coefficients, grouping, questions=len(items))
        size = lambda bucket: groups * sizes(bucket).questions
        which, threads = range(len(items)), self.config.num_threads
        known = {i for i in which if all(i in self.known[layer] for layer in self.layers)}
        with stop_signals() as stopped:
            asked = batches(self.processor, items, which, encode, size=size, mesh=self.vlm.mesh, threads=threads, known=known)
            for questions in asked:
                self._run_batch(questions, sizes(questions.bucket), stopped)
        return {layer: [self.known[layer][i] for i in range(len(self.test.items))] for layer in self.layers}

    def _run_batch(self, questions: QuestionBatch, size: Size, stopped: Callable[[], bool]) -> None:
        members, encoded = questions.members, questions.encoded
        rows = local_rows(self.vlm.mesh, len(members))
        left = [layer for layer in self.layers if not all(i in self.known[layer] for i in members)]
        local = self._pad([encoded[members[row]] for row in rows], questions.pixels)
        batch = place_rows(local, self.vlm.mesh, len(members))
        vlm, limit = self.vlm, self.test.max_new_tokens
        shared, tokens, margin = run_prompts(vlm.params, batch, vlm.graphdef, limit)
        self._check_sinks(shared)
        for layer in left:
            if layer == NO_LAYER:
                answered = host_array(tokens)[:, None], host_array(margin)[:, None]
            else:
                grouping = self.settings.grouping
                answered = answer_in_parts(vlm, shared, layer, self.coefficients, grouping, limit, size=size)
            self._save(layer, self._settle(layer, members, encoded, *answered))
            done = sum(map(len, self.known.values()))
            if stopped() and done < self.total:
                raise Preempted(
                    f"{self.out}: stopped at {done} of {self.total} questions and layers of {self.name}; "
                    "run the same command to go on"
                )

    def _settle(
        self, layer: int, members: list[int], encoded: Mapping[int, Encoded], tokens: np.ndarray, margin: np.ndarray
    ) -> dict[int, Cells]:
        """The cells of a batch, near ties computed again.

        Args:
            tokens: int32 [B, C, N].
            margin: float32 [B, C], the smallest gap between the two highest logits of each answer.
        """
        where = "" if layer == NO_LAYER else f" with fixed coefficients in layer {layer}"
        check_finite(margin, [f"question {self.test.items[i].id}{where}" for i in members], self.vlm.method)
        own = {i: row for row, i in reversed(list(enumerate(members)))}  # the last batch of a length may repeat a question
        tokens = tokens.copy()
        near = [(i, c) for i, row in own.items() for c in np.flatnonzero(margin[row] < near_tie_of(self.vlm, self.config))]
        coefficients = self.coefficients if layer != NO_LAYER else np.ones_like(self.coefficients[:1])
        size = batch_rows(self.vlm.mesh)
        for start in range(0, len(near), size):
            some = near[start : start + size]
            some += some[:1] * (size - len(some))
            cells = np.full(size, layer, np.int32), coefficients[[c for _, c in some]]
            placed = self._place([i for i, _ in some], encoded, *cells)
            again = answer_alone(self.vlm.params, *placed, self.vlm.graphdef, self.settings.grouping, self.test.max_new_tokens)
            for (i, c), answer in zip(some, host_array(again), strict=True):
                tokens[own[i], c] = answer
        alone = {i: sum(of == i for of, _ in near) for i in own}
        return {i: Cells(tuple(map(self.processor.decode, tokens[row])), alone[i]) for i, row in own.items()}

    def _pad(self, encoded: Sequence[Encoded], pixels: Sequence[Pixels | None]) -> Batch:
        batch = self.vlm.pad_questions(encoded, pixels)
        return dataclasses.replace(batch, answer_index=None, answer_target=None, row_id=None)

    def _place(self, members: Sequence[int], encoded: Mapping[int, Encoded], *more: np.ndarray) -> tuple[Any, ...]:
        """The batch of these questions, read again, and the arrays `more`, one row a question, on the devices."""
        rows = local_rows(self.vlm.mesh, len(members))
        here = [members[row] for row in rows]
        with ThreadPoolExecutor(self.config.num_threads) as pool:
            pixels = list(pool.map(lambda i: item_pixels(self.processor, self.test.items[i]), here))
        batch = self._pad([encoded[i] for i in here], pixels)
        return place_rows((batch, *(values[rows] for values in more)), self.vlm.mesh, len(members))

    def _save(self, layer: int, cells: dict[int, Cells]) -> None:
        new = {i: found for i, found in cells.items() if i not in self.known[layer]}
        self.logs[layer].add({i: Answer(json.dumps(dataclasses.asdict(found))) for i, found in new.items()})
        self.known[layer] |= new
        what = "base" if layer == NO_LAYER else f"layer {layer}"
        self.progress(sum(map(len, self.known.values())), self.total, f"{self.name} {what}")

    def _log(self, layer: int) -> AnswerLog:
        test, config = self.test, self.config
        meaning = meaning_of(self.vlm, config, max_new_tokens=test.max_new_tokens)
        if layer != NO_LAYER:
            cells = {"grouping": self.settings.grouping, "coefficients": self.settings.coefficients}
            meaning |= cells | {"sinks": to_dict(self.vlm.config.sinks)}
        name = f"{self.name}.base" if layer == NO_LAYER else f"{self.name}.layer{layer}"
        return AnswerLog(self.out / "answers", name, meaning, test.items, test.prompts)

    def _check_sinks(self, shared: PromptPass) -> None:
        """Warns once, on the first batch, if no patch or implausibly many patches are V-sinks."""
        if self.warned:
            return
        self.warned = True
        visual, v_sink = (int(host_array(mask).sum()) for mask in (shared.visual.mask, shared.visual.v_sink))
        if wrong := implausible(v_sink, visual, self.vlm.config.sinks, "the first images"):
            log.warning("%s: %s", self.name, wrong)


def _read(log: AnswerLog) -> dict[int, Cells]:
    """{question: cells} of earlier runs; every process must call it."""
    found = {i: json.loads(answer.text) for i, answer in log.known().items()}
    return {i: Cells(tuple(line["outputs"]), line["alone"]) for i, line in found.items()}
