"""Rendered scenes with exact answers (`lsg_jax.data.scene_questions`), coarse and fine questions. No file is needed."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from lsg_jax.data.drawing import draw
from lsg_jax.data.scene_questions import scene_questions
from lsg_jax.data.shapes import Scene
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Metrics, by, mean
from lsg_jax.eval.benchmarks.questions import match, prompt

COUNT = 2000


@dataclass(frozen=True)
class Rendered:
    """A scene that is drawn on demand."""

    scene: Scene

    def read(self) -> Image.Image:
        """RGB, 224 x 224."""
        return Image.fromarray(draw(self.scene))


def read(path: str) -> list[Item]:
    """The first 2,000 questions of the split `test`. Raises InputError if a path is given: scenes are drawn, not read."""
    if path:
        raise InputError(f"benchmark scenes: takes no file ({path}); scenes are drawn. Own questions need another name")
    return [
        Item(
            id=question.id,
            question=question.question,
            answers=question.answers,
            choices=question.choices,
            images=(Rendered(question.scene),),
            fields={"grain": question.grain, "kind": question.kind},
        )
        for question in scene_questions("test", COUNT)
    ]


def metrics(graded: Graded) -> Metrics:
    """Accuracy over all questions, over coarse and fine ones, and by kind."""
    kinds = {f"kind: {name}": value for name, value in by(graded, "kind").items()}
    return {"accuracy": mean(graded), **by(graded, "grain"), **kinds}


SCENES = Benchmark(
    name="scenes",
    kind="general",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    task="kind",
    official={"paper": "accuracy"},
    size=COUNT,
    guess_by="kind",
)
