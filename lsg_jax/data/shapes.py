"""Seeded rendered scenes: a few coloured shapes on a plain background, with questions and exact answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (210, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 210), "yellow": (230, 200, 40)}
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS = ((235, 235, 230), (200, 215, 225), (60, 62, 70))


@dataclass(frozen=True)
class Item:
    """One drawn object; position and size in units of the image's side."""

    shape: str
    colour: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """What is in an image, exactly."""

    items: tuple[Item, ...]
    background: tuple[int, int, int]


def make_scene(seed: int, index: int) -> Scene:
    """The scene of that number: one to four items in different quarters of the image."""
    rng = np.random.default_rng([seed, index])
    quarters = rng.permutation(4)[: rng.integers(1, 5)]
    items = []
    for quarter in quarters:
        x, y = 0.27 + 0.46 * np.array([quarter % 2, quarter // 2]) + rng.uniform(-0.04, 0.04, 2)
        items.append(
            Item(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), float(x), float(y), float(rng.uniform(0.12, 0.18)))
        )
    return Scene(items=tuple(items), background=BACKGROUNDS[rng.integers(len(BACKGROUNDS))])


def draw(scene: Scene, side: int = 224) -> Image.Image:
    """Renders a scene as RGB [side, side]."""
    image = Image.new("RGB", (side, side), scene.background)
    pen = ImageDraw.Draw(image)
    for item in scene.items:
        left, top = (item.x - item.size) * side, (item.y - item.size) * side
        right, bottom = (item.x + item.size) * side, (item.y + item.size) * side
        colour = COLOURS[item.colour]
        if item.shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=colour)
        elif item.shape == "square":
            pen.rectangle((left, top, right, bottom), fill=colour)
        else:
            pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=colour)
    return image


def ask(scene: Scene, seed: int, index: int) -> dict[str, Any]:
    """One question about a scene: {question, answer, category, choices?}."""
    rng = np.random.default_rng([seed, index, 1])
    kind = rng.choice(["count", "colour", "exists"])
    if kind == "count":
        return {"question": "How many shapes are there?", "answer": str(len(scene.items)), "category": "count"}
    if kind == "colour":
        item = max(scene.items, key=lambda i: i.size)
        return {
            "question": "What colour is the largest shape?",
            "choices": list(COLOURS),
            "answer": item.colour,
            "category": "colour",
        }
    shape = str(rng.choice(SHAPES))
    present = any(item.shape == shape for item in scene.items)
    return {"question": f"Is there a {shape}?", "answer": "yes" if present else "no", "category": "exists"}


def write_questions(folder: Path, *, seed: int, count: int) -> Path:
    """Draws `count` scenes and writes them with a question each: folder/questions.jsonl and folder/images/."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        scene = make_scene(seed, index)
        draw(scene).save(folder / "images" / f"{index:05d}.png")
        lines.append(json.dumps({"id": str(index), "image": f"images/{index:05d}.png", **ask(scene, seed, index)}))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
