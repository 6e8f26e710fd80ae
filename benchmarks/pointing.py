"""The pointing game on the embedded model and on a copy of it whose sinks draw too much attention (docs/where_it_looks.md).

    python benchmarks/pointing.py OUT [--questions N] [--only STEP ...] [--pictures DIR]

It is a list of `lsg` commands, which are printed; what is finished is kept. `strength` plants sinks of several strengths and
asks 400 validation questions, as they are and with the keys of V-sinks scaled back; `test` asks 400 test questions of the
strength that was chosen; `pointing` plays the game on both models. Then it prints tables and the bounds that must hold, and
exits with 1 if one does not. `--pictures` copies the figures of the page.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from converters.convert import convert
from lsg_jax.cli.pointing import summary
from lsg_jax.data.scene_questions import write_questions
from lsg_jax.quickstart import CHECKPOINT

CONFIG = Path(__file__).parent.parent / "configs" / "tiny.toml"
LAYERS = (1, 2, 3, 4, 5, 6)
STRENGTHS, STRENGTH, ASKED = (1, 2, 3, 5, 8), 5, 400
STEPS = ("strength", "test", "pointing")
MODELS = ("embedded", "planted-5")
PICTURES = {
    "embedded/pointing.svg": "pointing_embedded.svg",
    "planted-5/pointing.svg": "pointing_planted.svg",
    "planted-5/examples.png": "pointing_examples.png",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--questions", type=int, default=200, metavar="N", help="of each kind and split")
    parser.add_argument("--only", nargs="+", default=list(STEPS), choices=STEPS, metavar="STEP")
    parser.add_argument("--pictures", type=Path, metavar="DIR")
    options = parser.parse_args()
    out = options.out
    prepare(out)
    held = []
    if "strength" in options.only:
        sound = answers(out, "embedded", 0, "validation")
        print_accuracy("validation", [(0, sound), *((s, answers(out, f"planted-{s}", s, "validation")) for s in STRENGTHS)])
    if "test" in options.only:
        found = answers(out, f"planted-{STRENGTH}", STRENGTH, "test")
        print_accuracy("test", [(STRENGTH, found)])
        held += accuracy_bounds(found, answers(out, "embedded", 0, "test"))
    if "pointing" in options.only:
        studies = {name: pointing(out, name, options.questions) for name in MODELS}
        for name, study in studies.items():
            print(f"\n{name}\n{summary(study)}\n{by_layer(study)}")
        held += pointing_bounds(studies)
    print("\n" + "\n".join(f"{'holds' if kept else 'FAILS'}: {text}" for text, kept in held))
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        for source, name in PICTURES.items():
            copy_picture(out / "pointing" / source, options.pictures / name)
    sys.exit(0 if all(kept for _, kept in held) else 1)


def copy_picture(source: Path, target: Path) -> None:
    """Copies an SVG file; of a PNG file the 256 colours that cover it best, in a fifth of its bytes."""
    if source.suffix == ".svg":
        shutil.copyfile(source, target)
    else:
        found, best = Image.open(source).convert("RGB"), Image.Quantize.MAXCOVERAGE
        found.quantize(256, method=best, kmeans=3, dither=Image.Dither.NONE).save(target, optimize=True)


def prepare(out: Path) -> None:
    """The embedded model, its copies with planted sinks, and validation questions."""
    if not (out / "models" / "embedded").exists():
        convert(CHECKPOINT, out / "models" / "embedded", dtype="float32")
    if not (out / "validation").exists():
        write_questions(out / "validation", "validation", ASKED)


def lsg(*arguments: object) -> None:
    words = [str(argument) for argument in arguments]
    print("lsg", shlex.join(words), flush=True)
    subprocess.run([sys.executable, "-m", "lsg_jax", *words], check=True, stdout=subprocess.DEVNULL)


def model(out: Path, name: str) -> Path:
    """The folder of a model, `embedded` or `planted-STRENGTH`, which is made if it is not there."""
    folder = out / "models" / name
    if not folder.exists():
        lsg("plant", out / "models" / "embedded", folder, "--layers", *LAYERS, "--strength", name.removeprefix("planted-"))
    return folder


def answers(out: Path, name: str, strength: float, split: str) -> dict[str, dict[str, float]]:
    """Accuracy in percent by metric, of the model as it is (`base`) and with V-sink keys times 1 / (1 + strength) (`fixed`)."""
    folder = out / "accuracy" / split / name
    if not (folder / "result.json").exists():
        paths = [f"model={model(out, name)}", f"output={folder}", f"eval.limit={ASKED}"]
        scaled = [f"fixed.layers={list(LAYERS)}", f"fixed.coefficients=[{1 / (1 + strength)}, 1.0]"]
        benchmark = f"validation={out / 'validation' / 'questions.jsonl'}" if split == "validation" else "scenes"
        lsg("eval", CONFIG, "--method", "fixed", "--benchmark", benchmark, "--out", folder, "--set", *paths, *scaled)
    (found,) = json.loads((folder / "result.json").read_text(encoding="utf-8"))["benchmarks"].values()
    return {
        method: {metric: estimate["value"] for metric, estimate in scores.items()}
        for method, scores in found["methods"].items()
    }


def print_accuracy(split: str, rows: list[tuple[float, dict[str, dict[str, float]]]]) -> None:
    print(f"\n{split}, {ASKED} questions, accuracy (%)\nstrength   as it is   V-sink keys / (1 + strength)")
    for strength, found in rows:
        print(f"{strength:8}{found['base']['accuracy']:11.2f}{found['fixed']['accuracy']:31.2f}", flush=True)


def accuracy_bounds(planted: dict[str, dict[str, float]], embedded: dict[str, dict[str, float]]) -> list[tuple[str, bool]]:
    sound, lost = embedded["base"]["accuracy"], planted["base"]["accuracy"]
    print(f"the embedded model on the same questions: {sound:.2f}")
    return [
        ("planted sinks cost 10 points of accuracy or more", sound - lost >= 10),
        (
            "half of the loss comes back where V-sink keys are scaled back",
            planted["fixed"]["accuracy"] - lost >= (sound - lost) / 2,
        ),
    ]


def pointing(out: Path, name: str, questions: int) -> dict[str, Any]:
    folder = out / "pointing" / name
    if not (folder / "pointing.json").exists():
        maps = ("--maps", "raw", "no_sinks", "relative")
        lsg("pointing", model(out, name), "--questions", questions, *maps, "--batch-size", 16, "--out", folder)
    study: dict[str, Any] = json.loads((folder / "pointing.json").read_text(encoding="utf-8"))
    return study


def by_layer(study: dict[str, Any]) -> str:
    """Hit rates in percent of each kind, map and layer, and what sinks draw; an asterisk: the change's interval excludes 0."""
    layers = range(len(study["attention"]) // len(study["kinds"]))
    lines = [f"{'hit rate (%)':<17}{'map':<12}" + "".join(f"{layer:>6}" for layer in layers)]
    moved = {(c["kind"], c["map"], c["layer"]): c["low"] > 0 or c["high"] < 0 for c in study["changes"]}
    for kind in study["kinds"]:
        for name in study["maps"]:
            own = [row for row in study["rows"] if (row["kind"], row["map"]) == (kind, name)]
            cells = [f"{100 * row['hit']:.0f}{'*' if moved.get((kind, name, row['layer'])) else ' '}" for row in own]
            lines.append(f"{kind:<17}{name:<12}" + "".join(f"{cell:>6}" for cell in cells))
        drawn = [f"{100 * row['share']:.0f} " for row in study["attention"] if row["kind"] == kind]
        lines.append(f"{kind:<17}{'sinks draw':<12}" + "".join(f"{cell:>6}" for cell in drawn))
    return "\n".join(lines)


def pointing_bounds(studies: dict[str, dict[str, Any]]) -> list[tuple[str, bool]]:
    embedded, planted = (studies[name] for name in MODELS)

    def best(study: dict[str, Any], choice: str = "layer") -> dict[str, Any]:
        rows = {(row["kind"], row["choice"], row["map"]): row for row in study["best"]}
        found: dict[str, Any] = rows["all", choice, "no_sinks"]
        return found

    changes = [c for c in planted["changes"] if (c["kind"], c["map"]) == ("all", "no_sinks") and c["layer"] in LAYERS]
    return [
        (
            "embedded: in its best layer the map without sinks points as raw attention does, within 2 points",
            abs(best(embedded)["change"]) <= 0.02,
        ),
        ("planted: in its best layer it points better, by 10 points or more", best(planted)["change_low"] >= 0.1),
        ("planted: it points better in every planted layer", all(c["low"] > 0 for c in changes)),
        (
            "planted: in the best head it points as raw attention does, within 2 points",
            abs(best(planted, "head")["change"]) <= 0.02,
        ),
    ]


if __name__ == "__main__":
    main()
