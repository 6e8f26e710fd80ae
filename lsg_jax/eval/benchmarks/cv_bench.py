"""CV-Bench (Tong et al., 2024): 1438 questions of 2D and 1200 of 3D vision, in the layout of `nyu-visionx/CV-Bench`.

The official score is a mean over sources, ((ADE20K + COCO) / 2 + Omni3D) / 2; that of lmms-eval is a mean over questions.
"""

from __future__ import annotations

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import Row, read_rows
from lsg_jax.data.prompts import LETTER_SUFFIX
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, by, check_unique, check_values, mean
from lsg_jax.eval.letters import (
    LETTERS,
    check_letter,
    choice_match,
    lmms_first_letter,
    row_choices,
    vlmevalkit_prompt,
)

SOURCES = ("ADE20K", "COCO", "Omni3D")
GROUPS = {"type": ("2D", "3D"), "task": ("Count", "Relation", "Depth", "Distance"), "source": SOURCES}


def read(path: str) -> list[Item]:
    """Items with fields `type`, `task`, `source`, `prompt` (the question with its choices) and `photo`."""
    needs = ("type", "task", "question", "choices", "answer", "prompt", "source")
    items = [
        _item(row, number)
        for number, row in enumerate(read_rows(path, needs=needs, images=("image",), optional=("idx", "source_filename")))
    ]
    check_unique(items, path)
    for name, known in GROUPS.items():
        check_values((item.fields[name] for item in items), known, what=name, where=path)
    return items


def _item(row: Row, number: int) -> Item:
    choices = row_choices(row, "choices")
    name = f"{row['type']}-{row.get('idx', number)}"
    return Item(
        id=name,
        question=row.text("question"),
        answers=(check_letter(str(row["answer"]).strip("()"), len(choices), row.where),),
        choices=choices,
        images=row.images(),
        fields={key: row.text(key) for key in ("type", "task", "source", "prompt")}
        | {"photo": row.label("source_filename") or name},
    )


def prompt(item: Item, protocol: Protocol) -> str:
    """The prompt of the file with the protocol's addition; VLMEvalKit instead lists the choices in its own way."""
    if protocol == "lmms_eval":
        letters = ", ".join(LETTERS[: len(item.choices)])
        note = f"Note: You only need to respond with {letters} without providing any additional information."
        return f"{note}\n\n{item.fields['prompt']}"
    if protocol == "vlmevalkit":
        return vlmevalkit_prompt(item.question, item.choices)
    return item.fields["prompt"] + LETTER_SUFFIX


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """The letter as the protocol reads it."""
    return choice_match(item, output, protocol, lmms=lmms_first_letter)


def metrics(graded: Graded) -> Metrics:
    """The official score and its parts (2D is the mean of its two sources), accuracy over all questions, tasks and sources."""
    sources = {name: mean(graded, graded.where("source", name)) for name in SOURCES}
    two = (sources["ADE20K"] + sources["COCO"]) / 2
    three = sources["Omni3D"]
    return {
        "official": (two + three) / 2,
        "accuracy": mean(graded),
        "2D": two,
        "3D": three,
        **{f"source: {name}": value for name, value in sources.items()},
        **{f"task: {name}": value for name, value in by(graded, "task").items()},
    }


CV_BENCH = Benchmark(
    name="cv_bench",
    kind="vision_centric",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    task="task",
    # VLMEvalKit reports 2D and 3D separately; their mean is the official score.
    official={"paper": "official", "lmms_eval": "accuracy", "vlmevalkit": "official", "cambrian": "official"},
    size=2638,
    groups=GROUPS,
    unit="photo",
    guess_by="task",
    max_new_tokens={"lmms_eval": 1024, "vlmevalkit": 2048, "cambrian": 512},
)
