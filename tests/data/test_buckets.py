"""Batches of several lengths: the examples of the records, each in its bucket, and the same batches however they are read."""

import json
from collections import Counter
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from processes import run_processes
from test_pipeline import FIELDS, key, read_all, same
from tokenizers_for_tests import model_config
from transformers import AutoTokenizer

from converters.byte_tokenizer import write_byte_tokenizer
from lsg_jax.config import DataConfig
from lsg_jax.data.pipeline import TrainingData
from lsg_jax.data.processor import Processor
from lsg_jax.data.records import prepare_llava
from lsg_jax.errors import InputError

DATA = DataConfig(max_length=500, max_answer_tokens=16, buckets=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts of three sizes: 21 records, 28 examples."""
    folder = tmp_path_factory.mktemp("buckets")
    records = []
    for i in range(21):
        values = ["q" * (10, 130, 300)[i % 3] + str(i), f"a{i}"]
        values += ["and?", f"b{i}"] if i % 3 == 1 else []
        turns = [{"from": ("human", "gpt")[k % 2], "value": v} for k, v in enumerate(values)]
        records.append({"id": str(i), "conversations": turns})
    (folder / "r.json").write_text(json.dumps(records))
    prepare_llava(folder / "r.json", folder, folder / "records")
    write_byte_tokenizer(folder / "model")
    return folder


def opened(folder, data=DATA, *, batch_size=4, seed=0, epochs=2, **options):
    processor = Processor(AutoTokenizer.from_pretrained(folder / "model", local_files_only=True), model_config())
    return TrainingData(folder / "records", processor, data, batch_size=batch_size, seed=seed, epochs=epochs, **options)


@pytest.fixture
def make(folder):
    made = []

    def build(*args, **options):
        made.append(opened(folder, *args, **options))
        return made[-1]

    yield build
    for data in made:
        data.close()


@pytest.fixture(scope="module")
def alone(folder):
    """(batches of 4, states) of a single process."""
    data = opened(folder)
    batches, states = read_all(data)
    data.close()
    return batches, states


def length(batch):
    return batch.input_ids.shape[1]


def test_batches_are_short_and_hold_what_rows_of_full_length_do(make, alone, caplog):
    caplog.set_level("INFO")
    data, full = make(), make(replace(DATA, buckets=1))
    batches = alone[0]
    assert len(batches) == data.num_batches == full.num_batches
    assert 1 < len(data.lengths) <= 4 and {*map(length, batches)} == {*data.lengths} and full.lengths == (500,)
    masks = [batch.attention_mask for batch in batches]
    assert data.padding == pytest.approx(1 - sum(m.sum() for m in masks) / sum(m.size for m in masks)) and data.padding < 0.1
    of_one = 1 - sum(m.sum() for m in masks) / sum(m.shape[0] * 500 for m in masks)
    assert full.padding is None and of_one > 0.2
    named = ", ".join(map(str, data.lengths))
    said = f"{len(data.lengths)} lengths: {named}; {100 * data.padding:.1f} % padding, {100 * of_one:.1f} % at data.max_length"
    assert said in caplog.messages

    rows = {k: (b, i) for b in full for i, k in enumerate(key(b))}
    for batch in batches:
        for i, k in enumerate(key(batch)):
            other, j = rows[k]
            for name in ("input_ids", "attention_mask"):
                np.testing.assert_array_equal(getattr(batch, name)[i], getattr(other, name)[j, : length(batch)])
            assert not other.attention_mask[j, length(batch) :].any()
            for name in ("answer_index", "gate_position"):
                np.testing.assert_array_equal(getattr(batch, name)[i], getattr(other, name)[j])


@pytest.mark.parametrize("batch_size", [1, 3, 8, 28])
def test_every_example_is_trained_on_once_an_epoch(make, batch_size):
    times = Counter(k for batch in make(batch_size=batch_size, epochs=3) for k in key(batch))
    assert len(times) == 28 and max(times.values()) == 3
    assert 3 * 28 - times.total() == 3 * 28 % batch_size


def test_continues_exactly_after_any_step(make, alone):
    batches, states = alone
    data = make()
    for stop, state in enumerate(states):
        data.set_state(state)
        for batch, expected in zip(data, batches[stop:], strict=True):
            same(batch, expected)


def test_fewer_steps_are_the_first_of_all(make, alone):
    for steps in (1, 5):
        data = make(steps=steps)
        assert data.num_batches == steps
        for batch, expected in zip(data, alone[0][:steps], strict=True):
            same(batch, expected)


def test_parts_of_the_same_global_batches(make, alone):
    batches, states = alone
    for rows in ([0, 1], [2, 3], [1], [0, 1, 2, 3]):
        data = make(rows=rows)
        for step, batch in enumerate(data):
            assert length(batch) == length(batches[step]) and key(batch) == [key(batches[step])[row] for row in rows]
            assert step > 2 or data.get_state() == states[step + 1]


def test_another_number_of_buckets_is_refused(make, alone):
    state = alone[1][3]
    with pytest.raises(InputError, match=r"lengths is \[\d+, .*\d+\], here None"):
        make(replace(DATA, buckets=1)).set_state(state)
    with pytest.raises(InputError, match=r"lengths is \[\d+, .*\d+\], here \[\d+, \d+\]$"):
        make(replace(DATA, buckets=2)).set_state(state)


def test_one_length_keeps_the_order(make, monkeypatch):
    """Where one length is enough, it is that of the longest example; the batches are those of one bucket."""
    monkeypatch.setattr("lsg_jax.data.lengths.ENOUGH", 0.9)
    data = make()
    assert len(data.lengths) == 1
    for ours, theirs in zip(data, make(replace(DATA, buckets=1)), strict=True):
        assert key(ours) == key(theirs) and length(ours) == data.lengths[0] < 500 == length(theirs)


def test_whole_conversations(make):
    data = make(replace(DATA, conversations="whole"), epochs=1, batch_size=3)
    assert sorted(row for batch in data for row, _ in key(batch)) == list(range(21)) and len(data.lengths) > 1


WORKER = """
import json, sys
from pathlib import Path
sys.modules["torch"] = None  # transformers would import it, which takes seconds
import jax
import numpy as np
sys.path.insert(0, sys.argv[3])
from test_buckets import FIELDS, opened, read_all
from operator import attrgetter
from lsg_jax.config import MeshConfig
from lsg_jax.sharding import local_rows, make_mesh, place_rows

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
alone, positions = np.load(out / "alone.npz"), json.loads((out / "states.json").read_text())
for sizes in ((1, 4, 1), (2, 1, 2)):
    mesh = make_mesh(MeshConfig(*sizes))
    data = opened(folder, rows=local_rows(mesh, 4))
    batches, states = read_all(data)
    data.close()
    assert states == positions
    for step, batch in enumerate(batches):
        placed = place_rows(batch, mesh, 4)
        for field in FIELDS:
            for shard in attrgetter(field)(placed).addressable_shards:
                np.testing.assert_array_equal(shard.data, alone[f"{step}/{field}"][shard.index])
"""


def test_two_real_processes_hold_the_batches_of_one(alone, folder, tmp_path):
    batches, states = alone
    (tmp_path / "states.json").write_text(json.dumps(states))
    np.savez(
        tmp_path / "alone.npz", **{f"{s}/{field}": attrgetter(field)(b) for s, b in enumerate(batches) for field in FIELDS}
    )
    run_processes(WORKER, 2, devices_each=2, args=[folder, tmp_path, Path(__file__).parent], timeout=120)
