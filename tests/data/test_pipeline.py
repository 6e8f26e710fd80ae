import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tokenizers_for_tests import model_config
from transformers import AutoTokenizer

from lsg_jax.config import DataConfig
from lsg_jax.data.byte_tokenizer import EOS, IMAGE, write_byte_tokenizer
from lsg_jax.data.pipeline import TrainingData
from lsg_jax.data.processor import Processor
from lsg_jax.data.records import open_records, prepare_llava
from lsg_jax.errors import InputError

DATA = DataConfig(max_length=260, max_answer_tokens=8)
LONG = "x" * 200


def write_records(folder: Path) -> None:
    """9 rows with 12 answers: two of row 3 are too far back, row 4 has no image, row 5 a long answer."""
    (folder / "images").mkdir()
    records = []
    for i in range(9):
        Image.new("RGB", (30, 20), (i * 20, 0, 0)).save(folder / f"images/{i}.png")
        values = [f"<image>\nq{i}", f"a{i}"]
        if i == 3:
            values += [LONG, "b", "and?", "c"]
        if i == 4:
            values[0] = "q4"
        if i == 5:
            values[1] = "far more than eight tokens"
        if i == 6:
            values += ["q", "d6"]
        turns = [{"from": ("human", "gpt")[k % 2], "value": v} for k, v in enumerate(values)]
        records.append({"id": f"id{i}", "conversations": turns, **({} if i == 4 else {"image": f"{i}.png"})})
    (folder / "r.json").write_text(json.dumps(records))
    prepare_llava(folder / "r.json", folder / "images", folder / "records")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_records(folder)
    write_byte_tokenizer(folder / "model")
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return Processor(AutoTokenizer.from_pretrained(folder / "model", local_files_only=True), model_config())


@pytest.fixture
def make(folder, processor):
    made = []

    def build(data=DATA, *, batch_size=3, seed=0, epochs=2):
        made.append(TrainingData(folder / "records", processor, data, batch_size=batch_size, seed=seed, epochs=epochs))
        return made[-1]

    yield build
    for data in made:
        data.close()


def key(batch):
    """(row, answer text ids) of each example."""
    return [(int(r), tuple(t[t != -100].tolist())) for r, t in zip(batch.row_id, batch.answer_target, strict=True)]


def same(a, b):
    for name in ("input_ids", "attention_mask", "pixels", "gate_position", "answer_index", "answer_target", "row_id"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_batches_hold_the_records(make, folder, processor):
    data = make()
    assert (data.num_examples, data.num_batches, data.truncated) == (10, 6, 1)
    assert data.dropped == {"nothing_supervised": 2}
    batches = list(data)
    assert len(batches) == data.num_batches
    rows = open_records(folder / "records")
    for batch in batches:
        assert batch.input_ids.shape == batch.attention_mask.shape == (3, 260)
        assert batch.pixels.shape == (3, 28, 28, 3) and batch.pixels.dtype == np.uint8
        assert batch.answer_index.shape == batch.answer_target.shape == (3, 8)
        for b, row in enumerate(batch.row_id):
            tokens = batch.input_ids[b][batch.attention_mask[b]]
            assert (tokens == IMAGE).sum() == (0 if row == 4 else 4)
            expected = processor.blank if row == 4 else processor.pixels(rows[int(row)]["image"])
            np.testing.assert_array_equal(batch.pixels[b], expected)
            answer = processor.decode(batch.answer_target[b][batch.answer_target[b] != -100])
            assert answer == {5: "far mor"}.get(int(row), f"a{row}") or (row == 6 and answer == "d6")
            used = batch.answer_target[b] != -100
            assert batch.input_ids[b][batch.answer_index[b][used] + 1].tolist() == batch.answer_target[b][used].tolist()
            assert (batch.answer_target[b][used][-1] == EOS) == (row != 5)


def test_each_example_once_an_epoch_and_another_order_each(make):
    seen = [k for batch in make(batch_size=5) for k in key(batch)]
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) and len(set(first)) == 10
    assert first != second
    assert sorted(r for r, _ in first) == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8]


def test_order_follows_the_seed(make):
    orders = [[key(b) for b in make(seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("stop", range(7))
def test_continues_exactly_after_any_step(make, stop):
    whole = list(make())
    data = make()
    for _ in range(stop):
        next(data)
    state = json.loads(json.dumps(data.get_state()))
    again = make()
    again.set_state(state)
    rest = list(again)
    assert len(rest) == len(whole) - stop
    for a, b in zip(rest, whole[stop:], strict=True):
        same(a, b)


def test_state_goes_back_within_one_object(make):
    data = make()
    state = data.get_state()
    first = [next(data) for _ in range(4)]
    data.set_state(state)
    for batch in first:
        same(next(data), batch)


def test_state_of_another_run_is_refused(make):
    state = make(seed=1).get_state()
    with pytest.raises(InputError, match="seed is 1, here 0"):
        make().set_state(state)
    with pytest.raises(InputError, match="digest is 'x'"):
        make().set_state({**make().get_state(), "digest": "x"})
    with pytest.raises(InputError, match="num_examples is 11, here 10"):
        make().set_state({**make().get_state(), "num_examples": 11})


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (DATA, {"batch_size": 11}, "batch of 11 is larger than the 10 examples"),
        (DATA, {"batch_size": 0}, "batch size 0"),
        (DATA, {"epochs": 0}, "0 epochs"),
        (DataConfig(max_length=20), {}, r"none of the 12 examples is usable: .*'image_truncated': 11"),
    ],
)
def test_impossible_settings(make, data, options, message):
    with pytest.raises(InputError, match=message):
        make(data, **options)


def test_missing_records(tmp_path, processor):
    with pytest.raises(InputError, match="no prepared records"):
        TrainingData(tmp_path, processor, DATA, batch_size=1, seed=0, epochs=1)


def test_a_row_that_cannot_be_read_is_named(make, monkeypatch):
    data = make(batch_size=10, epochs=1)

    def fail(self, image):
        raise InputError("image: broken image file")

    monkeypatch.setattr(Processor, "pixels", fail)
    with pytest.raises(InputError, match=r"row \d \(record id\d\): image: broken"):
        next(data)


def test_digest_identifies_the_records(make, folder):
    assert make().digest == open_records(folder / "records").digest
    assert len(make().digest) == 64


@pytest.mark.parametrize("hosts", [2, 4])
def test_processes_share_the_same_global_batches(make, monkeypatch, hosts):
    """Each process in turn, with JAX telling it its rank; then one process goes on where several stopped."""
    alone = list(make(batch_size=4))
    parts, states = [], []
    for rank in range(hosts):
        monkeypatch.setattr(jax, "process_count", lambda: hosts)
        monkeypatch.setattr(jax, "process_index", lambda rank=rank: rank)
        data = make(batch_size=4)
        parts.append([key(next(data)) for _ in range(2)])
        states.append(data.get_state())
        parts[-1] += [key(batch) for batch in data]
    assert all(len(part) == len(alone) == 5 for part in parts)
    for step, batch in enumerate(alone):
        together = [example for part in parts for example in part[step]]
        assert len(together) == 4 and sorted(together) == sorted(key(batch))
    assert all(state == states[0] for state in states)
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    resumed = make(batch_size=4)
    resumed.set_state(states[0])
    for batch, expected in zip(resumed, alone[2:], strict=True):
        same(batch, expected)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(InputError, match="cannot be divided among 3"):
        make(batch_size=4)
