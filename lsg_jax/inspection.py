"""Describes and verifies model folders, run folders, prepared records and gate files, without loading a model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lsg_jax.checkpoint import (
    MANIFEST,
    METRICS,
    SEEDS,
    RunFolder,
    read_manifest,
    read_run,
    read_seeds,
    read_steps,
    seed_folder,
    verify_base,
)
from lsg_jax.checkpoint.processes import tree_sha256
from lsg_jax.config import ModelConfig, is_scale, to_dict
from lsg_jax.config.model import PLANTED
from lsg_jax.data import clevr, records
from lsg_jax.data.prepared import PreparedRows
from lsg_jax.digest import file_sha256
from lsg_jax.errors import CheckpointError, InputError
from lsg_jax.files import read_regular
from lsg_jax.gating.portable import is_portable, read_gates
from lsg_jax.hub import download_gates, on_hub, reading
from lsg_jax.json_files import LINE_CHECK, read_object, read_sealed, sealed_lines

RESULT = "result.json"
STUDIES = frozenset(
    {RESULT, "sinks.json", "probe.json", "sweep.json", "stack.json", "ablate.json", "pointing.json", "look.json"}
)


def kind_of(path: Path) -> str:
    """`model`, `run`, `seeds`, `records` or `gates`.

    Raises:
        InputError: the path does not exist or is none of these.
    """
    found = _kind(path)
    if found:
        return found
    if (path / "config.json").exists():
        raise InputError(f"{path}: looks like a Hugging Face checkpoint; run `lsg convert {path} MODEL` first")
    raise InputError(
        f"{path}: neither a model folder ({MANIFEST}), nor a run folder (run.json), prepared records or a gate file"
    )


def _kind(path: Path) -> str | None:
    if path.is_file():
        return "gates"
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if (path / MANIFEST).exists():
        return "model"
    if (path / "run.json").exists():
        return "run"
    if (path / SEEDS).exists():
        return "seeds"
    if any((path / layout.manifest).exists() for layout in (records.LAYOUT, clevr.LAYOUT)):
        return "records"
    return None


def describe(path: Path) -> dict[str, Any]:
    """The content of a folder, of a file, or of the gate file of a Hub id `owner/name@revision`, as plain data."""
    if (name := on_hub(path)) is not None:
        found = download_gates(name)
        with reading(found):
            return {**_gates(found.file), "hub": {"repository": found.repository, "commit": found.commit}}
    return {"model": _model, "run": _run, "seeds": _seeds, "records": _records, "gates": _gates}[kind_of(path)](path)


def problems(path: Path) -> tuple[list[str], list[str]]:
    """Everything that is wrong with a file, or with what a folder holds; and remarks.

    Of a Hub id `owner/name@revision`, its gate file is checked. A folder may hold runs, models, records, evaluations, studies
    and gate files at any depth, as that of `lsg quickstart`.

    Raises:
        InputError: a broken gate file, or nothing there that `lsg` wrote.
    """
    if (name := on_hub(path)) is not None:
        fetched = download_gates(name)
        with reading(fetched):
            return problems(fetched.file)
    if path.is_file():
        return [], [] if read_gates(path).checked else [f"{path}: no checksum in it; its values were not compared"]
    found, remarks, known = list[str](), list[str](), _kind(path) is not None
    for folder, below, names in os.walk(path):
        here, kind = Path(folder), _kind(Path(folder))
        # what a model, records and steps hold is compared with their manifests
        below[:] = [] if kind in ("model", "records") else sorted(set(below) - {"checkpoints", "quarantine"})
        where = "" if here == path else f"{here.relative_to(path)}: "
        if kind is not None:
            found += [where + what for what in _CHECKS[kind](here)]
        elif names:
            known |= _check_files(here, sorted(names), where, found, remarks)
    if not known:
        kind_of(path)
    return found, remarks


def _check_files(folder: Path, names: list[str], where: str, found: list[str], remarks: list[str]) -> bool:
    """Checks files of evaluations and studies, and gate files; whether there is one."""
    known = False
    for name in names:
        file = folder / name
        try:
            if name in STUDIES:
                known = True
                content = read_sealed(file)
                rows = _rows_of(content) if name == RESULT else {}
                found += [f"{where}{row}: not the file that {name} is of" for row in _changed_rows(folder, rows)]
            elif folder.name == "answers" and name.endswith(".jsonl"):
                known = True
                if f'"{LINE_CHECK}": '.encode() not in read_regular(file):
                    remarks.append(f"{where}{name}: no checksums in it; its answers are not used any more")
                elif damaged := sealed_lines(file, name)[1]:
                    found.append(f"{where}{name}: {damaged} damaged lines; the next run asks their questions again")
            elif name.endswith(".safetensors") and is_portable(file):
                known = True
                remarks += [] if read_gates(file).checked else [f"{where}{name}: no checksum in it"]
        except InputError as error:
            found.append(str(error))
    return known


def _rows_of(result: dict[str, Any]) -> dict[str, str]:
    """File of question rows -> its sha256, as result.json states them."""
    rows: dict[str, str] = {}
    try:
        for benchmark, entry in result["benchmarks"].items():
            rows |= {f"{benchmark}.{method}.jsonl": str(digest) for method, digest in entry.get("rows", {}).items()}
    except (LookupError, TypeError, AttributeError):
        raise InputError(f"{RESULT}: not as lsg writes it; run the evaluation again") from None
    return rows


def _changed_rows(folder: Path, rows: dict[str, str]) -> list[str]:
    return [name for name, digest in rows.items() if not (folder / name).is_file() or file_sha256(folder / name) != digest]


def _run_problems(path: Path) -> list[str]:
    found = [str(problem) for problem in RunFolder(path).verify()]
    try:
        read_run(path)
        if damaged := read_steps(path / METRICS)[1]:
            found.append(f"{METRICS}: {damaged} damaged lines, which reports leave out")
    except (InputError, CheckpointError) as error:
        found.append(str(error))
    return found


def _seeds_problems(path: Path) -> list[str]:
    try:
        read_seeds(path)  # its runs are folders below
    except (InputError, CheckpointError) as error:
        return [str(error)]
    return []


def _records_problems(path: Path) -> list[str]:
    try:
        _open(path, check=True)
    except InputError as error:
        return [str(error)]
    return []


_CHECKS: dict[str, Callable[[Path], list[str]]] = {
    "model": lambda path: [str(problem) for problem in verify_base(path)],
    "run": _run_problems,
    "seeds": _seeds_problems,
    "records": _records_problems,
}


def _model(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    parts: dict[str, int] = {}
    dtypes = set()
    for name, leaf in manifest.leaves.items():
        part = name.split("/")[0]
        if is_scale(name):
            continue
        parts[part] = parts.get(part, 0) + math.prod(leaf.shape)
        dtypes.add(leaf.dtype)
    file = path / "hf" / "config.json"
    planted = read_object(file).get(PLANTED) if file.is_file() else None
    return {
        "kind": "model",
        "path": str(path),
        "source": manifest.source and manifest.source.name,
        "digest": manifest.digest,
        "dtype": ", ".join(sorted(dtypes)),
        "parameters": {**parts, "total": sum(parts.values())},
        **({} if planted is None else {"planted sinks": planted}),
        "sink dimensions": sink_dimensions(manifest.config),
        "config": to_dict(manifest.config),
    }


def sink_dimensions(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The dimensions of V- and L-sinks of a model folder and where they come from, as plain data."""
    found = {}
    stages = (
        ("V-sinks", config.sinks.vit_dims, config.sink_sources.vit),
        ("L-sinks", config.sinks.llm_dims, config.sink_sources.llm),
    )
    for kind, dims, source in stages:
        missing = "not recorded" if dims else "none known: run `lsg calibrate`"
        found[kind] = {"dims": list(dims), "from": source or missing}
    return found


def _run(path: Path) -> dict[str, Any]:
    run = read_run(path)
    steps = read_steps(path / METRICS)[0]
    return {
        "kind": "run",
        "path": str(path),
        "model": run.model_name,
        "backbone": run.backbone,
        "saved steps": RunFolder(path).steps(),
        "total steps": run.total_steps,
        "last loss": steps[-1].get("loss") if steps else None,
        "gate": run.table("gate"),
        "sinks": to_dict(run.sinks),
    }


def _seeds(path: Path) -> dict[str, Any]:
    runs = {seed: seed_folder(path, seed) for seed in read_seeds(path)}
    begun = {f"seed {seed}": _run(run) for seed, run in runs.items() if (run / "run.json").exists()}
    shown = ("path", "saved steps", "total steps", "last loss")
    each = {seed: {name: run[name] for name in shown} for seed, run in begun.items()}
    return {"kind": "seeds", "path": str(path), "seeds": list(runs), **each}


def _open(path: Path, *, check: bool) -> PreparedRows:
    opened = clevr.open_clevr if (path / clevr.LAYOUT.manifest).exists() else records.open_records
    return opened(path, check=check)


def _records(path: Path) -> dict[str, Any]:
    report = asdict(_open(path, check=False).manifest.report)
    return {"kind": "records", "path": str(path), **{k: v for k, v in report.items() if k != "answers" and v not in ({}, [])}}


def _gates(path: Path) -> dict[str, Any]:
    gates = read_gates(path)
    count = sum(leaf.size for leaf in gates.parameters.values())
    return {
        "kind": "gates",
        "path": str(path),
        "backbone": gates.backbone or None,
        "checksum": "fits" if gates.checked else "no checksum",
        "digest": tree_sha256(gates.parameters),
        "model width": gates.width_in,
        "parameters": {"total": count, "a gate": count // len(gates.gate.layers)},
        "gate": to_dict(gates.gate),
        "sinks": to_dict(gates.sinks),
    }


def as_table(found: dict[str, Any], indent: str = "") -> str:
    """Nested data as lines of name and value, aligned."""
    width = max(len(name) for name in found)
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", as_table(value, indent + "  ")]
        else:
            text = (
                f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else "" if value is None else str(value)
            )
            lines.append(f"{indent}{name.ljust(width)}  {text}".rstrip())
    return "\n".join(lines)
