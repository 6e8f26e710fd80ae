"""The commands that write, each with the inputs and the output that the tests of stops and kills give it."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

RUN = """\
model = "{inputs}/model"
output = "run"

[gate]
layers = [{layers}]
{gate}
[sinks]
criterion = "norm"
vit_tau = 10.0

[data]
records = "{inputs}/records"
max_length = 256
max_answer_tokens = 8

[train]
batch_size = 2
epochs = 1
max_steps = 6
save_every = 2

[eval]
batch_size = 4
max_new_tokens = 4

[eval.benchmarks]
mine = "{inputs}/scenes/questions.jsonl"
"""
SINKS = "--sinks criterion=norm vit_tau=10.0 llm_criterion=norm llm_tau=12.0"
CAMBRIAN, IMAGES = "{inputs}/cambrian", "{inputs}/scenes/images"


@dataclass(frozen=True)
class Command:
    """A command, run in an empty folder; `{inputs}` in its arguments is the folder of `make_inputs`.

    Attributes:
        then_refused: it replaces no output, so once that is there the command is refused with 65.
        few: cheap enough for the tests of CI.
    """

    name: str
    arguments: str
    then_refused: bool = False
    few: bool = False

    def __str__(self):
        return self.name

    def argv(self, inputs):
        return self.arguments.format(inputs=inputs).split()


COMMANDS = [
    Command("convert", "convert {inputs}/hf out", then_refused=True, few=True),
    Command("convert-int8", "convert {inputs}/hf out --dtype int8", then_refused=True),
    Command("convert-adapter", "convert {inputs}/adapter out --base {inputs}/hf", then_refused=True),
    Command("export", "export {inputs}/model out", then_refused=True),
    Command("prepare", "prepare {inputs}/scenes/llava.jsonl out", then_refused=True, few=True),
    Command("cambrian", f"prepare --format cambrian --images {CAMBRIAN}/images --sample 40 {CAMBRIAN}/c.jsonl out", True),
    Command("clevr", "prepare --format clevr {inputs}/clevr out", then_refused=True),
    Command("paper", "prepare --format paper {inputs}/paper out", then_refused=True),
    Command("plant", "plant {inputs}/sinky out --layers 1 --scenes 8 --mark 1", then_refused=True),
    Command("train", "train {inputs}/run.toml"),
    Command("train-each", "train {inputs}/each.toml"),
    Command("train-seeds", "train {inputs}/run.toml --seeds 2"),
    Command("eval", "eval {inputs}/run.toml --gates {inputs}/run --out out"),
    Command("sweep", "sweep {inputs}/run.toml --coefficients 0.5,1.5 2,1 --batch-size 4 --out out"),
    Command("stack", "stack {inputs}/run.toml --gates {inputs}/g0.safetensors {inputs}/g1.safetensors --max-gates 2 --out out"),
    Command("ablate", "ablate {inputs}/run.toml --variants signal grouping --out out"),
    Command("probe", "probe {inputs}/model --data scenes --images 30 --draws 2 --tokens 4 --out out " + SINKS),
    Command("pointing", "pointing {inputs}/model --questions 6 --out out " + SINKS),
    Command("sinks", f"sinks {{inputs}}/model --images {IMAGES} --limit 3 --max-new-tokens 2 --out out {SINKS}"),
    Command("calibrate", "calibrate {inputs}/model --images {inputs}/scenes --limit 2 --out out.toml"),
    Command("look", "look {inputs}/model --image {inputs}/scenes/images/0.png --prompt Why? --max-new-tokens 3 --out out"),
    Command("gates-export", "gates export {inputs}/run out.safetensors", then_refused=True, few=True),
    Command("gates-import", "gates import {inputs}/published out.safetensors --layers 1", then_refused=True),
    Command("gates-combine", "gates combine {inputs}/g0.safetensors {inputs}/g1.safetensors --out out.safetensors", True),
    Command("report", "report {inputs}/run --out out.html", few=True),
    Command("quickstart", "quickstart --out out"),
]  # fmt: skip


def make_inputs(folder, *, model, hf, records, scenes):
    """Everything that the commands read, but for the trained run `{inputs}/run`."""
    for name in ("analysis", "data"):
        sys.path.append(str(Path(__file__).parents[1] / name))  # of the helpers below
    from test_cambrian import written
    from test_clevr import published, random_scenes
    from test_paper_records import by_path
    from test_stack import made_gates

    from converters.convert import convert
    from lsg_jax.gating.portable import write_gates

    sinky = shutil.copytree(hf, folder / "sinky-hf") / "config.json"
    sinky.write_text(json.dumps(json.loads(sinky.read_text()) | {"lsg_sinks": {"criterion": "norm", "vit_tau": 18.375}}))
    convert(folder / "sinky-hf", folder / "sinky")
    for name, source in {"hf": hf, "model": model, "records": records, "scenes": scenes}.items():
        shutil.copytree(source, folder / name)
    for name, layers in {"run": "1", "each": "0, 1"}.items():
        independent = "independent = true\n" * (name == "each")
        (folder / f"{name}.toml").write_text(RUN.format(inputs=folder, layers=layers, gate=independent))
    for name in ("adapter", "cambrian", "paper", "published"):
        (folder / name).mkdir()
    written(folder / "cambrian", count=200)
    published(folder / "clevr", random_scenes(), split="train")
    for number in range(12):
        shutil.copy(scenes / "images" / f"{number}.png", folder / "paper" / f"{number}.jpg")
    (folder / "paper" / "train.json").write_text(json.dumps([by_path(n) for n in range(12)]))
    for layer in (0, 1):
        write_gates(folder / f"g{layer}.safetensors", made_gates((layer,), seed=layer))
    shapes = {"0.weight": 64, "0.bias": 64, "1.weight": (64, 64), "1.bias": 64, "3.weight": (2, 64), "3.bias": 2}
    tensors = {f"sink_gates.0.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "published" / "gates.safetensors")
    module = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
    adapter = {f"{module}.lora_A.weight": np.ones((2, 64), np.float32), f"{module}.lora_B.weight": np.ones((64, 2), np.float32)}
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
