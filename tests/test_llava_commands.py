"""The commands on a tiny LLaVA-NeXT, OneVision and ViP-LLaVA, with images of many sizes."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from hf_models import save_tiny, tiny_hf
from PIL import Image

import lsg_jax
from converters.convert import convert
from lsg_jax.answer_programs import read_first, read_rest
from lsg_jax.cli import main
from lsg_jax.config import EvalConfig, GateConfig
from lsg_jax.data.layout import lay_out
from lsg_jax.errors import InputError
from lsg_jax.eval.answering import answer
from lsg_jax.eval.batches import batches, encode_item
from lsg_jax.eval.benchmarks.questions import QUESTIONS
from lsg_jax.eval.image_files import ImageFile
from lsg_jax.gating.portable import PortableGates, write_gates
from lsg_jax.methods.gates import Gates

PINPOINTS = [[42, 84], [84, 42], [84, 84], [42, 126]]
SIZES = [(60, 200), (200, 60), (77, 90), (42, 42), (300, 101), (99, 100)]  # width, height
MIXED = [("How many?", 0), ("How many?", 1), ("Is <image> like <image>?", 2), ("Which?", 3)]  # question, images
SINKS = {"vit_dims": [3], "vit_tau": 1.2, "llm_dims": [5], "llm_tau": 3.0}


TILES = {"image_grid_pinpoints": PINPOINTS}
FAMILIES = {
    "next": ("clip", "llama", TILES),
    "onevision": ("siglip", "qwen2", TILES | {"vision_aspect_ratio": "anyres_max_1", "vision_feature_layer": -1}),
    "vipllava": ("clip", "llama", {"vision_feature_layer": [-2, 1], "projector_layernorm_eps": 1e-5}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A model, twelve pictures of six sizes, questions about them, and a configuration."""
    root = tmp_path_factory.mktemp(request.param)
    vision, text, settings = FAMILIES[request.param]
    hf = tiny_hf(vision, text, text_config={"max_position_embeddings": 1024}, **settings)
    save_tiny(hf, root / "hf")
    stated = json.loads((root / "hf/config.json").read_text())
    (root / "hf/config.json").write_text(json.dumps({**stated, "lsg_sinks": SINKS}))
    convert(root / "hf", root / "model")
    (root / "images").mkdir()
    rng, questions, records = np.random.default_rng(0), [], []
    for index in range(12):
        width, height = SIZES[index % len(SIZES)]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(root / f"images/{index}.png")
        common = {"id": str(index), "image": f"images/{index}.png"}
        questions.append(common | {"question": "How many?", "answer": "two", "category": str(index % 2)})
        turns = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "two"}]
        records.append(common | {"conversations": turns})
    for name, rows in {"questions": questions, "records": records}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "run.toml").write_text(
        f'model = "{root / "model"}"\noutput = "{root / "run"}"\n[gate]\nlayers = [1, 3]\n'
        f'[data]\nrecords = "{root / "prepared"}"\nmax_length = 256\nmax_answer_tokens = 8\n'
        "[train]\nbatch_size = 4\nmax_steps = 2\nlearning_rate = 0.05\n"
        f'[eval]\nmax_new_tokens = 4\nbatch_size = 4\n[eval.benchmarks]\nmine = "{root / "questions.jsonl"}"\n'
    )
    return root


def lsg(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def answers(path):
    """Output of each question, by its id."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["id"]: row["output"] for row in rows}


@pytest.fixture(scope="module")
def prepared(folder):
    lsg("prepare", folder / "records.jsonl", folder / "prepared", "--images", folder)


@pytest.mark.parametrize("folder", ["next", "onevision"], indirect=True)
def test_trained_and_evaluated(folder, prepared, capfd):
    short = ["--set", "data.max_length=14", f"output={folder / 'short'}"]
    assert main(["train", str(folder / "run.toml"), *short]) == 65
    assert (
        "no example is usable: 12 of 12 examples are left out (image_truncated 12); raise data.max_length"
        in capfd.readouterr().err
    )
    lsg("train", folder / "run.toml")
    before = read_first._cache_size(), read_rest._cache_size()
    lsg("eval", folder / "run.toml", "--out", folder / "eval")
    shapes, of_gates = read_first._cache_size() - before[0], read_rest._cache_size() - before[1]
    assert shapes == of_gates
    assert shapes <= 4  # six sizes: (3 or 4, 5) tiles x (up to 64, 128) tokens
    if folder.name.startswith("onevision"):  # the more general of the two
        devices = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
        command = [sys.executable, "-m", "lsg_jax", "eval", folder / "run.toml", "--out", folder / "devices"]
        subprocess.run([*command, "--set", "eval.limit=3"], env=os.environ | devices, check=True)  # of two shapes
        some, every = (answers(folder / where / "mine.lsg.jsonl") for where in ("devices", "eval"))
        assert len(some) == 3 and some.items() <= every.items()
    result = json.loads((folder / "eval/result.json").read_text())
    assert result["ratios"] and all(row["questions"] == 6 or row["questions"] == 12 for row in result["ratios"])


@pytest.fixture(scope="module")
def mixed(folder):
    """Questions with none to three of the pictures."""
    rows = []
    for i in range(12):
        text, count = MIXED[i % len(MIXED)]
        names = [f"images/{(i + k) % 12}.png" for k in range(count)]
        rows.append({"id": str(i), "question": text, "answer": "two", "images": names})
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = QUESTIONS.read(str(folder / "mixed.jsonl"))
    return items, [QUESTIONS.prompt(item, "paper") for item in items]


@pytest.mark.parametrize("folder", ["next", "onevision"], indirect=True)
def test_answers_about_any_number_of_images_do_not_depend_on_the_batch(folder, mixed, capfd):
    vlm, method = lsg_jax.load(folder / "model"), Gates(GateConfig(layers=(1, 3)))
    start = method.initial(vlm.config, vlm.frozen, jax.random.key(0))
    moved = jax.tree.map(lambda leaf: np.asarray(leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape)), start)
    write_gates(folder / "gates.safetensors", PortableGates(method.gate, vlm.config.sinks, moved))
    gated = lsg_jax.load(folder / "model", folder / "gates.safetensors")
    items, prompts = (rows[:6] for rows in mixed)  # each number of images is there, and two of them twice
    found = [answer(gated, items, prompts, EvalConfig(batch_size=size), max_new_tokens=4) for size in (4, 1)]
    texts = [[each.text for each in run] for run in found]
    assert texts[0] == texts[1] and len(set(texts[0])) > 3
    assert [each.ratios is None for each in found[0]] == [not item.images for item in items]
    ask = ["generate", folder / "model", "--gates", folder / "gates.safetensors", "--max-new-tokens", 4]
    shown = [folder / f"images/{k}.png" for k in (2, 3)]
    lsg(*ask, "--prompt", prompts[2], "--image", shown[0], "--image", shown[1])
    assert capfd.readouterr().out.strip() == texts[0][2]
    assert main([*map(str, ask), "--prompt", "a <image>", "--image", *map(str, shown)]) == 65
    assert "1 <image> tag in the text for 2 images; write one for each image, or none" in capfd.readouterr().err


def test_each_image_is_read_once_and_few_are_held(folder, mixed):
    """Its size and its pixels come from one reading, and reading does not run far ahead of the batches."""
    items, prompts = mixed
    reads = []

    @dataclasses.dataclass(frozen=True)
    class Counted:
        source: object

        def read(self):
            reads.append(self.source.path.name)
            return self.source.read()

    many = [dataclasses.replace(item, images=tuple(map(Counted, item.images))) for item in items] * 20
    processor = lsg_jax.load(folder / "model").processor
    encode = lambda i, sizes: encode_item(processor, items[i % 12], prompts[i % 12], sizes, 512)
    asked = batches(processor, many, range(len(many)), encode, size=lambda bucket: 3, mesh=None, threads=1)
    first = next(asked)
    assert len(reads) < 60  # of 360
    for batch in (first, *asked):
        assert len({batch.encoded[i].tiles for i in batch.members}) == 1
        assert [0 if p is None else len(p) for p in batch.pixels] == [batch.encoded[i].num_tiles for i in batch.members]
    assert sorted(reads) == sorted(image.path.name for item in items for image in item.images * 20)
    broken = [dataclasses.replace(item, images=(ImageFile(folder / "mixed.jsonl"),) * len(item.images)) for item in items]
    with pytest.raises(InputError, match=r"question 1: .*mixed\.jsonl: image: not an image"):
        list(batches(processor, broken, range(12), encode, size=lambda bucket: 3, mesh=None, threads=2))


@pytest.mark.parametrize("folder", ["onevision"], indirect=True)  # the most general
def test_studies_run_and_are_reported(folder, prepared):
    config = folder / "run.toml"
    each = ["gate.layers=each", "train.remat=full", "train.max_steps=1", f"output={folder / 'each'}"]
    lsg("train", config, "--set", *each)
    few = ["--set", "eval.limit=3"]  # of two shapes
    lsg("stack", config, "--gates", folder / "each", "--max-gates", 1, "--out", folder / "stack", *few)
    assert len(json.loads((folder / "stack/stack.json").read_text())["singles"]) == 5
    lsg("sweep", config, "--out", folder / "sweep", "--layers", 1, 3, "--coefficients", "0,1", "1,1", *few)
    sweep = json.loads((folder / "sweep/sweep.json").read_text())
    assert len(sweep["rows"]) > 0
    lsg("probe", folder / "model", "--data", "scenes", "--images", 60, "--draws", 2, "--tokens", 2, "--out", folder / "probe")
    lsg("report", folder, "--out", folder / "report.html")
    assert "sweep" in (folder / "report.html").read_text()


def test_sinks_lie_on_the_original_image(folder, capfd):
    chosen = (0, 2)  # of different shapes
    files = [folder / f"images/{index}.png" for index in chosen]
    answer = 2 if folder.name.startswith("vipllava") else 0  # V-sinks need none
    lsg("sinks", folder / "model", "--images", *files, "--out", folder / "sinks", "--max-new-tokens", answer)
    found = json.loads(capfd.readouterr().out)["images"]
    vlm = lsg_jax.load(folder / "model")
    for file, index in zip(files, chosen, strict=True):
        entry, layout = found[str(file)], lay_out(SIZES[index], vlm.config)
        assert len(entry["boxes"]) == len(entry["norms"]) == (layout.source[:, 0] >= 0).sum()
        with Image.open(file) as image:
            encoded = vlm.processor.encode_question("x", image_sizes=[image.size])
            batch = vlm.pad_questions([encoded], [vlm.processor.pixels(image)])
        marked = np.asarray(_marked(vlm, batch))
        assert entry["v_sinks"] == np.flatnonzero(marked).tolist()
        assert 0 < len(entry["v_sinks"]) < len(marked)
    lsg("calibrate", folder / "model", "--images", folder / "images", "--limit", 3, "--out", folder / "sinks.toml")


def _marked(vlm, batch):
    """V-sinks of the tokens of one row, in the order of the sequence."""
    tiles = vlm.config.vision
    patches = np.asarray(batch.images.patches, np.float32) / 255
    image = (patches.reshape(*patches.shape[:3], -1, 3) - vlm.config.image.mean) / vlm.config.image.std
    side, size = tiles.image_size // tiles.patch_size, tiles.patch_size
    grid = image.reshape(*patches.shape[:2], side, side, size, size, 3).swapaxes(3, 4)
    pixels = grid.reshape(*patches.shape[:2], tiles.image_size, tiles.image_size, 3).transpose(0, 1, 4, 2, 3)
    members = batch.source[0, batch.source[0, :, 0] >= 0]
    marks = vlm.v_sinks(pixels if vlm.config.image.canvases else pixels[0])[0]
    return (marks[members] & (members >= 0)).any(1)
