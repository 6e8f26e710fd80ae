"""The log of a model's answers, appended batch by batch, from which an interrupted run resumes.

There is one file for each benchmark, method and set of settings (weights, gates, sinks, decoding, text template, files), so
answers under other settings are never reused. A line is `{"id", "prompt": sha256 of the prompt, "output"}`, with `ratios` if
there are gates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsg_jax.checkpoint.processes import is_primary, share_bytes
from lsg_jax.digest import text_sha256
from lsg_jax.eval.answering import Answer
from lsg_jax.eval.benchmark import Item
from lsg_jax.json_files import json_lines


class AnswerLog:
    """Answers to `items` under one set of settings. Process 0 reads and writes, and broadcasts what it reads.

    Args:
        folder: of the logs.
        name: benchmark and method, for the file name.
        meaning: everything that determines an answer besides item and prompt, as plain data.
    """

    def __init__(self, folder: Path, name: str, meaning: Mapping[str, Any], items: Sequence[Item], prompts: Sequence[str]):
        key = text_sha256(json.dumps(meaning, sort_keys=True))
        self.path = folder / f"{name}.{key[:16]}.jsonl"
        self._lines = [{"id": item.id, "prompt": text_sha256(prompt)} for item, prompt in zip(items, prompts, strict=True)]

    def known(self) -> dict[int, Answer]:
        """Answers of earlier runs by position. All processes must call it."""
        found: dict[str, tuple[str, list[list[float]] | None]] = {}
        if is_primary() and self.path.exists():
            position = {(line["id"], line["prompt"]): str(i) for i, line in enumerate(self._lines)}
            for _, text in json_lines(self.path):
                try:
                    line = json.loads(text)
                    found[position[line["id"], line["prompt"]]] = (line["output"], line.get("ratios"))
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a kill cut short, or a question that this run does not ask
        shared = json.loads(share_bytes(json.dumps(found).encode()))
        return {int(i): Answer(text, None if r is None else np.array(r, np.float32)) for i, (text, r) in shared.items()}

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Appends the answers of a batch by position."""
        if not is_primary():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps({**self._lines[i], **_plain(answer)}) + "\n" for i, answer in answers.items())
        with self.path.open("a", encoding="utf-8") as file:
            # The newline ends a line that a kill cut short, so that only that line is lost.
            file.write(text if file.tell() == 0 else "\n" + text)


def _plain(answer: Answer) -> dict[str, Any]:
    return {"output": answer.text} | ({} if answer.ratios is None else {"ratios": answer.ratios.tolist()})
