"""What a method is: something done to the model, and perhaps trained, while everything else stays frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax
from flax import nnx

from lsg_jax.config import BenchmarkKind, GateConfig, ModelConfig, Part
from lsg_jax.config.ranges import Table
from lsg_jax.errors import ConfigError
from lsg_jax.methods.first_questions import FirstQuestion
from lsg_jax.model.contrast import Contrasted
from lsg_jax.model.multimodal import ConnectorTokens
from lsg_jax.model.projector import any_member
from lsg_jax.model.vision_layers import Registers
from lsg_jax.types import Batch, Intervention, Sequence

if TYPE_CHECKING:
    from lsg_jax.methods.method_model import MethodModel


@dataclass(frozen=True)
class Method:
    """The base model: does nothing and trains nothing. Subclasses override what they do otherwise.

    Instances are hashable and static under jit; what is trained is a part of the model's state, `model.trained`.

    Class attributes:
        Settings: the dataclass of its table in a configuration file, a config.ranges.Table; None without a table.
        trains: whether `lsg train` has something to train.
        trains_inputs: whether something is trained on which the decoder's inputs or its weights depend. The backward pass then
            goes through every layer, instead of stopping at the first that the intervention changes.
        reads_words: whether it looks at the words of the question (`Batch.words`).
    """

    settings: Any = None

    Settings: ClassVar[type[Table] | None] = None
    trains: ClassVar[bool] = False
    trains_inputs: ClassVar[bool] = False
    reads_words: ClassVar[bool] = False

    def for_model(self, config: ModelConfig) -> Method:
        """Fills in settings that depend on the model.

        Raises:
            ConfigError: the method does not fit the model.
        """
        return self

    def for_benchmark(self, kind: BenchmarkKind) -> Method:
        """Fills in settings that depend on what a benchmark is about."""
        return self

    @property
    def without_bos(self) -> bool:
        """Whether prompts are written without the BOS token."""
        return False

    # What is trained.

    @property
    def gate(self) -> GateConfig | None:
        """The gates whose ratios and norms are reported, and which portable gate files hold; None for other methods."""
        return None

    @property
    def independent(self) -> bool:
        """Whether its gates are trained each as if it were the only one (`train.independent`)."""
        return False

    @property
    def parts(self) -> tuple[Part, ...]:
        """Parts of the model itself that are trained in place of the frozen ones."""
        return ()

    def module(self, config: ModelConfig, key: jax.Array) -> nnx.Module | None:
        """What is trained beside the model, float32; None for nothing."""
        return None

    def initial(self, config: ModelConfig, params: dict[str, Any], key: jax.Array) -> dict[str, Any]:
        """The values that training starts from: a nested dict of float32 arrays, which training may donate.

        Args:
            params: of the backbone.
        """
        return nnx.to_pure_dict(nnx.state(self.module(config, key)))

    # What is done to a batch.

    @property
    def registers(self) -> Registers | None:
        """Tokens that the vision tower is given besides the patches; None for none."""
        return None

    def first_questions(self, question: str) -> tuple[FirstQuestion, ...]:
        """The questions put to the base model before each prompt with an image, each by itself; () for none."""
        return ()

    def read_replies(self, replies: tuple[str, ...]) -> int:
        """`Batch.route` from the replies to the first questions; 0 is the route of a question without an image."""
        raise TypeError(f"{type(self).__name__} asks no first questions")

    def connect(
        self, model: MethodModel, features: jax.Array, v_sink: jax.Array, batch: Batch, text: jax.Array
    ) -> ConnectorTokens:
        """The visual tokens that it makes of features, in the order that it gives them; see VisionLanguageModel.connect."""
        return ConnectorTokens(model.projector(features), any_member(v_sink, model.config))

    def intervention(self, model: MethodModel, batch: Batch, sequence: Sequence) -> Intervention | None:
        """What it does in the decoder layers; None for nothing."""
        return None

    def contrast(self, model: MethodModel, batch: Batch, sequence: Sequence) -> Sequence | None:
        """What the model reads besides, without the intervention, for `contrasted`; None for nothing and without images.

        It has the shape of `sequence`: tokens that it leaves out are not valid. Which logits are contrasted,
        `model.contrast.contrasted_positions` says.
        """
        return None

    @property
    def reads_class_attention(self) -> bool:
        """Whether it needs `Sequence.class_attention`."""
        return False

    @property
    def contrasts(self) -> bool:
        """Whether there is a `contrast` for batches with images, and so a second cache."""
        return False

    def contrasted(self, logits: jax.Array, others: jax.Array) -> Contrasted:
        """The logits that a token is chosen by, from those of `sequence` and of `contrast`: float32 [..., V] each."""
        raise TypeError(f"{type(self).__name__} contrasts no logits")


BASE = Method()


def check_layer(layer: int, config: ModelConfig, name: str) -> None:
    """Raises ConfigError for a decoder layer that the model lacks; `name` is the setting that names it."""
    if not 0 <= layer < config.text.num_layers:
        raise ConfigError(f"{name}: layer {layer} does not exist, the model has layers 0 to {config.text.num_layers - 1}")


def layer_range(first: int, last: int | None, config: ModelConfig, name: str) -> tuple[int, int]:
    """The layers of a table from `first_layer` to `last_layer`, None for the model's last: the first, and the end, exclusive.

    Numbers are taken as they are, also where their source has them for a model of another depth.

    Raises:
        ConfigError: the model lacks one of them, or there is none between them.
    """
    num_layers = config.text.num_layers
    last = num_layers - 1 if last is None else last
    check_layer(first, config, f"{name}.first_layer")
    check_layer(last, config, f"{name}.last_layer")
    if first > last:
        raise ConfigError(f"{name}.first_layer is {first}, behind {name}.last_layer {last}")
    return first, last + 1


def check_one_square(config: ModelConfig, name: str) -> None:
    """Raises ConfigError for a method that takes the patches of one square image, and a model that has no such tokens."""
    if config.image.kind != "square":
        does = "takes images of any size" if config.vision.native else "cuts images into tiles"
        raise ConfigError(f"{name} takes the patches of one square image, but this model {does}")
    if config.merge > 1:
        raise ConfigError(f"{name} takes a token a patch, but this model merges {config.merge} x {config.merge} patches")
