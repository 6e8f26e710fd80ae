"""`lsg eval`: asks the questions of the benchmarks under every method, grades, and writes what was asked and answered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsg_jax.checkpoint.processes import host_array, is_primary, on_primary
from lsg_jax.config import EvalConfig, GateConfig, Protocol, to_dict
from lsg_jax.digest import arrays_sha256, text_sha256
from lsg_jax.errors import InputError, Preempted
from lsg_jax.eval.answering import Answer, answer
from lsg_jax.eval.answers import AnswerLog
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Metrics
from lsg_jax.eval.parquet import digests
from lsg_jax.eval.registry import find_benchmark
from lsg_jax.eval.statistics import interval, paired_test, resample_weights
from lsg_jax.files import write_json
from lsg_jax.gating.keys import GROUPS
from lsg_jax.methods.method import BASE as PLAIN
from lsg_jax.progress import Progress, silent
from lsg_jax.stopping import stop_signals
from lsg_jax.vlm import VLM

RESULT = "result.json"
BASE = "base"  # the method that the others are compared with: the model as it is
MAX_NEW_TOKENS = 32  # where neither the run nor the protocol says


@dataclass(frozen=True)
class Asked:
    """A benchmark as it is put to the model.

    Attributes:
        rules: the protocol whose prompts, matcher and score are used: the run's, or `paper` if that has none of its own.
        rows: number of items in the file, before `eval.limit`.
        files: sha256 of each file, {} for drawn scenes.
    """

    benchmark: Benchmark
    items: list[Item]
    prompts: list[str]
    rules: Protocol
    rows: int
    files: dict[str, str]
    max_new_tokens: int

    @property
    def partial(self) -> bool:
        """Whether questions are missing: by `eval.limit`, or since the file is not the whole benchmark."""
        return len(self.items) != (self.benchmark.size or self.rows)

    @property
    def score(self) -> str | None:
        """The metric that is the official score; None for a partial run, and where there is none."""
        return None if self.partial else self.benchmark.official.get(self.rules)


def evaluate(
    models: Mapping[str, VLM],
    config: EvalConfig,
    out: Path,
    *,
    asked: dict[str, Asked] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Answers every question of `config.benchmarks` under every method; a collective.

    Writes into `out`: `result.json`; `<name>.<method>.jsonl`, a line a question with prompt, output, what it was read as and
    how the gates stood; `answers/`, the log by which a stopped run goes on (questions answered under the same settings are not
    asked again).

    Args:
        models: method -> the model under it; `base` is the one that the others are compared with.
        asked: what `ask_all(config)` gave, for a caller who looked at the files before loading the model.
        progress: counts the questions of each benchmark and method.

    Returns:
        What result.json holds.

    Raises:
        InputError: no benchmarks, or a file that is none; raised before anything is computed.
        Preempted: SIGTERM or SIGINT came; what was answered is kept.
    """
    asked = ask_all(config) if asked is None else asked
    first = next(iter(models.values()))
    on_primary(lambda: out.mkdir(parents=True, exist_ok=True))
    result: dict[str, Any] = {
        "format": "lsg-eval-3",
        "model": first.folder.name if first.folder else None,
        "backbone": first.digest,
        "methods": {method: settings_of(model) for method, model in models.items()},
        "settings": {k: v for k, v in to_dict(config).items() if k != "benchmarks"} | {"decoding": "greedy"},
        "versions": {name: version(name) for name in ("lsg_jax", "jax")},
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "benchmarks": {},
        "ratios": [],
    }
    for name, test in asked.items():
        answers = {m: _answers(model, f"{name}.{m}", test, config, out, progress) for m, model in models.items()}
        graded = {method: grade(test, [answer.text for answer in found]) for method, found in answers.items()}
        if is_primary():
            for method, found in answers.items():
                _write_outputs(out / f"{name}.{method}.jsonl", test, found, graded[method])
        result["benchmarks"][name] = {"path": config.benchmarks[name], **summary(test, graded)}
        for method, model in models.items():
            if model.gate is not None:
                result["ratios"] += [{"method": method, **row} for row in ratio_rows(name, test, answers[method], model.gate)]
    on_primary(lambda: write_json(out / RESULT, result, sort_keys=False))
    return result


def ask_all(config: EvalConfig) -> dict[str, Asked]:
    """Reads every benchmark of the configuration, by name. Raises InputError if there are none, or a file is wrong."""
    if not config.benchmarks:
        raise InputError("nothing to evaluate: give --benchmark NAME=PATH, or [eval.benchmarks] in the configuration")
    return {name: ask(find_benchmark(name, path), path, config) for name, path in config.benchmarks.items()}


def ask(benchmark: Benchmark, path: str, config: EvalConfig) -> Asked:
    """Reads a benchmark and makes its prompts. With `config.limit`, items are taken evenly from the whole file."""
    items = benchmark.read(path)
    rows = len(items)
    if config.limit is not None and config.limit < rows:
        items = [items[i] for i in np.linspace(0, rows - 1, config.limit).round().astype(int)]
    rules: Protocol = config.protocol if config.protocol in benchmark.official else "paper"
    return Asked(
        benchmark=benchmark,
        items=items,
        prompts=[benchmark.prompt(item, rules) for item in items],
        rules=rules,
        rows=rows,
        files=digests(path) if path else {},
        max_new_tokens=config.max_new_tokens or benchmark.max_new_tokens.get(rules, MAX_NEW_TOKENS),
    )


def settings_of(model: VLM) -> dict[str, Any]:
    """What is done to the model, as plain data: `gate`, `method` and `sinks`, null where they play no part."""
    changed, settings = model.method != PLAIN, model.method.settings
    return {
        "gate": to_dict(model.gate) if model.gate else None,
        "method": {"name": type(settings).__name__, **to_dict(settings)} if changed and model.gate is None else None,
        "sinks": to_dict(model.config.sinks) if changed else None,
    }


def _answers(model: VLM, name: str, test: Asked, config: EvalConfig, out: Path, progress: Progress) -> list[Answer]:
    meaning = {
        "backbone": model.digest,
        "dtype": str(jax.tree.leaves(model.frozen)[0].dtype),
        **settings_of(model),
        "gates": _digest(model.trained) if model.trained else None,
        "files": sorted(test.files.values()),
        "max_new_tokens": test.max_new_tokens,
        "max_length": config.max_length,
        "image_aspect": config.image_aspect,
        "template": config.template,
    }
    log = AnswerLog(out / "answers", name, meaning, test.items, test.prompts)
    known = log.known()
    done = len(known)
    with stop_signals() as stopped:

        def save(new: dict[int, Answer]) -> None:
            nonlocal done
            log.add(new)
            done += len(new)
            progress(done, len(test.items), name)
            if stopped() and done < len(test.items):
                raise Preempted(
                    f"{out}: stopped at {done} of {len(test.items)} answers of {name}; run the same command to go on"
                )

        return answer(model, test.items, test.prompts, config, max_new_tokens=test.max_new_tokens, known=known, on_batch=save)


def _digest(parameters: Any) -> str:
    """sha256 of a tree of arrays."""
    return arrays_sha256((jax.tree_util.keystr(path), host_array(leaf)) for path, leaf in jax.tree.leaves_with_path(parameters))


# -------------------------------------------------------------------------------------------------------------------- grading


def grade(test: Asked, outputs: Sequence[str]) -> Graded:
    """Reads and scores the outputs, every item counting once."""
    matches = [test.benchmark.match(item, text, test.rules) for item, text in zip(test.items, outputs, strict=True)]
    score = np.array([match.score for match in matches], np.float64)
    return Graded(test.items, [match.parsed for match in matches], score, np.ones((1, len(matches))))


def summary(test: Asked, graded: dict[str, Graded]) -> dict[str, Any]:
    """One benchmark's part of the result: every aggregate with its interval, and what each method changed over the base."""
    benchmark = test.benchmark
    units = [item.id if benchmark.unit is None else item.fields[benchmark.unit] for item in test.items]
    weight = resample_weights(units)
    resampled = {m: benchmark.metrics(Graded(g.items, g.parsed, g.score, weight)) for m, g in graded.items()}
    entry: dict[str, Any] = {
        "files": test.files,
        "protocol": test.rules,
        "questions": len(test.items),
        "of": benchmark.size or test.rows,
        "partial": test.partial,
        "prompts_sha256": text_sha256("\0".join(test.prompts)),
        "max_new_tokens": test.max_new_tokens,
        "score": test.score,
        "unread": {method: sum(parsed is None for parsed in g.parsed) for method, g in graded.items()},
        "majority": _plain(benchmark.metrics(grade(test, _most_frequent(test)))),
        "methods": {},
        "change": {},
        "paired_test": {},
    }
    points = {method: benchmark.metrics(g) for method, g in graded.items()}
    for method in graded:
        entry["methods"][method] = _with_intervals(points[method], resampled[method])
        if method != BASE and BASE in graded:
            change = lambda of, method=method: {metric: of[method][metric] - of[BASE][metric] for metric in of[BASE]}
            entry["change"][method] = _with_intervals(change(points), change(resampled))
            entry["paired_test"][method] = paired_test(graded[BASE].score, graded[method].score)
    return entry


def ratio_rows(name: str, test: Asked, answers: Sequence[Answer], gate: GateConfig) -> list[dict[str, Any]]:
    """How the gates stood, by task: mean and standard deviation of each layer's ratios over the questions with an image."""
    field = test.benchmark.task
    tasks: dict[str, list[np.ndarray]] = {}
    for item, found in zip(test.items, answers, strict=True):
        if found.ratios is not None:
            tasks.setdefault(item.fields.get(field, "") if field else "", []).append(found.ratios)
    rows = []
    for task in sorted(tasks):
        values = np.stack(tasks[task])
        for i, layer in enumerate(gate.layers):
            for j, group in enumerate(GROUPS[gate.grouping]):
                at = values[:, i, j].astype(np.float64)
                # three digits: the rest depends on the batch size
                stands = {"mean": round(float(at.mean()), 3), "std": round(float(at.std()), 3), "questions": len(at)}
                rows.append({"benchmark": name, "task": task or name, "layer": layer, "group": group, **stands})
    return rows


def _most_frequent(test: Asked) -> list[str]:
    """For every item the most frequent answer of its kind: what one who never looks, but knows the test set, would say."""
    of = test.benchmark.guess_by
    kinds = ["" if of is None else item.fields[of] for item in test.items]
    counts: dict[str, dict[str, int]] = {}
    for kind, item in zip(kinds, test.items, strict=True):
        answers = counts.setdefault(kind, {})
        answers[item.answers[0]] = answers.get(item.answers[0], 0) + 1
    return [max(counts[kind], key=counts[kind].__getitem__) for kind in kinds]


def _plain(metrics: Metrics) -> dict[str, float | None]:
    return {name: _number(values[0]) for name, values in metrics.items()}


def _with_intervals(point: Metrics, resampled: Metrics) -> dict[str, dict[str, float | None]]:
    entries = {}
    for name, values in point.items():
        low, high = interval(resampled[name])
        entries[name] = {"value": _number(values[0]), "low": _number(low), "high": _number(high)}
    return entries


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None  # NaN is no JSON


def _write_outputs(path: Path, test: Asked, answers: Sequence[Answer], graded: Graded) -> None:
    lines = [
        json.dumps(
            {
                "id": item.id,
                **item.fields,
                "prompt": prompt,
                "output": answer.text,
                "parsed": parsed,
                "answers": item.answers,
                "score": float(score),
                **_ratios(answer),
            }
        )
        for item, prompt, answer, parsed, score in zip(
            test.items, test.prompts, answers, graded.parsed, graded.score, strict=True
        )
    ]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _ratios(answer: Answer) -> dict[str, Any]:
    """The gate ratios of one question by layer and token group; three digits, as more would depend on the batch size."""
    return {} if answer.ratios is None else {"ratios": np.round(answer.ratios.astype(np.float64), 3).tolist()}
