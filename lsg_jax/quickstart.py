"""`lsg quickstart`: convert, find sinks, train a gate, evaluate, report, on a tiny random model and drawn scenes.

The weights are random, so the numbers mean nothing; every step is the one that a real checkpoint takes.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from lsg_jax.analysis.sinks import find_sinks
from lsg_jax.checkpoint.files import write_json
from lsg_jax.config import DataConfig, EvalConfig, GateConfig, RunConfig, SinkConfig, TrainConfig
from lsg_jax.data.records import prepare_llava
from lsg_jax.data.scene_questions import write_questions
from lsg_jax.eval.runner import evaluate
from lsg_jax.eval.table import table
from lsg_jax.model.llava import assemble
from lsg_jax.opening import load_backbone, with_gates
from lsg_jax.report.finished import read_sections
from lsg_jax.report.html import write_report
from lsg_jax.report.overlay import draw_sinks
from lsg_jax.train.loop import train
from lsg_jax.vlm import VLM

logger = logging.getLogger(__name__)

TRAIN_SCENES, TEST_SCENES, SHOWN_SCENES = 128, 64, 4
NOTES = [
    "This model has random weights: it shows that every step runs, and its accuracies and sinks mean nothing.",
    "V-sinks here are the patches with the largest norms of these very images; a trained model has thresholds of its own.",
]


def quickstart(out: Path, *, write_checkpoint: Callable[[Path], None], convert: Callable[[Path, Path], None]) -> Path:
    """Runs the story in `out` and returns the path of its HTML report. Finished parts are kept when it is run again.

    Args:
        write_checkpoint: writes a Hugging Face checkpoint into a folder.
        convert: turns it into a model folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    model, records, run = out / "model", out / "records", out / "run"
    train_file = write_questions(out / "train", "train", TRAIN_SCENES)
    write_questions(out / "test", "test", SHOWN_SCENES)
    if not model.exists():
        logger.info("1/5 converting a tiny checkpoint")
        write_checkpoint(out / "checkpoint")
        convert(out / "checkpoint", model)
    if not records.exists():
        logger.info("2/5 preparing %d training records", TRAIN_SCENES)
        prepare_llava(train_file.with_name("llava.jsonl"), out / "train", records)

    logger.info("3/5 finding sinks")
    base = load_backbone(model)
    images = [out / "test" / "images" / f"{index:05d}.png" for index in range(SHOWN_SCENES)]
    pixels = {path.name: base.processor.pixels(path) for path in images}
    sinks = SinkConfig(criterion="norm", vit_tau=_largest_norms(base, list(pixels.values())))
    knowing = VLM(dataclasses.replace(base.config, sinks=sinks), base.frozen, folder=model)
    found = find_sinks(knowing, pixels, "What is this?", max_new_tokens=0)
    (out / "sinks").mkdir(exist_ok=True)
    write_json(out / "sinks" / "sinks.json", found, sort_keys=False)
    for name, entry in found["images"].items():
        draw_sinks(pixels[name], entry).save(out / "sinks" / name)

    logger.info("4/5 training a gate at layer 2")
    config = RunConfig(
        model=str(model),
        output=str(run),
        gate=GateConfig(layers=(2,)),
        sinks=sinks,
        data=DataConfig(records=str(records), max_length=448, max_answer_tokens=16),
        train=TrainConfig(batch_size=8, epochs=2, learning_rate=3e-3, save_every=16),
    )
    train(config)

    logger.info("5/5 evaluating on %d questions", TEST_SCENES)
    settings = EvalConfig(benchmarks={"scenes": ""}, limit=TEST_SCENES, batch_size=16, max_new_tokens=8)
    result = evaluate({"base": base, "lsg": with_gates(base, run)}, settings, out / "eval")
    logger.info("%s", table(result))
    report = out / "report.html"
    sections = read_sections([out / "sinks", run, out / "eval"])
    write_report(report, title="Attention sinks, quickstart", notes=NOTES, sections=sections)
    return report.resolve()


def _largest_norms(vlm: VLM, pixels: list[np.ndarray]) -> float:
    """A threshold that the largest twentieth of the patches' feature norms reach."""
    features = jax.jit(lambda params, images: assemble(vlm.graphdef, params).image_features(images)[0])
    return float(np.quantile(np.linalg.norm(features(vlm.params, np.stack(pixels)), axis=-1), 0.95))
