"""All studies on the embedded model: oracle map, a gate at each layer, stacks, baselines, ablations, probes.

    python benchmarks/embedded.py OUT [--only STUDY ...]

Gates are trained on scenes of the split `train`, layers are chosen on `validation`, and all are measured on the
2,000 questions of `test`. It is a list of `lsg` commands, which are printed; what is finished is kept. Baselines and
ablations take the layer whose gate alone gains most on `validation`, so `stack` comes before them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from converters.convert import convert
from lsg_jax.data.records import prepare_llava
from lsg_jax.data.scene_questions import write_questions
from lsg_jax.quickstart import CHECKPOINT

CONFIG = Path(__file__).parent.parent / "configs" / "tiny.toml"
TRAIN, VALIDATION, SIDE = 4096, 2400, 112
# methods of others that are not trained, in the layers of their authors, in proportion to 8 layers instead of 32
UNTRAINED = ("pai", "vaf", "eah", "damro", "gift")
LAYERS = ("pai.first_layer=1", "vaf.first_layer=2", "vaf.last_layer=3", "eah.layer=1")
LAYERS += ("gift.saliency_layer=2", "gift.first_layer=3", "gift.last_layer=5")
STUDIES = ("probe", "sweep", "each", "stack", "baselines", "ablate", "report")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--only", nargs="+", default=[], metavar="STUDY")
    options = parser.parse_args()
    prepare(options.out)
    for name in options.only or STUDIES:
        for arguments in commands(name, options.out):
            print("lsg", shlex.join(arguments), flush=True)
            subprocess.run([sys.executable, "-m", "lsg_jax", *arguments], check=True)


def prepare(out: Path) -> None:
    """The model, the training records and the validation questions."""
    if not (out / "model").exists():
        convert(CHECKPOINT, out / "model", dtype="float32")
    if not (out / "records").exists():
        questions = write_questions(out / "train", "train", TRAIN, side=SIDE)
        prepare_llava(questions.with_name("llava.jsonl"), out / "train", out / "records")
    if not (out / "validation").exists():
        write_questions(out / "validation", "validation", VALIDATION, side=SIDE)


def best_layer(out: Path) -> int:
    """The layer of the best single gate in `stack`."""
    study = json.loads((out / "stack" / "stack.json").read_text(encoding="utf-8"))
    return study["steps"][0]["layers"][0]


def commands(study: str, out: Path) -> list[list[str]]:
    """The arguments of a study's `lsg` commands."""
    validation, test = f"validation={out / 'validation' / 'questions.jsonl'}", "scenes"

    def run(name: str, *overrides: str) -> list[str]:
        paths = [f"model={out / 'model'}", f"data.records={out / 'records'}", f"output={out / name}"]
        return [str(CONFIG), "--set", *paths, *overrides]

    train = lambda name, *overrides: ["train", *run(name, *overrides)]
    if study in ("baselines", "ablate"):
        layer = best_layer(out)
        only = f"gate.layers=[{layer}]"
    if study == "baselines":
        return [
            train("lora", "method=lora", f"lora.layer={layer}"),
            train("diysink", "method=diysink", "diysink.routing=mlp"),
            train("gated_output", "method=gated_output"),
            [
                *("eval", *run("baselines", only, *LAYERS), "--gates", f"{out / 'each'}@{layer}", "--benchmark", test),
                *("--method", "lsg", "sink_front", *UNTRAINED),
                *(f"{name}={out / name}" for name in ("lora", "diysink", "gated_output")),
                *("--out", str(out / "baselines")),
            ],
        ]
    if study == "ablate":
        return [["ablate", *run("ablate", only), "--benchmark", test, "--out", str(out / "ablate")]]
    return {
        "probe": [["probe", str(out / "model"), "--data", "scenes", "--images", "2000", "--out", str(out / "probe")]],
        "sweep": [["sweep", *run("sweep"), "--benchmark", validation, "--step", "0.25", "--out", str(out / "sweep")]],
        "each": [train("each", "gate.layers=each", "train.remat=full")],
        "stack": [
            [
                *("stack", *run("stack"), "--gates", str(out / "each"), "--benchmark", validation, test),
                *("--select", "validation", "--out", str(out / "stack")),
            ]
        ],
        "report": [["report", str(out), "--out", str(out / "report.html")]],
    }[study]


if __name__ == "__main__":
    main()
