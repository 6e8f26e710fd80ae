"""Conversion and export at the true tensor shapes of LLaVA-1.5 7B stay below 1 GiB, and give back the same bytes."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import LLAVA_7B, write_random_bf16

from converters.families import rules_of
from converters.hf_config import model_config
from converters.rules import layout

SCRIPT = """
import re, sys
from converters.convert import convert
from converters.export import export
hf, model, back = sys.argv[1:]
convert(hf, model)
export(model, back)
# not ru_maxrss, which a child inherits from the process that started it
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 2**20)
"""


@pytest.fixture
def folder(tmp_path: Path):
    """A place for some GB, emptied at the end."""
    yield tmp_path
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def write_checkpoint(folder: Path, *, vision_layers: int, text_layers: int) -> None:
    """LLaVA-1.5 7B with fewer layers, in two bfloat16 shards."""
    config = copy.deepcopy(LLAVA_7B)
    config["vision_config"]["num_hidden_layers"] = vision_layers
    config["text_config"]["num_hidden_layers"] = text_layers
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    wanted = model_config(config)
    tensors = layout(wanted, rules_of(wanted)).tensors
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for seed, (file, members) in enumerate(shards.items()):
        write_random_bf16(folder / file, {name: tensors[name] for name in members}, seed)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def peak_of_convert_and_export(*folders: Path) -> float:
    """The peak of resident memory, in GiB, of a process that converts and exports."""
    root, command = Path(__file__).resolve().parents[2], [sys.executable, "-c", SCRIPT, *map(str, folders)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return float(result.stdout.splitlines()[-1])


def same_data(first: Path, second: Path) -> bool:
    """Compares two safetensors folders tensor by tensor without holding more than one row range."""
    from converters.blocks import equal_tensors
    from converters.reader import open_source

    a, b = open_source(first), open_source(second)
    both = _Both(a, b)
    return a.tensors.keys() == b.tensors.keys() and all(equal_tensors(both, f"a {name}", f"b {name}") for name in a.tensors)


class _Both:
    """Two sources as one, for `equal_tensors`."""

    def __init__(self, a, b):
        self.tensors = {f"a {n}": t for n, t in a.tensors.items()} | {f"b {n}": t for n, t in b.tensors.items()}
        self.files = (*a.files, *b.files)
        self._of = {"a": a, "b": b}

    def rows(self, name, start, stop):
        which, original = name.split(" ", 1)
        return self._of[which].rows(original, start, stop)

    def close(self):
        pass


def test_convert_and_export_below_1_gib(folder: Path) -> None:
    write_checkpoint(folder / "hf", vision_layers=1, text_layers=1)
    weights = sum(file.stat().st_size for file in (folder / "hf").glob("*.safetensors")) / 2**30
    peak = peak_of_convert_and_export(folder / "hf", folder / "model", folder / "back")
    print(f"{weights:.2f} GiB of weights, peak {peak:.2f} GiB")
    assert peak < 1 and weights > 0.9  # a process without any weights has 0.2 GiB
    assert same_data(folder / "hf", folder / "back")
