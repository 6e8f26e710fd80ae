"""A positive control: sinks are planted in a copy of the embedded model, and gates win back what that costs (docs/control.md).

    python benchmarks/control.py OUT [--only STEP ...]

It is a list of `lsg` commands, which are printed; what is finished is kept. `strength` plants sinks of several strengths and
asks 400 validation questions, as they are and with the keys of V-sinks scaled back. For the strength that was chosen there,
`gates` trains gates of three seeds in the planted layers, and others elsewhere, and asks the 2,000 test questions; `signals`
trains gates that read other signals; `methods` asks these questions under the methods of others; `map` draws the oracle map;
`text` asks questions without their images. `layer` plants sinks in one layer alone, draws its map, trains a gate at each
layer alone and stacks them. Then it prints the bounds that must hold, and exits with 1 if one does not.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from embedded import LAYERS, UNTRAINED

import lsg_jax
from converters.convert import convert
from lsg_jax.data.records import prepare_llava
from lsg_jax.data.scene_questions import scene_questions, write_questions
from lsg_jax.eval.statistics import interval, resample_weights
from lsg_jax.quickstart import CHECKPOINT, PLANTED, PLANTED_LAYERS, PLANTED_SCENES

CONFIG = Path(__file__).parent.parent / "configs" / "tiny.toml"
STRENGTHS, STRENGTH = (2, 4, 8, 16), int(PLANTED["strength"])
ONE_LAYER, ITS_STRENGTH = 3, 24
ASKED, RECORDS, SEEDS, SIDE = 400, 1024, 3, 112
GATES = ("gate.key_scale=1.0", "train.learning_rate=3e-3")
ELSEWHERE = [0, 7]
TRAINED = {"gated_output": (), "lora": (f"lora.layer={ONE_LAYER}",), "diysink": ("diysink.routing=mlp",)}
Held = list[tuple[str, bool]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--only", nargs="+", default=list(STEPS), choices=STEPS, metavar="STEP")
    options = parser.parse_args()
    prepare(options.out)
    held: Held = []
    for name in options.only:
        print(f"\n# {name}", flush=True)
        held += STEPS[name](options.out)
    print("\n" + "\n".join(f"{'holds' if kept else 'FAILS'}: {text}" for text, kept in held))
    sys.exit(0 if all(kept for _, kept in held) else 1)


def prepare(out: Path) -> None:
    """The embedded model, training records and validation questions."""
    if not (out / "models" / "embedded").exists():
        convert(CHECKPOINT, out / "models" / "embedded", dtype="float32")
    if not (out / "records").exists():
        questions = write_questions(out / "train", "train", RECORDS, side=SIDE)
        prepare_llava(questions.with_name("llava.jsonl"), out / "train", out / "records")
    if not (out / "validation").exists():
        write_questions(out / "validation", "validation", ASKED, side=SIDE)


def lsg(*arguments: object) -> None:
    words = [str(argument) for argument in arguments]
    print("lsg", shlex.join(words), flush=True)
    subprocess.run([sys.executable, "-m", "lsg_jax", *words], check=True, stdout=subprocess.DEVNULL)


def model(out: Path, strength: int = STRENGTH, layers: tuple[int, ...] = PLANTED_LAYERS) -> Path:
    """The folder of the model with planted sinks, which is made if it is not there; without any for strength 0."""
    folder = out / "models" / (f"planted-{strength}-at-{'-'.join(map(str, layers))}" if strength else "embedded")
    if not folder.exists():
        settings = ["--mark", PLANTED["mark"], "--text", PLANTED["text"], "--scenes", PLANTED_SCENES]
        lsg("plant", out / "models" / "embedded", folder, "--layers", *layers, "--strength", strength, *settings)
    return folder


def validation(out: Path) -> str:
    return f"validation={out / 'validation' / 'questions.jsonl'}"


def configured(out: Path, name: str, *overrides: str, planted: Path | None = None) -> list[object]:
    """CONFIG and its settings for a run of that name; on the model of STRENGTH, unless `planted` is another."""
    paths = [f"model={planted or model(out)}", f"data.records={out / 'records'}", f"output={out / 'runs' / name}"]
    return [CONFIG, "--set", *paths, *overrides]


def trained(out: Path, name: str, layers: list[int] | str, *more: str, planted: Path | None = None) -> Path:
    """The run of gates at these layers."""
    lsg("train", *configured(out, name, f"gate.layers={layers}", *GATES, *more, planted=planted))
    return out / "runs" / name


def asked(
    out: Path, name: str, benchmark: str, *how: object, planted: Path | None = None, overrides: tuple[str, ...] = ()
) -> dict[str, Any]:
    """result.json of an evaluation; `how` says which methods."""
    folder = out / "eval" / name
    if not (folder / "result.json").exists():
        config = configured(out, name, *overrides, planted=planted)
        lsg("eval", *config, *how, "--benchmark", benchmark, "--out", folder)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))["benchmarks"]
    return next(iter(found.values()))  # type: ignore[no-any-return]


def accuracy(found: dict[str, Any], method: str = "base") -> float:
    return float(found["methods"][method]["accuracy"]["value"])


def choose_strength(out: Path) -> Held:
    print("strength   as it is   V-sink keys / (1 + strength)")
    lost = {}
    for strength in (0, *STRENGTHS):
        scaled = (f"fixed.layers={list(PLANTED_LAYERS)}", f"fixed.coefficients=[{1 / (1 + strength)}, 1.0]")
        name = f"strength-{strength}"
        found = asked(out, name, validation(out), "--method", "fixed", planted=model(out, strength), overrides=scaled)
        lost[strength] = accuracy(found)
        print(f"{strength:8}{lost[strength]:11.2f}{accuracy(found, 'fixed'):31.2f}", flush=True)
    enough = [strength for strength in STRENGTHS if lost[0] - lost[strength] >= 15]
    return [(f"{STRENGTH} is the smallest strength that costs 15 points on validation", enough[:1] == [STRENGTH])]


def train_gates(out: Path) -> Held:
    sound = asked(out, "sound", "scenes", "--method", "base", planted=model(out, 0))
    run = trained(out, "planted", list(PLANTED_LAYERS), f"train.seeds={SEEDS}", "data.order=-1")
    seeds = (f"train.seeds={SEEDS}", "data.order=-1", f"gate.layers={list(PLANTED_LAYERS)}", *GATES)
    found = asked(out, "planted", "scenes", "--gates", run, overrides=seeds)
    elsewhere = trained(out, "elsewhere", ELSEWHERE)
    other = asked(out, "elsewhere", "scenes", "--gates", elsewhere, overrides=(f"gate.layers={ELSEWHERE}", *GATES))
    loss, low, high = change(out, "sound", "planted")
    over = found["over_seeds"]["lsg"]
    mean, deviation = over["methods"]["accuracy"], over["deviation"]["accuracy"]
    gain = over["change"]["accuracy"]
    share = gain["value"] / -loss
    aside = accuracy(other, "lsg") - accuracy(other)
    print(f"test, 2000 questions: {accuracy(sound):.2f} without planted sinks, {accuracy(found):.2f} with them")
    print(f"planted: {loss:+.2f} [{low:+.2f}, {high:+.2f}]")
    print(f"gates at layers {list(PLANTED_LAYERS)}, {SEEDS} seeds: {mean['value']:.2f}, deviation {deviation:.2f}")
    print(f"they change {gain['value']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}], {100 * share:.0f} % of the loss")
    for name, test in found["paired_test"].items():
        print(f"{name}: {accuracy(found, name):.2f}, {test['better']} better, {test['worse']} worse, p = {test['p_value']:.2g}")
    print(f"gates at layers {ELSEWHERE}: {aside:+.2f}")
    return [
        ("planted sinks cost 15 points on test, and the interval ends 10 points below zero", loss <= -15 and high <= -10),
        ("gates in the planted layers win back half of it, mean over seeds", share >= 0.5),
        ("they win back 80 % of it", share >= 0.8),
        ("gates elsewhere win back less than half as much", aside < gain["value"] / 2),
    ]


def change(out: Path, before: str, after: str) -> tuple[float, float, float]:
    """The change of the base models' accuracy between two evaluations of the same questions, with its bootstrap interval."""
    rows = [_rows(out / "eval" / name / "scenes.base.jsonl") for name in (before, after)]
    assert rows[0].keys() == rows[1].keys()
    difference = np.array([100 * (rows[1][name] - rows[0][name]) for name in rows[0]])
    weight = resample_weights(list(rows[0]))
    return float(difference.mean()), *interval(weight @ difference / weight.sum(1))


def _rows(file: Path) -> dict[str, float]:
    return {row["id"]: row["score"] for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}


def other_signals(out: Path) -> Held:
    folder = out / "eval" / "signals"
    if not (folder / "ablate.json").exists():
        config = configured(out, "signals", f"gate.layers={list(PLANTED_LAYERS)}", *GATES)
        lsg("ablate", *config, "--variants", "signal", "--benchmark", "scenes", "--out", folder)
    for row in json.loads((folder / "ablate.json").read_text(encoding="utf-8"))["rows"]:
        if row["metric"] == "accuracy":
            print(f"{row['variant']:12}{row['value']:7.2f}" + ("" if row["change"] is None else f"{row['change']:+7.2f}"))
    return []


def other_methods(out: Path) -> Held:
    runs = []
    for method, settings in TRAINED.items():
        lsg("train", *configured(out, method, f"method={method}", *settings))
        runs.append(f"{method}={out / 'runs' / method}")
    scaled = (f"fixed.layers={list(PLANTED_LAYERS)}", f"fixed.coefficients=[{1 / (1 + STRENGTH)}, 1.0]")
    found = asked(out, "methods", "scenes", "--method", "fixed", *UNTRAINED, *runs, overrides=(*LAYERS, *scaled))
    print_changes(found)
    return []


def print_changes(found: dict[str, Any]) -> None:
    """The change of the accuracy under each method, with its interval, and how many questions it won and lost."""
    for name, of in found["change"].items():
        change, test = of["accuracy"], found["paired_test"][name]
        line = f"{name:16}{change['value']:+7.2f} [{change['low']:+.2f}, {change['high']:+.2f}]"
        print(f"{line}{test['better']:6} / {test['worse']}")


def oracle_map(out: Path) -> Held:
    best = _map(out, "sweep", model(out))
    first = sorted(best, key=best.__getitem__, reverse=True)[:5]
    return [("the five layers that gain most in the oracle map are planted ones", set(first) <= set(PLANTED_LAYERS))]


def _map(out: Path, name: str, planted: Path) -> dict[int, float]:
    """The largest change of validation accuracy that coefficients of one layer bring about, by layer."""
    folder = out / name
    if not (folder / "sweep.json").exists():
        lsg("sweep", *configured(out, name, planted=planted), "--benchmark", validation(out), "--step", 0.25, "--out", folder)
    study = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    best = {row["layer"]: row["change"] for row in study["best"] if row["task"] in ("accuracy", "official")}
    print("layer  best change\n" + "\n".join(f"{layer:5}{value:+13.2f}" for layer, value in sorted(best.items())))
    return best


def one_layer(out: Path) -> Held:
    planted = model(out, ITS_STRENGTH, (ONE_LAYER,))
    sound = accuracy(asked(out, "sound", "scenes", "--method", "base", planted=model(out, 0)))
    best = _map(out, "sweep-one-layer", planted)
    run = trained(out, "each", "each", "train.remat=full", planted=planted)
    folder = out / "stack"
    if not (folder / "stack.json").exists():
        config = configured(out, "stack", planted=planted)
        benchmarks = ("--benchmark", validation(out), "scenes", "--select", "validation")
        lsg("stack", *config, "--gates", run, *benchmarks, "--out", folder)
    study = json.loads((folder / "stack.json").read_text(encoding="utf-8"))
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))["benchmarks"]["scenes"]
    loss, gain = accuracy(found) - sound, {name: of["accuracy"]["value"] for name, of in found["change"].items()}
    print(f"test: {sound:.2f} without planted sinks, {accuracy(found):.2f} with them")
    print_changes(found)
    others = [gain[name] for name in map("L{}".format, best) if name != f"L{ONE_LAYER}"]
    return [
        (f"layer {ONE_LAYER} gains most in the oracle map", max(best, key=best.__getitem__) == ONE_LAYER),
        (f"the stack takes the gate at layer {ONE_LAYER} first", study["steps"][0]["layers"] == [ONE_LAYER]),
        ("that gate alone wins back half of the loss on test", gain[f"L{ONE_LAYER}"] >= -loss / 2),
        ("no other gate wins back a tenth of it", max(others) < -loss / 10),
    ]


def text_alone(out: Path) -> Held:
    prompts = [question.prompt for question in scene_questions("test", ASKED)]
    sound, planted = (lsg_jax.load(model(out, strength)).generate([None] * ASKED, prompts, 4) for strength in (0, STRENGTH))
    same = float(np.mean([a == b for a, b in zip(sound, planted, strict=True)]))
    print(f"{100 * same:.1f} % of {ASKED} answers to questions without an image are the same")
    return [("19 of 20 answers to text alone are as before", same >= 0.95)]


STEPS: dict[str, Callable[[Path], Held]] = {
    "strength": choose_strength,
    "gates": train_gates,
    "signals": other_signals,
    "methods": other_methods,
    "map": oracle_map,
    "layer": one_layer,
    "text": text_alone,
}

if __name__ == "__main__":
    main()
