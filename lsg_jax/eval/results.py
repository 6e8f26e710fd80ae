"""The files that an evaluation writes: `result.json`, and `<benchmark>.<method>.jsonl` with one line per question."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lsg_jax.config import Protocol
from lsg_jax.digest import bytes_sha256
from lsg_jax.errors import InputError
from lsg_jax.eval.statistics import PairedTest
from lsg_jax.files import read_regular, write_atomic
from lsg_jax.json_files import json_lines, parse_json, read_sealed, write_sealed

RESULT = "result.json"
FORMAT = "lsg-eval-3"
MAX_NAMED = 8  # missing values that a text names; the result has all
BASE = "base"  # the unchanged model, which the other methods are compared with


@dataclass(frozen=True)
class Estimate:
    """A metric or its change, with its 95 % bootstrap interval. None: there is no item to compute it from."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class OverSeeds:
    """A method over the seeds that it was trained from.

    Attributes:
        seeds: the methods that are its seeds.
        methods: metric -> mean over the seeds; the interval is over questions, with these seeds.
        change: metric -> the same of the difference from the base model.
        deviation: metric -> standard deviation over the seeds (n - 1), of the value and of the change alike.
    """

    seeds: tuple[str, ...]
    methods: Mapping[str, Estimate]
    change: Mapping[str, Estimate]
    deviation: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """Scores of all methods on one benchmark. Metrics are in percent unless the benchmark says otherwise.

    Attributes:
        path: as given to `--benchmark`; None in files of versions that did not store it.
        files: sha256 of each file.
        protocol: the protocol whose prompts, matcher and score were used.
        questions: number of questions asked. of: number in the official file.
        partial: whether these are not all official questions; a partial run has no official score.
        missing: field -> its values of which no question was asked. Metrics that need one are None.
        broken: field -> number of groups (pairs) of which only a part was asked. They are not counted as groups.
        note: how the scoring differs from the owner's, or on which files of the user it depends.
        prompts_sha256: of all prompts. questions_sha256: of all prompts and images.
        max_new_tokens: longest answer in tokens.
        score: the metric that is the official score, if there is one.
        unread: method -> number of outputs in which the matcher found no answer.
        majority: metric -> its value when every answer is the most frequent one.
        methods: method -> metric -> its value.
        change: method -> metric -> its difference from the base model.
        paired_test: method -> test of its scores against those of the base model.
        over_seeds: method -> mean and deviation over its seeds, each of which is among `methods`.
        rows: method -> sha256 of its file of question rows; empty in results of versions that did not store it.
        work: decoder layers in the passes over the prompts, summed over questions and methods: `layers_run`, `layers_naive` if
            each method ran alone, and their ratio `share`. Near ties that were asked again do not count.
        settings: method -> its settings on this kind of benchmark, where they differ from those of `EvaluationResult.methods`.
    """

    path: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    protocol: Protocol
    questions: int
    of: int
    partial: bool = False
    missing: Mapping[str, Sequence[str]] = field(default_factory=dict)
    broken: Mapping[str, int] = field(default_factory=dict)
    note: str = ""
    prompts_sha256: str = ""
    questions_sha256: str = ""
    max_new_tokens: int = 0
    score: str | None = None
    unread: Mapping[str, int] = field(default_factory=dict)
    majority: Mapping[str, float | None] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Estimate]]
    change: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    paired_test: Mapping[str, PairedTest] = field(default_factory=dict)
    over_seeds: Mapping[str, OverSeeds] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    work: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, MethodSettings] = field(default_factory=dict)

    def shown(self, method: str) -> str:
        """The metric that stands for all of a method's: the official score, or the first with a value, or the first."""
        metrics = self.methods[method]
        return self.score or next((name for name, found in metrics.items() if found.value is not None), next(iter(metrics)))

    @property
    def lacks(self) -> list[str]:
        """What a partial run lacks of the benchmark, a sentence for each field without a final period."""
        told = []
        for name, values in self.missing.items():
            more = f" and {len(values) - MAX_NAMED} more" if len(values) > MAX_NAMED else ""
            told.append(f"no questions of {name} {', '.join(values[:MAX_NAMED])}{more}")
        return told + [f"groups by {name} that are not whole, so not counted: {count}" for name, count in self.broken.items()]


@dataclass(frozen=True)
class RatioRow:
    """Gate ratios of one token group at one layer: mean and standard deviation over the questions of a task."""

    method: str
    benchmark: str
    task: str
    layer: int
    group: str
    mean: float
    std: float
    questions: int


@dataclass(frozen=True)
class MethodSettings:
    """What a method does to the model, as plain data; None where a part is not used."""

    gate: Mapping[str, Any] | None = None
    method: Mapping[str, Any] | None = None
    sinks: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The content of result.json.

    Attributes:
        model: name of the model folder. backbone: digest of its weights.
        files: sha256 of the model folder's tokenizer, processor and template files.
        trained: method -> sha256 of what was trained for it.
        hub: method -> `owner/name@commit`, where that was fetched from the Hugging Face Hub.
        methods: method -> its settings, `base` first.
        settings: the `[eval]` table without its benchmarks.
        devices: number and kind.
    """

    format: str = FORMAT
    model: str | None
    backbone: str
    files: Mapping[str, str] = field(default_factory=dict)
    trained: Mapping[str, str] = field(default_factory=dict)
    hub: Mapping[str, str] = field(default_factory=dict)
    methods: Mapping[str, MethodSettings]
    settings: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    devices: str = ""
    benchmarks: Mapping[str, BenchmarkResult]
    ratios: tuple[RatioRow, ...] = ()


def write_result(folder: Path, result: EvaluationResult) -> None:
    """Writes result.json."""
    write_sealed(folder / RESULT, asdict(result))


def read_result(path: Path) -> EvaluationResult:
    """Reads result.json. Raises InputError if it is missing, broken, changed or of another format."""
    tree = read_sealed(path)
    found = tree.get("format")
    if found != FORMAT:
        raise InputError(f"{path}: format {found}, but this version of lsg reads {FORMAT}; run the evaluation again")
    try:
        return result_of(tree)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not as lsg writes it ({type(error).__name__}: {error}); run the evaluation again") from None


def result_of(tree: Mapping[str, Any]) -> EvaluationResult:
    """The result from its plain data. Raises KeyError, TypeError or AttributeError if that is not as written."""
    return EvaluationResult(
        **{
            **tree,
            "methods": {name: MethodSettings(**settings) for name, settings in tree["methods"].items()},
            "benchmarks": {name: _benchmark(entry) for name, entry in tree["benchmarks"].items()},
            "ratios": tuple(RatioRow(**row) for row in tree.get("ratios", ())),
        }
    )


def _benchmark(entry: Mapping[str, Any]) -> BenchmarkResult:
    estimates = lambda of: {metric: Estimate(**at) for metric, at in of.items()}
    scores = lambda of: {method: estimates(metrics) for method, metrics in of.items()}
    tests = {method: PairedTest(**test) for method, test in entry.get("paired_test", {}).items()}
    settings = {method: MethodSettings(**own) for method, own in entry.get("settings", {}).items()}
    seeds = {
        method: OverSeeds(tuple(of["seeds"]), estimates(of["methods"]), estimates(of["change"]), of["deviation"])
        for method, of in entry.get("over_seeds", {}).items()
    }
    nested = {"methods": scores(entry["methods"]), "change": scores(entry.get("change", {})), "paired_test": tests}
    return BenchmarkResult(**{**entry, **nested, "settings": settings, "over_seeds": seeds})


# ------------------------------------------------------------------------------------------------------------- question rows


@dataclass(frozen=True)
class QuestionRow:
    """One question under one method.

    Attributes:
        fields: of the item, such as its category; stored beside the other columns.
        parsed: how the matcher read the output; None: it found no answer.
        answers: the accepted ones.
        score: in [0, 1].
        ratios: gate ratios, [gated layers][groups]; None without gates or without an image.
    """

    id: str
    prompt: str
    output: str
    parsed: str | None
    answers: tuple[str, ...]
    score: float
    ratios: list[list[float]] | None = None
    fields: Mapping[str, str] = field(default_factory=dict)


_COLUMNS = ("id", "prompt", "output", "parsed", "answers", "score", "ratios")


def questions_file(folder: Path, benchmark: str, method: str) -> Path:
    """Where the question rows of a benchmark and a method are."""
    return folder / f"{benchmark}.{method}.jsonl"


def questions_bytes(rows: Iterable[QuestionRow]) -> bytes:
    """The file of these rows: one JSON line each."""
    return "".join(json.dumps(_line(row)) + "\n" for row in rows).encode()


def write_questions(path: Path, rows: Iterable[QuestionRow]) -> None:
    """Writes one JSON line per row, atomically."""
    write_atomic(path, questions_bytes(rows))


def read_questions(path: Path, sha256: str | None = None) -> list[QuestionRow]:
    """Reads the rows of one file. Raises InputError if it cannot be read, is not as written, or is not that of `sha256`."""
    if sha256 not in (None, bytes_sha256(read_regular(path))):
        raise InputError(f"{path}: not the file that {RESULT} is of, or damaged (its sha256); run the evaluation again")
    try:
        return [_row(parse_json(text)) for _, text in json_lines(path)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not as lsg writes it ({type(error).__name__}: {error}); run the evaluation again") from None


def _line(row: QuestionRow) -> dict[str, Any]:
    columns = {name: getattr(row, name) for name in _COLUMNS if name != "ratios" or row.ratios is not None}
    return {"id": row.id, **row.fields, **columns}


def _row(line: Mapping[str, Any]) -> QuestionRow:
    fields = {name: value for name, value in line.items() if name not in _COLUMNS}
    return QuestionRow(
        id=str(line["id"]),
        prompt=str(line["prompt"]),
        output=str(line["output"]),
        parsed=line["parsed"],
        answers=tuple(map(str, line["answers"])),
        score=float(line["score"]),
        ratios=line.get("ratios"),
        fields=fields,
    )
