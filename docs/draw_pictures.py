"""Draws the pictures of README.md, of files that `lsg` commands write.

    lsg quickstart && python benchmarks/control.py control --only map
    python docs/draw_pictures.py lsg-quickstart control/sweep docs/pictures

`a_look.png` is where the embedded model looks for the answer to one question, with sinks and without. `oracle_map.png` is the
first part of the figure of `lsg sweep`: the best change by layer and kind of question, on the control.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import lsg_jax
from lsg_jax.data.scene_questions import scene_question
from lsg_jax.eval.best_cells import extreme_cells
from lsg_jax.report import heat_map
from lsg_jax.report.drawing import PAGE_WIDTH, PERCENTAGE_POINTS, painted
from lsg_jax.report.overlay import draw_map, draw_sinks

SCENE, LAYER = 7, 2
"""Question and decoder layer: of the quickstart's validation questions the first with a layer in which sinks draw more than
40 % of the attention on the picture, and the map has its peak on one of them, and without them on what is asked for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("quickstart", type=Path, metavar="QUICKSTART")
    parser.add_argument("sweep", type=Path, metavar="SWEEP")
    parser.add_argument("out", type=Path, metavar="OUT")
    options = parser.parse_args()
    (options.out / "a_look.png").write_bytes(look(options.quickstart))
    (options.out / "oracle_map.png").write_bytes(oracle_map(json.loads((options.sweep / "sweep.json").read_bytes())["rows"]))


def look(quickstart: Path) -> bytes:
    """A scene with its V-sinks, the attention of the answer, and the same without sinks, side by side, a PNG."""
    row = json.loads((quickstart / "validation" / "questions.jsonl").read_text(encoding="utf-8").splitlines()[SCENE])
    image, prompt = quickstart / "validation" / row["image"], scene_question("validation", SCENE).prompt
    seen = lsg_jax.load(quickstart / "model").look(image, prompt)
    marked = {"v_sinks": np.flatnonzero(seen.v_sink).tolist(), "l_sinks": None, "boxes": seen.box}
    drawn = {"the picture; framed: its V-sinks": draw_sinks(seen.pictures[0].convert("RGB"), marked)}
    for name, title in (("raw", "all attention"), ("no_sinks", "attention without sinks")):
        values = seen.on_picture(seen.values(name, 0, LAYER), side=672)
        drawn[f"{title}, layer {LAYER}"] = draw_map(seen.pictures[0], values)

    def paint(figure: Any) -> None:
        figure.suptitle(f"{row['question']}  Answer: {row['answer']}", fontsize=9, x=0.01, ha="left")
        for axes, (title, picture) in zip(figure.subplots(1, 3), drawn.items(), strict=True):
            axes.imshow(picture)
            axes.set_title(title)
            axes.set_axis_off()

    return painted((PAGE_WIDTH, 2.75), paint)


def oracle_map(rows: list[dict[str, Any]]) -> bytes:
    """The best change over the coefficients, by layer and kind of question, a PNG. Hatched where its interval covers 0."""
    cells = extreme_cells(rows, "best")
    for cell in cells:
        cell["task"] = cell["task"].removeprefix("category: ").replace("_", " ")
    layers = sorted({cell["layer"] for cell in cells})
    lines = heat_map.lines_of(list(dict.fromkeys((cell["benchmark"], cell["task"]) for cell in cells)))
    places = [(cell["benchmark"], cell["task"], cell["layer"]) for cell in cells]
    change, low, high = (
        lines.table({place: cell[name] for place, cell in zip(places, cells, strict=True)}, layers)
        for name in ("change", "low", "high")
    )
    bound = float(np.nanmax(np.abs(change)))

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        mesh = heat_map.draw_map(axes, lines, layers, change, colours="RdBu", limits=(-bound, bound), across=1)
        heat_map.hatch_cells(axes, (low <= 0) & (high >= 0))
        axes.set_title("Best change with keys scaled in one layer")
        axes.set_title("hatched: interval covers 0", loc="right", fontsize=7)
        heat_map.draw_bar(figure, mesh, [axes], lines, PERCENTAGE_POINTS)

    return painted((PAGE_WIDTH, lines.height + 0.9), paint)


if __name__ == "__main__":
    main()
