"""Several methods on one pass: the vision tower, and the decoder layers below the lowest that a method changes, run once.

The base model reads the prompts and keeps what enters a few layers; each method goes on from the highest of these below which
it changes nothing (`model.generate.Prefix`). A method with visual tokens of its own shares the features of the images only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lsg_jax.answer_programs import read_first, read_rest
from lsg_jax.methods.method import BASE, Method
from lsg_jax.methods.method_model import assemble
from lsg_jax.model.generate import Generated
from lsg_jax.types import Batch, Sequence, VisualTokens
from lsg_jax.vlm import VLM

MOST_STARTS = 4
"""Layers that methods go on from, besides layer 0. Each costs the memory of a residual stream and a loop to compile."""


def groups(models: Mapping[str, VLM]) -> list[dict[str, VLM]]:
    """The models in groups that may answer together (`Together`), in the order of the first of each."""
    found: dict[Any, dict[str, VLM]] = {}
    base = next((model for model in models.values() if model.method == BASE), None)
    for name, model in models.items():
        alone: Any = name
        if base is not None and model.frozen is base.frozen and _shares_features(model.method):
            alone = None if model.method == BASE else model.config.sinks
        found.setdefault(alone, {})[name] = model
    unchanged = found.pop(None, {})
    together = max((g for key, g in found.items() if not isinstance(key, str)), key=len, default={})
    apart = [{name: models[name]} for g in found.values() if g is not together for name in g]
    return [group for group in ({**unchanged, **together}, *apart) if group]


def _shares_features(method: Method) -> bool:
    """Whether a method takes the same batches and the features of the images as the base model makes them."""
    asks_first = type(method).first_questions is not Method.first_questions
    return not (asks_first or method.without_bos or method.registers or method.parts or method.reads_class_attention)


def _shares_tokens(method: Method) -> bool:
    """Whether the decoder reads the same tokens as under the base model."""
    return type(method).connect is Method.connect


class Together:
    """Models of one group answering the same batches.

    Args:
        models: one of `groups`, of two models or more; the first is the base model.

    Attributes:
        start: the layer that each model goes on from; None for one with visual tokens of its own.
    """

    def __init__(self, models: Mapping[str, VLM]):
        self.models = models
        base = next(iter(models.values()))
        # V-sinks are judged with the features, and the base model has no use for them
        self.base = base.with_method(BASE, sinks=[*models.values()][-1].config.sinks)
        lowest = {name: _lowest_change(model) if _shares_tokens(model.method) else None for name, model in models.items()}
        self.starts = chosen_starts(lowest.values(), base.config.text.num_layers)
        below = lambda layer: None if layer is None else max(start for start in self.starts if start <= layer)
        self.start = {name: below(layer) for name, layer in lowest.items()}

    def answers(self, wanted: Iterable[str], batch: Batch, max_new_tokens: int) -> Iterator[tuple[str, Generated]]:
        """Name and answers of each of these models to a batch with images on the devices, as `VLM.generate_in_full`."""
        for model in self.models.values():
            batch = model.as_asked(batch, max_new_tokens)
        base = self.base
        read, cache, prefix = read_first(base.params, batch, base.graphdef, max_new_tokens, self.starts)
        for name in wanted:
            model = self.models[name]
            if model.method != BASE:
                start = self.start[name]
                read, cache = read_rest(model.params, batch, prefix, model.graphdef, max_new_tokens, start)
            yield name, model.answer_read(batch, read, cache, max_new_tokens)


def work_of(split: Iterable[Mapping[str, VLM]], questions: int) -> dict[str, float]:
    """`BenchmarkResult.work` of models in these groups."""
    run = naive = 0
    for group in split:
        layers = [model.config.text.num_layers for model in group.values()]
        start = Together(group).start if len(group) > 1 else {}
        saved = sum(start[name] or 0 for name, model in group.items() if model.method != BASE) if start else 0
        run, naive = run + sum(layers) - saved, naive + sum(layers)
    return {"layers_run": questions * run, "layers_naive": questions * naive, "share": round(run / naive, 4)}


def _lowest_change(model: VLM) -> int:
    """The lowest decoder layer that the method of a model changes; the number of layers for none."""
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    mask = of(jnp.bool_, 1, 8)
    batch = Batch(of(jnp.int32, 1, 8), mask, of(jnp.int32, 1), words=of(jnp.int8, 1, 8))

    def change(params: dict, batch: Batch, valid: jax.Array, visual: VisualTokens) -> Any:
        return assemble(model.graphdef, params).intervention(batch, Sequence(x=None, valid=valid, visual=visual))

    found = jax.eval_shape(change, model.params, batch, mask, VisualTokens(mask, mask))  # its first layer is static
    return model.config.text.num_layers if found is None else int(found.first_layer)


def chosen_starts(lowest: Iterable[int | None], layers: int) -> tuple[int, ...]:
    """Layers that models go on from, ascending: 0 and at most MOST_STARTS of the lowest layers that one of them changes."""
    wanted = sorted({min(layer, layers - 1) for layer in lowest if layer})
    count = min(MOST_STARTS, len(wanted))
    return 0, *(wanted[i * len(wanted) // count] for i in range(count))
