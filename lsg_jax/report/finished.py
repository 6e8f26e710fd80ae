"""`lsg report`: finds finished runs, evaluations and studies in folders, and makes a section of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lsg_jax.checkpoint import read_run
from lsg_jax.errors import InputError
from lsg_jax.json_files import read_sealed
from lsg_jax.report.parts import Section
from lsg_jax.report.results import eval_section, run_section
from lsg_jax.report.sections import ablate_section, pointing_section, probe_section, stack_section, sweep_section
from lsg_jax.report.sinks import sinks_section

PASSED_OVER = frozenset({"checkpoints", "quarantine", "answers"})
"""Subfolders of runs and evaluations that hold no work of their own."""


def read_sections(paths: Sequence[Path]) -> list[Section]:
    """A section for each run, evaluation and study in the folders and below, in the order given, then by name.

    Each is named by its path relative to the common parent folder.

    Raises:
        InputError: a folder is missing or holds nothing that `lsg` wrote, or a file is broken or of another format.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        files = list(_files(path))
        if not files and (looks := sorted(path.rglob("look.json"))):
            page = looks[0].with_name("look.html")
            raise InputError(f"{path}: nothing to report on: `lsg look` writes a page of its own; open {page}")
        if not files:
            raise InputError(f"{path}: nothing to report on: expected a folder with {', '.join(KINDS)}, or one that holds such")
        for file in files:
            found.setdefault(file.resolve(), file)
    root = Path(os.path.commonpath([file.parent for file in found]))
    return [_section(file, str(resolved.parent.relative_to(root))) for resolved, file in found.items()]


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        raise InputError(f"{path}: {'a file' if path.exists() else 'no such folder'}; give a folder that lsg wrote into")
    for folder, below, names in os.walk(path):
        below[:] = sorted(name for name in below if name not in PASSED_OVER and not name.startswith("."))
        yield from (Path(folder) / name for name in KINDS if name in names)


def _section(file: Path, name: str) -> Section:
    """Args: name: relative path of the file's folder, "." if there is only one."""
    expected, what, make = KINDS[file.name]
    study = read_sealed(file)
    found = study.get("format")
    if found not in expected:
        raise InputError(f"{file}: format {found}, but this version of lsg reads {' and '.join(expected)}; run the study again")
    try:
        return make(study, file.parent, title=what if name == "." else f"{what}: {name}")
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, AssertionError) as error:
        raise InputError(f"{file}: not as lsg writes it ({type(error).__name__}: {error}); run the study again") from error


def _alone(section: Callable[..., Section]) -> Callable[..., Section]:
    """For a study that needs no other file of its folder."""
    return lambda study, folder, *, title: section(study, title=title)


def _training(study: object, folder: Path, *, title: str) -> Section:
    return run_section(read_run(folder), folder, title=title)


KINDS: dict[str, tuple[tuple[str, ...], str, Callable[..., Section]]] = {
    "sinks.json": (("lsg-sinks-2", "lsg-sinks-1"), "Sinks", sinks_section),
    "probe.json": (("lsg-probe-1",), "Probes", _alone(probe_section)),
    "sweep.json": (("lsg-sweep-1",), "Oracle sweep", _alone(sweep_section)),
    "run.json": (("lsg-run-1",), "Training", _training),
    "result.json": (("lsg-eval-3",), "Evaluation", eval_section),
    "stack.json": (("lsg-stack-1",), "Stack", _alone(stack_section)),
    "ablate.json": (("lsg-ablate-1",), "Ablation", _alone(ablate_section)),
    "pointing.json": (("lsg-pointing-1",), "Pointing", _alone(pointing_section)),
}
"""File name -> formats that can be read, heading, and the function that makes the section."""
