import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from processes import run_processes
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


FIELDS = ("input_ids", "attention_mask", "pixels", "gate_position", "answer_index", "answer_target", "row_id")


def same(a, b):
    for name in FIELDS:
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


def walk(data):
    """(all batches, the state before each and after the last)."""
    batches, states = [], [data.get_state()]
    for batch in data:
        batches.append(batch)
        states.append(data.get_state())
    return batches, json.loads(json.dumps(states))


def test_continues_exactly_after_any_step(make):
    whole, states = walk(make())
    assert len(whole) == 6
    for stop, state in enumerate(states):
        again = make()
        again.set_state(state)
        for a, b in zip(again, whole[stop:], strict=True):
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


def test_a_look_at_the_length_changes_nothing(make, monkeypatch):
    """Limits around each length: what is kept, dropped and cut is what tokenising everything says."""

    def outcome(data):
        return data._index.tolist(), data.dropped, data.truncated

    asked = []
    look = Processor.surely_fits
    monkeypatch.setattr(
        Processor, "surely_fits", lambda self, *args, **limits: asked.append(look(self, *args, **limits)) or asked[-1]
    )
    limits = [DataConfig(max_length=length, max_answer_tokens=answer) for length in range(182, 212, 2) for answer in (3, 8, 40)]
    quick = [outcome(make(data, batch_size=1)) for data in limits]
    assert 0.1 < np.mean(asked) < 0.9
    monkeypatch.setattr(Processor, "surely_fits", lambda self, *args, **limits: False)
    assert quick == [outcome(make(data, batch_size=1)) for data in limits]


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
        assert [example for part in parts for example in part[step]] == key(batch)
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


# Reads everything, and then once more from each position in `states`, one process's and then its own.
WORKER = """
import json, sys
from pathlib import Path
sys.modules["torch"] = None  # transformers would import it, which takes seconds
import jax
import numpy as np
from transformers import AutoTokenizer
sys.path.insert(0, sys.argv[3])
from test_pipeline import DATA, FIELDS, model_config, walk
from lsg_jax.data.pipeline import TrainingData
from lsg_jax.data.processor import Processor

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
processor = Processor(AutoTokenizer.from_pretrained(folder / "model", local_files_only=True), model_config())
data = TrainingData(folder / "records", processor, DATA, batch_size=4, seed=0, epochs=2)
batches, states = walk(data)
runs = [batches]
for state in json.loads((out / "states.json").read_text()):
    data.set_state(state)
    runs.append(list(data))
data.close()
arrays = {f"{r}/{b}/{f}": getattr(batch, f) for r, run in enumerate(runs) for b, batch in enumerate(run) for f in FIELDS}
np.savez(out / f"{jax.process_index()}.npz", **arrays)
(out / f"{jax.process_index()}.json").write_text(json.dumps(states))
"""


def test_two_real_processes_share_the_batches_of_one(make, folder, tmp_path):
    """The same global batches, from the start and from any step of one process, whose positions are also theirs."""
    alone, states = walk(make(batch_size=4))
    (tmp_path / "states.json").write_text(json.dumps(states))
    run_processes(WORKER, 2, args=[folder, tmp_path, Path(__file__).parent])
    parts = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    for run, start in enumerate([0, *range(len(alone) + 1)]):
        assert f"{run}/{len(alone) - start}/row_id" not in parts[0]
        for number, batch in enumerate(alone[start:]):
            for field in FIELDS:
                together = np.concatenate([part[f"{run}/{number}/{field}"] for part in parts])
                np.testing.assert_array_equal(together, getattr(batch, field), err_msg=f"run {run}, batch {number}, {field}")
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == states
