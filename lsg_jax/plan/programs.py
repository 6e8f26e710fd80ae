"""The programs of a run as they are compiled on a mesh, at true size, with shapes in the place of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsg_jax.analysis.sweep import coefficient_grid
from lsg_jax.analysis.sweep_cells import answer_cells, run_prompts
from lsg_jax.answer_programs import answer_batch, read_batch
from lsg_jax.config import GateConfig, ModelConfig
from lsg_jax.data.layout import longest_layout, most_patches, most_tiles, tile_bucket
from lsg_jax.errors import ConfigError
from lsg_jax.eval.batches import Bucket
from lsg_jax.eval.sizes import abstract_questions, abstract_results
from lsg_jax.look.compute import observe, reading
from lsg_jax.methods.gates import Gates
from lsg_jax.methods.method import BASE, Method
from lsg_jax.methods.method_model import TRAINED, abstract_model, assemble
from lsg_jax.methods.registry import name_of
from lsg_jax.model.loss import answer_loss
from lsg_jax.run_config import RunConfig
from lsg_jax.sharding import abstract_batch, batch_rows, replicated, shard_params, state_shardings
from lsg_jax.train.seeds import stack_seeds, together
from lsg_jax.train.step import compiled_step, init_state
from lsg_jax.types import Batch
from lsg_jax.vlm import PROMPT_BUCKET

TEXT_ROOM = 128  # tokens of a question beside its image, system prompt included
SEPARATORS = 3  # most tokens in front of a tile that has a text of its own, the last one's end included


@dataclass(frozen=True)
class Program:
    """A jitted function and the abstract, sharded arguments of one call.

    Attributes:
        rows: examples or questions of one call, over all devices.
        parts: what the arguments are, for a table of the memory: name -> pytree.
        static: arguments that follow, hashable.
        trips: `hlo.analyse` has it.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    rows: int
    parts: Mapping[str, Any]
    static: tuple[Any, ...] = ()
    trips: Mapping[str, float] = field(default_factory=dict)

    def compile(self) -> Any:
        """Compiles it for the devices of the mesh; takes from seconds to minutes, and 1 to 2 GiB at 7B."""
        return self.function.lower(*self.arguments, *self.static).compile()


def train_program(config: RunConfig, model: ModelConfig, mesh: Mesh, *, dtype: Any = jnp.bfloat16) -> Program:
    """The training step of a configuration; `gate.independent` for gates of many layers in one run.

    Of seeds that are not trained together it is the step of one.
    """
    train = config.train if together(config) else dataclasses.replace(config.train, seeds=1)
    method = trained_method(config, model)
    independent = method.independent
    graphdef, params = _sharded_model(model, mesh, method=method, dtype=dtype)
    float32 = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
    parts = {part: params.pop(part) for part in method.parts}
    trained = jax.tree.map(float32, parts) if parts else params.pop(TRAINED)
    state = jax.eval_shape(
        lambda trained: init_state(trained, params, config=train, total_steps=100, independent=independent), trained
    )
    if train.seeds > 1:
        state = jax.eval_shape(lambda state: stack_seeds([state] * train.seeds), state)
    state = _placed(state, state_shardings(state, mesh))
    batch = training_batch(config, model, mesh)
    return Program(
        name="each" if independent else "train",
        function=compiled_step(graphdef, train, 100, mesh, independent=independent),
        arguments=(state, params, batch),
        rows=config.train.batch_size,
        parts={"weights": params, "trained and optimiser": state, "batch": batch},
        trips=_suffix_trips(method.gate, model) if independent and method.gate is not None else {},
    )


def each_config(config: RunConfig, model: ModelConfig) -> RunConfig:
    """The configuration with a gate at every layer, all trained in one run, each as if alone."""
    gates = Gates(dataclasses.replace(config.gate, layers=tuple(range(model.text.num_layers)), independent=True))
    train = dataclasses.replace(config.train, remat="full")
    return dataclasses.replace(config.with_settings(gates.settings), train=train, method=name_of(gates))


def forward_program(config: RunConfig, model: ModelConfig, mesh: Mesh, *, dtype: Any = jnp.bfloat16) -> Program:
    """The loss of a training batch without gates, and without a gradient: what others are multiples of."""
    graphdef, params = _sharded_model(model, mesh, dtype=dtype)
    batch = training_batch(config, model, mesh)
    loss = jax.jit(lambda params, batch: answer_loss(assemble(graphdef, params), batch))
    parts = {"weights": params, "batch": batch}
    return Program("forward", loss, (params, batch), config.train.batch_size, parts)


def eval_prompts(
    config: RunConfig, model: ModelConfig, mesh: Mesh, *, max_new_tokens: int, dtype: Any = jnp.bfloat16
) -> Program:
    """The pass over the prompts of one batch of evaluation, under the configured method; without independent gates."""
    method = config.get_method()
    method = BASE if method.independent else method.for_model(model)
    graphdef, params = _sharded_model(model, mesh, method=method, dtype=dtype)
    rows = _questions(config) * batch_rows(mesh)
    batch = question_batch(model, mesh, rows, config.eval.max_length, method=method)
    parts = {"weights": params, "batch": batch}
    return Program("eval prompts", read_batch, (params, batch), rows, parts, static=(graphdef, max_new_tokens))


def eval_answers(prompts: Program, compiled: Any) -> Program:
    """Decoding of a batch whose prompts were read.

    Args:
        compiled: of `prompts`; says where its results lie.
    """
    params, batch = prompts.arguments
    read, cache = _results(prompts, compiled)
    asked = batch.without_images()
    return Program(
        name="eval answers",
        function=answer_batch,
        arguments=(params, asked, read, cache),
        static=prompts.static,
        rows=prompts.rows,
        parts={"weights": params, "batch": (asked, read), "cache": cache},
        trips={"decode_greedily": prompts.static[1] - 1},
    )


def _questions(config: RunConfig) -> int:
    """`eval.batch_size`, which a caller sets where the configuration leaves it open."""
    assert config.eval.batch_size != "auto"
    return config.eval.batch_size


def sweep_prompts(
    config: RunConfig,
    model: ModelConfig,
    mesh: Mesh,
    *,
    max_new_tokens: int,
    cells: int,
    questions: int | None = None,
    dtype: Any = jnp.bfloat16,
) -> Program:
    """The ungated pass of a sweep over one batch, whose results its cells start from.

    Args:
        cells: coefficients that a question is run under.
        questions: at a time on each device along `data`; None for as many as make an evaluation's batch.
    """
    graphdef, params = _sharded_model(model, mesh, dtype=dtype)
    rows = (questions or max(1, _questions(config) // cells)) * batch_rows(mesh)
    batch = question_batch(model, mesh, rows, config.eval.max_length)
    return Program(
        name="sweep prompts",
        function=run_prompts,
        arguments=(params, batch),
        static=(graphdef, max_new_tokens),
        rows=rows,
        parts={"weights": params, "batch": batch},
        trips={"decode_greedily": max_new_tokens - 1},
    )


def sweep_cells(
    prompts: Program, compiled: Any, model: ModelConfig, *, coefficients: tuple[tuple[float, ...], ...] | None = None
) -> Program:
    """The coefficients of one layer that run at once, for the batch of `sweep_prompts`; a mean over the layers.

    Args:
        compiled: of `prompts`; says where its results lie.
        coefficients: None for the grid in steps of 0.1.
    """
    graphdef, max_new_tokens = prompts.static
    coefficients = coefficients or coefficient_grid(2, 0.1)
    params = prompts.arguments[0]
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    shared, *_ = _results(prompts, compiled)
    whole = replicated(mesh)
    values = jax.ShapeDtypeStruct((len(coefficients), len(coefficients[0])), jnp.float32, sharding=whole)
    layer = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return Program(
        name="sweep cells",
        function=answer_cells,
        arguments=(params, shared, layer, values),
        static=(graphdef, "v_sink_rest", max_new_tokens),
        rows=prompts.rows * len(coefficients),
        parts={"weights": params, "prompt passes": shared},
        trips={"decode_greedily": max_new_tokens - 1, "resume": (model.text.num_layers - 1) / 2},
    )


def look_program(
    config: RunConfig, model: ModelConfig, mesh: Mesh, *, max_new_tokens: int, dtype: Any = jnp.bfloat16
) -> Program:
    """The pass of `vlm.look` over one question with the largest image and its answer, without a method."""
    graphdef, params = _sharded_model(model, mesh, dtype=dtype)
    longest = config.eval.max_length
    tiles, patches = tile_bucket(most_tiles(model, longest)), most_patches(model, longest)
    length = prompt_tokens(model, longest) + max_new_tokens
    given = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))
    one_row = abstract_batch(model, mesh, 1, length, tiles=tiles, patches=patches)
    batch = jax.tree.map(lambda leaf: given(leaf.shape, leaf.dtype), one_row)
    visual = int((longest_layout(model, longest).source[:, 0] >= 0).sum())
    rows, places = given((1, max_new_tokens), jnp.int32), given((visual,), jnp.int32)
    return Program(
        name="look",
        function=observe,
        arguments=(params, batch, rows, places, given((1, length), jnp.bool_)),
        static=(graphdef, reading(model.sinks, "vit"), reading(model.sinks, "llm"), ()),
        rows=1,
        parts={"weights": params, "batch": batch},
    )


def _results(program: Program, compiled: Any) -> Any:
    """Shapes and shardings of what a compiled program gives."""
    return abstract_results(program.function, program.arguments, program.static, compiled)


def trained_method(config: RunConfig, model: ModelConfig) -> Method:
    """The method that a configuration trains.

    Raises:
        ConfigError: it has nothing to train, or the model cannot carry it.
    """
    method = config.get_method()
    if not method.trains:
        raise ConfigError(f'method = "{config.method}" has nothing to train: plan --programs eval')
    return method.for_model(model)


def training_batch(config: RunConfig, model: ModelConfig, mesh: Mesh) -> Batch:
    """A batch as `lsg train` places it on the mesh, of examples with the largest image that `data.max_length` has room for."""
    data, longest = config.data, config.data.max_length
    return abstract_batch(
        model,
        mesh,
        config.train.batch_size,
        data.max_length,
        tiles=most_tiles(model, longest),
        patches=most_patches(model, longest),
        answers=data.max_answer_tokens,
    )


def question_bucket(model: ModelConfig, longest: int | None = None) -> Bucket:
    """Tiles, patches and length of questions with the largest image each.

    Args:
        longest: `eval.max_length`; None for any length.
    """
    tiles, patches = tile_bucket(most_tiles(model, longest)), most_patches(model, longest)
    return Bucket(tiles, patches, prompt_tokens(model, longest))


def question_batch(model: ModelConfig, mesh: Mesh, rows: int, longest: int | None = None, *, method: Method = BASE) -> Batch:
    """Questions of `question_bucket`, as `lsg eval` places them on the mesh."""
    return abstract_questions(model, mesh, rows, question_bucket(model, longest), method=method)


def prompt_tokens(model: ModelConfig, longest: int | None = None) -> int:
    """Length that the prompts of evaluation are padded to: the largest image with its separators, and room for a question."""
    layout = longest_layout(model, longest)
    separators = SEPARATORS * (len(layout.text) if layout.text[0][0] else 0)
    return -(-(len(layout) + separators + TEXT_ROOM) // PROMPT_BUCKET) * PROMPT_BUCKET


def _placed(tree: Any, shardings: Any) -> Any:
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, tree, shardings)


def _sharded_model(model: ModelConfig, mesh: Mesh, **settings: Any) -> tuple[Any, dict]:
    graphdef, abstract = abstract_model(model, mesh=mesh, **settings)
    return graphdef, shard_params(abstract, mesh)


def _suffix_trips(gate: GateConfig, model: ModelConfig) -> dict[str, float]:
    """Plain layers between a gate and the last layer, the mean over the gates below it (`train.independent`)."""
    last = model.text.num_layers - 1
    below = [last - 1 - layer for layer in gate.layers if layer < last]
    return {"of_gate": sum(below) / len(below)} if below else {}
