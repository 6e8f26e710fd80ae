"""Every number of the configuration has a range, which reading and construction check; no impossible value gets through."""

import dataclasses
import inspect
import json
import math
import typing
from dataclasses import replace

import pytest

from lsg_jax import config
from lsg_jax.config import (
    Canvas,
    ImageConfig,
    MeshConfig,
    ModelConfig,
    RopeConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
    from_dict,
    to_dict,
)
from lsg_jax.config.ranges import Range, Table, without_none
from lsg_jax.errors import ConfigError
from lsg_jax.run_config import RunSettings, load_run_config, method_tables

MODEL = ModelConfig(
    vision=VisionConfig("clip", 336, 14, 1024, 4096, 24, 16, 1e-5, "quick_gelu"),
    text=TextConfig("llama", 32_064, 4096, 11_008, 32, 32, 8, 128, 1e-5, RopeConfig(10_000.0), 4096),
    feature_layers=(-2,),
    feature_select="default",
    image_token_id=32_000,
    eos_token_ids=(2,),
    pad_token_id=32_001,
    image=ImageConfig(336, "pad", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
)
RUN = RunSettings(model="m", output="o")
TABLES = [cls for _, cls in inspect.getmembers(config, dataclasses.is_dataclass)]
TABLES = [*dict.fromkeys([*TABLES, *method_tables().values(), RunSettings])]
VALID = {type(c): c for c in (MODEL, MODEL.vision, MODEL.text, MODEL.text.rope, MODEL.image, Canvas(672, 336), RUN)}


def leaves(hint):
    """The types within the type of a field; a number with its range is one."""
    if typing.get_origin(hint) is typing.Annotated or not typing.get_args(hint):
        return [hint]
    return [leaf for arg in typing.get_args(hint) for leaf in leaves(arg)]


def numbers():
    for cls in TABLES:
        for name, hint in typing.get_type_hints(cls, include_extras=True).items():
            inner = without_none(hint)
            many = typing.get_origin(inner) is tuple
            leaf = typing.get_args(inner)[0] if many else inner
            if typing.get_origin(leaf) is typing.Annotated:
                yield pytest.param(cls, name, *typing.get_args(leaf), many, id=f"{cls.__name__}.{name}")


@pytest.mark.parametrize("cls", TABLES)
def test_every_number_states_its_range(cls):
    assert issubclass(cls, Table)
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        for leaf in leaves(hint):
            assert leaf not in (int, float), f"{name} has no range"
            if typing.get_origin(leaf) is typing.Annotated:
                assert typing.get_args(leaf)[0] in (int, float) and isinstance(typing.get_args(leaf)[1], Range)


@pytest.mark.parametrize(("cls", "name", "kind", "limits", "many"), list(numbers()))
def test_a_number_is_refused_outside_its_range_and_accepted_at_its_ends(cls, name, kind, limits, many):
    valid = VALID.get(cls) or cls()
    set_to = lambda value: replace(valid, **{name: (value,) if many else value})
    read = lambda value: from_dict(cls, {**to_dict(valid), name: [value] if many else value}, where="here")
    low, high = limits.ends
    outward = {int: lambda end, sign: int(end) + sign, float: lambda end, sign: math.nextafter(end, sign * math.inf)}[kind]
    first = outward(low, 1) if limits.interval[0] == "(" else kind(low)
    last = outward(high, -1) if limits.interval[-1] == ")" else kind(high)
    for value in (first, last):
        for make in (set_to, read):
            try:
                assert getattr(make(value), name) == ((value,) if many else value)
            except ConfigError as error:  # it contradicts another field, but lies in its own range
                assert "must lie in" not in str(error), error
    wrong = (outward(first, -1), outward(last, 1), -(10**400), 10**400, math.nan, math.inf, -math.inf, True, "1", None)
    for value in wrong:
        if value is None and (many or getattr(valid, name) is None):
            continue
        for make, table in ((set_to, cls.table), (read, "")):
            with pytest.raises(ConfigError) as caught:
                make(value)
            named = f"{table}.{name}" if table else name
            assert named + ("[0]" if many else "") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.batch_size=1_000_000_000_000", "train.batch_size is 1000000000000: it must lie in [1, 1e6]"),
        ("train.learning_rate=-1", "train.learning_rate is -1: it must lie in (0, 1000]"),
        ("train.learning_rate=nan", "train.learning_rate is nan: it must lie in (0, 1000]"),
        ("train.learning_rate=inf", "train.learning_rate is inf"),
        ("train.learning_rate=" + 400 * "9", "it must lie in (0, 1000]"),
        ("train.learning_rate=" + 5000 * "9", "train.learning_rate: expected float, got '999"),
        ("train.beta1=1.5", "train.beta1 is 1.5: it must lie in [0, 1)"),
        ("train.beta2=1", "train.beta2 is 1: it must lie in [0, 1)"),
        ("train.clip_norm=0", "train.clip_norm is 0"),
        ("train.clip_norm=-1", "train.clip_norm is -1"),
        ("train.warmup_fraction=2", "train.warmup_fraction is 2: it must lie in [0, 1]"),
        ("train.final_lr_fraction=nan", "train.final_lr_fraction is nan"),
        ("train.weight_decay=-0.1", "train.weight_decay is -0.1"),
        ("train.accumulate=0", "train.accumulate is 0"),
        ("train.accumulate=3", "train.accumulate 3 does not divide train.batch_size 64"),
        ("train.profile=[0, 3]", "train.profile[0] is 0"),
        ("train.profile=[5, 3]", "train.profile is [5, 3]: give the first and the last step"),
        ("gate.width=1_000_000_000", "gate.width is 1000000000"),
        ("gate.layers=[3, -1]", "gate.layers[1] is -1"),
        ("gate.key_scale=nan", "gate.key_scale is nan"),
        ("gate.layer_norm_eps=-1e-5", "gate.layer_norm_eps is -1e-05"),
        ("fixed.coefficients=[1.0, nan]", "fixed.coefficients[1] is nan"),
        ("sinks.vit_tau=nan", "sinks.vit_tau is nan"),
        ("sinks.vit_dims=[-1]", "sinks.vit_dims[0] is -1"),
        ("var.rho=1.1", "var.rho is 1.1: it must lie in [0, 1]"),
        ("sink_front.tau=0", "sink_front.tau is 0"),
        ("diysink.tau=nan", "diysink.tau is nan"),
        ("lora.rank=0", "lora.rank is 0"),
        ("lora.layer=-1", "lora.layer is -1"),
        ("data.max_length=1_000_000_000_000", "data.max_length is 1000000000000"),
        ("data.num_threads=0", "data.num_threads is 0"),
        ("eval.near_tie=-0.1", "eval.near_tie is -0.1"),
        ("eval.limit=0", "eval.limit is 0"),
        ("mesh.fsdp=0", "mesh.fsdp is 0: it must lie in [1, 1e6], or be -1"),
        ("eval.mesh.data=-2", "eval.mesh.data is -2: it must lie in [1, 1e6], or be -1"),
        ("seed=-1", "seed is -1"),
        ("seed=4_294_967_296", "seed is 4294967296"),
        ('output="a\\u0000b"', "output is 'a\\x00b': it must not hold a NUL byte"),
        ('eval.benchmarks={"a" = "b\\u0000"}', "eval.benchmarks.a is 'b\\x00'"),
    ],
)
def test_absurd_values_are_refused_by_name(tmp_path, override, message):
    path = tmp_path / "run.toml"
    path.write_text("model = 'm'\noutput = 'o'\n")
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, [override])
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value) and caught.value.exit_code == 65


def test_a_number_of_thousands_of_digits_in_a_file_is_one_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(f"model = 'm'\noutput = 'o'\nseed = {5000 * '9'}\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_run_config(path)


@pytest.mark.parametrize(
    "part, fields, message",
    [
        ("text", {"rms_norm_eps": 0.0}, "text.rms_norm_eps is 0.0: it must lie in (0, 1]"),
        ("text", {"num_heads": 0}, "text.num_heads is 0"),
        ("text", {"num_heads": 12}, "text.num_heads 12 is no multiple of text.num_kv_heads 8"),
        ("text", {"hidden_size": 10**9}, "text.hidden_size is 1000000000"),
        ("text", {"rope": {"theta": math.nan}}, "text.rope.theta is nan"),
        ("text", {"rope": {"theta": 1e4, "kind": "llama3", "low_freq_factor": 4.0}}, "rope.low_freq_factor 4.0 is not below"),
        ("vision", {"num_heads": 0}, "vision.num_heads is 0"),
        ("vision", {"num_heads": 7}, "vision.hidden_size 1024 is no multiple of vision.num_heads 7"),
        ("vision", {"patch_size": 337}, "vision.patch_size 337 is larger than vision.image_size 336"),
        ("text", {"head_dim": 127}, "text rotates 127 dimensions of text.head_dim 127: it must be an even number"),
        ("text", {"rope": {"theta": 1e4, "rotary_dim": 130}}, "text rotates 130 dimensions of text.head_dim 128"),
        ("image", {"std": [0.5, 0.0, 0.5]}, "image.std[1] is 0.0"),
        (None, {"feature_layers": []}, "feature_layers is []: the tower has hidden states 0 to 24"),
        (None, {"feature_layers": [-2, 25]}, "feature_layers is [-2, 25]"),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(part, fields, message):
    tree = to_dict(MODEL)
    (tree[part] if part else tree).update(fields)
    with pytest.raises(ConfigError) as caught:
        from_dict(ModelConfig, json.loads(json.dumps(tree)), where="lsg_manifest.json: config")
    assert str(caught.value).startswith("lsg_manifest.json: config: ") and message in str(caught.value)


def test_large_models_and_runs_are_in_range():
    """Llama 3.1 405B; 10M positions of Llama 4 Scout; a learning rate of 30, as linear probes have it."""
    rope = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0)
    replace(MODEL, text=TextConfig("llama", 128_256, 16_384, 53_248, 126, 128, 8, 128, 1e-5, rope, 10_485_760))
    TrainConfig(batch_size=16_384, learning_rate=30.0, max_steps=2_000_000)
    assert MeshConfig(data=-1, fsdp=4096, tensor=8).data == -1


def test_an_interval_is_read_as_mathematics_writes_it():
    half_open = Range("(0, 1]", also=-1)
    assert [value in half_open for value in (-1, -0.5, 0, 1e-9, 1, 1.1, math.nan)] == [1, 0, 0, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="not an interval"):
        _ = 1 in Range("0 to 1")
