"""RealWorldQA (xAI, 2024): 765 questions, in the layout of `xai-org/RealworldQA` and `lmms-lab/RealWorldQA`.

Some questions list choices and are answered by a letter, others by a word or number; each ends in its own instruction, so
no protocol adds one. VLMEvalKit uses a rewritten file in which some choices are missing, so it has no rules here.
"""

from __future__ import annotations

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import Row, read_rows
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, by, mean
from lsg_jax.eval.letters import cambrian_text, chosen_letter, letter_match, lmms_letter


def read(path: str) -> list[Item]:
    """Items with field `kind`, letter or short; the position in the file is the id."""
    rows = read_rows(path, needs=("question", "answer"), images=("image",))
    return [_item(row, number) for number, row in enumerate(rows)]


def _item(row: Row, number: int) -> Item:
    answer = row.label("answer").strip()
    if not answer:
        raise InputError(f"{row.where}: no answer")
    kind = "letter" if answer.upper() in ("A", "B", "C", "D") else "short"
    return Item(
        id=str(number),
        question=row.text("question"),
        answers=(answer.upper() if kind == "letter" else answer,),
        images=row.images(),
        fields={"kind": kind},
    )


def prompt(item: Item, protocol: Protocol) -> str:
    """The question with the instruction that is part of it."""
    return item.question if protocol == "cambrian" else item.question.strip()


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """A letter as the protocol reads it; a short answer must be equal up to case and a final period."""
    if protocol == "cambrian":  # one word, whatever the kind: `B` is right, `B. Yes` and `(B)` are not
        words = cambrian_text(output).rstrip(".").split()
        return Match(words[0] if words else None, float(words[:1] == [item.answers[0].lower()]))
    if item.fields["kind"] == "letter":
        return letter_match(item, lmms_letter(output) if protocol == "lmms_eval" else chosen_letter(output, 4))
    text = output.lower().strip().rstrip(".")
    return Match(text, float(text == item.answers[0].lower()))


def metrics(graded: Graded) -> Metrics:
    """Accuracy, over all questions and by kind of answer."""
    return {"accuracy": mean(graded), **{f"kind: {name}": value for name, value in by(graded, "kind").items()}}


REALWORLDQA = Benchmark(
    name="realworldqa",
    kind="general",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    task="kind",
    official=dict.fromkeys(("paper", "lmms_eval", "cambrian"), "accuracy"),
    size=765,
    guess_by="kind",
    max_new_tokens={"lmms_eval": 16, "cambrian": 512},
)
