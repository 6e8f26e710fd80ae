"""The commands as a user types them: outputs on stdout, one-line errors on stderr, exit codes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_vlm import gates

import lsg_jax
from lsg_jax.cli import main
from lsg_jax.gating.portable import write_gates
from lsg_jax.json_files import read_sealed
from lsg_jax.methods.pai import Pai, PaiConfig

UNKNOWN_TEMPLATE = ("generate", "m", "--prompt", "x", "--template", "alpaca")
SINK_OPTIONS = ["--sinks", "criterion=norm", "vit_tau=10.0", "llm_criterion=norm", "llm_tau=12.0"]


@pytest.fixture
def lsg(capfd):
    """Runs a command; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        capfd.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse, for usage errors and --help
            code = stop.code
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def config_file(folder, model, records="", **train):
    settings = "".join(
        f"{name} = {value}\n" for name, value in ({"batch_size": 2, "epochs": 1, "max_steps": 2} | train).items()
    )
    path = folder / "run.toml"
    path.write_text(
        f'model = "{model}"\noutput = "{folder / "run"}"\n'
        "[gate]\nlayers = [1]\n"
        '[sinks]\ncriterion = "norm"\nvit_tau = 10.0\n'
        f'[data]\nrecords = "{records}"\nmax_length = 256\nmax_answer_tokens = 8\n'
        f"[train]\n{settings}"
        "[eval]\nbatch_size = 4\nmax_new_tokens = 4\n"
    )
    return path


def test_convert_export_verify_inspect(lsg, tiny_hf_folder, tmp_path):
    model, back = tmp_path / "model", tmp_path / "back"
    assert lsg("convert", tiny_hf_folder, model) == (0, f"{model}\n", "")
    assert lsg("verify", model)[:2] == (0, f"{model}: ok\n")
    code, out, _ = lsg("inspect", model)
    assert code == 0 and "vision_tower" in out and "tiny-llava" in out
    found = json.loads(lsg("inspect", model, "--json")[1])
    assert found["kind"] == "model" and found["parameters"]["total"] == sum(
        count for part, count in found["parameters"].items() if part != "total"
    )
    assert lsg("export", model, back)[0] == 0
    assert (back / "model.safetensors").stat().st_size > 0
    code, out, err = lsg("convert", tiny_hf_folder, model)
    assert code == 65 and out == "" and str(model) in err and err.count("\n") == 1


def test_train_eval_gates_inspect_verify(lsg, tiny_model, records, scenes, tmp_path):
    config, run = config_file(tmp_path, tiny_model, records), tmp_path / "run"
    told = f"{run}: no run in it, so only the unchanged model is asked; name trained gates with --gates"
    code, out, err = lsg("eval", config, "--out", tmp_path / "base", "--benchmark", f"mine={scenes / 'questions.jsonl'}")
    assert code == 0 and "lsg" not in out and told in err
    code, out, err = lsg("train", config)
    assert (code, out) == (0, f"{run}\n"), err
    assert lsg("verify", run)[:2] == (0, f"{run}: ok\n")
    assert json.loads(lsg("inspect", run, "--json")[1])["saved steps"] == [2]
    file = tmp_path / "g.safetensors"
    assert lsg("gates", "export", run, file)[:2] == (0, f"{file}\n")
    assert json.loads(lsg("inspect", file, "--json")[1])["gate"]["layers"] == [1]
    assert lsg("verify", file)[0] == 0

    code, out, err = lsg("eval", config, "--benchmark", f"mine={scenes / 'questions.jsonl'}")
    assert code == 0 and told not in err, err
    assert out.startswith("mine: 12 questions, protocol paper\nmetric") and "lsg against base: " in out
    result = json.loads((run / "eval" / "result.json").read_text())["benchmarks"]["mine"]
    assert set(result["methods"]["lsg"]) == {"accuracy", "category: colour", "category: count"} and not result["partial"]
    for method in ("base", "lsg"):
        rows = [json.loads(line) for line in (run / "eval" / f"mine.{method}.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == [str(i) for i in range(12)]
        assert sum(row["score"] for row in rows) / 12 * 100 == pytest.approx(result["methods"][method]["accuracy"]["value"])
    # the same gates from the portable file give the same answers
    elsewhere = tmp_path / "elsewhere"
    code, out, err = lsg(
        "eval", config, "--gates", file, "--out", elsewhere, "--json",
        "--benchmark", f"mine={scenes / 'questions.jsonl'}",
    )  # fmt: skip
    assert code == 0 and json.loads(out)["benchmarks"]["mine"]["methods"] == result["methods"], err
    for name in ("mine.base.jsonl", "mine.lsg.jsonl"):
        assert (elsewhere / name).read_text() == (run / "eval" / name).read_text()


def test_generate_prints_the_answer_only(lsg, tiny_model, scenes, tmp_path):
    write_gates(tmp_path / "g.safetensors", gates())
    image = scenes / "images" / "0.png"
    common = ("generate", tiny_model, "--prompt", "What is this?", "--max-new-tokens", 5)
    for options, source in ([], None), (["--gates", tmp_path / "g.safetensors"], gates()):
        (answer,) = lsg_jax.load(tiny_model, source).generate([image], ["What is this?"], 5)
        assert lsg(*common, "--image", image, *options) == (0, f"{answer}\n", "")
    # a method that is not trained, with its settings
    settings = PaiConfig(alpha=2.0, gamma=3.0, first_layer=1)
    (answer,) = lsg_jax.load(tiny_model).with_method(Pai(settings)).generate([image], ["What is this?"], 5)
    assert answer not in [
        lsg_jax.load(tiny_model, source).generate([image], ["What is this?"], 5)[0] for source in (None, gates())
    ]
    chosen = ("--method", "pai", "alpha=2", "gamma=3", "first_layer=1")
    assert lsg(*common, "--image", image, *chosen) == (0, f"{answer}\n", "")
    seen = json.loads(lsg("look", *common[1:], "--image", image, *chosen, "--json")[1])
    assert seen["answer"] == answer
    assert seen["model"]["method"] == "pai alpha=2.0 gamma=3.0 first_layer=1" and seen["model"]["trained"] is None
    assert (seen["model"]["name"], seen["model"]["backbone"]) == ("tiny", lsg_jax.load(tiny_model).digest)
    # text only, with another template
    vlm = lsg_jax.load(tiny_model, template="mistral_instruct")
    prompt = vlm.processor.decode(vlm.processor.encode_question("What is this?", image_sizes=()).ids)
    assert prompt == vlm.plain().processor.decode(vlm.plain().processor.encode_question("What is this?", image_sizes=()).ids)
    assert prompt == "[INST] What is this? [/INST]"
    (answer,) = vlm.generate([None], ["What is this?"], 5)
    assert lsg(*common, "--template", "mistral_instruct") == (0, f"{answer}\n", "")


def test_sinks(lsg, tiny_model, scenes, tmp_path):
    (tmp_path / "few").mkdir()
    files = [Path(shutil.copy(scenes / "images" / f"{i}.png", tmp_path / "few")) for i in (0, 1)]
    (tmp_path / "few" / "broken.png").write_bytes(b"no image")
    out_folder = tmp_path / "o"
    common = ("sinks", tiny_model, "--images", files[0], tmp_path / "few", "--out", out_folder, "--max-new-tokens", 2)
    code, out, err = lsg(*common, "--layer", 1, *SINK_OPTIONS, "vit_tau=18.375")
    assert code == 0 and err.count("skipped: ") == err.count("broken.png") == 1, err
    found = json.loads(out)
    assert (found["format"], found["template"]) == ("lsg-sinks-2", "vicuna_v1") and list(found["images"]) == [
        str(f) for f in files
    ]
    entry = found["images"][str(files[0])]
    norms = np.array(entry["norms"])
    assert entry["v_sinks"] == np.flatnonzero(norms >= 18.375).tolist() != [] and len(entry["boxes"]) == len(norms)
    assert len(entry["l_sinks"]) == 6 and not set(entry["v_sinks"]) & {p for layer in entry["l_sinks"] for p in layer}
    assert {row["queries"] for row in found["attention"]} == {"prompt", "answer"}
    assert read_sealed(out_folder / "sinks.json") == found
    figures = {f"{name}.{kind}" for name in ("sinks_by_layer", "attention_shares") for kind in ("csv", "svg", "png")}
    assert {path.name for path in out_folder.iterdir()} == figures | {"sinks.json", "marked", "images", "maps"}
    for folder in ("marked", "images", "maps"):
        assert sorted(path.name for path in (out_folder / folder).iterdir()) == ["0.png", "1.png"]
    with Image.open(out_folder / "marked" / "0.png") as overlay:
        assert overlay.size == (672, 672)
    # a threshold that is far too low is said, and a model without dimensions says so instead of inventing sinks
    assert "more than 25% of the visual tokens are flagged as L-sinks" in err
    code, out, err = lsg("sinks", tiny_model, "--images", files[0], "--max-new-tokens", 0, "--template", "mistral_instruct")
    assert code == 0 and "no V-sink dimensions are known" in err
    found = json.loads(out)
    assert found["template"] == "mistral_instruct"
    entry = found["images"][str(files[0])]
    assert entry["v_sinks"] is entry["l_sinks"] is entry["criteria"]["llm"]["dim_rms"] is None
    assert {row["group"] for row in found["attention"]} == {"text", "ordinary"}
    assert "set sinks.llm_dims" in found["criteria"]["llm"]["dim_abs"]["unknown"]


def test_calibrate(lsg, tiny_model, scenes, tmp_path):
    file = tmp_path / "sinks.toml"
    common = ("calibrate", tiny_model, "--images", scenes, "--limit", 2, "--out", file)
    code, out, err = lsg(*common)
    assert code == 0 and "no V-sink dimensions were found" in err
    assert out == file.read_text() and out.startswith("# Sink settings from 2 images") and "Nothing to propose" in out
    found = json.loads(lsg(*common, "--json")[1])
    assert found["format"] == "lsg-calibrate-1" and found["images"] == 2 and found["sinks"] == {}


def test_prepare(lsg, scenes, tmp_path):
    code, out, err = lsg("prepare", scenes / "llava.jsonl", tmp_path / "records")
    assert code == 0 and out.startswith("12 of 12 records written"), err
    assert lsg("verify", tmp_path / "records")[:2] == (0, f"{tmp_path / 'records'}: ok\n")
    assert json.loads(lsg("inspect", tmp_path / "records", "--json")[1])["rows"] == 12
    (file,) = (tmp_path / "records").rglob("*.array_record*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, out, err = lsg("verify", tmp_path / "records")
    assert code == 65 and f"{file} does not match its sha256" in out and "1 problem found" in err
    code, out, err = lsg("prepare", scenes / "questions.jsonl", tmp_path / "other")
    assert code == 65 and out == "" and not (tmp_path / "other").exists()


def test_no_configuration_is_needed_for_text_help(lsg):
    code, out, _ = lsg("--help")
    assert code == 0 and all(name in out for name in ("quickstart", "convert", "train", "eval", "sinks"))
    for arguments in ((), ("nonsense",), ("generate", "m"), ("gates",), ("train", "c", "--epochs", "3"), UNKNOWN_TEMPLATE):
        assert lsg(*arguments)[0] == 2


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["inspect", "nowhere"], 65, "nowhere: no such file or folder"),
        (["inspect", "{hf}"], 65, "looks like a Hugging Face checkpoint; run `lsg convert"),
        (["verify", "{tmp}"], 65, "neither a model folder"),
        (["inspect", "{tmp}/junk.safetensors"], 65, "junk.safetensors"),
        (["convert", "{tmp}", "{tmp}/out"], 65, "config.json"),
        (["convert", "no/such-model", "{tmp}/out"], 65, "no/such-model"),
        (["generate", "{model}", "--prompt", "x", "--image", "{tmp}/none.png"], 65, "none.png"),
        (["generate", "{model}", "--prompt", "x", "--image", "{tmp}/junk.safetensors"], 65, "junk.safetensors"),
        (["generate", "{model}", "--prompt", "x", "--gates", "{tmp}/junk.safetensors"], 65, "junk.safetensors"),
        (["generate", "{model}", "--prompt", "x", "--max-new-tokens", "0"], 65, "--max-new-tokens is 0: it must lie in [1, "),
        (["generate", "{model}", "--prompt", "what is <image>?"], 65, "<image> in the text, but there is no image"),
        (
            ["generate", "{model}", "--prompt", "x", "--template", "qwen2"],
            65,
            "template qwen2: the tokenizer lacks <|im_start|>",
        ),
        (["generate", "{model}", "--prompt", "x", "--template", "chat_template"], 65, "the checkpoint has no chat template"),
        (["generate", "{model}", "--prompt", "x", "--method", "vcd"], 65, "--method vcd: unknown; known are var, pai, vaf, "),
        (
            ["generate", "{model}", "--prompt", "x", "--method", "lora"],
            65,
            "--method lora: it is trained; name its run with --gates",
        ),
        (
            ["generate", "{model}", "--prompt", "x", "--method", "pai", "alfa=1"],
            65,
            "--method pai: unknown field alfa; did you mean alpha",
        ),
        (
            ["generate", "{model}", "--prompt", "x", "--method", "pai", "--gates", "g"],
            65,
            "--method pai: cannot be combined with --gates",
        ),
        (
            ["look", "{model}", "--prompt", "x", "--image", "{tmp}/a.png", "--method", "vaf"],
            65,
            "vaf.first_layer: layer 9 does not exist",
        ),
        (["sinks", "{model}", "--images", "{tmp}/a.png", "--sinks", "vit_dim=[3]"], 65, "did you mean vit_dims?"),
        (["sinks", "{model}", "--images", "{tmp}/a.png", "--sinks", "vit_dims=[999]"], 65, "outside the model width 64"),
        (["sinks", "{model}", "--images", "{tmp}/junk.safetensors"], 65, "junk.safetensors"),
        (["sinks", "{model}", "--images", "{tmp}/a.png", "--max-new-tokens", "-1"], 65, "--max-new-tokens is -1"),
        (["sinks", "{model}", "--images", "{tmp}/a.png", "{tmp}/a.png", "--out", "{tmp}/o"], 65, "a.png is named twice"),
        (["sinks", "{model}", "--images", "{tmp}/a.png", "--layer", "6"], 65, "--layer 6: the model has layers 0 to 5"),
        (["sinks", "{model}", "--images", "{hf}"], 65, "no image in it"),
        (["calibrate", "{model}", "--images", "{tmp}/a.png"], 65, "no such folder"),
        (["calibrate", "{model}", "--images", "{model}"], 65, "no image in it"),
        (["calibrate", "{model}", "--images", "{tmp}", "--limit", "0"], 65, "--limit is 0"),
        (["calibrate", "{model}", "--images", "{tmp}", "--out", "{tmp}/no/s.toml"], 65, "there is no folder"),
        (["train", "{tmp}/none.toml"], 65, "no such file"),
        (["train", "{config}", "--set", "train.epoch=3"], 65, "unknown field epoch; did you mean epochs?"),
        (["train", "{config}"], 65, "records"),
        (["eval", "{config}"], 65, "nothing to evaluate"),
        (["eval", "{config}", "--benchmark", "a"], 65, "benchmark a: unknown; known are mmstar, "),
        (["eval", "{config}", "--benchmark", "mmstar={tmp}/junk.safetensors"], 65, "not a Parquet file"),
        (["eval", "{config}", "--benchmark", "a={tmp}/none.jsonl"], 65, "none.jsonl: no such file"),
        (["eval", "{config}", "--benchmark", "../x={tmp}/q.jsonl"], 65, "benchmark '../x': results are written under"),
        (["eval", "{config}", "--benchmark", "={tmp}/q.jsonl"], 65, "benchmark '': results are written under"),
        (["eval", "{config}", "--benchmark", "a=x.jsonl", "a=y.jsonl"], 65, "--benchmark a: given twice"),
        (["gates", "export", "{tmp}", "{tmp}/g.safetensors"], 65, "neither a run folder"),
        (["gates", "import", "{tmp}/none.pt", "{tmp}/g.safetensors"], 65, "none.pt"),
    ],
)
def test_errors_are_one_line_with_their_code(lsg, tiny_hf_folder, tiny_model, tmp_path, arguments, code, message):
    (tmp_path / "junk.safetensors").write_bytes(b"\x10" * 64)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    names = {"tmp": tmp_path, "hf": tiny_hf_folder, "model": tiny_model, "config": config_file(tmp_path, tiny_model)}
    before = sorted(tmp_path.rglob("*"))
    got, out, err = lsg(*(a.format(**names) for a in arguments))
    assert got == code and out == ""
    assert (
        message in err
        and err.count("\n") == 1
        and err.startswith(f"lsg {' '.join(arguments[: 2 if arguments[0] == 'gates' else 1])}: ")
    )
    left = {path for path in tmp_path.rglob("*") if path not in before}
    assert {path.name for path in left} <= {"run", "lock", "checkpoints"}  # an empty run folder at most


def test_verify_names_the_damage(lsg, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = model / "hf" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    code, out, err = lsg("verify", model)
    assert code == 65 and "tokenizer.json" in out and err.endswith("problem found\n")


def test_traceback_on_request(lsg):
    assert "Traceback" in lsg("inspect", "nowhere", "--traceback")[2]
