"""The scores of gates: the evaluation in the run's folder, or one that is named, if it asked these gates."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from lsg_jax.checkpoint import SEEDS
from lsg_jax.config import to_dict
from lsg_jax.errors import InputError
from lsg_jax.eval.results import RESULT, EvaluationResult, read_result
from lsg_jax.gating.portable import GATE_FIELDS, PortableGates

logger = logging.getLogger(__name__)

EVALUATION = "eval"  # folder of a run in which `lsg eval` writes by default


@dataclass(frozen=True)
class Scores:
    """An evaluation, and the name under which it asked the gates."""

    result: EvaluationResult
    method: str


def find_scores(run: Path | None, named: Path | None, gates: PortableGates, digest: str) -> Scores | None:
    """The evaluation of gates; None, with a line in the log, if there is none of them.

    Args:
        run: run folder, in which or (of several seeds) beside which an evaluation may be.
        named: folder of an evaluation, which then must be of these gates.
        digest: sha256 of the gates' parameters.

    Raises:
        InputError: the evaluation cannot be read, or the named one is of other gates, or of these with other settings.
    """
    if named is not None:
        result = read_result(named / RESULT)
        asked = [name for name, trained in result.trained.items() if trained == digest]
        if not asked:
            raise InputError(f"{named}: an evaluation of other gates than these; run `lsg eval` with them, or leave --eval out")
        differ = [_other_settings(result, name, gates) for name in asked]
        if all(differ):
            raise InputError(
                f"{named}: an evaluation of these gates with other {differ[0]} settings than they have; "
                "run `lsg eval` without such settings, or leave --eval out"
            )
        return Scores(result, asked[differ.index("")])
    beside = _beside(run)
    for folder in beside:
        result = read_result(folder / RESULT)
        for name, trained in result.trained.items():
            if trained == digest and not _other_settings(result, name, gates):
                return Scores(result, name)
    if run is not None:
        found = f"{beside[0]}: not an evaluation of these gates" if beside else f"{run}: no evaluation in it"
        logger.warning("%s, so the card shows no scores; name one with --eval", found)
    return None


def _other_settings(result: EvaluationResult, method: str, gates: PortableGates) -> str:
    """Which settings an evaluation changed: `gate`, `sinks`, or none (empty). The digest of gates does not cover them."""
    asked, own = result.methods[method], to_dict(gates.gate)
    if any((asked.gate or {}).get(name) != own[name] for name in ("layers", *GATE_FIELDS)):
        return "gate"
    return "" if asked.sinks == to_dict(gates.sinks) else "sinks"


def _beside(run: Path | None) -> list[Path]:
    if run is None:
        return []
    places = [run, *([run.parent] if (run.parent / SEEDS).is_file() else [])]
    return [place / EVALUATION for place in places if (place / EVALUATION / RESULT).is_file()]
