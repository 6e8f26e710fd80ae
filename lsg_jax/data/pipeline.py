"""Prepared records -> a resumable stream of batches of few shapes (Grain)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lsg_jax.config import DataConfig
from lsg_jax.config.ranges import Range
from lsg_jax.data.conversation import RecordError
from lsg_jax.data.lengths import arrange, choose_lengths, unit_of
from lsg_jax.data.processor import Processor
from lsg_jax.data.records import open_records
from lsg_jax.data.rows import to_batch
from lsg_jax.data.usable import encode_example, usable_examples
from lsg_jax.errors import InputError
from lsg_jax.types import Batch

logger = logging.getLogger(__name__)

_POSITION = "global_next_index"  # Grain's name: counts the examples of all processes


Place: TypeAlias = Callable[[int, int], tuple[int, int]]
"""(number of a batch, row in it) -> the example there, and the length that the batch is padded to."""


class TrainingData(Iterator[Batch]):
    """Training batches. Each epoch has every example once, in an order set by `seed`.

    A record with several answers gives one example per answer, or a single one with `data.conversations = "whole"`. The
    constructor checks the text of every example, and tokenizes it where its length leaves doubt. Examples that have no answer
    token after truncation are dropped there, the same ones in every run.

    With several `data.buckets` the constructor tokenizes all examples and chooses the lengths (`data/lengths.py`). An example
    whose turn has come waits until its bucket fills a batch, past the end of an epoch too. At the end of the last epoch, those
    that still wait make batches across buckets.

    The global batch does not depend on the number of processes or the mesh. Several processes may need the same rows of it.

    Batches hold uint8 pixels (zeros for text-only rows), with room for the most tiles of any example; T is one of `lengths`,
    A = `data.max_answer_tokens`, and B = `len(rows)`. `row_id` is the row in the prepared records.

    Args:
        batch_size: rows in the global batch.
        steps: batches that are read at most; None for those of all epochs.
        rows: the rows of it that this process reads, ascending (`sharding.local_rows`); all by default.

    Attributes:
        num_examples: examples per epoch.
        num_batches: batches in all; an incomplete last batch is dropped.
        lengths: ascending; `data.max_length` alone with one bucket.
        padding: share of padding in the positions of all batches; None with one bucket, as lengths are not known then.
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
        steps: int | None = None,
        rows: Sequence[int] | None = None,
    ):
        for name, value in (("batch_size", batch_size), ("epochs", epochs)):
            Range("[1, 1e6]").check(value, name, int)
        self._records = open_records(records_path)
        self._processor = processor
        self._data = data
        self._seed = seed
        self.digest = self._records.digest
        usable = usable_examples(self._records, processor, data, lengths=data.buckets > 1)
        self._index, self.dropped, self.truncated = usable.index, usable.dropped, usable.truncated
        self.tiles, self.patches = usable.tiles, usable.patches
        self.num_examples = len(self._index)
        if not self.num_examples:
            raise InputError(f"{records_path}: no example is usable: {self.left_out}")
        if batch_size > self.num_examples:
            also = f" ({self.left_out})" if self.dropped else ""
            raise InputError(
                f"batch of {batch_size} is larger than the {self.num_examples} examples of {records_path}{also}; "
                f"set train.batch_size to {self.num_examples} or less"
            )
        if self.dropped:
            logger.warning("%s: %s", records_path, self.left_out)
        self.num_batches = min(self.num_examples * epochs // batch_size, steps or self.num_examples * epochs)
        self._batch_size = batch_size
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self.lengths: tuple[int, ...] = (data.max_length,)
        self.padding: float | None = None
        place = self._in_order(epochs) if usable.lengths is None else self._in_buckets(epochs, usable.lengths)
        self._iterator = self._grain_iterator(place)

    @property
    def left_out(self) -> str:
        """What is not trained on and why, in words."""
        count = sum(self.dropped.values())
        reasons = ", ".join(f"{reason} {number}" for reason, number in self.dropped.items())
        too_long = {"image_truncated", "nothing_supervised", "prompt_too_long"} & self.dropped.keys()
        advice = "; raise data.max_length" if too_long else ""
        return f"{count} of {count + self.num_examples} examples are left out ({reasons}){advice}"

    def _order(self, epochs: int) -> Any:
        """The examples of all epochs, by their place in the order."""
        import grain

        return grain.MapDataset.range(self.num_examples).seed(self._seed).shuffle().repeat(epochs)

    def _in_order(self, epochs: int) -> Place:
        order, size, length = self._order(epochs), self._batch_size, self._data.max_length
        return lambda batch, row: (order[batch * size + row], length)

    def _in_buckets(self, epochs: int, tokens: np.ndarray) -> Place:
        """Chooses the lengths and arranges the batches.

        Args:
            tokens: int32 [examples].
        """
        longest, size = self._data.max_length, self._batch_size
        self.lengths = choose_lengths(tokens, max_length=longest, most=self._data.buckets, unit=unit_of(longest))
        order, waiting = self._order(epochs), len(self.lengths) * (size - 1)
        count = min(len(order), self.num_batches * size + waiting)
        read = np.fromiter((order[place] for place in range(count)), np.int64, count)
        table, buckets = arrange(read, np.searchsorted(self.lengths, tokens), size, ends=count == len(order))
        table, length = table[: self.num_batches], np.asarray(self.lengths)[buckets[: self.num_batches]]
        share = lambda held, positions: 1 - int(held.sum(dtype=np.int64)) / max(1, int(positions))
        padding, of_one = share(tokens[table], size * length.sum(dtype=np.int64)), share(tokens[table], table.size * longest)
        chosen = f"{len(self.lengths)} length{'s' * (len(self.lengths) > 1)}: {', '.join(map(str, self.lengths))}"
        logger.info("%s; %.1f %% padding, %.1f %% at data.max_length", chosen, 100 * padding, 100 * of_one)
        self.padding = padding
        return lambda batch, row: (int(table[batch, row]), int(length[batch]))

    def _grain_iterator(self, place: Place) -> Any:
        import grain

        here = len(self._rows)
        order = grain.MapDataset.range(self.num_batches * here)
        # ElasticIterator could shard examples over processes, but would give each to only one. Its state is one integer.
        return iter(
            grain.experimental.ElasticIterator(
                order.map(lambda i: self._row(*place(int(i // here), self._rows[i % here]))),
                here,
                grain.sharding.NoSharding(),
                read_options=grain.ReadOptions(
                    num_threads=self._data.num_threads, prefetch_buffer_size=max(self._data.prefetch, self._data.num_threads)
                ),
            )
        )

    def _row(self, example: int, length: int) -> dict[str, np.ndarray]:
        row, number = self._index[example].tolist()
        record = self._records[row]
        try:
            encoded = encode_example(record, number, self._processor, self._data)
            shown = record.images[: len(encoded.image_sizes)]  # the others belong to later turns
            return self._processor.row(
                encoded,
                self._processor.all_pixels(shown),
                tiles=self.tiles,
                patches=self.patches,
                max_length=length,
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
        own = self._identity()
        for name in sorted((own.keys() | state.keys()) - {_POSITION}):
            if state.get(name) != own.get(name):
                raise InputError(f"data position of another run: {name} is {state.get(name)!r}, here {own.get(name)!r}")
        self._iterator.set_state({_POSITION: state[_POSITION] // self._batch_size * len(self._rows)})

    def _identity(self) -> dict[str, Any]:
        """What must match for a position to be valid."""
        chosen = {"lengths": list(self.lengths)} if self._data.buckets > 1 else {}
        return {"digest": self.digest, "num_examples": self.num_examples, "seed": self._seed, **chosen}

    def close(self) -> None:
        """Stops the reader threads."""
        self._iterator.close()
