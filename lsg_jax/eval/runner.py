"""`lsg eval`: asks every question of the benchmarks, base and gated, grades, and writes what was asked, answered and scored."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsg_jax.checkpoint.files import write_json
from lsg_jax.checkpoint.processes import host_array, is_primary, on_primary
from lsg_jax.config import EvalConfig, Protocol, to_dict
from lsg_jax.errors import InputError, Preempted
from lsg_jax.eval.answering import answer
from lsg_jax.eval.answers import AnswerLog, sha256
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Metrics
from lsg_jax.eval.parquet import digests
from lsg_jax.eval.registry import find_benchmark
from lsg_jax.eval.statistics import interval, paired_test, resample_weights
from lsg_jax.stopping import stop_signals
from lsg_jax.vlm import VLM

Progress = Callable[[str, int, int], None]

RESULT = "result.json"
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
    vlm: VLM,
    config: EvalConfig,
    out: Path,
    *,
    asked: dict[str, Asked] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answers every question of `config.benchmarks`, ungated and, where the model has gates, gated; a collective.

    Writes into `out`: `result.json`; `<name>.<method>.jsonl`, a line a question with prompt, output and what it was read as;
    `answers/`, the log by which a stopped run goes on (questions answered under the same settings are not asked again).

    Args:
        asked: what `ask_all(config)` gave, for a caller who looked at the files before loading the model.
        progress: called with (what, done, total).

    Returns:
        What result.json holds.

    Raises:
        InputError: no benchmarks, or a file that is none; raised before anything is computed.
        Preempted: SIGTERM or SIGINT came; what was answered is kept.
    """
    asked = ask_all(config) if asked is None else asked
    models = {"base": vlm.plain(), **({"gated": vlm} if vlm.gates is not None else {})}
    on_primary(lambda: out.mkdir(parents=True, exist_ok=True))
    result: dict[str, Any] = {
        "format": "lsg-eval-2",
        "model": vlm.folder.name if vlm.folder else None,
        "backbone": vlm.digest,
        "gate": to_dict(vlm.gate) if vlm.gate else None,
        "sinks": to_dict(vlm.config.sinks),
        "settings": {k: v for k, v in to_dict(config).items() if k != "benchmarks"} | {"decoding": "greedy"},
        "versions": {name: version(name) for name in ("lsg_jax", "jax")},
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "benchmarks": {},
    }
    for name, test in asked.items():
        outputs = {m: _outputs(model, f"{name}.{m}", test, config, out, progress) for m, model in models.items()}
        graded = {method: grade(test, texts) for method, texts in outputs.items()}
        if is_primary():
            for method, texts in outputs.items():
                _write_outputs(out / f"{name}.{method}.jsonl", test, texts, graded[method])
        result["benchmarks"][name] = summary(test, graded)
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


def _outputs(model: VLM, name: str, test: Asked, config: EvalConfig, out: Path, progress: Progress | None) -> list[str]:
    meaning = {
        "backbone": model.digest,
        "dtype": str(jax.tree.leaves(model.frozen)[0].dtype),
        "gate": to_dict(model.gate) if model.gate else None,
        "gates": _digest(model.gates) if model.gates else None,
        "sinks": to_dict(model.config.sinks) if model.gates else None,
        "files": sorted(test.files.values()),
        "max_new_tokens": test.max_new_tokens,
        "max_length": config.max_length,
        "image_aspect": config.image_aspect,
        "template": config.template,
    }
    log = AnswerLog(out / "answers", name, meaning, test.items, test.prompts)
    known = log.known()
    done = len(known)
    # with several processes one that stops would leave the others waiting; there a signal just ends it
    with stop_signals() if jax.process_count() == 1 else contextlib.nullcontext(lambda: False) as stopped:

        def save(new: dict[int, str]) -> None:
            nonlocal done
            log.add(new)
            done += len(new)
            if progress:
                progress(name, done, len(test.items))
            if stopped() and done < len(test.items):
                raise Preempted(
                    f"{out}: stopped at {done} of {len(test.items)} answers of {name}; run the same command to go on"
                )

        return answer(model, test.items, test.prompts, config, max_new_tokens=test.max_new_tokens, known=known, on_batch=save)


def _digest(parameters: Any) -> str:
    """sha256 of a tree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(parameters):
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}".encode() + host_array(leaf).tobytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------------- grading


def grade(test: Asked, outputs: Sequence[str]) -> Graded:
    """Reads and scores the outputs, every item counting once."""
    matches = [test.benchmark.match(item, text, test.rules) for item, text in zip(test.items, outputs, strict=True)]
    score = np.array([match.score for match in matches], np.float64)
    return Graded(test.items, [match.parsed for match in matches], score, np.ones((1, len(matches))))


def summary(test: Asked, graded: dict[str, Graded]) -> dict[str, Any]:
    """One benchmark's part of the result: every aggregate with its interval, and what the gates changed."""
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
        "prompts_sha256": sha256("\0".join(test.prompts)),
        "max_new_tokens": test.max_new_tokens,
        "score": test.score,
        "unread": {method: sum(parsed is None for parsed in g.parsed) for method, g in graded.items()},
        "majority": _plain(benchmark.metrics(grade(test, _most_frequent(test)))),
    }
    points = {method: benchmark.metrics(g) for method, g in graded.items()}
    for method in graded:
        entry[method] = _with_intervals(points[method], resampled[method])
    if "gated" in graded:
        difference = lambda of: {name: of["gated"][name] - of["base"][name] for name in of["base"]}
        entry["change"] = _with_intervals(difference(points), difference(resampled))
        entry["paired_test"] = paired_test(graded["base"].score, graded["gated"].score)
    return entry


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


def _write_outputs(path: Path, test: Asked, outputs: Sequence[str], graded: Graded) -> None:
    lines = [
        json.dumps(
            {
                "id": item.id,
                **item.fields,
                "prompt": prompt,
                "output": text,
                "parsed": parsed,
                "answers": item.answers,
                "score": float(score),
            }
        )
        for item, prompt, text, parsed, score in zip(
            test.items, test.prompts, outputs, graded.parsed, graded.score, strict=True
        )
    ]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
