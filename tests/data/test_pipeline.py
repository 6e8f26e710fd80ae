import functools
import json
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import run_processes
from tokenizers_for_tests import model_config
from transformers import AutoTokenizer

from converters.byte_tokenizer import EOS, IMAGE, write_byte_tokenizer
from lsg_jax.config import DataConfig
from lsg_jax.data.images import to_patches
from lsg_jax.data.pipeline import TrainingData
from lsg_jax.data.processor import Processor
from lsg_jax.data.records import open_records, prepare_llava
from lsg_jax.errors import ConfigError, InputError

DATA = DataConfig(max_length=260, max_answer_tokens=8)
LONG = "x" * 200


def write_records(folder: Path) -> None:
    """9 rows with 12 answers: two of row 3 are beyond `max_length`, row 4 has no image, row 5 a long answer."""
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

    def build(data=DATA, *, batch_size=3, seed=0, epochs=2, **options):
        made.append(
            TrainingData(folder / "records", processor, data, batch_size=batch_size, seed=seed, epochs=epochs, **options)
        )
        return made[-1]

    yield build
    for data in made:
        data.close()


def key(batch):
    """(row, answer text ids) of each example."""
    return [(int(r), tuple(t[t != -100].tolist())) for r, t in zip(batch.row_id, batch.answer_target, strict=True)]


FIELDS = ("input_ids", "attention_mask", "images.patches", "source", "gate_position", "answer_index", "answer_target", "row_id")


def same(a, b):
    for name in FIELDS:
        np.testing.assert_array_equal(attrgetter(name)(a), attrgetter(name)(b), err_msg=name)


def test_batches_hold_the_records(make, folder, processor, caplog):
    data = make()
    assert (data.num_examples, data.num_batches, data.truncated) == (10, 6, 1)
    assert data.dropped == {"nothing_supervised": 2}
    left_out = f"2 of {data.num_examples + 2} examples are left out (nothing_supervised 2); raise data.max_length"
    assert caplog.messages[-1].endswith(left_out)
    batches = list(data)
    assert len(batches) == data.num_batches
    rows = open_records(folder / "records")
    for batch in batches:
        assert batch.input_ids.shape == batch.attention_mask.shape == (3, 260)
        patches = batch.images.patches
        assert patches.shape == (3, 1, 4, 14 * 14 * 3) and patches.dtype == np.uint8
        assert batch.answer_index.shape == batch.answer_target.shape == (3, 8)
        for b, row in enumerate(batch.row_id):
            tokens = batch.input_ids[b][batch.attention_mask[b]]
            assert (tokens == IMAGE).sum() == (0 if row == 4 else 4)
            expected = processor.blank if row == 4 else processor.pixels(rows[int(row)].images[0])
            np.testing.assert_array_equal(patches[b], to_patches(expected, 14))
            assert batch.source[b][batch.source[b] >= 0].tolist() == ([] if row == 4 else [0, 1, 2, 3])
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


def read_all(data):
    """(all batches, the state before each and after the last)."""
    batches, states = [], [data.get_state()]
    for batch in data:
        batches.append(batch)
        states.append(data.get_state())
    return batches, json.loads(json.dumps(states))


def test_continues_exactly_after_any_step(make):
    whole, states = read_all(make())
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
        (DATA, {"batch_size": 11}, "batch of 11 is larger than the 10 examples of .*; set train.batch_size to 10 or less"),
        (DATA, {"batch_size": 0}, "batch_size is 0: it must lie in"),
        (DATA, {"epochs": 0}, "epochs is 0: it must lie in"),
        (
            DataConfig(max_length=20),
            {},
            r"no example is usable: 12 of 12 examples are left out \(.*image_truncated 11.*\); raise data.max_length",
        ),
    ],
)
def test_impossible_settings(make, data, options, message):
    with pytest.raises((ConfigError, InputError), match=message):
        make(data, **options)


def test_missing_records(tmp_path, processor):
    with pytest.raises(InputError, match="no prepared records"):
        TrainingData(tmp_path, processor, DATA, batch_size=1, seed=0, epochs=1)


def test_a_row_that_cannot_be_read_is_named(make, monkeypatch):
    data = make(batch_size=10, epochs=1)

    def fail(self, image, alone):
        raise InputError("image: broken image file")

    monkeypatch.setattr(Processor, "pixels", fail)
    with pytest.raises(InputError, match=r"row \d \(record id\d\): image: broken"):
        next(data)


def test_checking_lengths_without_tokenizing_changes_nothing(make, monkeypatch):
    """For limits around each length, the same examples are kept, dropped and truncated as if all were tokenized."""

    def outcome(data):
        return data._index.tolist(), data.dropped, data.truncated

    sure = []
    surely_fits = Processor.surely_fits
    monkeypatch.setattr(
        Processor, "surely_fits", lambda self, *args, **limits: sure.append(surely_fits(self, *args, **limits)) or sure[-1]
    )
    monkeypatch.setattr("lsg_jax.data.pipeline.open_records", functools.cache(open_records))
    limits = [DataConfig(max_length=length, max_answer_tokens=answer) for length in range(182, 212, 2) for answer in (3, 8, 40)]
    quick = [outcome(make(data, batch_size=1)) for data in limits]
    assert 0.1 < np.mean(sure) < 0.9
    monkeypatch.setattr(Processor, "surely_fits", lambda self, *args, **limits: False)
    assert quick == [outcome(make(data, batch_size=1)) for data in limits]


def test_digest_identifies_the_records(make, folder):
    assert make().digest == open_records(folder / "records").digest
    assert len(make().digest) == 64


@pytest.fixture(scope="module")
def alone(folder, processor):
    """(batches of 4, states) of a single process."""
    data = TrainingData(folder / "records", processor, DATA, batch_size=4, seed=0, epochs=2)
    batches, states = read_all(data)
    data.close()
    assert len(batches) == 5
    return batches, states


@pytest.mark.parametrize(
    "parts", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 2], [1, 3], [0, 2], [1, 3]], [[3], [0, 1, 2, 3]]]
)
def test_parts_of_the_same_global_batches(make, alone, parts):
    """Each process reads its rows, which may overlap; then one process continues where several stopped."""
    batches, states = alone
    for rows in parts:
        data = make(batch_size=4, rows=rows)
        for step, batch in enumerate(data):
            assert key(batch) == [key(batches[step])[row] for row in rows]
            if step == 1:
                assert data.get_state() == states[2]
        assert step == 4
    for rows in (None, parts[-1]):
        resumed = make(batch_size=4, rows=rows)
        resumed.set_state(states[2])
        for batch, expected in zip(resumed, batches[2:], strict=True):
            assert key(batch) == [key(expected)[row] for row in rows or range(4)]


# Reads all batches on each mesh, then again from each position of a single process. The arrays on devices must equal `alone`.
WORKER = """
import json, sys
from pathlib import Path
sys.modules["torch"] = None  # transformers would import it, which takes seconds
import jax
import numpy as np
from transformers import AutoTokenizer
sys.path.insert(0, sys.argv[3])
from operator import attrgetter
from test_pipeline import DATA, FIELDS, model_config, read_all
from lsg_jax.config import MeshConfig
from lsg_jax.data.pipeline import TrainingData
from lsg_jax.data.processor import Processor
from lsg_jax.sharding import local_rows, make_mesh, place_rows

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
processor = Processor(AutoTokenizer.from_pretrained(folder / "model", local_files_only=True), model_config())
alone = np.load(out / "alone.npz")
positions = json.loads((out / "states.json").read_text())

def check(batch, step, mesh):
    placed, compared = place_rows(batch, mesh, 4), 0
    for field in FIELDS:
        for shard in attrgetter(field)(placed).addressable_shards:
            np.testing.assert_array_equal(shard.data, alone[f"{step}/{field}"][shard.index], err_msg=f"{mesh} {step} {field}")
            compared += 1
    assert compared == 2 * len(FIELDS)

rows = {}
for sizes in ((1, 4, 1), (4, 1, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)):
    mesh = make_mesh(MeshConfig(*sizes))
    rows[str(sizes)] = local_rows(mesh, 4)
    data = TrainingData(
        folder / "records", processor, DATA, batch_size=4, seed=0, epochs=2, rows=local_rows(mesh, 4)
    )
    batches, states = read_all(data)
    assert states == positions
    for step, batch in enumerate(batches):
        check(batch, step, mesh)
    for start, state in enumerate(positions if sizes in ((1, 4, 1), (1, 1, 4)) else []):
        data.set_state(state)
        again = list(zip(range(start, start + 2), data))
        assert len(again) == min(2, len(positions) - 1 - start)
        for step, batch in again:
            check(batch, step, mesh)
    data.close()
(out / f"{jax.process_index()}.json").write_text(json.dumps(rows))
"""


def test_two_real_processes_hold_the_batches_of_one(alone, folder, tmp_path):
    """On every mesh, from the start and from any step of a single process. The positions are equal too."""
    batches, states = alone
    (tmp_path / "states.json").write_text(json.dumps(states))
    np.savez(
        tmp_path / "alone.npz", **{f"{s}/{field}": attrgetter(field)(b) for s, b in enumerate(batches) for field in FIELDS}
    )
    run_processes(WORKER, 2, devices_each=2, args=[folder, tmp_path, Path(__file__).parent], timeout=120)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["(1, 4, 1)"] == [0, 1] and second["(1, 4, 1)"] == [2, 3]
    assert first["(1, 1, 4)"] == second["(1, 1, 4)"] == [0, 1, 2, 3]  # the tensor axis spans both
