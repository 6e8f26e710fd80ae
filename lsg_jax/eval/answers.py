"""The log of a model's answers, appended batch by batch, from which an interrupted run resumes.

There is one file for each benchmark, method and set of settings (weights, gates, sinks, decoding, text template, tokenizer,
image settings, versions; `identity.meaning_of`), so answers under other settings are never reused. A line is `{"id",
"question": sha256 of the prompt and the images, "output"}`, with `ratios` if there are gates, and a checksum.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsg_jax.checkpoint.processes import is_primary, on_primary, share_bytes
from lsg_jax.digest import json_sha256
from lsg_jax.errors import InputError
from lsg_jax.eval.answering import Answer
from lsg_jax.eval.benchmark import Item
from lsg_jax.eval.identity import question_sha256
from lsg_jax.files import naming
from lsg_jax.json_files import sealed_line, sealed_lines

logger = logging.getLogger(__name__)


class AnswerLog:
    """Answers to `items` under one set of settings. Process 0 reads and writes, and broadcasts what it reads.

    Args:
        folder: of the logs.
        name: benchmark and method, for the file name.
        meaning: everything that determines an answer besides its question, as plain data.
        prompts: of each item.
    """

    def __init__(self, folder: Path, name: str, meaning: Mapping[str, Any], items: Sequence[Item], prompts: Sequence[str]):
        key = json_sha256(meaning)
        self.path = folder / f"{name}.{key[:16]}.jsonl"
        self._log = self.path.name
        self._asked = list(zip(items, prompts, strict=True))

    def known(self) -> dict[int, Answer]:
        """Answers of earlier runs by position. All processes must call it.

        A damaged line does not count, nor does one about other images.
        """
        shared = json.loads(share_bytes(json.dumps(on_primary(self._read) or {}).encode()))
        return {int(i): Answer(text, None if r is None else np.array(r, np.float32)) for i, (text, r) in shared.items()}

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Appends the answers of a batch by position."""
        if not is_primary():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(sealed_line({**self._line(i), **_plain(answer)}, self._log) for i, answer in answers.items())
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            # The newline ends a line that a kill cut short, so that only that line is lost.
            file.write(text if file.tell() == 0 else "\n" + text)

    def _read(self) -> dict[str, tuple[str, list[list[float]] | None]]:
        if not self.path.exists():
            return {}
        lines, damaged = sealed_lines(self.path, self._log)
        if damaged:
            logger.warning("%s: %d damaged lines left out; their questions are asked again", self.path, damaged)
        position = {item.id: i for i, (item, _) in enumerate(self._asked)}
        latest = {(line["id"], line["question"]): line for line in lines if line["id"] in position}
        found = {}
        for (name, question), line in latest.items():
            if question == self._question(position[name]):
                found[str(position[name])] = (line["output"], line.get("ratios"))
        return found

    def _question(self, position: int) -> str | None:
        """See `question_sha256`; None if an image cannot be read. Asking the question then says so."""
        try:
            return question_sha256(*self._asked[position])
        except InputError:
            return None

    def _line(self, position: int) -> dict[str, Any]:
        item, prompt = self._asked[position]
        return {"id": item.id, "question": question_sha256(item, prompt)}


def _plain(answer: Answer) -> dict[str, Any]:
    return {"output": answer.text} | ({} if answer.ratios is None else {"ratios": answer.ratios.tolist()})
