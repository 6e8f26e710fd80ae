"""How much of a naive oracle sweep does `lsg sweep` compute? FLOPs of the prompt passes at LLaVA-1.5-7B shapes.

    JAX_PLATFORMS=cpu python benchmarks/sweep_work.py [--length 1024] [--json FILE]

32 layers x 11 coefficients for one question. Nothing is allocated, compiled or run: the programs of the sweep are traced with
abstract arrays, and their matrix products and convolutions counted, loops by their trip counts. Decoding, which is the same in
both, is left out.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from converters.hf_config import model_config
from lsg_jax.analysis.sweep import coefficient_grid
from lsg_jax.analysis.sweep_cells import PromptPass, resume_cells
from lsg_jax.config import FixedConfig, ModelConfig
from lsg_jax.model.generate import last_token
from lsg_jax.model.llava import Llava, abstract_model, assemble
from lsg_jax.types import Batch, KVCache

LLAVA_15_7B = {
    "model_type": "llava",
    "image_token_index": 32000,
    "pad_token_id": 32001,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt, 576 of them image")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = count(model_config(LLAVA_15_7B), options.length, coefficient_grid(2, 0.1))
    for name, value in result.items():
        print(f"{name:44}{value:12.3f}" if isinstance(value, float) else f"{name:44}{value:12}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def count(config: ModelConfig, length: int, coefficients: tuple[tuple[float, ...], ...]) -> dict[str, Any]:
    """TFLOP of a sweep over all layers for one question of `length` tokens, shared and naive."""
    layers = range(config.text.num_layers)
    batch = Batch(
        input_ids=jax.ShapeDtypeStruct((1, length), jnp.int32),
        attention_mask=jax.ShapeDtypeStruct((1, length), bool),
        pixels=jax.ShapeDtypeStruct((1, config.image.size, config.image.size, 3), jnp.uint8),
        gate_position=jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    graphdef, params = abstract_model(config, dtype=jnp.bfloat16)

    def prompts(params: dict, batch: Batch) -> tuple[jax.Array, PromptPass]:
        model: Llava = assemble(graphdef, params)
        merged = model.merge(batch)
        assert merged.visual is not None
        rows = last_token(merged.valid)[:, None]
        out = model(batch, merged=merged, rows=rows, keep_kv=True, observe=lambda view: view.hidden)
        shared = PromptPass(batch, merged.visual, out.observed, KVCache(out.key, out.value, merged.valid))
        return model.language_model.logits(out.hidden), shared

    def cells(params: dict, shared: PromptPass, layer: int) -> jax.Array:
        model: Llava = assemble(graphdef, params)
        values = jnp.array(coefficients, jnp.float32)
        return model.language_model.logits(resume_cells(model, shared, layer, values, "v_sink_rest", room=0)[0])

    def alone(params: dict, batch: Batch, layer: int) -> jax.Array:
        fixed, _ = abstract_model(config, method=FixedConfig((layer,), coefficients[0]), dtype=jnp.bfloat16)
        model: Llava = assemble(fixed, params)
        rows = last_token(batch.attention_mask)[:, None]
        return model.language_model.logits(model(batch, rows=rows, keep_kv=True).hidden)

    base, (_, shared) = flops(prompts, params, batch), jax.eval_shape(prompts, params, batch)
    once = base + sum(flops(lambda p, s, layer=layer: cells(p, s, layer), params, shared) for layer in layers)
    naive = base + len(coefficients) * sum(
        flops(lambda p, b, layer=layer: alone(p, b, layer), params, batch) for layer in layers
    )
    return {
        "tokens of the prompt": length,
        "cells": len(layers) * len(coefficients),
        "one prompt pass, TFLOP": base / 1e12,
        "naive sweep of one question, TFLOP": naive / 1e12,
        "lsg sweep of one question, TFLOP": once / 1e12,
        "share of the naive sweep": once / naive,
    }


def flops(function: Any, *arguments: Any) -> int:
    """Multiplications and additions of the matrix products and convolutions of a function of abstract arrays."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        out = equation.outvars[0].aval if equation.outvars else None
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(out.shape) * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, layout = equation.invars[1].aval.shape, params["dimension_numbers"]
            total += 2 * math.prod(out.shape) * math.prod(kernel) // kernel[layout.rhs_spec[0]]
        elif name == "while":
            raise ValueError("a loop of unknown length cannot be counted")
        else:
            total += params.get("length", 1) * sum(map(_count, _inner(params)))
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    """The jaxprs that an equation calls."""
    values = [value for value in params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
    return [value.jaxpr if hasattr(value, "jaxpr") else value for value in values]


if __name__ == "__main__":
    main()
