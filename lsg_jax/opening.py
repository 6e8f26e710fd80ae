"""Opens model folders, and on them gates or another method that a run has trained."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsg_jax.checkpoint import LeafEntry, RunRecord, load_base, read_manifest, read_run, read_seeds, read_step, seed_folder
from lsg_jax.checkpoint.processes import on_primary, share_bytes, tree_sha256
from lsg_jax.config import GateConfig, MeshConfig, SinkConfig, Template, from_dict, is_scale
from lsg_jax.digest import text_sha256
from lsg_jax.errors import ConfigError, InputError, NonFiniteError
from lsg_jax.gating.portable import PortableGates, check_together, check_width, choose_gates, read_gates
from lsg_jax.hub import HubFile, HubName, download_gates, on_hub, reading
from lsg_jax.memory import GIB, agreed_memory, check_fits, tree_bytes
from lsg_jax.methods.gates import Gates
from lsg_jax.methods.method_model import abstract_model, join_trained
from lsg_jax.methods.registry import METHODS
from lsg_jax.run_config import RunConfig
from lsg_jax.sharding import answering_mesh, replicated, shard_params, state_shardings
from lsg_jax.vlm import VLM

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16", "int8")


def load_backbone(
    folder: str | Path,
    *,
    dtype: Any = None,
    sinks: SinkConfig | None = None,
    mesh: jax.sharding.Mesh | None = None,
    verify: bool = True,
    template: Template | None = None,
) -> VLM:
    """Opens a model folder without gates.

    Args:
        dtype: of the weights, except 8-bit ones and their scales: one of DTYPES, as text or type. None keeps them as stored.
            "int8" demands 8-bit weights.
        sinks: instead of the sink settings of the folder.
        mesh: devices to spread the weights over; None for one device.
        template: the text template of prompts; None for the checkpoint's own.

    Raises:
        ConfigError: another dtype, a sink dimension that does not exist, or a model that cannot fit.
        InputError: no model folder, or one without 8-bit weights for "int8". CheckpointError: a damaged one.
    """
    folder, dtype = Path(folder), None if dtype is None else _dtype_name(dtype)
    manifest = read_manifest(folder)
    config = manifest.config if sinks is None else dataclasses.replace(manifest.config, sinks=sinks)
    if dtype == "int8":
        if config.text.weights != "int8":
            raise InputError(f"{folder}: holds no 8-bit weights; convert its source with --dtype int8, or leave the dtype out")
        dtype = None
    stored = _as_stored(abstract_model(config)[1], manifest.leaves)
    weights = stored if dtype is None else jax.tree.map_with_path(functools.partial(_cast, dtype), stored)
    check_fits(tree_bytes(weights), f"{folder}: the model", "take more or larger devices, or bfloat16 weights", mesh=mesh)
    if (size := tree_bytes(weights)) > GIB:
        logger.info("reading %.1f GiB of weights from %s", size / GIB, folder)
    frozen = load_base(folder, stored if mesh is None else shard_params(stored, mesh), dtype=dtype, verify=verify)
    return VLM(config, frozen, folder=folder, digest=manifest.digest, mesh=mesh, template=template)


def _dtype_name(dtype: Any) -> str:
    """The name of a dtype that weights can be opened in. Raises ConfigError for another one."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ConfigError(f"dtype {name[:80]}: weights are opened in {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    return name


def open_to_answer(config: RunConfig, *, sinks: SinkConfig | None = None) -> VLM:
    """The model of a configuration without gates, on the mesh of evaluation (`eval.mesh`)."""
    mesh = model_mesh(config.model, config.eval.mesh, dtype=config.dtype)
    return load_backbone(config.model, dtype=config.dtype, sinks=sinks, mesh=mesh)


def model_mesh(folder: str | Path, config: MeshConfig | None = None, *, dtype: Any = None) -> jax.sharding.Mesh:
    """The mesh over all devices on which the model of a folder answers; `sharding.answering_mesh`. Every process must call it.

    Args:
        dtype: as `load_backbone` takes it.
    """
    manifest = read_manifest(folder)
    weights = sum(
        math.prod(entry.shape) * _loaded_dtype(dtype, name, entry.dtype).itemsize for name, entry in manifest.leaves.items()
    )
    return answering_mesh(config, manifest.config.text, weights=weights, memory=agreed_memory())


def _as_stored(abstract: dict, leaves: dict[str, LeafEntry]) -> dict:
    """Abstract leaves with the dtypes that the manifest states; names and shapes stay for `load_base` to compare."""

    def leaf(path: tuple, struct: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        entry = leaves.get("/".join(key.key for key in path))
        return struct if entry is None else jax.ShapeDtypeStruct(struct.shape, jnp.dtype(entry.dtype))

    return jax.tree.map_with_path(leaf, abstract)


def _cast(dtype: Any, path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What `load_base` makes of a leaf."""
    return jax.ShapeDtypeStruct(leaf.shape, _loaded_dtype(dtype, "/".join(key.key for key in path), leaf.dtype))


def _loaded_dtype(dtype: Any, name: str, stored: Any) -> np.dtype:
    """The dtype in which `load_backbone` has a parameter: 8-bit weights and their scales keep theirs."""
    stored = jnp.dtype(stored)
    return stored if dtype in (None, "int8") or stored == jnp.int8 or is_scale(name) else jnp.dtype(dtype)


def with_gates(vlm: VLM, source: Any, *, sinks: SinkConfig | None = None) -> VLM:
    """Adds gates to a model.

    The gates bring the sink settings that they were trained with, unless `sinks` says otherwise.

    Args:
        source: all that `open_gates` takes, or PortableGates.

    Raises:
        InputError: no gates there, gates for another model width, or independent ones without a choice of layers.
        CheckpointError: a run of another backbone.
    """
    gates = source if isinstance(source, PortableGates) else open_gates(source, backbone=vlm.digest)
    check_together(gates)
    check_width(gates, vlm.config.text.hidden_size, vlm.config.text.num_layers)
    parameters = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), gates.parameters)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(parameters)):
        raise NonFiniteError(f"the gates at layers {list(gates.gate.layers)} hold NaN or infinity: train them again")
    parameters = jax.device_put(parameters, None if vlm.mesh is None else replicated(vlm.mesh))
    trained_on = gates.backbone.rpartition(" ")[2]
    if gates.origin and vlm.digest and trained_on not in ("", vlm.digest):
        text = "%s: was trained on %s, and this model is %s: sound if that is the same model in another dtype"
        logger.warning(text, gates.origin, gates.backbone, vlm.digest)
    return vlm.with_method(Gates(gates.gate), parameters, sinks=sinks or gates.sinks, origin=gates.origin)


def open_trained(vlm: VLM, source: Any, *, method: str | None = None, sinks: SinkConfig | None = None) -> VLM:
    """The model with what a run has trained: gates, another method's parameters, or parts of the model itself.

    Args:
        source: the run folder; of gates all that `with_gates` takes.
        method: what the run must have trained; None for whatever it did.

    Raises:
        InputError: no run there, or one of another method. CheckpointError: a run of another backbone.
    """
    run = None
    if isinstance(source, str | Path) and on_hub(source) is None:
        if not (where := split_layers(source)[0]).exists():
            raise InputError(f"{where}: no such run folder or gate file")
        run = read_run(source, backbone=vlm.digest) if Path(source).is_dir() else None
    held = "lsg" if run is None else run.method
    if method not in (None, held):
        raise InputError(f"{source}: what was trained there is {held}, not {method}")
    if run is None or held == "lsg":
        return with_gates(vlm, source, sinks=sinks)
    kind, sinks = METHODS[held], sinks or run.sinks
    opened = kind()
    if kind.Settings is not None:
        table = kind.Settings.table
        opened = kind(from_dict(kind.Settings, run.table(table), where=f"{source}/run.json: {table}"))
    trained = _newest(Path(source), run)
    if opened.parts:  # in the dtype of the weights that they replace
        replaced = {part: vlm.frozen[part] for part in opened.parts}
        trained = jax.tree.map(lambda new, old: new.astype(old.dtype), trained, replaced)
    placed = None if vlm.mesh is None else state_shardings({"trained": trained}, vlm.mesh)["trained"]
    trained = jax.device_put(trained, placed)
    if opened.parts:
        config = dataclasses.replace(vlm.config, sinks=sinks)
        digest = text_sha256(f"{vlm.digest} {tree_sha256(trained)}")
        weights = join_trained(vlm.frozen, trained)
        return VLM(config, weights, folder=vlm.folder, digest=digest, mesh=vlm.mesh, template=vlm.template)
    return vlm.with_method(opened, trained, sinks=sinks)


def open_gates(path: str | Path, *, backbone: str | None = None) -> PortableGates:
    """Reads gates from a run folder (its newest sound step), from a portable file, or from the Hugging Face Hub.

    Args:
        path: run folder or file. `RUN@10` or `RUN@3,6,7` takes the gates of these layers only, likewise of a file. What is not
            here and reads `owner/name` or `owner/name@revision` is on the Hub (`hub.on_hub`). Without a choice, gates that were
            trained independently stay so: `with_gates`, `write_gates` and `combine_gates` refuse them as a stack.
        backbone: digest of the model they are meant for; a run folder of another one is refused.

    Raises:
        InputError: no gates there, or none at a layer that was asked for. CheckpointError: a run of another backbone.
    """
    if (name := on_hub(path)) is not None:
        return _hub_gates(_fetch(name))
    source, layers = split_layers(path)
    gates = _run_gates(source, backbone) if source.is_dir() else read_gates(source)
    return choose_gates(gates, layers, where=str(source)) if layers else gates


def seed_sources(path: str | Path) -> dict[int, str]:
    """The run of each seed of a folder of several (`train.seeds`), with the layers asked for; none for anything else."""
    if on_hub(path) is not None:
        return {}
    folder, layers = split_layers(path)
    chosen = "@" + ",".join(map(str, layers)) if layers else ""
    return {seed: f"{seed_folder(folder, seed)}{chosen}" for seed in read_seeds(folder)}


def _fetch(name: HubName) -> HubFile:
    """The gate file, on every process from the commit that process 0 has found. Every process must call it."""
    if not jax.distributed.is_initialized():
        return download_gates(name)
    found = on_primary(lambda: download_gates(name))
    commit = share_bytes(found.commit.encode() if found else b"").decode()
    return download_gates(HubName(name.repository, commit))


def _hub_gates(found: HubFile) -> PortableGates:
    with reading(found):
        return dataclasses.replace(read_gates(found.file), origin=found.origin)


def split_layers(path: str | Path) -> tuple[Path, tuple[int, ...]]:
    """`RUN@3,6` -> RUN and (3, 6); no layers without an @, or where the whole is the name of something that exists."""
    name, at, layers = str(path).rpartition("@")
    if not at or Path(path).exists():
        return Path(path), ()
    if not re.fullmatch(r"\d+(,\d+)*", layers):
        raise InputError(f"{path}: after @ come layers, for example {name}@10 or {name}@3,6,7")
    return Path(name), tuple(map(int, layers.split(",")))


def _run_gates(path: Path, backbone: str | None) -> PortableGates:
    """All gates of a run folder."""
    run = read_run(path, backbone=backbone)
    if (held := run.method) != "lsg":
        raise InputError(f"{path}: a run of method {held} holds no gates; name one of method lsg, or a gate file")
    parameters = _newest(path, run)
    return PortableGates(
        gate=from_dict(GateConfig, run.table("gate"), where=f"{path}/run.json: gate"),
        sinks=run.sinks,
        parameters=parameters,
        backbone=f"{run.model_name} {run.backbone}",
    )


def _newest(path: Path, run: RunRecord) -> dict[str, Any]:
    """What the newest sound step of a run holds. Says so if that is not its last: it would pass for the finished run's."""
    step, tree, _ = read_step(path)
    if step < run.total_steps:
        logger.warning(
            "%s: step %d of %d is used: the run has not finished, or its last step is gone", path, step, run.total_steps
        )
    return tree["trained"]
