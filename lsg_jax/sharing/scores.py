"""The scores of gates: the evaluation in the run's folder, or one that is named, if it asked these gates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lsg_jax.checkpoint import SEEDS
from lsg_jax.errors import InputError
from lsg_jax.eval.results import RESULT, EvaluationResult, read_result

EVALUATION = "eval"  # folder of a run in which `lsg eval` writes by default


@dataclass(frozen=True)
class Scores:
    """An evaluation, and the name under which it asked the gates."""

    result: EvaluationResult
    method: str


def find_scores(run: Path | None, named: Path | None, digest: str) -> Scores | None:
    """The evaluation of gates; None if there is none of them.

    Args:
        run: run folder, in which or (of several seeds) beside which an evaluation may be.
        named: folder of an evaluation, which then must be of these gates.
        digest: sha256 of the gates.

    Raises:
        InputError: the evaluation cannot be read, or the named one is of other gates.
    """
    for folder in [named] if named is not None else _beside(run):
        result = read_result(folder / RESULT)
        method = next((name for name, trained in result.trained.items() if trained == digest), None)
        if method is not None:
            return Scores(result, method)
    if named is not None:
        raise InputError(f"{named}: an evaluation of other gates than these; run `lsg eval` with them, or leave --eval out")
    return None


def _beside(run: Path | None) -> Iterator[Path]:
    if run is None:
        return
    places = [run, *([run.parent] if (run.parent / SEEDS).is_file() else [])]
    yield from (place / EVALUATION for place in places if (place / EVALUATION / RESULT).is_file())
