"""Model folders -> checkpoints in Hugging Face format."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.blocks import pieces
from converters.convert import CARRIED, check_free
from converters.ops import Shape
from converters.quantize import dequantize, scale_of
from converters.reader import INDEX, SAFETENSORS, SafetensorsSource
from converters.rules import Part, layout_of
from converters.safetensors_writer import SafetensorsWriter
from lsg_jax.checkpoint import Manifest, hf_problems, iter_base, read_manifest, read_run, read_step
from lsg_jax.config import is_scale
from lsg_jax.errors import CheckpointError, InputError
from lsg_jax.files import new_folder
from lsg_jax.json_files import read_object
from lsg_jax.progress import Progress, silent

SHARD_BYTES = 5_000_000_000  # what transformers writes


def export(
    model_dir: str | Path,
    hf_dir: str | Path,
    *,
    dtype: str | None = None,
    trained: Mapping[str, np.ndarray] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> None:
    """Writes a model folder as a checkpoint in Hugging Face format, under the original tensor names.

    If the model was converted at the dtype of its source and nothing is `trained`, every tensor has its original bytes. 8-bit
    weights are multiplied by their scales: the values that the model computes with, not those of its source. Buffers that the
    conversion dropped (`ignored` in the manifest) are not written. Memory stays bounded; the folder appears once complete.

    Args:
        model_dir: made by `convert`.
        hf_dir: the folder to make; must not exist, or be empty.
        dtype: bfloat16 or float32; None for that of the embeddings. float32 holds 8-bit weights exactly, bfloat16 rounds them.
        trained: path -> leaf that replaces the model's, rounded to its dtype; see `trained_leaves`.
        shard_bytes: the largest size of one weight file.
        progress: counts bytes, after each block.

    Raises:
        InputError: no model at `model_dir`, or `hf_dir` exists.
        CheckpointError: the model is damaged, or a write failed.
    """
    model, target = Path(model_dir), Path(hf_dir)
    check_free(target)
    manifest = read_manifest(model)
    with new_folder(target) as work:
        for problem in hf_problems(model, manifest, manifest.hf):
            raise CheckpointError(f"{model}: damaged: {problem}; convert the model again")
        _Export(model, manifest, dtype, shard_bytes, trained or {}).write(work, progress)


def trained_leaves(model_dir: str | Path, run: str | Path) -> dict[str, np.ndarray]:
    """Path -> leaf of everything that a run of method `full` has trained.

    Raises:
        InputError: no such run, or one of another method. CheckpointError: a run of another model.
    """
    record = read_run(run, backbone=read_manifest(model_dir).digest)
    if (held := record.method) != "full":
        raise InputError(f"{run}: what was trained there is {held}; only a run of method full changes the model itself")
    parts = read_step(run)[1]["trained"]
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(parts)}


class _Export:
    """An export, planned from the manifest.

    Attributes:
        parts: (leaf, layer) -> part. tensors: canonical name -> (shape, dtype name). shards: file name -> canonical names.
    """

    def __init__(self, model: Path, manifest: Manifest, dtype: str | None, shard_bytes: int, trained: Mapping[str, np.ndarray]):
        self.model, self.manifest, self.trained = model, manifest, trained
        for name, leaf in trained.items():
            known = manifest.leaves[name].shape if name in manifest.leaves else None
            if known != leaf.shape:
                raise CheckpointError(f"{model}: trained leaf {name} {leaf.shape} does not fit {known}")
        self.names, self.repeats, self.carried = manifest.names, manifest.repeats, bool(manifest.carried)
        self.dtype = dtype or manifest.leaves["language_model/embed_tokens"].dtype
        self.scales = {(name, layer): scale[0] for name, layer, scale in iter_base(model, wanted=is_scale)}
        plain = layout_of(manifest.config, self.names)
        self.parts: dict[tuple[str, int | None], Part] = {(part.leaf, part.layer): part for part in plain.parts}
        self.tensors: dict[str, tuple[Shape, str]] = {name: (shape, self.dtype) for name, shape in plain.tensors.items()}
        self.tensors |= {name: self.tensors[other] for name, other in self.repeats.items()}
        if self.carried:
            self.carried_source = SafetensorsSource([model / "hf" / CARRIED])
            self.tensors |= {name: (t.shape, t.dtype.name) for name, t in self.carried_source.tensors.items()}
        if absent := sorted(self.tensors.keys() - self.names.keys()):
            raise CheckpointError(f"{model}: its manifest has no original name for {', '.join(absent[:8])}")
        self.shards = self._shards(shard_bytes)

    def write(self, folder: Path, progress: Progress) -> None:
        total, done = sum(map(_nbytes, self.tensors.values())), 0
        with ExitStack() as stack:
            writers: dict[str, SafetensorsWriter] = {}
            for file, members in self.shards.items():
                contents = {self.names[name]: self.tensors[name] for name in members}
                writer = stack.enter_context(SafetensorsWriter(folder / file, contents))
                writers |= dict.fromkeys(members, writer)
            for leaf, offset, block in iter_base(self.model, wanted=lambda name: not is_scale(name)):
                if leaf in self.trained:
                    block = self.trained[leaf][offset : offset + len(block)].astype(block.dtype)
                if block.dtype == np.int8:
                    block = dequantize(block, self.scales[scale_of(leaf), offset])
                block = block.astype(self.dtype, copy=False)
                done += self._put(writers, leaf, offset, block)
                progress(done >> 20, total >> 20, "MiB")
            if self.carried:
                for name in self.carried_source.tensors:
                    for row, values in pieces(self.carried_source, name):
                        writers[name].put(self.names[name], values.reshape(len(values), -1), row)
                self.carried_source.close()
        self._write_index(folder)
        self._copy_files(folder)

    def _put(self, writers: dict[str, SafetensorsWriter], leaf: str, offset: int, block: np.ndarray) -> int:
        """Writes one block of a leaf to all its tensors; a tied head may be a second one. Returns the bytes written."""
        if (leaf, None) in self.parts:
            part, start = self.parts[leaf, None], offset
        else:
            part, start, block = self.parts[leaf, offset], 0, block[0]
        matrix, row, column = part.op.invert(block, start)
        names = [part.source, *(name for name, other in self.repeats.items() if other == part.source)]
        for name in names:
            writers[name].put(self.names[name], matrix, part.first_row + row, column)
        return len(names) * block.nbytes

    def _shards(self, limit: int) -> dict[str, list[str]]:
        """File name -> canonical names, filled in order up to the limit."""
        groups: list[list[str]] = [[]]
        size = 0
        for name in sorted(self.tensors, key=lambda n: self.names[n]):
            nbytes = _nbytes(self.tensors[name])
            if groups[-1] and size + nbytes > limit:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += nbytes
        if len(groups) == 1:
            return {SAFETENSORS: groups[0]}
        return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}

    def _write_index(self, folder: Path) -> None:
        if len(self.shards) == 1:
            return
        index = {
            "metadata": {"total_size": sum(map(_nbytes, self.tensors.values()))},
            "weight_map": {self.names[name]: file for file, members in self.shards.items() for name in members},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _copy_files(self, folder: Path) -> None:
        for name in self.manifest.hf.keys() - {CARRIED}:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.model / "hf" / name, folder / name)
        if any(self.manifest.dtypes[name] != self.dtype for name in self.tensors if name not in self.manifest.carried):
            config = read_object(folder / "config.json")
            _state_dtype(config, self.dtype)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _state_dtype(config: dict[str, Any], dtype: str) -> None:
    """Replaces the dtype wherever a configuration states one, under either name; at the top level it is always stated."""
    if "torch_dtype" not in config:
        config["dtype"] = dtype
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for name in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and name in part:
                part[name] = dtype


def _nbytes(tensor: tuple[Shape, str]) -> int:
    return math.prod(tensor[0]) * np.dtype(tensor[1]).itemsize
