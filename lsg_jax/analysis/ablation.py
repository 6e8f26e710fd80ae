"""`lsg ablate`: trains variants of gates (other signals, other groupings, LoRA instead) and compares their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import jax

from lsg_jax.analysis.scores import score_rows
from lsg_jax.checkpoint import read_manifest
from lsg_jax.checkpoint.processes import on_primary
from lsg_jax.config import Grouping, ModelConfig, Signal
from lsg_jax.data.records import open_records
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.eval.results import BASE
from lsg_jax.eval.runner import ask_all, evaluate
from lsg_jax.json_files import write_sealed
from lsg_jax.methods.gates import Gates
from lsg_jax.opening import open_to_answer, open_trained
from lsg_jax.progress import Progress, silent, training_progress
from lsg_jax.run_config import RunConfig
from lsg_jax.train.loop import train

RESULT = "ablate.json"
REFERENCE = "reference"

KINDS: dict[str, tuple[str, ...]] = {"signal": get_args(Signal), "grouping": get_args(Grouping), "lora": ("lora",)}
"""Kind of variation -> names of its variants."""


def plan_variants(
    config: RunConfig, wanted: Sequence[str], model: ModelConfig
) -> tuple[dict[str, RunConfig], list[dict[str, str]]]:
    """The runs to train, the reference first, and the variants that are not possible.

    Args:
        config: the reference.
        wanted: names of variants, or kinds, which stand for all their variants but the reference's own; empty for all kinds.
        model: the model; sink settings of `config` override its own.

    Returns:
        {variant: its configuration, with `output` unchanged}, rows `{variant, reason}` of the variants left out.

    Raises:
        ConfigError: a name is unknown, the reference does not fit the model, or no variant is left.
    """
    model = replace(model, sinks=config.sinks or model.sinks)
    if config.method != "lsg":
        raise ConfigError(f'method = "{config.method}": the reference of `lsg ablate` is gates, set method = "lsg"')
    if config.gate.independent:
        raise ConfigError("gate.layers: `lsg ablate` compares gates that are used together: name one layer, for example [10]")
    if config.train.seeds > 1:
        raise ConfigError("train.seeds: `lsg ablate` trains one seed of each variant: set it to 1, and `seed` to name another")
    config.get_method().for_model(model)
    runs, skipped = {REFERENCE: config}, []
    for name in _names(config, wanted):
        try:
            runs[name] = _variant(config, name, model)
        except ConfigError as error:
            skipped.append({"variant": name, "reason": str(error)})
    if len(runs) == 1:
        reasons = "; ".join(f"{row['variant']}: {row['reason']}" for row in skipped)
        raise ConfigError(f"nothing is left to compare with the reference: {reasons or 'no variants are named'}")
    return runs, skipped


def _names(config: RunConfig, wanted: Sequence[str]) -> list[str]:
    own = (config.gate.signal, config.gate.grouping)
    names: list[str] = []
    for name in wanted or KINDS:
        if name not in KINDS and not any(name in values for values in KINDS.values()):
            known = [*KINDS, *(value for kind in ("signal", "grouping") for value in KINDS[kind])]
            raise ConfigError(f"--variants {name}: unknown; known are {', '.join(known)}")
        names += [value for value in KINDS[name] if value not in own] if name in KINDS else [name]
    return list(dict.fromkeys(names))


def _variant(config: RunConfig, name: str, model: ModelConfig) -> RunConfig:
    """The configuration of one variant. Raises ConfigError if it is the reference or does not fit the model."""
    gate = config.gate
    if name in (gate.signal, gate.grouping):
        raise ConfigError("this is the reference itself")
    if name == "lora":
        if len(gate.layers) > 1:
            raise ConfigError(f"LoRA is at one layer, the gates are at {', '.join(map(str, gate.layers))}")
        lora = config.get_method(name)
        lora = replace(lora, settings=replace(lora.settings, layer=gate.layers[0]))
        return replace(config.with_settings(lora.for_model(model).settings), method=name)
    kind = "signal" if name in KINDS["signal"] else "grouping"
    return config.with_settings(Gates(replace(gate, **{kind: name})).for_model(model).settings)  # type: ignore[arg-type]


def ablation_study(config: RunConfig, wanted: Sequence[str], out: Path, *, progress: Progress = silent) -> dict[str, Any]:
    """Trains the reference and every variant in a run each, then evaluates all of them; every process must call it.

    Writes into `out`: a run folder for each variant, `ablate.json`, and the files of `evaluate`. An interrupted study resumes.

    Args:
        config: the reference; all runs share its data, training settings, seed and questions.
        wanted: see `plan_variants`.
        progress: counts the steps of each training run, then the questions of each benchmark and method.

    Returns:
        The content of ablate.json.

    Raises:
        ConfigError, InputError: see `plan_variants`, or no records or questions; raised before anything is computed.
        Preempted: SIGTERM or SIGINT was received; finished training and answers are kept.
    """
    model = read_manifest(config.model).config
    runs, skipped = plan_variants(config, wanted, model)
    if not config.data.records:
        raise InputError("data.records is empty: name a folder that `lsg prepare` wrote")
    open_records(config.data.records)
    asked = ask_all(config.eval)
    folders = {name: _train(name, run, out, progress) for name, run in runs.items()}
    base = open_to_answer(config)
    models = {BASE: base, **{name: open_trained(base, folder) for name, folder in folders.items()}}
    result = evaluate(models, config.eval, out, asked=asked, progress=progress)
    study = {
        "format": "lsg-ablate-1",
        "model": result.model,
        "backbone": result.backbone,
        "rows": [_variant_row(row) for row in score_rows(result, asked)],
        "skipped": skipped,
        "parameters": {name: sum(leaf.size for leaf in jax.tree.leaves(models[name].trained)) for name in runs},
        "settings": _settings(config) | {"eval": result.settings},
        "variants": {name: asdict(settings) for name, settings in result.methods.items()},
        "versions": result.versions,
        "devices": result.devices,
    }
    on_primary(lambda: write_sealed(out / RESULT, study))
    return study


def _train(name: str, config: RunConfig, out: Path, progress: Progress) -> Path:
    return train(replace(config, output=str(out / name)), on_step=training_progress(progress, f"training {name}"))


def _variant_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"variant": row["method"], **{name: value for name, value in row.items() if name != "method"}}


def _settings(config: RunConfig) -> dict[str, Any]:
    """Settings that all runs share."""
    tree = config.as_dict()
    return {name: tree[name] for name in ("seed", "dtype", "data", "train")}
