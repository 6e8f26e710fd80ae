"""Describes and verifies model folders, run folders, prepared records and gate files, without loading a model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lsg_jax.checkpoint import MANIFEST, Problem, RunFolder, read_manifest, read_run, verify_base
from lsg_jax.config import ModelConfig, to_dict
from lsg_jax.data import clevr, records
from lsg_jax.data.prepared import PreparedRows
from lsg_jax.errors import InputError
from lsg_jax.gating.portable import read_gates
from lsg_jax.json_files import json_lines


def kind_of(path: Path) -> str:
    """`model`, `run`, `records` or `gates`.

    Raises:
        InputError: the path does not exist or is none of these.
    """
    if path.is_file():
        return "gates"
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if (path / MANIFEST).exists():
        return "model"
    if (path / "run.json").exists():
        return "run"
    if any((path / layout.manifest).exists() for layout in (records.LAYOUT, clevr.LAYOUT)):
        return "records"
    if (path / "config.json").exists():
        raise InputError(f"{path}: looks like a Hugging Face checkpoint; run `lsg convert {path} MODEL` first")
    raise InputError(
        f"{path}: neither a model folder ({MANIFEST}), nor a run folder (run.json), prepared records or a gate file"
    )


def describe(path: Path) -> dict[str, Any]:
    """The content of a folder or file as plain data."""
    return {"model": _model, "run": _run, "records": _records, "gates": _gates}[kind_of(path)](path)


def problems(path: Path) -> list[Problem] | list[str]:
    """Everything that is wrong with a folder or file. Raises InputError for a broken gate file."""
    kind = kind_of(path)
    if kind == "model":
        return verify_base(path)
    if kind == "run":
        return RunFolder(path).verify()
    if kind == "records":
        return [f"{name} does not match its sha256; run `lsg prepare` again" for name in _open(path).changed_files()]
    read_gates(path)
    return []


def _model(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    parts: dict[str, int] = {}
    dtypes = set()
    for name, leaf in manifest.leaves.items():
        part = name.split("/")[0]
        parts[part] = parts.get(part, 0) + math.prod(leaf.shape)
        dtypes.add(leaf.dtype)
    return {
        "kind": "model",
        "path": str(path),
        "source": manifest.source and manifest.source.name,
        "digest": manifest.digest,
        "dtype": ", ".join(sorted(dtypes)),
        "parameters": {**parts, "total": sum(parts.values())},
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
    metrics = path / "metrics.jsonl"
    lines = json_lines(metrics) if metrics.exists() else []
    last = json.loads(lines[-1][1]) if lines else {}
    return {
        "kind": "run",
        "path": str(path),
        "model": run.model_name,
        "backbone": run.backbone,
        "saved steps": RunFolder(path).steps(),
        "total steps": run.total_steps,
        "last loss": last.get("loss"),
        "gate": run.table("gate"),
        "sinks": to_dict(run.sinks),
    }


def _open(path: Path) -> PreparedRows:
    return clevr.open_clevr(path) if (path / clevr.LAYOUT.manifest).exists() else records.open_records(path)


def _records(path: Path) -> dict[str, Any]:
    report = asdict(_open(path).manifest.report)
    return {"kind": "records", "path": str(path), **{k: v for k, v in report.items() if k != "answers" and v not in ({}, [])}}


def _gates(path: Path) -> dict[str, Any]:
    gates = read_gates(path)
    count = sum(leaf.size for leaf in gates.parameters.values())
    return {
        "kind": "gates",
        "path": str(path),
        "backbone": gates.backbone or None,
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
