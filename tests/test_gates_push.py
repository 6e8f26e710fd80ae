"""Gates on the Hub, with a stand-in for it: pushed by one process, loaded by id in another; the card; what is refused."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_hub import OWNER, READER, serving
from huggingface_hub import constants
from markdown_it import MarkdownIt
from processes import run_processes
from test_cli import config_file, lsg  # noqa: F401
from test_vlm import gates

import lsg_jax
from converters.convert import convert
from lsg_jax.checkpoint import read_manifest
from lsg_jax.checkpoint.processes import tree_sha256
from lsg_jax.cli import main
from lsg_jax.config import GateConfig
from lsg_jax.errors import InputError
from lsg_jax.gating.portable import PortableGates, gate_bytes, read_gates, write_gates
from lsg_jax.hub import HubName, on_hub
from lsg_jax.json_files import read_sealed, write_sealed
from lsg_jax.sharing.card import toml_lines
from lsg_jax.sharing.push import gate_files

COMMIT = "c3" * 20


@pytest.fixture(scope="module")
def model(tiny_hf_folder, tmp_path_factory):
    """A model folder that was converted from a Hub id."""
    snapshot = tmp_path_factory.mktemp("cache") / "snapshots" / COMMIT
    shutil.copytree(tiny_hf_folder, snapshot)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **options: str(snapshot))
        convert("llava-hf/tiny", folder)
    return folder


@pytest.fixture(scope="module")
def run(model, records, scenes, tmp_path_factory):
    """A run of that model with its evaluation; its configuration is beside it."""
    folder = tmp_path_factory.mktemp("private-place")
    config = config_file(folder, model, records)
    assert main(["train", str(config)]) == 0
    assert main(["eval", str(config), "--benchmark", f"mine={scenes / 'questions.jsonl'}"]) == 0
    return folder / "run"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, asked with the token of the owner, and an empty cache."""
    with serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", OWNER)
        yield served


def files_of(hub, name):
    repository = hub.repositories[name.partition("@")[0]]
    return repository.commits[name.partition("@")[2] or repository.branches["main"]]


def test_gates_pushed_by_one_process_are_the_same_in_another(hub, run, model, scenes, tmp_path, lsg, monkeypatch):  # noqa: F811
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "theirs")}
    command = [sys.executable, "-m", "lsg_jax", "gates", "push", str(run), "owner/gate", "--message", "A first gate"]
    pushed = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)
    assert pushed.returncode == 0, pushed.stderr
    name = pushed.stdout.strip()
    assert re.fullmatch(r"owner/gate@[0-9a-f]{40}", name) and f"/commit/{name[-40:]}" in pushed.stderr
    assert hub.repositories["owner/gate"].messages == ["initial commit", "A first gate"]
    assert set(files_of(hub, name)) == {".gitattributes", "README.md", "gates.safetensors", "sinks.toml"}

    # the same answers and digests, by the newest commit; and by this one the same file
    config, out = run.parent / "run.toml", tmp_path / "out"
    benchmark = f"mine={scenes / 'questions.jsonl'}"
    code, _, err = lsg("eval", config, "--gates", "owner/gate", "--benchmark", benchmark, "--out", out)
    assert code == 0, err
    there, here = read_sealed(out / "result.json"), read_sealed(run / "eval" / "result.json")
    assert there["hub"] == {"lsg": name} and here["hub"] == {}
    assert there["trained"] == here["trained"] and there["benchmarks"] == here["benchmarks"]
    found = json.loads(lsg("inspect", "owner/gate", "--json")[1])
    assert found["hub"] == {"repository": "owner/gate", "commit": name[-40:]} and found["digest"] == here["trained"]["lsg"]
    assert lsg("verify", name)[:2] == (0, f"{name}: ok\n")

    # without a network, from the cache
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    vlm = lsg_jax.load(model, gates="owner/gate")
    assert vlm.origin == name and tree_sha256(vlm.trained) == here["trained"]["lsg"] and len(hub.asked) == asked
    local = lsg_jax.load(model, gates=run)
    assert local.origin == "" and vlm.config == local.config and vlm.gate == local.gate
    images = [scenes / "images" / "0.png"]
    assert vlm.generate(images, ["How many?"], 4) == local.generate(images, ["How many?"], 4)


def test_only_the_gate_file_is_downloaded(hub, model):
    hub.add("owner/large", {"gates.safetensors": gate_bytes(gates(), where="x"), "model.safetensors": b"0" * 1000})
    lsg_jax.load(model, gates="owner/large")
    assert [path for _, path in hub.asked if "resolve" in path] == ["/owner/large/resolve/main/gates.safetensors"]


def test_every_process_takes_the_commit_that_the_first_one_found(hub, tmp_path, monkeypatch):
    first = hub.add("owner/gate", {"gates.safetensors": gate_bytes(gates(), where="x")})
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    script = """
import os, sys, jax
os.environ["HF_HOME"] = f"{sys.argv[1]}/{jax.process_index()}"
from lsg_jax.opening import open_gates
with open(f"{sys.argv[1]}/origin{jax.process_index()}", "w") as file:
    file.write(open_gates("owner/gate").origin)
"""
    run_processes(script, 2, args=[tmp_path])
    assert [(tmp_path / f"origin{rank}").read_text() for rank in range(2)] == [f"owner/gate@{first}"] * 2
    asked = [path for method, path in hub.asked if method == "HEAD"]
    assert asked.count("/owner/gate/resolve/main/gates.safetensors") == 1
    assert asked.count(f"/owner/gate/resolve/{first}/gates.safetensors") >= 1


# ------------------------------------------------------------------------------------------------------------------- the card


def card_of(run, **options):
    return gate_files(run, "owner/gate", **options)["README.md"].decode()


def test_the_card_tells_where_gates_come_from_and_what_they_change(run, model):
    files = gate_files(run, "owner/gate")
    text = files["README.md"].decode()
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["base_model"], front["base_model_relation"], front["library_name"]) == ("llava-hf/tiny", "adapter", "lsg_jax")
    assert "attention-sinks" in front["tags"]
    record, result = read_sealed(run / "run.json"), read_sealed(run / "eval" / "result.json")
    digests = [
        record["backbone"],
        record["data"],
        result["trained"]["lsg"],
        hashlib.sha256(files["gates.safetensors"]).hexdigest(),
    ]
    assert all(digest in text for digest in digests)
    assert f"lsg convert llava-hf/tiny models/base --revision {COMMIT}" in text and "--gates owner/gate" in text
    scores = result["benchmarks"]["mine"]
    for each in (scores["methods"]["base"], scores["methods"]["lsg"], scores["change"]["lsg"]):
        assert re.search(rf"\| [+]?{each['accuracy']['value']:.2f} \[[-+\d., ]+\] ", text), each
    assert "learning_rate = 0.001" in text and f"jax {record['versions']['jax']}" in text
    assert str(run.parent) not in text and str(model.parent) not in text and "private-place" not in text


@pytest.mark.parametrize(("dtype", "option"), [("int8", " --dtype int8"), ("bfloat16", " --dtype bfloat16"), ("float32", "")])
def test_the_card_converts_to_the_weights_of_the_run(run, model, tiny_hf_folder, tmp_path, dtype, option):
    """A model in another dtype has another digest, and those who follow the card would be told that it is another model."""
    snapshot = tmp_path / "snapshots" / COMMIT
    shutil.copytree(tiny_hf_folder, snapshot)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **options: str(snapshot))
        convert("llava-hf/tiny", tmp_path / "model", dtype=dtype)
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    record = read_sealed(run / "run.json")
    digest = read_manifest(tmp_path / "model").digest
    config = record["config"] | {"model": str(tmp_path / "model")}
    write_sealed(tmp_path / "run" / "run.json", record | {"config": config, "backbone": digest})
    text = gate_files(tmp_path / "run", "owner/gate")["README.md"].decode()
    assert f"lsg convert llava-hf/tiny models/base --revision {COMMIT}{option}\n" in text


def test_the_card_is_whole_markdown(run):
    tokens = MarkdownIt("commonmark").enable("table").parse(card_of(run).split("---\n", 2)[2])
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == ["Sink gates for llava-hf/tiny", "Use", "Scores", "How it was made", "What counts as a sink"]
    assert [token.info for token in tokens if token.type == "fence"] == ["sh", "python", "python", "toml", "toml"]
    assert sum(token.type == "table_open" for token in tokens) == 2
    assert not any("|---" in token.content for token in tokens if token.type == "inline")


def test_a_card_without_an_evaluation_says_so(run, tmp_path):
    write_gates(tmp_path / "g.safetensors", gates())
    text = card_of(tmp_path / "g.safetensors")
    assert "no evaluation of these gates was given" in text and "does not say how they were trained" in text
    assert "base_model" not in text and "made with" not in text  # another tool may have written the file
    assert "base_model: some/model" in card_of(tmp_path / "g.safetensors", base_model="some/model")
    with pytest.raises(InputError, match="an evaluation of other gates than these"):
        card_of(tmp_path / "g.safetensors", evaluation=run / "eval")
    assert "no evaluation" not in card_of(run / ".", evaluation=run / "eval")


@pytest.mark.parametrize(("part", "change"), [("gate", {"key_scale": 7.0}), ("sinks", {"vit_tau": 77.0})])
def test_scores_with_other_settings_than_the_gate_file_holds_are_not_shown(run, tmp_path, caplog, part, change):
    """The digest is of the parameters alone."""
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "eval" / "result.json"
    result = read_sealed(file)
    result["methods"]["lsg"][part] |= change
    write_sealed(file, result)
    assert "no evaluation of these gates was given" in card_of(tmp_path / "run")
    assert f"{file.parent}: not an evaluation of these gates, so the card shows no scores" in caplog.text
    with pytest.raises(InputError, match=f"of these gates with other {part} settings than they have"):
        card_of(tmp_path / "run", evaluation=file.parent)


def test_a_run_without_an_evaluation_is_told(run, tmp_path, caplog):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    card_of(tmp_path / "run")
    assert f"{tmp_path / 'run'}: no evaluation in it, so the card shows no scores; name one with --eval" in caplog.text


def test_scores_of_other_weights_are_told(run, tmp_path):
    text = "The weights that were asked have another digest than those that the gates were trained on"
    assert text not in card_of(run)
    shutil.copytree(run / "eval", tmp_path / "eval")
    write_sealed(tmp_path / "eval" / "result.json", read_sealed(run / "eval" / "result.json") | {"backbone": "e" * 64})
    assert text in card_of(run, evaluation=tmp_path / "eval")


def test_names_of_others_are_no_markup_in_the_card(tmp_path):
    """A gate file from elsewhere names its model as it likes."""
    from dataclasses import replace

    name = "a`b``c\n\n# Heading\n\n<b>x</b> [y](http://z) \\` | d"
    write_gates(tmp_path / "g.safetensors", replace(gates(), backbone=f"{name} {'d' * 64}"))
    text = card_of(tmp_path / "g.safetensors").split("---\n", 2)[2]
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [token for token in tokens if token.type == "inline"]
    assert "Heading" not in [token.content for token in inline]
    kinds = {child.type for token in inline if "Heading" in token.content for child in token.children}
    assert kinds == {"text", "code_inline", "link_open", "link_close"}  # one link, to the paper
    assert all(child.attrs["href"] != "http://z" for token in inline for child in token.children if child.type == "link_open")
    assert any(len([c for c in row.split(" | ")]) == 2 for row in text.splitlines() if row.startswith("| model |"))


def test_toml_of_the_card_is_read_as_it_was_meant():
    import tomllib

    tree = {"name": 'a "b"\\\u007f\n\U0001f600', "rate": 1e-05, "on": True, "layers": [3, 10], "none": None, "gate": {"x": 1}}
    assert tomllib.loads("\n".join(toml_lines(tree))) == {k: v for k, v in tree.items() if v is not None}


# ------------------------------------------------------------------------------------------------------- what a name stands for


def test_a_local_path_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("owner/gate", "owner/gate@main", "owner/gate@refs/pr/1", "owner/gate@10"):
        repository, _, revision = name.partition("@")
        assert on_hub(name) == HubName(repository, revision or None) and str(on_hub(name)) == name
    for name in (
        "gate",
        "gate@10",
        "./owner/gate",
        "/owner/gate",
        "a/b/c",
        "owner/gate@",
        "owner/gate.safetensors",
        "o/g.safetensors@3",
    ):
        assert on_hub(name) is None
    Path("owner/gate").mkdir(parents=True)
    assert on_hub("owner/gate") is on_hub("owner/gate@10") is on_hub("owner/gate@main") is None
    assert on_hub("owner/gte") is on_hub("owner/gte@10") is None  # a mistyped path below a folder that is here
    with pytest.raises(InputError, match="after @ come layers, for example owner/gate@10"):
        lsg_jax.opening.open_gates("owner/gate@main")


def test_what_follows_a_hub_id_is_a_revision_even_a_number(hub):
    first = hub.add("owner/two", {"gates.safetensors": gate_bytes(gates((1, 4)), where="x")})
    hub.repositories["owner/two"].branches["1"] = first
    hub.repositories["owner/two"].commit("main", {"gates.safetensors": gate_bytes(gates((2,)), where="x")}, "later")
    assert lsg_jax.opening.open_gates("owner/two@1").gate.layers == (1, 4)
    assert lsg_jax.opening.open_gates("owner/two").gate.layers == (2,)
    assert lsg_jax.opening.open_gates(f"owner/two@{first}").origin == f"owner/two@{first}"


# -------------------------------------------------------------------------------------------------------------------- refusals


def refused(lsg, *arguments):  # noqa: F811
    """The one line that a command prints when it fails."""
    code, out, err = lsg(*arguments)
    last = err.strip().splitlines()[-1]
    assert code in (1, 65) and out == "" and last.startswith("lsg "), err
    return last


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (
            OWNER,
            "owner/none",
            r"owner/none: no such run folder or gate file, and .* answered 404: no such repository; check its name",
        ),
        ("", "owner/none", "answered 401: no such repository, or a private one; .*`hf auth login`"),
        (READER, "owner/hidden", "answered 404: no such repository"),
        (OWNER, "owner/some@v9", "answered 404: the repository has no revision v9; look it up"),
        (OWNER, "owner/empty", "holds no gates.safetensors; choose a repository that `lsg gates push` has written"),
        (OWNER, "owner/damaged", "owner/damaged@[0-9a-f]{40}: .* if only the copy in the cache is broken, delete it"),
        (
            OWNER,
            "owner/wide",
            "owner/wide@.*: the gates read a width of 32, the language model has 64: .*; give gates that were trained on",
        ),
    ],
)
def test_names_that_cannot_be_loaded(hub, token, name, message, model, lsg, monkeypatch):  # noqa: F811
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    whole = gate_bytes(gates(), where="x")
    hub.add("owner/some", {"gates.safetensors": whole})
    hub.add("owner/hidden", {"gates.safetensors": whole}, private=True)
    hub.add("owner/empty", {"README.md": b""})
    hub.add("owner/damaged", {"gates.safetensors": whole[:-40] + b"1234" + whole[-36:]})
    hub.add("owner/wide", {"gates.safetensors": gate_bytes(gates(width=32), where="x")})
    assert re.search(message, refused(lsg, "generate", model, "--prompt", "x", "--gates", name))
    if name != "owner/wide":
        assert re.search(message, refused(lsg, "inspect", name)) and re.search(message, refused(lsg, "verify", name))


def test_without_a_network(hub, lsg, tmp_path, monkeypatch):  # noqa: F811
    write_gates(tmp_path / "g.safetensors", gates())
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of huggingface_hub
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody + "/{repo_id}/resolve/{revision}/{filename}")
    line = refused(lsg, "inspect", "owner/gate")
    assert re.search(r"could not be fetched .*: http://127.* cannot be reached: .*; check the network and run it again", line)
    assert "cannot be reached" in refused(lsg, "gates", "push", tmp_path / "g.safetensors", "owner/gate")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for command in (["inspect", "owner/gate"], ["gates", "push", tmp_path / "g.safetensors", "owner/gate"]):
        assert "HF_HUB_OFFLINE is set; unset it to ask the Hub" in refused(lsg, *command)


def test_what_may_not_be_written(hub, lsg, tmp_path, monkeypatch):  # noqa: F811
    file = tmp_path / "g.safetensors"
    write_gates(file, gates())
    hub.add("owner/model", {"README.md": b"a model", "model.safetensors": b""})
    hub.add("owner/open", {".gitattributes": b""})
    push = lambda *more: refused(lsg, "gates", "push", file, *more)
    assert "not a Hub id; write it as owner/name" in push("gate")
    assert "not a Hub id" in push("owner/gate", "--base-model", "llava 1.5")
    for name in ("owner/g\u00e4te", "owner/gate.safetensors", "owner/a--b", f"owner/{'n' * 97}"):  # no --gates takes these
        assert "not a Hub id" in push(name)
    assert "holds a README.md and no gates.safetensors: it is of something else" in push("owner/model")
    assert "is public already, and --private is for new repositories" in push("owner/open", "--private")
    assert "answered 403: your token may not write there; run `hf auth login`" in push("other/gate")
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "answered 403" in push("owner/open")
    monkeypatch.delenv("HF_TOKEN")
    assert "answered 401: there is no token, or an invalid one; run `hf auth login`" in push("owner/gate")
    assert set(hub.repositories) == {"owner/model", "owner/open"} and len(hub.repositories["owner/open"].commits) == 1


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (409, "answered 409: something else writes to it at the same time; run it again"),
        (412, "answered 412: something else writes to it at the same time; run it again"),
        (429, "answered 429: too many requests; wait 7 seconds and run it again"),
        (500, "answered 500: it has trouble; run it again later, see https://status.huggingface.co"),
    ],
)
def test_a_push_that_the_hub_cannot_take_now(hub, lsg, tmp_path, status, message):  # noqa: F811
    write_gates(tmp_path / "g.safetensors", gates())
    hub.add("owner/gate", {".gitattributes": b""})
    hub.refuses[("POST", "/api/models/owner/gate/commit/main")] = status
    assert message in refused(lsg, "gates", "push", tmp_path / "g.safetensors", "owner/gate")
    assert len(hub.repositories["owner/gate"].commits) == 1


def test_the_same_gates_again_make_no_commit(hub, lsg, tmp_path):  # noqa: F811
    write_gates(tmp_path / "g.safetensors", gates())
    first = lsg("gates", "push", tmp_path / "g.safetensors", "owner/gate")
    again = lsg("gates", "push", tmp_path / "g.safetensors", "owner/gate")
    assert first[:2] == again[:2] and first[0] == 0
    assert hub.repositories["owner/gate"].messages == ["initial commit", "Upload gates of lsg_jax"]


def test_a_private_repository_and_a_branch(hub, lsg, tmp_path):  # noqa: F811
    files = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, file in enumerate(files):
        write_gates(file, gates(seed=seed))
    code, first, err = lsg("gates", "push", files[0], "owner/gate", "--private")
    assert code == 0 and hub.repositories["owner/gate"].private, err
    code, second, err = lsg("gates", "push", files[1], "owner/gate", "--private", "--revision", "other/seed")
    assert code == 0, err
    assert set(hub.repositories["owner/gate"].branches) == {"main", "other/seed"}
    held = [
        read_gates(files[0]),
        lsg_jax.opening.open_gates(first.strip()),
        lsg_jax.opening.open_gates("owner/gate@other/seed"),
    ]
    same = [np.array_equal(held[0].parameters["fc1_bias"], each.parameters["fc1_bias"]) for each in held[1:]]
    assert same == [True, False] and f"owner/gate@{hub.repositories['owner/gate'].branches['other/seed']}" == second.strip()
    card = files_of(hub, second.strip())["README.md"].decode()
    assert "--gates owner/gate@other/seed" in card and 'revision="other/seed"' in card


def test_what_is_no_gate_is_refused_by_name(hub, run, lsg, tmp_path):  # noqa: F811
    several = tmp_path / "several"
    several.mkdir()
    write_sealed(several / "seeds.json", {"format": "lsg-seeds-1", "seeds": [0, 1]})
    line = refused(lsg, "gates", "push", several, "owner/gate")
    assert f"holds the seeds 0, 1, each a run of its own: name one, as {several / 'seed0'}" in line
    shutil.copytree(run, tmp_path / "lora")
    record = read_sealed(run / "run.json")
    write_sealed(tmp_path / "lora" / "run.json", {**record, "config": {**record["config"], "method": "lora"}})
    assert "a run of method lora holds no gates" in refused(lsg, "gates", "push", tmp_path / "lora", "owner/gate")
    assert "no gate at layer 3" in refused(lsg, "gates", "push", f"{run}@3", "owner/gate")
    assert "no such run folder or gate file" in refused(lsg, "gates", "push", tmp_path / "nothing", "owner/gate")
    assert not hub.asked


def test_independent_gates_are_pushed_one_by_one():
    each = gates()
    alone = PortableGates(GateConfig(layers=(1, 4), width=8, independent=True), each.sinks, each.parameters)
    with pytest.raises(InputError, match="were trained each alone and are no stack"):
        gate_bytes(alone, where="x")


def test_gates_of_another_model_of_this_width_are_told(hub, model, caplog):
    from dataclasses import replace

    hub.add("owner/other", {"gates.safetensors": gate_bytes(replace(gates(), backbone=f"llava {'d' * 64}"), where="x")})
    lsg_jax.load(model, gates="owner/other")
    assert f"was trained on llava {'d' * 64}, and this model is" in caplog.text
