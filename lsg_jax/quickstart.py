"""`lsg quickstart`: what gates win back where sinks do harm, and what they change where sinks do none; with a report.

The model is a small LLaVA that comes with the package, trained on rendered scenes. First comes a control: a copy of it with
planted sinks, whose loss is known, and gates that are trained against it. Then the model as it is. Each step is the one that a
checkpoint of any size takes, with the settings that the two files `config.toml` in the output folder hold.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lsg_jax.analysis.sinks import find_sinks
from lsg_jax.analysis.sweep import SweepConfig, coefficient_grid, sweep
from lsg_jax.config import EvalConfig, to_dict
from lsg_jax.config.model import PLANTED as PLANT_RECORD
from lsg_jax.config.ranges import Table
from lsg_jax.data.records import prepare_llava
from lsg_jax.data.scene_questions import write_questions
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Item
from lsg_jax.eval.benchmarks.scenes import SCENES
from lsg_jax.eval.letters import LETTERS
from lsg_jax.eval.results import EvaluationResult
from lsg_jax.eval.runner import evaluate
from lsg_jax.eval.table import table
from lsg_jax.files import check_only, check_output, write_atomic
from lsg_jax.json_files import read_object, read_sealed
from lsg_jax.opening import load_backbone, with_gates
from lsg_jax.progress import Progress, training_progress
from lsg_jax.report.answers import Question, read_questions
from lsg_jax.report.drawing import interval_text
from lsg_jax.report.finished import read_sections
from lsg_jax.report.overlay import draw_map
from lsg_jax.report.page import write_report
from lsg_jax.report.parts import Gallery, Paragraph, Part, Section, picture
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
TRAIN_SCENES, TEST_QUESTIONS, ORACLE_QUESTIONS, SHOWN_SCENES, PLANTED_SCENES = 1024, 400, 80, 6, 64
PLANTED_LAYERS = (1, 2, 3, 4, 5, 6)
PLANTED: dict[str, Any] = {"layers": PLANTED_LAYERS, "strength": 8.0, "mark": 1.0, "text": 30.0}
"""The control. Its strength was chosen on validation questions (docs/control.md)."""

EXAMPLES, EXAMPLE_LAYER = 3, 3
"""Questions that are shown with their attention before and after, and the decoder layer of that attention."""

NOTES = [
    "The embedded model was taught to have V-sinks (see its model card). Scores are of a part of the test questions.",
]
GATE = """\
layers = [{layer}]
key_scale = 2.0 # the untrained gate changes nothing"""
CONTROL_GATES = """\
layers = {layers}"""
CONFIG = """\
# Written by `lsg quickstart`, which trained and evaluated with it; `lsg train` and `lsg eval` take it as it is.
model = {model}
output = {output}

[gate]
{gate}

[data]
records = {records}
max_length = 160
max_answer_tokens = 4

[train]
batch_size = 32
epochs = 2
learning_rate = {learning_rate}
save_every = 16

[eval]
batch_size = 40
max_new_tokens = 4
limit = {questions}

[eval.benchmarks]
validation = {validation}
"""

WRITTEN = frozenset(
    {"config.toml", "control", "eval", "model", "model.tmp", "records", "report.html", "run", "sinks", "sweep", "train"}
) | {"validation"}
"""What the quickstart writes."""

ProgressBar = Callable[[str], AbstractContextManager[Progress]]
"""Title -> a context that shows the progress reported to it."""


def quickstart(
    out: Path, *, convert: Callable[..., object], plant: Callable[..., object], planting: Table, progress_bar: ProgressBar
) -> Path:
    """Runs all steps in `out` and returns the path of the HTML report. Finished steps are not repeated in a second run.

    Args:
        convert: `converters.convert.convert`.
        plant: `converters.plant_sinks.plant`.
        planting: its settings, those of PLANTED and PLANTED_SCENES.

    Raises:
        InputError: a finished step in `out` belongs to another model or other settings.
    """
    check_output(out, folder=True)
    check_only(out, WRITTEN, "quickstart folder")
    out.mkdir(parents=True, exist_ok=True)
    logger.info("1/8 converting the embedded model")
    if not (out / "model").exists():
        convert(CHECKPOINT, out / "model", dtype="float32")
    vlm = load_backbone(out / "model")
    side = vlm.config.image.size

    logger.info("2/8 finding sinks in %d images", SHOWN_SCENES)
    write_questions(out / "validation", "validation", ORACLE_QUESTIONS, side=side)
    if not _has_sinks(out / "sinks" / "sinks.json", vlm):
        with progress_bar("sinks") as progress:
            _find_sinks(vlm, out, progress)

    logger.info("3/8 drawing %d scenes with a question each, and preparing them as training records", TRAIN_SCENES)
    if not (out / "records").exists():
        written = write_questions(out / "train", "train", TRAIN_SCENES, side=side)
        prepare_llava(written.with_name("llava.jsonl"), out / "train", out / "records")

    control = out / "control"
    logger.info(
        "4/8 the control: planting sinks that draw too much attention in layers %d to %d", PLANTED_LAYERS[0], PLANTED_LAYERS[-1]
    )
    planted = _planted(out / "model", control / "model", plant, planting, vlm.digest, progress_bar)
    logger.info("5/8 training gates there, and asking %d test questions with and without them", TEST_QUESTIONS)
    won = _train_and_ask(out, control, planted, CONTROL_GATES.format(layers=list(PLANTED_LAYERS)), 3e-3, progress_bar)
    logger.info("6/8 looking at %d questions that the gates win back", EXAMPLES)
    examples = _examples(control, planted, won)

    logger.info("7/8 the model as it is: training a gate at layer %d, and asking the same questions", LAYER)
    plain = _train_and_ask(out, out, vlm, GATE.format(layer=LAYER), 1e-3, progress_bar)
    logger.info("8/8 what fixed coefficients do in each layer, on %d validation questions", ORACLE_QUESTIONS)
    cells = SweepConfig(layers=(), coefficients=coefficient_grid(2, 0.25), batch_size=8)
    settings = EvalConfig(benchmarks={"validation": str(out / "validation" / "questions.jsonl")}, max_new_tokens=4)
    with progress_bar("oracle map") as progress:
        sweep(vlm, cells, settings, out / "sweep", progress=progress)

    words, report = _found(won, plain), out / "report.html"
    sections = read_sections([control / "eval", out / "eval", out / "sinks", out / "sweep", control / "run", out / "run"])
    write_report(report, title="Attention sinks, quickstart", notes=[*words, *NOTES], sections=[examples, *sections])
    for name, result in (("The control, with planted sinks", won), ("The model as it is", plain)):
        print(f"{name}\n{table(result.benchmarks)}\n")
    print("\n".join(words))
    return report.resolve()


def check_planted(folder: Path, planting: Table, source: str) -> None:
    """Refuses a control that was planted with other settings, or into another model than that of digest `source`.

    Raises:
        InputError: names the folder to remove, and the first setting that differs.
    """
    file = folder / "hf" / "config.json"
    found = read_object(file).get(PLANT_RECORD)
    for name, due in {"source": source, **to_dict(planting)}.items():
        has = found.get(name) if isinstance(found, dict) else None
        if has != due:
            differs = "into another model" if name == "source" else f"with {name} {has} instead of {due}"
            raise InputError(f"{folder}: its sinks were planted {differs}; remove {folder.parent} and run it again")


def _planted(
    model: Path, folder: Path, plant: Callable[..., object], planting: Table, digest: str, progress_bar: ProgressBar
) -> VLM:
    """The model with planted sinks, which is made in `folder` if it is not there."""
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with progress_bar("plant") as progress:
            plant(model, folder, planting, progress=progress)
    check_planted(folder, planting, digest)
    return load_backbone(folder)


def _train_and_ask(
    out: Path, folder: Path, vlm: VLM, gate: str, learning_rate: float, progress_bar: ProgressBar
) -> EvaluationResult:
    """Trains gates on the records in `out`, and asks the test questions; config.toml, run and eval are in `folder`."""
    file, run = folder / "config.toml", folder / "run"
    paths = {"model": vlm.folder, "output": run, "records": out / "records"}
    paths["validation"] = out / "validation" / "questions.jsonl"
    strings = {name: json.dumps(str(path), ensure_ascii=False) for name, path in paths.items()}
    write_atomic(file, CONFIG.format(**strings, gate=gate, learning_rate=learning_rate, questions=TEST_QUESTIONS).encode())
    config = load_run_config(file)
    with progress_bar("train") as progress:
        train(config, on_step=training_progress(progress))
    settings = replace(config.eval, benchmarks={SCENES.name: ""})
    with progress_bar("eval") as progress:
        return evaluate({"base": vlm, "lsg": with_gates(vlm, run)}, settings, folder / "eval", progress=progress)


def _found(won: EvaluationResult, plain: EvaluationResult) -> list[str]:
    """What the two parts show, for someone who has not read about them."""

    def right(result: EvaluationResult, method: str) -> float:
        return result.benchmarks[SCENES.name].methods[method]["accuracy"].value or 0.0

    sound, planted, gated = right(plain, "base"), right(won, "base"), right(won, "lsg")
    share = f", which is {100 * (gated - planted) / (sound - planted):.0f} % of the loss won back" if sound > planted else ""
    change = plain.benchmarks[SCENES.name].change["lsg"]["accuracy"]
    clear = change.low is not None and change.high is not None and not change.low <= 0 <= change.high
    why = "a change." if clear else "no clear change. Its sinks do no harm, so there is nothing to win back."
    return [
        "The control: in a copy of the model, sinks were planted that draw too much attention in layers "
        f"{PLANTED_LAYERS[0]} to {PLANTED_LAYERS[-1]}. It answers {planted:.1f} % of the questions right, the model without "
        f"them {sound:.1f} %, and with trained gates {gated:.1f} %{share}. So gates work where sinks do harm.",
        f"The model as it is: a gate changes {sound:.1f} % by {interval_text(change.value, change.low, change.high)}, {why}",
    ]


def _examples(control: Path, planted: VLM, result: EvaluationResult) -> Section:
    """Questions that the gates win back, each of another kind: where the first token of the answer looks, before and after."""
    questions = read_questions(control / "eval", SCENES.name, ["base", "lsg"], result.benchmarks[SCENES.name].rows)
    gained: dict[str, Question] = {}
    for question in questions:
        if question.outcome("lsg") == "gained":
            gained.setdefault(question.category, question)
    asked = {item.id: item for item in SCENES.read("")}
    gated = with_gates(planted, control / "run")
    lead = (
        f"Where the first token of the answer looks in layer {EXAMPLE_LAYER}, mean over heads: the first question of each kind "
        "that is wrong with planted sinks and right with gates."
    )
    parts: list[Part] = [Paragraph(lead if gained else "There are none.")]
    for question in list(gained.values())[:EXAMPLES]:
        item = asked[question.id]
        scene, caption = item.images[0].read(), f"{item.question} {_in_words(item.answers[0], item)}."
        pictures = [picture(caption, scene, alt=caption)]
        for name, vlm in (("With planted sinks", planted), ("With gates", gated)):
            look = vlm.look(scene, question.prompt, 4)
            values = look.over_heads("raw")[0, EXAMPLE_LAYER]
            share = 100 * values[look.v_sink].sum() / values.sum()
            answer = f"{_in_words(look.answer.strip(), item)}, {'right' if vlm is gated else 'wrong'}"
            caption = f"{name}: {answer}. V-sinks get {share:.0f} % of the attention on the image."
            pictures.append(picture(caption, draw_map(look.pictures[0], look.on_picture(values)), alt=caption))
        parts.append(Gallery(pictures))
    return Section("Control: questions that the gates win back", parts, gist="attention before and after", group="sinks")


def _in_words(answer: str, item: Item) -> str:
    """The text of a choice instead of its letter."""
    place = LETTERS.find(answer or "?")
    return item.choices[place] if 0 <= place < len(item.choices) else answer


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
