"""Folders that version 0.1 prepared. They hold no sizes of images; see fixtures/prepared_v0_1/make.py."""

import tarfile
from pathlib import Path

import pytest
from tokenizers_for_tests import model_config
from transformers import AutoTokenizer

from converters.byte_tokenizer import IMAGE, write_byte_tokenizer
from lsg_jax.config import DataConfig
from lsg_jax.data.clevr import open_clevr
from lsg_jax.data.conversation import Turn
from lsg_jax.data.pipeline import TrainingData
from lsg_jax.data.processor import Processor
from lsg_jax.data.records import open_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v0_1")
    with tarfile.open(Path(__file__).parents[1] / "fixtures/prepared_v0_1/prepared_v0_1.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_records(folder):
    rows = open_records(folder / "records")
    assert (rows.manifest.format, rows.manifest.report.rows, rows.changed_files()) == (1, 3, [])
    assert [rows[i].record_id for i in range(3)] == ["wide", "text", "tall"]
    assert [rows[i].image_sizes for i in range(3)] == [((40, 30),), (), ((7, 90),)]
    assert rows[2].turns == (Turn("human", "<image>\nAnd this?"), Turn("gpt", "Blue."))


def test_clevr(folder):
    rows = open_clevr(folder / "clevr")
    assert (rows.manifest.format, rows.manifest.report.split, rows.changed_files()) == (1, "val", [])
    assert [(rows[i].name, rows[i].image_size, rows[i].attributes["count"]) for i in range(2)] == [
        ("CLEVR_val_000000.png", (48, 32), 1),
        ("CLEVR_val_000001.png", (48, 32), 2),
    ]


def test_training(folder, tmp_path):
    write_byte_tokenizer(tmp_path)
    processor = Processor(AutoTokenizer.from_pretrained(tmp_path, local_files_only=True), model_config())
    data = TrainingData(folder / "records", processor, DataConfig(max_length=260), batch_size=3, seed=0, epochs=1)
    batch = next(data)
    data.close()
    assert dict(zip(batch.row_id.tolist(), (batch.input_ids == IMAGE).sum(1).tolist(), strict=True)) == {0: 4, 1: 0, 2: 4}
