"""`lsg quickstart`: convert the embedded model, find its sinks, train a gate, evaluate, draw an oracle map, report.

The model is a small LLaVA that comes with the package, trained on rendered scenes. Each step is the one that a checkpoint of
any size takes, with the settings that `config.toml` in the output folder holds.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from lsg_jax.analysis.sinks import find_sinks
from lsg_jax.analysis.sweep import SweepConfig, coefficient_grid, sweep
from lsg_jax.config import EvalConfig
from lsg_jax.data.records import prepare_llava
from lsg_jax.data.scene_questions import write_questions
from lsg_jax.errors import InputError
from lsg_jax.eval.runner import evaluate
from lsg_jax.eval.table import table
from lsg_jax.files import check_only, check_output, write_atomic
from lsg_jax.json_files import read_sealed
from lsg_jax.opening import load_backbone, with_gates
from lsg_jax.progress import Progress, training_progress
from lsg_jax.report.finished import read_sections
from lsg_jax.report.page import write_report
from lsg_jax.report.sink_files import write_sinks
from lsg_jax.run_config import load_run_config
from lsg_jax.train.loop import train
from lsg_jax.vlm import VLM

logger = logging.getLogger(__name__)

CHECKPOINT = Path(__file__).parent / "embedded" / "checkpoint"
"""The embedded model in Hugging Face format; its README.md is the model card."""

GATES = CHECKPOINT.parent / "gates.safetensors"
"""Gates for it, those that the model card measures."""

LAYER = 6  # its gate gains most on validation questions (docs/embedded_gating.md)
TRAIN_SCENES, TEST_QUESTIONS, ORACLE_QUESTIONS, SHOWN_SCENES = 1024, 400, 80, 6
NOTES = [
    "The embedded model was taught to have V-sinks (see its model card). Scores are of a part of the test questions.",
]
CONFIG = """\
# Written by `lsg quickstart`, which trained and evaluated the gate with it; `lsg train` and `lsg eval` take it as it is.
model = {model}
output = {output}

[gate]
layers = [{layer}]
key_scale = 2.0 # the untrained gate changes nothing

[data]
records = {records}
max_length = 160
max_answer_tokens = 4

[train]
batch_size = 32
epochs = 2
learning_rate = 1e-3
save_every = 16

[eval]
batch_size = 40
max_new_tokens = 4
limit = {questions}

[eval.benchmarks]
validation = {validation}
"""

WRITTEN = frozenset(
    {"config.toml", "eval", "model", "model.tmp", "records", "report.html", "run", "sinks", "sweep", "train", "validation"}
)
"""What the quickstart writes."""

ProgressBar = Callable[[str], AbstractContextManager[Progress]]
"""Title -> a context that shows the progress reported to it."""


def quickstart(out: Path, *, convert: Callable[..., object], progress_bar: ProgressBar) -> Path:
    """Runs all steps in `out` and returns the path of the HTML report. Finished steps are not repeated in a second run.

    Args:
        convert: `converters.convert.convert`.
    """
    check_output(out, folder=True)
    check_only(out, WRITTEN, "quickstart folder")
    out.mkdir(parents=True, exist_ok=True)
    model, records, run = out / "model", out / "records", out / "run"
    logger.info("1/6 converting the embedded model")
    if not model.exists():
        convert(CHECKPOINT, model, dtype="float32")
    vlm = load_backbone(model)
    side = vlm.config.image.size

    logger.info("2/6 finding sinks in %d images", SHOWN_SCENES)
    validation = write_questions(out / "validation", "validation", ORACLE_QUESTIONS, side=side)
    if not _has_sinks(out / "sinks" / "sinks.json", vlm):
        with progress_bar("sinks") as progress:
            _find_sinks(vlm, out, progress)

    logger.info("3/6 drawing %d scenes with a question each, and preparing them as training records", TRAIN_SCENES)
    if not records.exists():
        written = write_questions(out / "train", "train", TRAIN_SCENES, side=side)
        prepare_llava(written.with_name("llava.jsonl"), out / "train", records)

    logger.info("4/6 training a gate at layer %d", LAYER)
    config = load_run_config(_write_config(out, model=model, output=run, records=records, validation=validation))
    with progress_bar("train") as progress:
        train(config, on_step=training_progress(progress))

    logger.info("5/6 asking %d test questions, base and gated", TEST_QUESTIONS)
    settings = replace(config.eval, benchmarks={"scenes": ""})
    with progress_bar("eval") as progress:
        result = evaluate({"base": vlm, "lsg": with_gates(vlm, run)}, settings, out / "eval", progress=progress)

    logger.info("6/6 what fixed coefficients do in each layer, on %d validation questions", ORACLE_QUESTIONS)
    cells = SweepConfig(layers=(), coefficients=coefficient_grid(2, 0.25), batch_size=8)
    settings = EvalConfig(benchmarks={"validation": str(validation)}, max_new_tokens=4)
    with progress_bar("oracle map") as progress:
        sweep(vlm, cells, settings, out / "sweep", progress=progress)

    report = out / "report.html"
    sections = read_sections([out / "eval", out / "sinks", out / "sweep", run])
    write_report(report, title="Attention sinks, quickstart", notes=NOTES, sections=sections)
    print(table(result.benchmarks))
    return report.resolve()


def _write_config(out: Path, **paths: Path) -> Path:
    file = out / "config.toml"
    strings = {name: json.dumps(str(path), ensure_ascii=False) for name, path in paths.items()}
    write_atomic(file, CONFIG.format(**strings, layer=LAYER, questions=TEST_QUESTIONS).encode())
    return file


def _has_sinks(file: Path, vlm: VLM) -> bool:
    """Whether the file is whole and of this model; else its sinks are found again."""
    try:
        return read_sealed(file).get("backbone") == vlm.digest
    except InputError:
        return False


def _find_sinks(vlm: VLM, out: Path, progress: Progress) -> None:
    paths = sorted((out / "validation" / "images").iterdir())[:SHOWN_SCENES]
    images = {path.name: path for path in paths}
    write_sinks(find_sinks(vlm, images, "How many shapes are there?", progress=progress), images, out / "sinks")
