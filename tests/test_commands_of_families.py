"""The commands of the tutorial on a tiny model of each of the later families, with images of many sizes."""

import json

import numpy as np
import pytest
from family_models import image_processor, save_family, tiny_family
from PIL import Image
from safetensors.numpy import load_file

import lsg_jax
from lsg_jax.cli import main
from lsg_jax.config import EvalConfig
from lsg_jax.data.layout import lay_out
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmarks.questions import QUESTIONS
from lsg_jax.eval.likelihood import log_likelihoods
from tests.data import published_templates

SIZES = [(60, 200), (200, 60), (77, 90), (3, 2)]  # width, height; the first two have as many tokens
MIXED = [("How many?", (0,)), ("Is <image> like <image>?", (2, 3)), ("And now?", ()), ("How many?", (1,))]
TEMPLATES = {
    "qwen2_5_vl": published_templates.QWEN2_VL,
    "internvl-qwen3": published_templates.INTERNVL,
    "gemma3": published_templates.GEMMA3,
    "smolvlm": published_templates.SMOLVLM,
}
TAU = {"qwen2_5_vl": 3.0, "qwen3_vl": 2.0, "internvl-qwen3": 1.0, "gemma3": 3.0, "smolvlm": 1.0}
"""A threshold that some of the patches reach."""
KINDS = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"]}}


CONFIG = """
model = "{model}"
output = "{out}/run"
[gate]
layers = "each"
[data]
records = "{out}/prepared"
max_length = 256
max_answer_tokens = 8
[train]
batch_size = 2
max_steps = 1
learning_rate = 0.05
[eval]
max_new_tokens = 4
batch_size = 2
[eval.benchmarks]
mine = "{questions}"
"""


@pytest.fixture(scope="module", params=TAU)
def folder(request, tmp_path_factory):
    """A model that was converted, pictures, and questions about them."""
    name = request.param
    root = tmp_path_factory.mktemp("family") / name
    hf = tiny_family(name, text_config={"num_hidden_layers": 2, **KINDS.get(name, {})})
    save_family(name, hf, root / "hf")
    stated = json.loads((root / "hf/config.json").read_text())
    sinks = {"vit_dims": [3], "vit_tau": TAU[name], "llm_dims": [5], "llm_tau": 3.0}
    (root / "hf/config.json").write_text(json.dumps({**stated, "lsg_sinks": sinks}))
    if name in TEMPLATES:
        (root / "hf/chat_template.jinja").write_text(TEMPLATES[name])
    lsg("convert", root / "hf", root / "model")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for index, (width, height) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(root / f"images/{index}.png")
    files = {"questions": [], "records": [], "mixed": []}
    for index in (0, 1):
        common = {"id": str(index), "image": f"images/{index}.png"}
        files["questions"].append(common | {"question": "How many?", "answer": "two", "category": str(index)})
        turns = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "two"}]
        files["records"].append(common | {"conversations": turns})
    for index, (question, shown) in enumerate(MIXED):
        images = [f"images/{image}.png" for image in shown]
        files["mixed"].append({"id": str(index), "question": question, "answer": "two", "images": images})
    for file, rows in files.items():
        (root / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def lsg(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


STUDIED = {"qwen3_vl"}
"""Families whose gates are stacked, and whose coefficients are swept, by default: deepstack adds to layers inside."""
ASKED = {"qwen2_5_vl", "smolvlm"}
"""Families of which single questions are compared with batches by default: one of native sizes, one of tiles."""


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["short", "long"])
def test_from_a_checkpoint_to_a_report(folder, tmp_path, capfd, long):
    """Every family is trained, evaluated, exported and reported; `pytest -m soak` has studies and single answers of all."""
    name, model, config = folder.name, folder / "model", tmp_path / "run.toml"
    config.write_text(CONFIG.format(model=model, out=tmp_path, questions=folder / "questions.jsonl"))
    lsg("verify", model)
    capfd.readouterr()
    lsg("inspect", model, "--json")
    assert json.loads(capfd.readouterr().out)["sink dimensions"]["V-sinks"]["dims"] == [3]
    lsg("prepare", folder / "records.jsonl", tmp_path / "prepared", "--images", folder)
    lsg("train", config)
    lsg("eval", config, "--gates", f"{tmp_path}/run@1", "--out", tmp_path / "eval")
    if long or name in STUDIED:
        lsg("sweep", config, "--out", tmp_path / "sweep", "--layers", 1, "--coefficients", "0,1", "1,1")
        cells = json.loads((tmp_path / "sweep/sweep.json").read_text())["rows"]
        assert {tuple(row["coefficients"]) for row in cells} >= {(0, 1), (1, 1)}
        lsg("stack", config, "--gates", tmp_path / "run", "--max-gates", 1, "--out", tmp_path / "stack")
        assert len(json.loads((tmp_path / "stack/stack.json").read_text())["singles"]) == 2
    lsg("gates", "export", f"{tmp_path}/run@1", tmp_path / "gates.safetensors")
    lsg("export", model, tmp_path / "back")
    theirs, ours = (load_file(where / "model.safetensors") for where in (folder / "hf", tmp_path / "back"))
    assert all(np.array_equal(ours[name], tensor) for name, tensor in theirs.items())
    assert (tmp_path / "back/config.json").read_bytes() == (folder / "hf/config.json").read_bytes()
    lsg("report", tmp_path, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Evaluation" in page and ("Oracle sweep" in page) == (tmp_path / "sweep").exists()
    if long or name in ASKED:
        asked_alone_and_together(folder, tmp_path / "gates.safetensors", capfd)


def asked_alone_and_together(folder, gates, capfd):
    """What is asked one by one, and in a batch with other questions, is answered alike."""
    gated = lsg_jax.load(folder / "model", gates)
    items = QUESTIONS.read(str(folder / "mixed.jsonl"))
    prompts = [QUESTIONS.prompt(item, "paper") for item in items]
    found = [log_likelihoods(gated, items, prompts, ["two"] * 4, EvalConfig(batch_size=size)) for size in (2, 1)]
    together, alone = ([value for value, _ in each] for each in found)
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert len({round(value, 3) for value in alone}) == 4
    ask = ["generate", folder / "model", "--gates", gates, "--max-new-tokens", 4, "--prompt", prompts[1]]
    capfd.readouterr()
    lsg(*ask, "--image", folder / "images/2.png", "--image", folder / "images/3.png")
    shown = [[folder / f"images/{image}.png" for image in images] for _, images in MIXED]
    assert capfd.readouterr().out.strip() == gated.generate(shown, prompts, 4)[1]


def test_sinks_are_tokens_one_of_whose_patches_is_one(folder, capfd):
    name, vlm = folder.name, lsg_jax.load(folder / "model")
    files = [folder / f"images/{index}.png" for index in (0, 1)]
    answer = 2 if name == "gemma3" else 0  # V-sinks need none
    lsg("sinks", folder / "model", "--images", *files, "--out", folder / "sinks", "--max-new-tokens", answer)
    capfd.readouterr()
    found = json.loads((folder / "sinks/sinks.json").read_text())
    flagged = 0
    for file, size in zip(files, SIZES[:2], strict=True):
        entry, layout = found["images"][str(file)], lay_out(size, vlm.config)
        count, each = len(layout), vlm.config.merge**2
        assert len(entry["boxes"]) == count and len(entry["patches"]["boxes"]) == count * each
        assert entry["v_sinks"] == sorted({patch // each for patch in entry["patches"]["v_sinks"]})
        assert patches_of(name, vlm, file, layout) == entry["patches"]["v_sinks"]
        for boxes in (np.array(entry["boxes"]), np.array(entry["patches"]["boxes"])):
            assert boxes.min() > -1e-6 and boxes.max() < 1 + 1e-6
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1).sum()  # of the tiles, and of the whole image where it is one more
            assert np.isclose(areas, 1 + (layout.tiles > 1), atol=1e-4)
        flagged += len(entry["v_sinks"]) / count
        assert (folder / f"sinks/marked/{file.stem}.png").is_file()
    assert 0 < flagged < 2
    assert np.isclose(found["criteria"]["vit"]["dim_abs"]["share"], flagged / 2, atol=1e-4)
    assert found["criteria"]["vit"]["norm"]["verdict"] == "flags none"
    thin = folder / "images/thin.png"
    Image.new("RGB", (450, 1)).save(thin)
    capfd.readouterr()
    lsg("calibrate", folder / "model", "--images", folder / "images", "--out", folder / "sinks.toml")
    if vlm.config.vision.native:
        reason = "an image of 450 x 1 pixels is too thin: this model takes aspects of up to 200:1; crop it"
        assert f"skipped: {thin}: {reason}\n" in capfd.readouterr().err
        asked = ["sinks", str(folder / "model"), "--images", str(files[0]), str(thin)]
        assert main(asked) == 65 and f"lsg sinks: {thin}: {reason}" in capfd.readouterr().err
        with pytest.raises(InputError, match=f"prompt 1: image 2 of 2: {reason}"):
            vlm.generate([[files[0], thin]], ["Which?"])


def patches_of(name, vlm, file, layout):
    """V-sinks among the patches that tokens stand for, from `VLM.v_sinks` of what HF's image processor returns."""
    with Image.open(file) as image:
        made = dict(image_processor(name)([[image]] if name == "smolvlm" else [image], return_tensors="np"))
    if vlm.config.vision.native:  # patches come square by square there
        return np.flatnonzero(vlm.v_sinks(made["pixel_values"], made["image_grid_thw"])).tolist()
    side = vlm.config.vision.image_size // vlm.config.vision.patch_size // vlm.config.merge
    marks = vlm.v_sinks(made["pixel_values"]).reshape(layout.tiles, side, vlm.config.merge, side, vlm.config.merge)
    return np.flatnonzero(marks.swapaxes(2, 3)).tolist()
