"""Prepared records -> a resumable stream of batches of one fixed shape (Grain)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsg_jax.config import DataConfig
from lsg_jax.config.ranges import Range
from lsg_jax.data.conversation import RecordError, examples
from lsg_jax.data.encoded import Encoded
from lsg_jax.data.processor import Processor
from lsg_jax.data.records import PreparedRecords, Record, open_records
from lsg_jax.data.rows import patches_of, to_batch
from lsg_jax.errors import InputError
from lsg_jax.types import Batch

logger = logging.getLogger(__name__)

_POSITION = "global_next_index"  # Grain's name: counts the examples of all processes


class TrainingData(Iterator[Batch]):
    """Training batches. Each epoch has every example once, in an order set by `seed`.

    A record with several answers gives one example per answer, or a single one with `data.conversations = "whole"`. The
    constructor checks the text of every example, and tokenizes it where its length leaves doubt. Examples that have no answer
    token after truncation are dropped there, the same ones in every run.

    The global batch does not depend on the number of processes or the mesh. Several processes may need the same rows of it.

    Batches hold uint8 pixels (zeros for text-only rows), with room for the most tiles of any example; T = `data.max_length`,
    A = `data.max_answer_tokens`, and B = `len(rows)`. `row_id` is the row in the prepared records.

    Args:
        batch_size: rows in the global batch.
        rows: the rows of it that this process reads, ascending (`sharding.local_rows`); all by default.

    Attributes:
        num_examples: examples per epoch.
        num_batches: batches over all epochs; an incomplete last batch is dropped.
        dropped: number of dropped examples by reason (`nothing_supervised`, `image_truncated`).
        truncated: number of examples whose answer was truncated to `max_length` or `max_answer_tokens`.
        digest: sha256 that identifies the records.
        tiles: tiles or native images of every row (S), as many as the row with most of them has.
        patches: patches of each of them (P), as many as the largest fills up.

    Raises:
        InputError: the records cannot be opened, no example is left, or the batch is larger than the set.
    """

    def __init__(
        self,
        records_path: str | Path,
        processor: Processor,
        data: DataConfig,
        *,
        batch_size: int,
        seed: int,
        epochs: int,
        rows: Sequence[int] | None = None,
    ):
        for name, value in (("batch_size", batch_size), ("epochs", epochs)):
            Range("[1, 1e6]").check(value, name, int)
        self._records = open_records(records_path)
        self._processor = processor
        self._data = data
        self._limits = {"max_length": data.max_length, "max_answer_tokens": data.max_answer_tokens}
        self._seed = seed
        self.digest = self._records.digest
        self.dropped: dict[str, int] = {}
        self.truncated = 0
        self.tiles, self.patches = 1, 0
        self._index = self._usable_examples()
        self.patches = patches_of(self.patches, processor.model)
        self.num_examples = len(self._index)
        if not self.num_examples:
            raise InputError(f"{records_path}: no example is usable: {self.left_out}")
        if batch_size > self.num_examples:
            also = f" ({self.left_out})" if self.dropped else ""
            raise InputError(f"batch of {batch_size} is larger than the {self.num_examples} examples of {records_path}{also}")
        if self.dropped:
            logger.warning("%s: %s", records_path, self.left_out)
        self.num_batches = self.num_examples * epochs // batch_size
        self._batch_size = batch_size
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self._iterator = self._grain_iterator(epochs)

    @property
    def left_out(self) -> str:
        """What is not trained on and why, in words."""
        count = sum(self.dropped.values())
        reasons = ", ".join(f"{reason} {number}" for reason, number in self.dropped.items())
        too_long = {"image_truncated", "nothing_supervised", "prompt_too_long"} & self.dropped.keys()
        advice = "; raise data.max_length" if too_long else ""
        return f"{count} of {count + self.num_examples} examples are left out ({reasons}){advice}"

    def _usable_examples(self) -> np.ndarray:
        """int32 [examples, 2], (row, index of the answer in the row; 0 with `whole`), in the order of the records."""
        kept: list[tuple[int, int]] = []
        dropped: Counter[str] = Counter()
        for row in range(len(self._records)):
            record = self._records[row]
            whole = self._data.conversations == "whole"
            for number, (prompt, answer) in enumerate(examples(record.turns)[: 1 if whole else None]):
                try:
                    sizes = record.image_sizes
                    if whole or not self._processor.surely_fits(prompt, answer, image_sizes=sizes, **self._limits):
                        self.truncated += self._encode(record, number).cut > 0
                    shown = self._processor.shown(record.turns if whole else prompt, sizes)
                except RecordError as error:
                    dropped[error.reason] += 1
                    continue
                kept.append((row, number))
                layouts = self._processor.layouts(shown)
                self.tiles = max(self.tiles, sum(layout.tiles for layout in layouts))
                self.patches = max(self.patches, self._processor.patches(layouts))
        self.dropped = dict(sorted(dropped.items()))
        return np.asarray(kept, np.int32).reshape(-1, 2)

    def _encode(self, record: Record, number: int) -> Encoded:
        if self._data.conversations == "whole":
            return self._processor.encode_conversation(record.turns, image_sizes=record.image_sizes, **self._limits)
        prompt, answer = examples(record.turns)[number]
        return self._processor.encode(prompt, answer, image_sizes=record.image_sizes, **self._limits)

    def _grain_iterator(self, epochs: int) -> Any:
        import grain

        here, size = len(self._rows), self._batch_size
        examples = grain.MapDataset.source(_Examples(self._records, self._index)).seed(self._seed).shuffle().repeat(epochs)
        order = grain.MapDataset.range(self.num_batches * here)
        dataset = order.map(lambda i: examples[int(i // here * size + self._rows[i % here])])
        # ElasticIterator could shard examples over processes, but would give each to only one. Its state is one integer.
        return iter(
            grain.experimental.ElasticIterator(
                dataset.map(self._row),
                here,
                grain.sharding.NoSharding(),
                read_options=grain.ReadOptions(
                    num_threads=self._data.num_threads, prefetch_buffer_size=max(self._data.prefetch, self._data.num_threads)
                ),
            )
        )

    def _row(self, item: tuple[PreparedRecords, int, int]) -> dict[str, np.ndarray]:
        records, row, number = item
        record = records[row]
        try:
            encoded = self._encode(record, number)
            shown = record.images[: len(encoded.image_sizes)]  # the others belong to later turns
            return self._processor.row(
                encoded,
                self._processor.all_pixels(shown),
                tiles=self.tiles,
                patches=self.patches,
                max_length=self._data.max_length,
                max_answer_tokens=self._data.max_answer_tokens,
                row_id=row,
            )
        except (InputError, RecordError) as error:
            raise InputError(f"row {row} (record {record.record_id}): {error}") from None

    def __next__(self) -> Batch:
        return to_batch(next(self._iterator))

    def get_state(self) -> dict[str, Any]:
        """The position of the next batch, as JSON-able data. It is equal on all processes and valid for any number of them."""
        batches = self._iterator.get_state()[_POSITION] // len(self._rows)
        return {_POSITION: batches * self._batch_size, **self._identity()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position from `get_state`.

        Raises:
            InputError: the position belongs to other records, another seed or other limits.
        """
        for name, own in self._identity().items():
            if state.get(name) != own:
                raise InputError(f"data position of another run: {name} is {state.get(name)!r}, here {own!r}")
        self._iterator.set_state({_POSITION: state[_POSITION] // self._batch_size * len(self._rows)})

    def _identity(self) -> dict[str, Any]:
        """What must match for a position to be valid."""
        return {"digest": self.digest, "num_examples": self.num_examples, "seed": self._seed}

    def close(self) -> None:
        """Stops the reader threads."""
        self._iterator.close()


class _Examples:
    """Grain's random-access source of (records, row, index of the answer). It is cheap: `map` reads the records."""

    def __init__(self, records: PreparedRecords, index: np.ndarray):
        self._records = records
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, position: int) -> tuple[PreparedRecords, int, int]:
        row, number = self._index[position].tolist()
        return self._records, row, number
