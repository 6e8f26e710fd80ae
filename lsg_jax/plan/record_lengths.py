"""The lengths of training batches that the records of a configuration give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lsg_jax.config import ModelConfig
from lsg_jax.data.lengths import choose_lengths, unit_of
from lsg_jax.data.processor import Processor
from lsg_jax.data.records import open_records
from lsg_jax.data.usable import usable_examples
from lsg_jax.errors import InputError
from lsg_jax.run_config import RunConfig


@dataclass(frozen=True)
class RecordLengths:
    """Lengths that examples are padded to, as `TrainingData` chooses them.

    Attributes:
        lengths: ascending.
        mean: of an example, padded.
        padding: share of padding in all positions.
    """

    lengths: tuple[int, ...]
    mean: float
    padding: float


def record_lengths(config: RunConfig, model: ModelConfig) -> RecordLengths | None:
    """Tokenizes the records; None with one bucket, or where there are no records, or no tokenizer in the model folder.

    Raises:
        InputError: no example is usable, or as `open_records` and `Processor.from_folder`.
    """
    data, tokenizer = config.data, Path(config.model) / "hf"
    if data.buckets == 1 or not data.records or not Path(data.records).is_dir() or not tokenizer.is_dir():
        return None
    processor = Processor.from_folder(tokenizer, model, template=data.template, image_aspect=data.image_aspect)
    usable = usable_examples(open_records(data.records, check=False), processor, data, lengths=True)
    tokens = usable.lengths
    if tokens is None or not len(tokens):
        raise InputError(f"{data.records}: no example is usable: {usable.dropped}")
    lengths = choose_lengths(tokens, max_length=data.max_length, most=data.buckets, unit=unit_of(data.max_length))
    mean = float(np.asarray(lengths)[np.searchsorted(lengths, tokens)].mean())
    return RecordLengths(lengths, mean, 1 - float(tokens.mean()) / mean)
