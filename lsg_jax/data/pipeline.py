"""Prepared records -> a resumable stream of batches of one fixed shape (Grain)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lsg_jax.config import DataConfig
from lsg_jax.data.conversation import RecordError, examples
from lsg_jax.data.processor import Encoded, Processor
from lsg_jax.data.records import RandomAccess, open_records
from lsg_jax.errors import InputError
from lsg_jax.types import Batch


class TrainingData(Iterator[Batch]):
    """Training batches of this process; all processes together see each example once an epoch, in an order set by `seed`.

    A row with several answers gives one example per answer. All text is looked at once at construction, and tokenised where its
    length leaves doubt, so that examples without any answer token after truncation are left out before the first step, the
    same ones in every run.

    The global batch is the same for any number of processes: process r holds the r-th block of its rows.

    Batches hold uint8 pixels (black for rows of text only), T = `data.max_length`, A = `data.max_answer_tokens`, and
    B = `batch_size` divided by the number of processes. `row_id` is the row in the prepared records.

    Attributes:
        num_examples: examples of an epoch.
        num_batches: batches over all epochs; examples that do not fill the very last batch are left out.
        dropped: examples left out by reason (`nothing_supervised`, `image_truncated`).
        truncated: examples that are kept but whose answer was cut at `max_length` or `max_answer_tokens`.
        digest: sha256 that identifies the records.

    Raises:
        InputError: the records cannot be opened, no example is left, the batch is larger than the set, or it cannot be divided
            among the processes.
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
    ):
        if batch_size < 1 or epochs < 1:
            raise InputError(f"batch size {batch_size} and {epochs} epochs: both must be at least 1")
        self._records = open_records(records_path)
        self._processor = processor
        self._data = data
        self._limits = {"max_length": data.max_length, "max_answer_tokens": data.max_answer_tokens}
        self._seed = seed
        self.digest = self._records.digest
        self.dropped: dict[str, int] = {}
        self.truncated = 0
        self._index = self._usable_examples()
        self.num_examples = len(self._index)
        if not self.num_examples:
            raise InputError(f"{records_path}: none of the {sum(self.dropped.values())} examples is usable: {self.dropped}")
        if batch_size > self.num_examples:
            raise InputError(f"batch of {batch_size} is larger than the {self.num_examples} examples of {records_path}")
        self.num_batches = self.num_examples * epochs // batch_size
        self._iterator = self._grain_iterator(batch_size, epochs)

    def _usable_examples(self) -> np.ndarray:
        """int32 [examples, 2], (row, number of the answer within it), in the order of the records."""
        kept: list[tuple[int, int]] = []
        dropped: Counter[str] = Counter()
        for row in range(len(self._records)):
            record = self._records[row]
            for number, (prompt, answer) in enumerate(examples(record["turns"])):
                try:
                    if not self._processor.surely_fits(prompt, answer, **self._limits):
                        self.truncated += self._encode(record, number).cut > 0
                except RecordError as error:
                    dropped[error.reason] += 1
                    continue
                kept.append((row, number))
        self.dropped = dict(sorted(dropped.items()))
        return np.asarray(kept, np.int32).reshape(-1, 2)

    def _encode(self, record: dict[str, Any], number: int) -> Encoded:
        prompt, answer = examples(record["turns"])[number]
        return self._processor.encode(prompt, answer, **self._limits)

    def _grain_iterator(self, batch_size: int, epochs: int) -> Any:
        import grain
        import jax

        processes = jax.process_count()
        if batch_size % processes:
            raise InputError(f"batch of {batch_size} cannot be divided among {processes} processes")
        examples = grain.MapDataset.source(_Examples(self._records, self._index)).seed(self._seed).shuffle().repeat(epochs)
        # ElasticIterator gives process r the items r, r + processes, ...: dealt so, they are the r-th block of the batch.
        dealt = np.arange(batch_size).reshape(processes, -1).T.ravel()
        order = grain.MapDataset.range(self.num_batches * batch_size)
        dataset = order.map(lambda i: examples[int(i - i % batch_size + dealt[i % batch_size])])
        # Batched by ElasticIterator itself: its state is one integer, the same for any number of processes.
        return iter(
            grain.experimental.ElasticIterator(
                dataset.map(self._row),
                batch_size,
                grain.sharding.ShardByJaxProcess(drop_remainder=True),
                read_options=grain.ReadOptions(
                    num_threads=self._data.num_threads, prefetch_buffer_size=max(self._data.prefetch, self._data.num_threads)
                ),
            )
        )

    def _row(self, item: tuple[RandomAccess, int, int]) -> dict[str, np.ndarray]:
        records, row, number = item
        record = records[row]
        try:
            pixels = self._processor.pixels(record["image"]) if record["image"] else None
            return self._processor.row(
                self._encode(record, number),
                pixels,
                max_length=self._data.max_length,
                max_answer_tokens=self._data.max_answer_tokens,
                row_id=row,
            )
        except (InputError, RecordError) as error:
            raise InputError(f"row {row} (record {record['record_id']}): {error}") from None

    def __next__(self) -> Batch:
        return Batch(**next(self._iterator))

    def get_state(self) -> dict[str, Any]:
        """Position as JSON-able data: what the next batch is. Equal on all processes, and valid for another number of them."""
        return {
            **self._iterator.get_state(),
            "digest": self.digest,
            "num_examples": self.num_examples,
            "seed": self._seed,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position that `get_state` gave.

        Raises:
            InputError: the position belongs to other records, another seed or other limits.
        """
        own = self.get_state()
        for name in ("digest", "num_examples", "seed"):
            if state.get(name) != own[name]:
                raise InputError(f"data position of another run: {name} is {state.get(name)!r}, here {own[name]!r}")
        self._iterator.set_state({k: v for k, v in state.items() if k not in ("digest", "num_examples", "seed")})

    def close(self) -> None:
        """Stops the reading threads."""
        self._iterator.close()


class _Examples:
    """Random access to (records, row, number of the answer), as Grain wants it; cheap, since `map` does the work."""

    def __init__(self, records: RandomAccess, index: np.ndarray):
        self._records = records
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, position: int) -> tuple[RandomAccess, int, int]:
        row, number = self._index[position].tolist()
        return self._records, row, number
