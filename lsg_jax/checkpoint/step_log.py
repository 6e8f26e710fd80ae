"""`metrics.jsonl`, the log of a run's steps: one record a line, with a checksum (`json_files.sealed_line`).

train/metrics.py says what a record holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lsg_jax.files import read_regular
from lsg_jax.json_files import LINE_CHECK, parse_json, sealed_line, sealed_lines

METRICS = "metrics.jsonl"


def step_line(record: dict[str, Any]) -> str:
    """The line of a step."""
    return sealed_line(record, METRICS)


def read_steps(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a log, the last one of each step, ascending; and the number of damaged lines, which are left out.

    Earlier versions wrote no checksums: if no line has one, each line that is the record of a step counts.

    Raises:
        InputError: the file is there and cannot be read.
    """
    if not path.exists():
        return [], 0
    if f'"{LINE_CHECK}": '.encode() in read_regular(path):
        found, damaged = sealed_lines(path, METRICS)
    else:
        found, damaged = _without_checksums(path)
    sound = [record for record in found if type(record.get("step")) is int]
    by_step = {record["step"]: record for record in sound}
    return [by_step[step] for step in sorted(by_step)], damaged + len(found) - len(sound)


def _without_checksums(path: Path) -> tuple[list[dict[str, Any]], int]:
    found, damaged = [], 0
    for line in filter(bytes.strip, read_regular(path).split(b"\n")):
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            found.append(record)
        else:
            damaged += 1
    return found, damaged
