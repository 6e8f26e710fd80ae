"""Sizes that cannot fit: refused by arithmetic with what is needed, what is there, and which setting to lower."""

import json
import re
import shutil

import pytest

import lsg_jax
from lsg_jax import memory
from lsg_jax.cli import main
from lsg_jax.errors import ConfigError


@pytest.fixture
def config(tiny_model, scenes, records, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        f'model = "{tiny_model}"\noutput = "{tmp_path}/run"\n[sinks]\ncriterion = "norm"\n[gate]\nlayers = [3]\n'
        f'[data]\nrecords = "{records}"\n[train]\nbatch_size = 4\n[eval]\nlimit = 4\n'
        f'benchmarks.mine = "{scenes}/questions.jsonl"\n'
    )
    return str(path)


ANNOUNCED = "^mine: 4 questions under base$|: no run in it, so only the unchanged model is asked; name trained gates"


def refused(arguments, capsys, *named):
    assert main(arguments) == 65
    out, error = capsys.readouterr()
    *announced, last = error.splitlines()
    assert out == "" and all(re.search(ANNOUNCED, line) for line in announced) and all(each in last for each in named), error


@pytest.mark.parametrize(
    "command, settings, named",
    [
        (
            "train",
            ["data.max_length=100_000_000"],
            ["train.batch_size 4 with data.max_length 100000000 needs", "GiB: lower one"],
        ),
        ("train", ["train.batch_size=1_000_000", "data.max_length=1_000_000"], ["train.batch_size 1000000", "GiB: lower one"]),
        ("eval", ["eval.batch_size=1_000_000"], ["a batch of 1000000 answers of", "GiB: lower eval.batch_size"]),
        ("eval", ["eval.max_new_tokens=100_000_000"], ["GiB: lower eval.batch_size or eval.max_new_tokens"]),
        ("sweep", ["eval.max_new_tokens=100_000_000"], ["GiB: lower --batch-size, eval.max_new_tokens"]),
        ("eval", ["train.batch_size=1_000_001"], ["train.batch_size is 1000001: it must lie in [1, 1e6]"]),
    ],
)
def test_batches_of_a_configuration(command, settings, named, config, capsys):
    refused([command, config, "--set", *settings], capsys, *named)


def test_answers_longer_than_the_model(tiny_model, capsys):
    refused(["generate", str(tiny_model), "--prompt", "?", "--max-new-tokens", "100000000"], capsys, "max_new_tokens is 1000")


def test_weights_and_maps_beyond_the_memory(tiny_model, scenes, monkeypatch):
    vlm = lsg_jax.load(tiny_model)
    monkeypatch.setattr(memory, "host_memory", lambda: 100_000)
    with pytest.raises(ConfigError, match=r"tiny: the model needs 0\.0 GiB or more, and there are 0\.0 GiB: take more or larg"):
        lsg_jax.load(tiny_model)
    with pytest.raises(ConfigError, match=r"a map of 64 answer tokens on 49 visual tokens needs .*: lower max_new_tokens"):
        vlm.look(str(scenes / "images/0.png"), "?", 64)


def test_what_fits_exactly_is_not_refused(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 2**30)
    memory.check_fits(2.0**30, "it", "lower it")
    with pytest.raises(ConfigError, match=r"^it needs 1\.0 GiB or more, and there are 1\.0 GiB: lower it$"):
        memory.check_fits(2.0**30 + 1, "it", "lower it")


@pytest.mark.parametrize(
    "part, field, value",
    [
        ("text_config", "num_hidden_layers", 10**9),
        ("vision_config", "num_hidden_layers", 10**9),
        ("text_config", "vocab_size", 10**12),
        ("text_config", "hidden_size", 10**18),
        ("vision_config", "image_size", 10**9),
        ("text_config", "num_attention_heads", 10**9),
        ("text_config", "max_position_embeddings", 10**30),
    ],
)
def test_models_of_absurd_size(part, field, value, tiny_hf_folder, tmp_path, capsys):
    folder = shutil.copytree(tiny_hf_folder, tmp_path / "hf")
    tree = json.loads((folder / "config.json").read_text())
    tree[part][field] = value
    (folder / "config.json").write_text(json.dumps(tree))
    refused(["convert", str(folder), str(tmp_path / "out")], capsys, f"{part}: {field} is {value}: it must lie in")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["v5e:1000000x1000000", "v5e:-1x4", "v5e:0x0", "v5e", "", "v9:2x2", "v5e:2x2x" + "9" * 400])
def test_topologies_that_do_not_exist(name, config, capsys):
    refused(["plan", config, "--topology", name], capsys, "--topology")
