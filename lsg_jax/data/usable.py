"""Which examples of prepared records are trained on, and how long they are."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lsg_jax.config import DataConfig
from lsg_jax.data.conversation import RecordError, examples
from lsg_jax.data.encoded import Encoded
from lsg_jax.data.processor import Processor
from lsg_jax.data.records import PreparedRecords, Record
from lsg_jax.data.rows import patches_of
from lsg_jax.data.sources import in_order

logger = logging.getLogger(__name__)

THREADS = 8  # that tokenize at the start; more would wait for the interpreter
SAY_EVERY = 30.0  # seconds


@dataclass(frozen=True)
class Usable:
    """The examples that have an answer token after truncation.

    Attributes:
        index: int32 [examples, 2], in the order of the records: row, and index of the answer in it (0 of whole conversations).
        lengths: int32 [examples], tokens of each after truncation; None if they were not asked for.
        dropped: number of the other examples by reason.
        truncated: number of examples whose answer was truncated.
        tiles: most tiles or native images of an example (S).
        patches: most patches of one of them (P).
    """

    index: np.ndarray
    lengths: np.ndarray | None
    dropped: dict[str, int]
    truncated: int
    tiles: int
    patches: int


@dataclass(frozen=True)
class _Checked:
    """One example of a row: `reason` where it is dropped; `length` 0 where it was not tokenized."""

    number: int
    length: int = 0
    truncated: bool = False
    tiles: int = 1
    patches: int = 0
    reason: str = ""


def usable_examples(records: PreparedRecords, processor: Processor, data: DataConfig, *, lengths: bool) -> Usable:
    """Checks the text of every example.

    Args:
        lengths: tokenize all, in threads; otherwise only those whose size leaves doubt.
    """
    rows = range(len(records))
    check = lambda row: _check(records[row], processor, data, lengths=lengths)
    each: Iterable[list[_Checked]] = in_order(check, rows, min(THREADS, os.cpu_count() or 1)) if lengths else map(check, rows)
    kept: list[tuple[int, int]] = []
    sizes: list[int] = []
    dropped: Counter[str] = Counter()
    truncated, tiles, patches = 0, 1, 0
    said = time.monotonic()
    for row, found in enumerate(each):
        for one in found:
            if one.reason:
                dropped[one.reason] += 1
                continue
            kept.append((row, one.number))
            sizes.append(one.length)
            truncated += one.truncated
            tiles, patches = max(tiles, one.tiles), max(patches, one.patches)
        if time.monotonic() > said + SAY_EVERY:
            said = time.monotonic()
            logger.info("%d of %d records are %s", row + 1, len(rows), "tokenized" if lengths else "checked")
    return Usable(
        index=np.asarray(kept, np.int32).reshape(-1, 2),
        lengths=np.asarray(sizes, np.int32) if lengths else None,
        dropped=dict(sorted(dropped.items())),
        truncated=truncated,
        tiles=tiles,
        patches=patches_of(patches, processor.model),
    )


def _check(record: Record, processor: Processor, data: DataConfig, *, lengths: bool) -> list[_Checked]:
    """Every example of a record."""
    found = []
    whole, sizes = data.conversations == "whole", record.image_sizes
    limits: dict[str, Any] = {"max_length": data.max_length, "max_answer_tokens": data.max_answer_tokens}
    for number, (prompt, answer) in enumerate(examples(record.turns)[: 1 if whole else None]):
        length, truncated = 0, False
        try:
            if whole or lengths or not processor.surely_fits(prompt, answer, image_sizes=sizes, **limits):
                encoded = encode_example(record, number, processor, data)
                length, truncated = len(encoded.ids), encoded.cut > 0
            shown = processor.shown(record.turns if whole else prompt, sizes)
        except RecordError as error:
            found.append(_Checked(number, reason=error.reason))
            continue
        layouts = processor.layouts(shown)
        tiles = sum(layout.tiles for layout in layouts)
        found.append(_Checked(number, length, truncated, tiles, processor.patches(layouts)))
    return found


def encode_example(record: Record, number: int, processor: Processor, data: DataConfig) -> Encoded:
    """Tokenizes one example of a record, the one with this index of an answer; a whole conversation where they stay whole.

    Raises:
        RecordError: those of `TextProcessor.encode` or `encode_conversation`.
    """
    limits: dict[str, Any] = {"max_length": data.max_length, "max_answer_tokens": data.max_answer_tokens}
    if data.conversations == "whole":
        return processor.encode_conversation(record.turns, image_sizes=record.image_sizes, **limits)
    prompt, answer = examples(record.turns)[number]
    return processor.encode(prompt, answer, image_sizes=record.image_sizes, **limits)
