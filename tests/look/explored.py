"""A page of `lsg explore` whose answers are made up: what the tests of server and page run without a model."""

import dataclasses

import numpy as np

from lsg_jax.look.look import Criterion, Look, relative_to, without_sinks

TOKENS, LAYERS, HEADS, SIDE = ["", "a", " <b>cat</b>"], 6, 4, 4
TELLING = 4  # the layer in which sinks draw most, which a page shows first
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


def made_look(pictures, prompt="What is it?", seed=0, *, answer=HOSTILE, factor=1.0):
    """A look at 4 x 4 tokens a picture; token 0 is a V-sink, token 1 an L-sink of the upper half; `factor` scales V-sinks."""
    rng, visual = np.random.default_rng(seed), SIDE * SIDE * len(pictures)
    raw = rng.uniform(0, 0.5 / visual, (len(TOKENS), LAYERS, HEADS, visual)).astype(np.float32)
    raw[..., 0] = 0.4 * factor
    raw[:, TELLING, :, 1] += 0.02
    edges = np.linspace(0, 1, SIDE + 1)
    box = [(edges[x], edges[y], edges[x + 1], edges[y + 1]) for y in range(SIDE) for x in range(SIDE)]
    v_sink, l_sink = np.arange(visual) == 0, np.zeros((LAYERS, visual), bool)
    l_sink[3:, 1] = True
    neutral = np.full((LAYERS, HEADS, visual), 0.01, np.float32)
    return Look(
        prompt=prompt,
        answer=answer,
        tokens=TOKENS if answer else [],
        maps={
            "raw": raw if answer else raw[:0],
            "no_sinks": without_sinks(raw, v_sink | l_sink) if answer else raw[:0],
            "relative": relative_to(raw, neutral) if answer else raw[:0],
        },
        box=np.array(box * len(pictures), np.float32),
        image=np.repeat(np.arange(len(pictures), dtype=np.int32), SIDE * SIDE),
        v_sink=v_sink,
        l_sink=l_sink,
        v_value=np.where(v_sink, 60.5, 2.25).astype(np.float32),
        l_value=np.full((LAYERS, visual), 7.5, np.float32),
        criteria={"vit": Criterion("dim_abs", 33.0), "llm": Criterion("norm", 100.0)},
        pictures=list(pictures),
        visual=np.arange(visual, dtype=np.int32),
        neutral=neutral,
        warnings=["a warning, with <b>markup</b>"],
    )


class MadeAsker:
    """In place of `Asker`: answers at once; `fails` is raised instead, if it is set."""

    titles = {"base": "Base", "coefficients": "Coefficients"}  # noqa: RUF012

    def __init__(self):
        text = dataclasses.make_dataclass("Text", ["num_layers"])(LAYERS)
        self.config = dataclasses.make_dataclass("Config", ["text"])(text)
        self.methods, self.asked, self.fails, self.waits = self.titles, [], None, None

    def look(self, method, coefficients, pictures, prompt, report=lambda state: None):
        self.asked.append((method, coefficients, [picture.size for picture in pictures], prompt))
        report("compiling")
        if self.waits is not None:
            self.waits.wait(10)
        if self.fails is not None:
            raise self.fails
        report("answering")
        return made_look(pictures, prompt, factor=coefficients[0][0] if method == "coefficients" else 1.0)
