"""`lsg eval`: asks the questions of every benchmark under every method, grades the answers and writes the results."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from lsg_jax.checkpoint.processes import is_primary, on_primary, share_bytes, tree_sha256
from lsg_jax.config import EvalConfig, GateConfig, Protocol, to_dict
from lsg_jax.digest import bytes_sha256, file_sha256, json_sha256, text_sha256
from lsg_jax.errors import InputError, Preempted
from lsg_jax.eval.answering import Answer, answer_all
from lsg_jax.eval.answers import AnswerLog
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Metrics, is_whole
from lsg_jax.eval.identity import meaning_of, question_sha256, settings_of, surroundings, text_files, with_hashed_images
from lsg_jax.eval.intervals import Interval, change_intervals, resamples, score_intervals
from lsg_jax.eval.methods import fit
from lsg_jax.eval.registry import find_benchmark
from lsg_jax.eval.results import (
    BASE,
    BenchmarkResult,
    Estimate,
    EvaluationResult,
    OverSeeds,
    QuestionRow,
    RatioRow,
    questions_bytes,
    questions_file,
    write_result,
)
from lsg_jax.eval.statistics import paired_test
from lsg_jax.eval.together import groups, work_of
from lsg_jax.files import write_atomic
from lsg_jax.gating.keys import GROUPS
from lsg_jax.progress import Progress, silent
from lsg_jax.stopping import stop_signals
from lsg_jax.vlm import VLM

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 32  # where neither the run nor the protocol sets a limit
NO_SEEDS: Mapping[str, Sequence[str]] = {}
RATIO_DIGITS = 3  # of gate ratios in files: further digits depend on the batch size


@dataclass(frozen=True)
class Asked:
    """A benchmark with the prompts of a run.

    Attributes:
        path: as given to `--benchmark`.
        rules: the protocol whose prompts, matcher and score are used: that of the run, or `paper` if the benchmark has no
            rules for it.
        rows: number of items in the file, before `eval.limit`.
        files: sha256 of each file, {} for drawn scenes.
    """

    benchmark: Benchmark
    path: str
    items: list[Item]
    prompts: list[str]
    rules: Protocol
    rows: int
    files: dict[str, str]
    max_new_tokens: int

    @property
    def partial(self) -> bool:
        """Whether this is not exactly the official set of questions: `eval.limit`, or a file that lacks some of them."""
        return len(self.items) != (self.benchmark.size or self.rows) or bool(self.missing or self.broken)

    @property
    def missing(self) -> dict[str, list[str]]:
        """Field -> its values in the official file of which no question is asked."""
        there = {name: {item.fields[name] for item in self.items} for name in self.benchmark.groups}
        absent = {name: [v for v in values if v not in there[name]] for name, values in self.benchmark.groups.items()}
        return {name: values for name, values in absent.items() if values}

    @property
    def broken(self) -> dict[str, int]:
        """Field -> number of its groups of which only some questions are asked."""
        parts = {}
        for name, size in self.benchmark.whole.items():
            whole = is_whole(self.items, name, size)
            torn = (item for item, is_in in zip(self.items, whole, strict=True) if name in item.fields and not is_in)
            parts[name] = len({item.fields[name] for item in torn})
        return {name: count for name, count in parts.items() if count}

    def questions_sha256(self) -> str:
        """sha256 of all prompts and images; a collective. Process 0 reads images that it has not read before."""
        each = lambda: [question_sha256(*asked) for asked in zip(self.items, self.prompts, strict=True)]
        return share_bytes(json_sha256(on_primary(each)).encode()).decode()

    @property
    def score(self) -> str | None:
        """The metric that is the official score; None for a partial run or a benchmark without one."""
        return None if self.partial else self.benchmark.official.get(self.rules)


def evaluate(
    models: Mapping[str, VLM],
    config: EvalConfig,
    out: Path,
    *,
    asked: dict[str, Asked] | None = None,
    seeds: Mapping[str, Sequence[str]] = NO_SEEDS,
    progress: Progress = silent,
) -> EvaluationResult:
    """Answers every question of `config.benchmarks` under every method. All processes must call it.

    Writes into `out`: the files of `lsg_jax.eval.results`, and `answers/`, the log from which an interrupted run resumes:
    questions that were answered under the same settings are not asked again.

    Args:
        models: method -> the model under it; the others are compared with `base`.
        asked: `ask_all(config)`, if the caller has read the files before loading the model.
        seeds: name of a method -> the models that are its seeds, for `BenchmarkResult.over_seeds`.
        progress: counts the questions of each benchmark and method.

    Raises:
        InputError: no benchmarks, or a wrong file; before anything is computed.
        Preempted: SIGTERM or SIGINT was received; finished answers are kept.
    """
    asked = ask_all(config) if asked is None else asked
    first = next(iter(models.values()))
    on_primary(lambda: out.mkdir(parents=True, exist_ok=True))
    benchmarks: dict[str, BenchmarkResult] = {}
    ratios: list[RatioRow] = []
    for name, test in asked.items():
        fitted = {m: fit(model, test.benchmark.kind) for m, model in models.items()}
        answers, work = _answers(fitted, name, test, config, out, progress)
        graded = {method: grade(test, [answer.text for answer in found]) for method, found in answers.items()}
        files = {method: questions_bytes(question_rows(test, found, graded[method])) for method, found in answers.items()}
        if is_primary():
            for method, data in files.items():
                write_atomic(questions_file(out, name, method), data)
        rows = {method: bytes_sha256(data) for method, data in files.items()}
        settings = {m: settings_of(fitted[m]) for m in models if fitted[m] is not models[m]}
        benchmarks[name] = replace(summary(test, graded, seeds), rows=rows, settings=settings, work=work)
        for method, model in models.items():
            if model.gate is not None:
                ratios += ratio_rows(method, name, test, answers[method], model.gate)
    result = EvaluationResult(
        model=first.folder.name if first.folder else None,
        backbone=first.digest,
        files=text_files(first),
        methods={method: settings_of(model) for method, model in models.items()},
        settings={k: v for k, v in to_dict(config).items() if k != "benchmarks"} | {"decoding": "greedy"},
        trained={method: tree_sha256(model.trained) for method, model in models.items() if model.trained},
        hub={method: model.origin for method, model in models.items() if model.origin},
        versions=surroundings()["versions"],
        devices=f"{jax.device_count()} {jax.devices()[0].device_kind}",
        benchmarks=benchmarks,
        ratios=tuple(ratios),
    )
    on_primary(lambda: write_result(out, result))
    return result


def ask_all(config: EvalConfig) -> dict[str, Asked]:
    """Reads every benchmark of the configuration, by name. Raises InputError if there is none, or a file is wrong."""
    if not config.benchmarks:
        raise InputError("nothing to evaluate: give --benchmark NAME=PATH, or [eval.benchmarks] in the configuration")
    return {name: ask(find_benchmark(name, path), path, config) for name, path in config.benchmarks.items()}


def ask(benchmark: Benchmark, path: str, config: EvalConfig) -> Asked:
    """Reads a benchmark and makes its prompts. With `config.limit`, items are evenly spaced over the whole file."""
    items = with_hashed_images(benchmark.read(path))
    rows = len(items)
    if config.limit is not None and config.limit < rows:
        items = [items[i] for i in np.linspace(0, rows - 1, config.limit).round().astype(int)]
    rules: Protocol = config.protocol if config.protocol in benchmark.official else "paper"
    return Asked(
        benchmark=benchmark,
        path=path,
        items=items,
        prompts=[_prompt(benchmark, item, rules, path) for item in items],
        rules=rules,
        rows=rows,
        files={str(file): file_sha256(file) for file in benchmark.files(path)} if path else {},
        max_new_tokens=config.max_new_tokens or benchmark.max_new_tokens.get(rules, MAX_NEW_TOKENS),
    )


def _prompt(benchmark: Benchmark, item: Item, rules: Protocol, path: str) -> str:
    prompt = benchmark.prompt(item, rules)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: question {item.id}: it holds half of a surrogate pair, which is no character") from None
    return prompt


def _answers(
    models: Mapping[str, VLM], name: str, test: Asked, config: EvalConfig, out: Path, progress: Progress
) -> tuple[dict[str, list[Answer]], dict[str, float]]:
    """The answers of each model to the questions of a benchmark, and `BenchmarkResult.work`."""
    limit, total = test.max_new_tokens, len(models) * len(test.items)
    meanings = {method: meaning_of(model, config, max_new_tokens=limit) for method, model in models.items()}
    logs = {m: AnswerLog(out / "answers", f"{name}.{m}", meaning, test.items, test.prompts) for m, meaning in meanings.items()}
    known = {method: log.known() for method, log in logs.items()}
    done = sum(map(len, known.values()))
    kept = f", {done} of {total} answers are there" if done else ""
    logger.info("%s: %d questions under %s%s", name, len(test.items), ", ".join(models), kept)
    with stop_signals() as stopped:

        def save(method: str, new: dict[int, Answer]) -> None:
            nonlocal done
            logs[method].add(new)
            done += len(new)
            progress(done, total, f"{name}.{method}")
            if stopped() and done < total:
                raise Preempted(f"{out}: stopped at {done} of {total} answers of {name}; run the same command to go on")

        found: dict[str, list[Answer]] = {}
        shown = any(item.images for item in test.items)
        split = groups(models) if shown else [{method: model} for method, model in models.items()]
        for group in split:
            found |= answer_all(group, test.items, test.prompts, config, max_new_tokens=limit, known=known, on_batch=save)
    return {method: found[method] for method in models}, work_of(split, len(test.items))


# -------------------------------------------------------------------------------------------------------------------- grading


def grade(test: Asked, outputs: Sequence[str]) -> Graded:
    """Matches and scores the outputs; every item has weight one."""
    matches = [test.benchmark.match(item, text, test.rules) for item, text in zip(test.items, outputs, strict=True)]
    score = np.array([match.score for match in matches], np.float64)
    counts = [match.counts for match in matches]
    return Graded(test.items, [match.parsed for match in matches], score, np.ones((1, len(matches))), counts)


def summary(test: Asked, graded: Mapping[str, Graded], seeds: Mapping[str, Sequence[str]] = NO_SEEDS) -> BenchmarkResult:
    """Every metric of every method with its interval, the change over the base model, and both over seeds."""
    benchmark = test.benchmark
    weight = resamples(benchmark, test.items)
    points = {method: benchmark.metrics(g) for method, g in graded.items()}
    resampled = {m: benchmark.metrics(replace(g, weight=weight)) for m, g in graded.items()}
    difference = lambda of, method: {metric: of[method][metric] - of[BASE][metric] for metric in of[BASE]}
    others = [method for method in graded if method != BASE] if BASE in graded else []
    majority = benchmark.metrics(grade(test, _most_frequent(test)))
    return BenchmarkResult(
        path=test.path,
        files=test.files,
        protocol=test.rules,
        questions=len(test.items),
        of=benchmark.size or test.rows,
        partial=test.partial,
        missing=test.missing,
        broken=test.broken,
        note=benchmark.note(test.items),
        prompts_sha256=text_sha256("\0".join(test.prompts)),
        questions_sha256=test.questions_sha256(),
        max_new_tokens=test.max_new_tokens,
        score=test.score,
        unread={method: sum(parsed is None for parsed in g.parsed) for method, g in graded.items()},
        majority={name: _number(values[0]) for name, values in majority.items()},
        methods={m: _estimates(points[m], score_intervals(benchmark, graded[m], resampled[m])) for m in graded},
        change={
            m: _estimates(difference(points, m), change_intervals(benchmark, graded[m], difference(resampled, m)))
            for m in others
        },
        paired_test={method: paired_test(graded[BASE].score, graded[method].score) for method in others},
        over_seeds={m: _over_seeds(benchmark, names, graded[names[0]], points, resampled) for m, names in seeds.items()},
    )


def _over_seeds(
    benchmark: Benchmark, names: Sequence[str], graded: Graded, points: Mapping[str, Metrics], resampled: Mapping[str, Metrics]
) -> OverSeeds:
    """Means over the methods of these names, and their deviation; `graded`: the answers of one of them.

    Seeds that are all right have the interval of one.
    """

    def mean(of: Mapping[str, Metrics], base: int) -> Metrics:
        return {metric: np.mean([of[n][metric] - base * of[BASE][metric] for n in names], axis=0) for metric in of[BASE]}

    return OverSeeds(
        seeds=tuple(names),
        methods=_estimates(mean(points, 0), score_intervals(benchmark, graded, mean(resampled, 0))),
        change=_estimates(mean(points, 1), change_intervals(benchmark, graded, mean(resampled, 1))),
        deviation={metric: _number(np.std([points[n][metric][0] for n in names], ddof=1)) for metric in points[BASE]},
    )


def ratio_rows(method: str, name: str, test: Asked, answers: Sequence[Answer], gate: GateConfig) -> list[RatioRow]:
    """The gate ratios of a method by task, layer and token group, over the questions with an image."""
    field = test.benchmark.task
    tasks: dict[str, list[np.ndarray]] = {}
    for item, found in zip(test.items, answers, strict=True):
        if found.ratios is not None:
            tasks.setdefault(item.fields.get(field, "") if field else "", []).append(found.ratios)
    rows = []
    for task in sorted(tasks):
        values = np.stack(tasks[task])  # [questions, layers, groups]
        for i, layer in enumerate(gate.layers):
            for j, group in enumerate(GROUPS[gate.grouping]):
                at = values[:, i, j].astype(np.float64)
                mean, std = (round(float(of), RATIO_DIGITS) for of in (at.mean(), at.std()))
                rows.append(RatioRow(method, name, task or name, layer, group, mean, std, len(at)))
    return rows


def question_rows(test: Asked, answers: Sequence[Answer], graded: Graded) -> list[QuestionRow]:
    """One row per question."""
    return [
        QuestionRow(
            id=item.id,
            prompt=prompt,
            output=found.text,
            parsed=parsed,
            answers=item.answers,
            score=float(score),
            ratios=None if found.ratios is None else np.round(found.ratios.astype(np.float64), RATIO_DIGITS).tolist(),
            fields=item.fields,
        )
        for item, prompt, found, parsed, score in zip(
            test.items, test.prompts, answers, graded.parsed, graded.score, strict=True
        )
    ]


def _most_frequent(test: Asked) -> list[str]:
    """For every item the most frequent answer of its kind: what guessing without the image, knowing the test set, gives."""
    of = test.benchmark.guess_by
    kinds = ["" if of is None else item.fields[of] for item in test.items]
    counts: dict[str, dict[str, int]] = {}
    for kind, item in zip(kinds, test.items, strict=True):
        answers = counts.setdefault(kind, {})
        answers[item.answers[0]] = answers.get(item.answers[0], 0) + 1
    return [max(counts[kind], key=counts[kind].__getitem__) for kind in kinds]


def _estimates(point: Metrics, bounds: Mapping[str, Interval]) -> dict[str, Estimate]:
    return {name: Estimate(_number(values[0]), *map(_number, bounds[name])) for name, values in point.items()}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None  # JSON has no NaN
