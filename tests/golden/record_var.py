"""Records what the published code of VAR makes of made-up hidden states and attention weights in var.json, next to this file.

    python tests/golden/record_var.py --source DIR

`DIR` is a checkout of github.com/seilk/VisAttnSink at 98e62d6; it needs torch. Run it only to change the cases;
`tests/methods/test_var_released.py` reads the file. Two questions are recorded: one whose layers have visual sinks, and one
without; each as a prompt, and as the next token after it, whose sinks are those of the prompt. The code keeps state from one
question to the next, so each runs in a state that is cleared by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).with_name("var.json")
HEADS, WIDTH, LENGTH, FIRST_PATCH, PATCHES = 3, 16, 14, 4, 6
DIMS, LAYER = (5, 11), 2
SETTINGS = {"tau": 2.6, "rho": 0.5, "summ": 0.2, "p": 0.6}


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--source", type=Path, required=True)
    package = types.ModuleType("src")  # without running its __init__, which imports a model
    package.__path__ = [str(arguments.parse_args().source / "src")]
    sys.modules["src"] = package
    cases = [record(seed, sinks) for seed, sinks in enumerate(((0, 5, 8), (0, 12)))]
    common = {"dims": DIMS, "layer": LAYER, "first_patch": FIRST_PATCH, "patches": PATCHES, "settings": SETTINGS}
    OUT.write_text(json.dumps({**common, "cases": cases}).replace('{"hidden"', '\n{"hidden"') + "\n", encoding="utf-8")
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


def record(seed: int, sinks: tuple[int, ...]) -> dict[str, Any]:
    """One question: hidden [T, D] whose tokens `sinks` are large in a sink dimension, weights [N, T, T], [N, 1, T + 1]."""
    import torch
    from src.logic import DimProspector, HeadFork, LogicEngine, VARProcessor
    from src.stash import MetadataStation

    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(LENGTH, WIDTH)).round(3)
    for index, token in enumerate(sinks):
        hidden[token, DIMS[index % 2]] = 9.0
    MetadataStation.export_model_config(types.SimpleNamespace(num_hidden_layers=4, num_attention_heads=HEADS))
    MetadataStation.set_begin_pos("image", FIRST_PATCH)
    MetadataStation.set_vis_len(PATCHES)
    LogicEngine.activate(**SETTINGS)
    LogicEngine.dim_sink = torch.tensor(DIMS)
    LogicEngine.indices.clear()
    out: dict[str, Any] = {"hidden": hidden.tolist()}
    DimProspector.run_logic(torch.tensor(hidden)[None], LAYER)
    for name, queries, keys, count in (("prompt", LENGTH, LENGTH, -1), ("next", 1, LENGTH + 1, 0)):
        MetadataStation.metadata["output_token_count"] = count
        weights = torch.tensor(attention(rng, queries, keys), dtype=torch.float32)[None]
        HeadFork.run_logic(weights, LAYER)
        edited = VARProcessor.attn_redist(weights.clone(), LAYER)
        out[name] = {"weights": listed(weights), "edited": listed(edited)}
    return out


def attention(rng: np.random.Generator, queries: int, keys: int) -> np.ndarray:
    """float64 [N, queries, keys], causal; the heads differ in how much they look at the image."""
    logits = rng.normal(size=(HEADS, queries, keys))
    logits[..., FIRST_PATCH : FIRST_PATCH + PATCHES] += np.array([2.0, 0.5, -3.0])[:, None, None]
    hidden = np.arange(keys) > np.arange(keys - queries, keys)[:, None]
    weights = np.where(hidden, 0.0, np.exp(logits)).round(4)
    return weights / weights.sum(-1, keepdims=True)


def listed(weights: Any) -> list[Any]:
    """float32 as the shortest texts that give them back."""
    return [[[float(str(np.float32(x))) for x in row] for row in head] for head in weights[0].numpy()]


if __name__ == "__main__":
    main()
