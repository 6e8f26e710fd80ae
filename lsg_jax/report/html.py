"""One self-contained HTML page of a finished run: accuracies, the loss curve, gate ratios, images with their sinks."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #ccc }
th:first-child, td:first-child { text-align: left } figure { display: inline-block; margin: .5rem; max-width: 100% }
img { width: 16rem; max-width: 100% } svg { max-width: 100% } .note { background: #fff4d6; padding: .5rem 1rem }
"""


def write_report(
    path: Path, *, title: str, notes: list[str], result: dict[str, Any], metrics: Path, overlays: list[tuple[str, Image.Image]]
) -> None:
    """Writes the page.

    Args:
        notes: what a reader must know first, as plain text.
        result: what eval.runner wrote.
        metrics: metrics.jsonl of the training run.
        overlays: captions and images.
    """
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *(f'<p class="note">{html.escape(note)}</p>' for note in notes),
        "<h2>Accuracy, base against gated</h2>",
        _accuracy_table(result),
        "<h2>Training loss</h2>",
        _loss_curve(steps),
        "<h2>Gate ratios at the last step</h2>",
        _ratio_table(steps[-1], result),
        "<h2>Sinks</h2><p>Orange: V-sinks, decided before the projector. Blue: L-sinks in some layer.</p>",
        *(_figure(caption, image) for caption, image in overlays),
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>"
    )
    path.write_text(page, encoding="utf-8")


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _accuracy_table(result: dict[str, Any]) -> str:
    rows = []
    for name, entry in result["benchmarks"].items():
        for metric, base in entry["base"].items():
            rows.append(
                [
                    f"{name}, {metric}",
                    *(_number(v) for v in (entry["majority"][metric], base["value"], entry["gated"][metric]["value"])),
                    "{} [{}, {}]".format(*(_number(entry["change"][metric][of], "+") for of in ("value", "low", "high"))),
                ]
            )
    return _table(["benchmark, metric", "majority answer", "base", "gated", "change [95 %]"], rows)


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.2f}"


def _ratio_table(last: dict[str, Any], result: dict[str, Any]) -> str:
    layers = result["gate"]["layers"]
    rows = [[str(layer), *(f"{r:.3f}" for r in ratios)] for layer, ratios in zip(layers, last["ratios"], strict=True)]
    groups = {"v_sink_rest": ["V-sink", "rest"], "l_sink_rest": ["L-sink", "rest"], "three": ["V-sink", "L-sink", "ordinary"]}
    return _table(["layer", *groups[result["gate"]["grouping"]]], rows)


def _loss_curve(steps: list[dict[str, Any]]) -> str:
    points = [(s["step"], s["loss"]) for s in steps if s["loss"] is not None]
    if len(points) < 2:
        return "<p>Too few steps for a curve.</p>"
    (first, _), (last, _) = points[0], points[-1]
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    x = lambda step: 40 + 540 * (step - first) / max(last - first, 1)
    y = lambda loss: 180 - 160 * (loss - low) / max(high - low, 1e-12)
    line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    label = f"Training loss from {points[0][1]:.4f} at step {first} to {points[-1][1]:.4f} at step {last}"
    return (
        f'<svg viewBox="0 0 600 200" width="600" role="img" aria-label="{label}"><polyline points="{line}" fill="none" '
        f'stroke="#1a85ff" stroke-width="2"/><text x="0" y="24" font-size="11">{high:.3f}</text>'
        f'<text x="0" y="184" font-size="11">{low:.3f}</text></svg><p>{label}, in nats a token.</p>'
    )


def _figure(caption: str, image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
