"""DIYSink (Luo et al., arXiv 2510.08510): one projector for ViT sinks, one for other patches, and a choice for each question.

A patch is a sink if the norm of its features before the projector reaches `tau`. What a question needs decides which patches
take part, in one of two ways:

- `cot`: the base model, which sees the image, is first asked whether the question is simple or complex, and whether it is about
  the scene as a whole (holistic) or local. A complex one keeps all patches; of a simple one those that are not needed leave the
  sequence.
- `mlp`: a small network reads the question's token embeddings and weighs the two sets of projected patches.

The sinks of an image come before its other patches (`diysink.order`). There is no published code; docs/methods.md has what is
known to differ. Our choices are the words of the two questions, what a complex one keeps, that training with `cot` keeps both
sets, and the form of the network.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lsg_jax.activations import ACTIVATIONS, standardise
from lsg_jax.config import ModelConfig
from lsg_jax.config.ranges import Range, Table
from lsg_jax.errors import ConfigError
from lsg_jax.gating.gate import GateParam
from lsg_jax.methods.first_questions import FirstQuestion
from lsg_jax.methods.full import float32_copy
from lsg_jax.methods.method import Method, check_one_square
from lsg_jax.methods.method_model import MethodModel
from lsg_jax.methods.sink_front import order_in_rows
from lsg_jax.model.multimodal import ConnectorTokens
from lsg_jax.model.projector import Projector
from lsg_jax.sinks.criteria import norm
from lsg_jax.types import Batch

BOTH, GLOBAL, LOCAL = 0, 1, 2
"""Values of `Batch.route`: which patches take part. GLOBAL keeps the sinks, LOCAL the others."""

_QUOTED = """Here is a question about the image, between quotation marks:
"{question}"
Do not answer it. """
_COMPLEXITY = """Is it simple, so that it suffices to look either at the scene as a whole or at details, or complex, so that \
both are needed? Reply with one word: simple or complex."""
_SCOPE = """Is it about the scene as a whole (holistic), or about details in single places (local)? Reply with one word: \
holistic or local."""


@dataclass(frozen=True)
class DiySinkConfig(Table, name="diysink"):
    """DIYSink (arXiv 2510.08510): one projector for sinks, one for the others, and a choice between them for each question.

    The projectors start from the weights of the frozen one and are trained, and so is the network of `mlp`. With `cot`,
    training keeps both sets of patches, and each question is answered after two short ones on what it needs.

    Attributes:
        tau: norm of the features before the projector from which a patch is a sink.
        routing: by the model's own answer on what the question needs (`cot`), or by weights of a small network (`mlp`).
        width: hidden units of the network of `mlp`.
        order: place of sinks among the patches of each image.
        trains: both projectors, or `weights`: that network alone, over the frozen projector (the paper: over the two
            projectors).
    """

    tau: Annotated[float, Range("(0, 1e9]")] = 100.0
    routing: Literal["cot", "mlp"] = "cot"
    width: Annotated[int, Range("[1, 1e6]")] = 64
    order: Literal["sinks_first", "image"] = "sinks_first"
    trains: Literal["projectors", "weights"] = "projectors"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trains == "weights" and self.routing != "mlp":
            raise ConfigError('diysink.trains = "weights" trains the network of diysink.routing = "mlp": choose that routing')


class QuestionWeights(nnx.Module):
    """Weights of the sinks and of the other patches: layer norm, Linear D->width, GELU, Linear width->2, twice the softmax.

    Float32. The layer norm has no parameters, and the last linear starts at zero, so both weights start at 1.
    """

    def __init__(self, width_in: int, width: int, *, rngs: nnx.Rngs):
        self.fc1_kernel = GateParam(nnx.initializers.lecun_normal()(rngs.params(), (width_in, width)))
        self.fc1_bias = GateParam(jnp.zeros((width,)))
        self.fc2_kernel = GateParam(jnp.zeros((width, 2)))
        self.fc2_bias = GateParam(jnp.zeros((2,)))

    def __call__(self, question_BD: jax.Array) -> jax.Array:
        """[B, D] -> float32 [B, 2], (sinks, others); each row sums to 2."""
        exact: Any = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
        x = exact(standardise(question_BD, 1e-5), self.fc1_kernel[...]) + self.fc1_bias[...]
        return 2 * jax.nn.softmax(exact(ACTIVATIONS["gelu"](x), self.fc2_kernel[...]) + self.fc2_bias[...], axis=-1)


class SinkProjectors(nnx.Module):
    """What DIYSink trains. Its parameters are float32 and are used in the dtype of the backbone.

    Args:
        sink_projector, other_projector: of the shape of the frozen projector, whose weights they start from; None where it
            stays in force for both.
        weights: for the routing `mlp`, else None.
    """

    def __init__(self, sink_projector: nnx.Module | None, other_projector: nnx.Module | None, weights: QuestionWeights | None):
        self.sink_projector = sink_projector
        self.other_projector = other_projector
        self.weights = weights

    def __call__(self, features: jax.Array, is_sink: jax.Array, question: jax.Array, frozen: nnx.Module) -> jax.Array:
        """Projects each patch by its own projector.

        Args:
            features: [B, P, Dv], before the projector.
            is_sink: bool [B, P].
            question: float32 [B, D], see `mean_question`.
            frozen: the projector of the model.

        Returns:
            [B, P, D].
        """
        sinks = frozen(features) if self.sink_projector is None else _in_dtype(self.sink_projector, features.dtype)(features)
        others = sinks if self.other_projector is None else _in_dtype(self.other_projector, features.dtype)(features)
        patches = jnp.where(is_sink[..., None], sinks, others)
        if self.weights is None:
            return patches
        weights = self.weights(question)
        return (patches * jnp.where(is_sink, weights[:, :1], weights[:, 1:])[..., None]).astype(patches.dtype)


def _in_dtype(module: nnx.Module, dtype: Any) -> Any:
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(dtype), state))


def sink_patches(features: jax.Array, tau: float) -> jax.Array:
    """Norm of the features >= tau: [B, P, Dv] -> bool [B, P]."""
    return norm(features, tau)


def taking_part(is_sink: jax.Array, route: jax.Array) -> jax.Array:
    """Patches that a route keeps. A route that would keep none of an image keeps all of it: some image is better than none.

    Args:
        is_sink: bool [B, S, P], the patches of each image of a row.
        route: int32 [B], BOTH, GLOBAL or LOCAL, for all images of the row.

    Returns:
        bool [B, S, P].
    """
    route = route[:, None, None]
    kept = jnp.where(route == GLOBAL, is_sink, jnp.where(route == LOCAL, ~is_sink, True))
    return kept | ~kept.any(-1, keepdims=True)


def mean_question(embedded: jax.Array, text: jax.Array) -> jax.Array:
    """Mean token embedding of the prompt: embedded [B, T, D], text bool [B, T] (its text tokens) -> float32 [B, D]."""
    total = jnp.einsum("BTD,BT->BD", embedded.astype(jnp.float32), text.astype(jnp.float32))
    return total / jnp.maximum(text.sum(-1, keepdims=True), 1)


@dataclass(frozen=True)
class DiySink(Method):
    """Two projectors, and a choice between sinks and other patches for each question."""

    settings: DiySinkConfig = field(default_factory=DiySinkConfig)

    Settings = DiySinkConfig
    trains = True
    trains_inputs = True

    def for_model(self, config: ModelConfig) -> DiySink:
        """Refuses a model that cuts images into tiles."""
        check_one_square(config, "diysink")
        return self

    def module(self, config: ModelConfig, key: jax.Array) -> SinkProjectors:
        """Two projectors, and the network of the routing `mlp`."""
        rngs = nnx.Rngs(key)
        mlp = self.settings.routing == "mlp"
        weights = QuestionWeights(config.text.hidden_size, self.settings.width, rngs=rngs) if mlp else None
        if self.settings.trains == "weights":
            return SinkProjectors(None, None, weights)
        sinks, others = (Projector(config, rngs=rngs, dtype=jnp.float32) for _ in range(2))
        return SinkProjectors(sinks, others, weights)

    def initial(self, config: ModelConfig, params: dict[str, Any], key: jax.Array) -> dict[str, Any]:
        """Both projectors start from the frozen one."""
        parameters = super().initial(config, params, key)
        for name in {"sink_projector", "other_projector"} & parameters.keys():
            parameters[name] = float32_copy(params["projector"])
        return parameters

    def first_questions(self, question: str) -> tuple[FirstQuestion, ...]:
        """Whether the question is simple or complex, and whether it is holistic or local."""
        if self.settings.routing != "cot":
            return ()
        quoted = _QUOTED.format(question=question.strip())
        return tuple(FirstQuestion(quoted + asks, sees_image=True) for asks in (_COMPLEXITY, _SCOPE))

    def read_replies(self, replies: tuple[str, ...]) -> int:
        """The route that the replies name."""
        return read_route(*replies)

    def connect(
        self, model: MethodModel, features: jax.Array, v_sink: jax.Array, batch: Batch, text: jax.Array
    ) -> ConnectorTokens:
        """Patches by their own projectors, in the order of the settings; those that the route leaves out are not kept."""
        is_sink = sink_patches(features, self.settings.tau)
        is_text = jnp.asarray(batch.attention_mask) & (jnp.asarray(batch.source)[..., 0] < 0)
        prompt = is_text & (jnp.arange(text.shape[1]) <= batch.gate_position[:, None])
        tokens = model.trained(features, is_sink, mean_question(text, prompt), model.projector)
        each, kept = model.config.num_image_tokens, None
        if batch.route is not None:
            kept = taking_part(is_sink.reshape(len(is_sink), -1, each), batch.route).reshape(is_sink.shape)
        if self.settings.order == "image":
            return ConnectorTokens(tokens, v_sink, kept)
        order = order_in_rows(features, self.settings.tau, each)
        moved = lambda x: jnp.take_along_axis(x, order, axis=1)
        tokens = jnp.take_along_axis(tokens, order[..., None], axis=1)
        return ConnectorTokens(tokens, moved(v_sink), None if kept is None else moved(kept), order=order)


def read_route(complexity: str, scope: str) -> int:
    """The route that the replies to the two questions name: BOTH unless they say simple, and either holistic or local."""
    named = lambda reply, *words: set(re.findall(r"[a-z]+", reply.lower())) & set(words)
    if named(complexity, "simple", "complex") != {"simple"}:
        return BOTH
    return {("holistic",): GLOBAL, ("local",): LOCAL}.get(tuple(named(scope, "holistic", "local")), BOTH)
