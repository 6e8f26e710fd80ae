"""Example images of `lsg explore`: rendered scenes, each with a question."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass

from PIL import Image

from lsg_jax.data.drawing import draw
from lsg_jax.data.scene_questions import KINDS, scene_question

SIDE = 336
SHOWN = ("corner_letter", "count", "object_letter", "exists", "smallest_colour", "background")


@dataclass(frozen=True)
class Example:
    """A scene and a question about it."""

    prompt: str
    picture: Image.Image

    @functools.cached_property
    def png(self) -> bytes:
        """The picture as a file."""
        out = io.BytesIO()
        self.picture.save(out, "png")
        return out.getvalue()


@functools.cache
def examples() -> tuple[Example, ...]:
    """One scene of each kind in `SHOWN`, of the split `test`."""
    asked = [scene_question("test", len(KINDS) + list(KINDS).index(kind)) for kind in SHOWN]
    return tuple(Example(question.prompt, Image.fromarray(draw(question.scene, SIDE))) for question in asked)
