"""The device mesh, and the sharding of every parameter over it.

Axes: `data` replicates the model, `fsdp` shards parameters and batch, `tensor` splits heads and MLP width. In the vision tower
images are split over all three.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsg_jax.config import MeshConfig, ModelConfig, Part, TextConfig
from lsg_jax.errors import ConfigError
from lsg_jax.types import Batch, VisualInput

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the mesh axes that shard the rows of a batch
ALL = ("fsdp", "tensor")  # shard parameters whose computation is split by images or rows only

Axes = str | tuple[str, ...] | None

# (path, spec without the leading layer axis of stacked parameters); every parameter matches exactly one
_VISION = r"vision_tower/layers/"
_DECODER = r"language_model/layers/"
_PROJECTORS = r"(?:trained/\w+_|)projector/(?:deepstack/|)"
RULES: tuple[tuple[str, tuple[Axes, ...]], ...] = (
    (_DECODER + r"attention/[qkv]_proj/kernel", ("fsdp", "tensor", None)),
    (_DECODER + r"attention/[qkv]_proj/(?:bias|kernel_scale)", ("tensor", None)),
    (_DECODER + r"attention/o_proj/kernel", ("tensor", None, "fsdp")),
    (_DECODER + r"attention/o_proj/(?:bias|kernel_scale)", (None,)),
    (_DECODER + r"mlp/(?:gate|up)_proj/kernel", ("fsdp", "tensor")),
    (_DECODER + r"mlp/(?:gate|up)_proj/(?:bias|kernel_scale)", ("tensor",)),
    (_DECODER + r"mlp/down_proj/kernel", ("tensor", "fsdp")),
    (_DECODER + r"mlp/down_proj/(?:bias|kernel_scale)", (None,)),
    (_DECODER + r"(?:input|attention_out|post_attention|mlp_out)_norm/scale", (None,)),
    (_DECODER + r"attention/[qk]_norm/scale", (None,)),
    (_VISION + r"attention/[qkv]_proj/kernel", (ALL, None, None)),
    (_VISION + r"attention/[qkv]_proj/bias", (None, None)),
    (_VISION + r"attention/out_proj/kernel", (None, None, ALL)),
    (_VISION + r"attention/out_proj/bias", (None,)),
    (_VISION + r"attention/[qk]_norm/scale", (None,)),
    (_VISION + r"(?:fc1|gate_proj|up_proj)/kernel", (ALL, None)),
    (_VISION + r"(?:fc2|down_proj)/kernel", (None, ALL)),
    (_VISION + r"(?:fc[12]|gate_proj|up_proj|down_proj)/bias", (None,)),
    (_VISION + r"layer_norm[12]/(?:scale|bias)", (None,)),
    (_VISION + r"layer_scale[12]", (None,)),
    (r"vision_tower/patch_embedding/kernel", (None, None, None, ALL)),
    (r"vision_tower/patch_embedding/bias", (None,)),
    (r"vision_tower/position_embedding", (None, ALL)),
    (r"vision_tower/class_embedding", (None,)),
    (r"vision_tower/(?:pre|final)_norm/(?:scale|bias)", (None,)),
    (_PROJECTORS + r"norm/(?:scale|bias)", (None,)),
    (_PROJECTORS + r"linear_1/kernel", ("fsdp", "tensor")),
    (_PROJECTORS + r"linear_1/bias", ("tensor",)),
    (_PROJECTORS + r"linear_2/kernel", ("tensor", "fsdp")),
    (_PROJECTORS + r"linear_2/bias", (None,)),
    (r"image_newline", (None,)),
    (r"language_model/embed_tokens", ("tensor", "fsdp")),
    (r"language_model/norm/scale", (None,)),
    (r"language_model/lm_head/kernel", ("fsdp", "tensor")),
    (r"trained/(?!\w+_projector/).+", ()),
)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh over all devices.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = stated = [config.data, config.fsdp, config.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1:
        raise ConfigError(f"mesh: at most one size may be -1: {dict(zip(AXES, sizes, strict=True))}")
    if -1 in sizes:
        sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        asked = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, stated, strict=True))
        raise ConfigError(f"mesh: {asked} does not fit {len(devices)} devices: the sizes must multiply to that (-1 fills up)")
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


WEIGHTS_SHARE = 0.25  # of a device's memory: what weights take at most where a mesh for answering is chosen


def answering_mesh(
    config: MeshConfig | None, text: TextConfig, devices: list | None = None, *, weights: float, memory: float
) -> Mesh:
    """The mesh for prefill and decoding: without a `config`, as `tensor_size` says, the rest along `data`.

    Under FSDP every chip would gather all weights for each decoded token.

    Args:
        weights: bytes of the whole model.
        memory: bytes that programs may use on one device.
    """
    if config is not None:
        return make_mesh(config, devices)
    tensor = tensor_size(text, len(jax.devices() if devices is None else devices), weights=weights, memory=memory)
    return make_mesh(MeshConfig(data=-1, fsdp=1, tensor=tensor), devices)


def tensor_size(text: TextConfig, devices: int, *, weights: float, memory: float) -> int:
    """Neighbouring devices that hold the model together while it answers, of so many in all.

    The smallest number that divides the heads and leaves three quarters of each device's memory beside the weights, else the
    largest. Larger groups pass more from device to device for each question; smaller ones hold few questions at a time, for
    which all weights are read at every token.
    """
    sizes = [n for n in range(1, devices + 1) if devices % n == text.num_heads % n == text.num_kv_heads % n == 0]
    return next((size for size in sizes if weights / size <= memory * WEIGHTS_SHARE), sizes[-1])


def fitting_spec(shape: tuple[int, ...], axes: Iterable[Axes], mesh: Mesh) -> PartitionSpec:
    """A spec for an array of this shape. If the mesh axes do not divide a dimension, the last of them are dropped."""

    def fitting(size: int, names: Axes) -> Axes:
        names = (names,) if isinstance(names, str) else names or ()
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        return names[0] if len(names) == 1 else names or None

    return PartitionSpec(*(fitting(size, names) for size, names in zip(shape, axes, strict=False)))


def constrain(x: jax.Array, mesh: Mesh | None, *axes: Axes) -> jax.Array:
    """Constrains the sharding of the leading dimensions of a value; the others are not sharded."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fitting_spec(x.shape, axes, mesh)))


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec of one parameter. A dimension that the mesh does not divide is not sharded.

    Raises:
        ConfigError: no rule, or more than one, matches.
    """
    found = [spec for pattern, spec in RULES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise ConfigError(f"sharding: {len(found)} rules match parameter {path}, exactly one must")
    return fitting_spec(shape, (None,) * (len(shape) - len(found[0])) + found[0] if found[0] else (), mesh)


def shard_params(abstract: Any, mesh: Mesh) -> Any:
    """Nested dict of ShapeDtypeStruct -> the same with shardings."""

    def shard(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = param_spec("/".join(key.key for key in path), leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map_with_path(shard, abstract)


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Compiler options of XLA for a training step on a mesh; None for the defaults."""
    if mesh.devices.flat[0].platform != "tpu":
        return None
    # windowed einsums fetch gathered weights in thousands of small permutes, and move more bytes in total
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def abstract_batch(
    model: ModelConfig,
    mesh: Mesh,
    rows: int,
    length: int,
    *,
    tiles: int = 1,
    patches: int | None = None,
    answers: int | None = None,
) -> Batch:
    """Shapes and shardings of a batch of examples with an image each, of `rows` over all devices.

    Args:
        tiles: squares, or native images, that the vision tower sees of each row.
        patches: that a native image is filled up to; None for those of `vision.image_size`.
        answers: answer slots; None for questions.
    """
    vision, sharding, count = model.vision, batch_sharding(mesh), model.sources_per_token
    of = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)
    each = patches if vision.native and patches is not None else vision.num_patches
    images = VisualInput(of(np.uint8, tiles, each, vision.patch_values))
    if vision.native:
        images = dataclasses.replace(images, used=of(np.bool_, tiles, each), place=of(np.int32, tiles, each, 2))
    if vision.table_side is not None:
        table = of(np.int32, tiles, each, 4)
        images = dataclasses.replace(images, table=table, table_weight=of(np.float32, *table.shape[1:]))
    batch = Batch(
        input_ids=of(np.int32, length),
        attention_mask=of(np.bool_, length),
        gate_position=of(np.int32),
        images=images,
        source=of(np.int32, length, count),
        weight=None if count == 1 else of(np.float32, length, count),
        positions=of(np.int32, length, 3) if model.text.rope.sections else None,
        block=of(np.int32, length) if model.text.images_see_themselves else None,
    )
    if answers is None:
        return batch
    slots = of(np.int32, answers)
    return dataclasses.replace(batch, answer_index=slots, answer_target=slots, row_id=of(np.int32))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Shardings of a training state: trained parameters and their optimiser moments as `param_spec` says.

    Gates and counters are replicated.
    """

    def of(path: tuple, leaf: Any) -> NamedSharding:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        roots = [i for i, name in enumerate(names) if name in ("trained", *typing.get_args(Part))]
        parameter = "/".join(names[roots[-1] :]) if roots else ""
        return NamedSharding(mesh, param_spec(parameter, leaf.shape, mesh) if "/" in parameter else PartitionSpec())

    return jax.tree.map_with_path(of, state)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device: gates, metrics."""
    return NamedSharding(mesh, PartitionSpec())


def batch_rows(mesh: Mesh | None) -> int:
    """Number of shards of a batch."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def local_rows(mesh: Mesh | None, size: int) -> list[int]:
    """The rows of a batch of `size` that this process must provide."""
    if mesh is None:
        return list(range(size))
    found: set[int] = set()
    for index in batch_sharding(mesh).addressable_devices_indices_map((size,)).values():
        found.update(range(size)[index[0]])  # type: ignore[index]
    return sorted(found)


def place_rows(local: Any, mesh: Mesh | None, size: int) -> Any:
    """The rows of `local_rows`, a pytree of host arrays [len(rows), ...] -> global arrays [size, ...] on the mesh."""
    if mesh is None:
        return local
    sharding, where = batch_sharding(mesh), {row: i for i, row in enumerate(local_rows(mesh, size))}

    def place(leaf: np.ndarray) -> jax.Array:
        def part(index: Any) -> Any:
            start, stop, _ = index[0].indices(size)  # the rows of a device are contiguous in `local` too
            return leaf[where[start] : where[start] + stop - start]

        return jax.make_array_from_callback((size, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(place, local)
