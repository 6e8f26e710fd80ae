"""Opens the models of an evaluation: the base model and one for each method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lsg_jax.config import BenchmarkKind
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.eval.results import BASE
from lsg_jax.methods.registry import METHODS
from lsg_jax.opening import open_trained, seed_sources
from lsg_jax.run_config import RunConfig
from lsg_jax.vlm import VLM

SEED = "_seed"  # between the name of a method and the seed


def open_methods(base: VLM, config: RunConfig, wanted: Sequence[str], source: str | Path | None = None) -> dict[str, VLM]:
    """The model under each method, `base` first; under each seed of a run of several, as `lsg_seed0` (`seeds_of`).

    Args:
        base: the model as it is.
        wanted: `METHOD` or `METHOD=SOURCE`; a trained method without a SOURCE takes `source`, the others have their settings in
            their tables of `config`. Empty: what `source` holds, if there is one.
        source: run folder or gate file.

    Raises:
        ConfigError: an unknown method, one that is named twice, one with a SOURCE that is not trained, or one that the model
            cannot carry.
        InputError: a trained method without a source, or whose source holds another method.
    """
    models = {BASE: base}
    if not wanted and source is not None:
        wanted = [f"{config.method}={source}"]
    for text in wanted:
        method, _, own = text.partition("=")
        if method not in METHODS:
            raise ConfigError(f"--method {method}: unknown; known are {', '.join(METHODS)}")
        if method == BASE:
            continue
        if own and not METHODS[method].trains:
            raise ConfigError(f"--method {text}: {method} is not trained; its settings are those of the table [{method}]")
        if method in models or method in seeds_of(models):
            raise ConfigError(f"--method {method}: named twice")
        held = own or source if METHODS[method].trains else None
        seeds = {} if held is None else seed_sources(held)
        models |= {f"{method}{SEED}{seed}": _open(base, config, method, run) for seed, run in seeds.items()}
        if not seeds:
            models[method] = _open(base, config, method, held)
    return models


def fit(model: VLM, kind: BenchmarkKind) -> VLM:
    """The model as its method is meant for benchmarks of this kind (`Method.for_benchmark`)."""
    method = model.method.for_benchmark(kind)
    return model if method == model.method else model.with_method(method, model.trained)


def seeds_of(models: Iterable[str]) -> dict[str, list[str]]:
    """Method -> those of the names of `open_methods` that are its seeds."""
    found: dict[str, list[str]] = {}
    for name in models:
        method, seed, _ = name.partition(SEED)
        if seed:
            found.setdefault(method, []).append(name)
    return found


def _open(base: VLM, config: RunConfig, method: str, source: str | Path | None) -> VLM:
    if METHODS[method].trains:
        if source is None:
            raise InputError(f"method {method}: there is no trained run; name one as --method {method}=RUN")
        return open_trained(base, source, method=method, sinks=config.sinks)
    return base.with_method(config.get_method(method), sinks=config.sinks)
