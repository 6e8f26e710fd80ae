"""Runs question files through a model, base and gated, and keeps every raw output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lsg_jax.checkpoint.files import write_json
from lsg_jax.config import EvalConfig, to_dict
from lsg_jax.data.conversation import RecordError
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmarks.questions import Question, aggregate, is_correct, majority, read_questions
from lsg_jax.vlm import PROMPT_BUCKET, VLM

Progress = Callable[[str, int, int], None]

RESULT = "result.json"


def evaluate(vlm: VLM, config: EvalConfig, out: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Answers every question of `config.benchmarks`, ungated and, where the model has gates, gated.

    Writes `out/<name>.<base|gated>.jsonl` (a line a question: prompt, output, answers, correct) and `out/result.json`.

    Args:
        progress: called with (what, done, total).

    Returns:
        What result.json holds: settings, and accuracies in percent for each benchmark and method.

    Raises:
        InputError: no benchmarks, or a file that is none; raised before anything is computed.
    """
    if not config.benchmarks:
        raise InputError("nothing to evaluate: give --benchmark NAME=FILE, or [eval.benchmarks] in the configuration")
    files = {name: Path(path) for name, path in config.benchmarks.items()}
    questions = {name: read_questions(path) for name, path in files.items()}
    methods = {"base": vlm.ungated(), **({"gated": vlm} if vlm.gates is not None else {})}
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "format": "lsg-eval-1",
        "model": vlm.folder.name if vlm.folder else None,
        "backbone": vlm.digest,
        "gate": to_dict(vlm.gate) if vlm.gate else None,
        "sinks": to_dict(vlm.config.sinks),
        "settings": {k: v for k, v in to_dict(config).items() if k != "benchmarks"} | {"decoding": "greedy"},
        "benchmarks": {},
    }
    for name, items in questions.items():
        prompts = hashlib.sha256("\0".join(q.prompt for q in items).encode()).hexdigest()
        entry: dict[str, Any] = {
            "file": str(files[name]),
            "sha256": hashlib.sha256(files[name].read_bytes()).hexdigest(),
            "prompts_sha256": prompts,
            "majority": majority(items),
        }
        for method, model in methods.items():
            report = (lambda done, total, what=f"{name} {method}": progress(what, done, total)) if progress else None
            outputs = answer(model, items, config, progress=report)
            correct = [is_correct(q, text) for q, text in zip(items, outputs, strict=True)]
            _write_outputs(out / f"{name}.{method}.jsonl", items, outputs, correct)
            entry[method] = aggregate(items, correct)
        result["benchmarks"][name] = entry
    write_json(out / RESULT, result)
    return result


def answer(
    vlm: VLM, questions: list[Question], config: EvalConfig, *, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Greedy answers, in the order of the questions.

    Questions are batched by length, so that few shapes compile; the last batch of a length is filled up with repeats.
    """
    processor = vlm.make_processor(config.image_aspect, config.template)
    encoded = []
    for q in questions:
        try:
            encoded.append(processor.encode_question(q.prompt, has_image=q.image is not None, max_length=config.max_length))
        except RecordError as error:
            raise InputError(f"question {q.id}: {error}") from None
    buckets: dict[int, list[int]] = {}
    for i, e in enumerate(encoded):
        buckets.setdefault(-(-len(e.ids) // PROMPT_BUCKET), []).append(i)
    outputs: dict[int, str] = {}
    for bucket in sorted(buckets):
        members = buckets[bucket]
        for start in range(0, len(members), config.batch_size):
            chosen = members[start : start + config.batch_size]
            filled = [*chosen, *[chosen[0]] * (config.batch_size - len(chosen))]
            images = {i: questions[i].image for i in chosen}
            pixels = {i: None if path is None else processor.pixels(path) for i, path in images.items()}
            batch = vlm.pad_questions([encoded[i] for i in filled], [pixels[i] for i in filled])
            tokens = vlm.generate_batch(batch, config.max_new_tokens)
            outputs.update({i: processor.decode(row) for i, row in zip(chosen, tokens, strict=False)})
            if progress:
                progress(len(outputs), len(questions))
    return [outputs[i] for i in range(len(questions))]


def _write_outputs(path: Path, questions: list[Question], outputs: list[str], correct: list[bool]) -> None:
    lines = [
        json.dumps(
            {"id": q.id, "category": q.category, "prompt": q.prompt, "output": text, "answers": q.answers, "correct": hit}
        )
        for q, text, hit in zip(questions, outputs, correct, strict=True)
    ]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """The accuracies as plain text, one line a benchmark and category."""
    rows: list[tuple[str, ...]] = [("benchmark", "n", "majority", "base", "gated", "change")]
    for name, entry in result["benchmarks"].items():
        base, gated = entry["base"], entry.get("gated")
        rows.append(_row(name, base, gated, f"{entry['majority']['accuracy']:.2f}"))
        for category, part in base.get("categories", {}).items():
            rows.append(_row(f"  {category}", part, gated["categories"][category] if gated else None, ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def _row(name: str, base: dict, gated: dict | None, majority_text: str) -> tuple[str, ...]:
    change = "" if gated is None else f"{gated['accuracy'] - base['accuracy']:+.2f}"
    after = "" if gated is None else f"{gated['accuracy']:.2f}"
    return name, str(base["count"]), majority_text, f"{base['accuracy']:.2f}", after, change
