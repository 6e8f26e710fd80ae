"""Gated models against Hugging Face with the gate attached by hooks: logits, loss, every gate gradient, greedy generation."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import BOS, IMAGE_TOKEN, PAD, VOCABULARY, state_arrays, tiny_hf
from whole_model import visual

from converters.convert import tree_from_tensors
from converters.hf_config import model_config
from converters.torch_gate import attach
from lsg_jax.config import GateConfig, ModelConfig, SinkConfig
from lsg_jax.gating.keys import GROUPS
from lsg_jax.gating.portable import PortableGates, to_torch_layout
from lsg_jax.methods.gates import Gates
from lsg_jax.methods.method import BASE
from lsg_jax.methods.method_model import abstract_model, assemble
from lsg_jax.model.generate import generate
from lsg_jax.types import IGNORE, Batch

TOLERANCE = 1e-4  # of the largest absolute value of the reference array
QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of the time here
PATCHES, LENGTH, TEXT_LAYERS = 9, 30, 5


@dataclass(frozen=True)
class Case:
    vision: str
    text: str
    layers: tuple[int, ...]
    signal: str
    grouping: str
    key_scale: float
    side: str
    criterion: str
    llm_criterion: str = "dim_abs"
    activation: str = "gelu"
    seed: int = 0  # of the gates; none that makes a gradient vanish by cancellation, where rounding would be all that is left


ALL = tuple(range(TEXT_LAYERS))
CASES = [
    Case("clip", "llama", (0,), "last", "v_sink_rest", 1.0, "right", "dim_abs"),
    Case("clip", "llama", (1, 3), "mean_all", "l_sink_rest", 2.0, "left", "dim_rms", "norm", "silu"),
    Case("clip", "llama", ALL, "mean_visual", "three", 1.0, "left", "norm", "dim_abs", "relu"),
    Case("siglip", "qwen2", (0,), "mean_visual", "l_sink_rest", 1.0, "right", "norm", "massive"),
    Case("siglip", "qwen2", (1, 3), "last", "three", 2.0, "right", "massive", "dim_rms", "quick_gelu"),
    Case("siglip", "qwen2", ALL, "last", "v_sink_rest", 1.0, "left", "dim_abs", seed=1),
    Case("clip", "phi3", (0,), "last", "three", 2.0, "left", "dim_abs", "norm", "gelu_exact"),
    Case("clip", "phi3", (1, 3), "mean_all", "v_sink_rest", 1.0, "right", "dim_rms"),
    Case("clip", "phi3", ALL, "last", "l_sink_rest", 1.0, "left", "dim_abs", "dim_abs"),
    Case("clip", "mistral", (2, 4), "last", "v_sink_rest", 2.0, "left", "norm"),
]
"""Settings of a gate, sinks, padding, towers and decoders."""
COVERED_TWICE = {0, 5, 8}
"""Cases whose every value is in others; with them the towers and decoders have more of the pairs, in `pytest -m soak`."""
PARAMETERS = [pytest.param(case, marks=[pytest.mark.soak] * (n in COVERED_TWICE)) for n, case in enumerate(CASES)]
name_of = lambda case: "-".join(map(str, (case.vision, case.text, len(case.layers), case.signal, case.grouping, case.side)))


@cache
def hf_model(vision: str, text: str) -> torch.nn.Module:
    torch.set_num_threads(1)
    return tiny_hf(vision, text, text_config={"num_hidden_layers": TEXT_LAYERS})


@cache
def ours(vision: str, text: str) -> tuple[ModelConfig, dict]:
    model = hf_model(vision, text)
    config = model_config(model.config.to_diff_dict())
    return config, tree_from_tensors(config, state_arrays(model))


def random_gates(layers, *, signal="last", grouping="v_sink_rest", key_scale=1.0, activation="gelu", sinks, seed=0, width=40):
    """Gates far from their start: ratios that differ by row and layer."""
    rng = np.random.default_rng(seed)
    config = GateConfig(layers=layers, width=16, activation=activation, key_scale=key_scale, signal=signal, grouping=grouping)
    n, g = len(layers), len(GROUPS[config.grouping])
    normal = lambda *shape, scale=1.0: (scale * rng.normal(size=shape)).astype(np.float32)
    parameters = {
        "norm_scale": 1 + normal(n, width, scale=0.3),
        "norm_bias": normal(n, width, scale=0.3),
        "fc1_kernel": normal(n, width, 16, scale=width**-0.5),
        "fc1_bias": normal(n, 16, scale=0.5),
        "fc2_kernel": normal(n, 16, g, scale=0.7),
        "fc2_bias": normal(n, g, scale=0.5),
    }
    return PortableGates(gate=config, sinks=sinks, parameters=parameters)


@dataclass(frozen=True)
class Examples:
    """Three rows of unequal length: two with an image at different places, one of text only; prompt, then answer."""

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray  # NCHW, for the rows with an image
    image_rows: tuple[int, ...]
    gate_position: np.ndarray

    def batch(self) -> Batch:
        pixels = np.zeros((len(self.ids), *self.pixels.shape[1:]), np.float32)
        pixels[list(self.image_rows)] = self.pixels
        return Batch(
            input_ids=jnp.asarray(self.ids, jnp.int32),
            attention_mask=jnp.asarray(self.mask),
            **jax.tree.map(jnp.asarray, visual(self.mask & (self.ids == IMAGE_TOKEN), pixels.transpose(0, 2, 3, 1), 14)),
            gate_position=jnp.asarray(self.gate_position, jnp.int32),
        )

    def torch(self) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.tensor(self.ids),
            "attention_mask": torch.tensor(self.mask).long(),
            "pixel_values": torch.tensor(self.pixels),
        }


def examples(side: str, *, answers: bool = True, seed: int = 3) -> Examples:
    rng = np.random.default_rng(seed)
    words = lambda n: rng.integers(4, VOCABULARY, size=n).tolist()
    image = [IMAGE_TOKEN] * PATCHES
    rows = [
        ([BOS, *words(3), *image, *words(6)], words(5)),
        ([BOS, *words(9)], words(2)),
        ([BOS, *image, *words(12)], words(7)),
    ]
    pixels = rng.normal(size=(2, 3, 42, 42)).astype(np.float32)
    ids = np.full((3, LENGTH), PAD)
    labels, mask, gate = np.full((3, LENGTH), IGNORE), np.zeros((3, LENGTH), bool), np.zeros(3, int)
    for i, (prompt, answer) in enumerate(rows):
        answer = answer if answers else []
        row = [*prompt, *answer]
        start = LENGTH - len(row) if side == "left" else 0
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = row, True
        labels[i, start + len(prompt) : start + len(row)] = answer
        gate[i] = start + len(prompt) - 1
    return Examples(ids, mask, labels, pixels, (0, 2), gate)


def between(values: np.ndarray, share: float) -> float:
    """A threshold that about `share` of the values reach, in the middle of the widest gap there: rounding decides nothing."""
    ordered = np.sort(np.ravel(values))[::-1]
    low, high = max(1, int(len(ordered) * share * 0.6)), int(len(ordered) * share * 1.5) + 2
    at = low + int(np.argmax(ordered[low - 1 : high - 1] - ordered[low:high]))
    return float((ordered[at - 1] + ordered[at]) / 2)


def magnitude(criterion: str, x: np.ndarray, dims: tuple[int, ...]) -> np.ndarray:
    """What the criterion holds against its threshold: [..., D] -> [...]."""
    peak = np.abs(x[..., list(dims)]).max(-1)
    rms = np.sqrt((x**2).mean(-1))
    return {"dim_abs": peak, "dim_rms": peak / rms, "norm": np.linalg.norm(x, axis=-1), "massive": np.abs(x).max(-1)}[criterion]


def sinks_for(case: Case, data: Examples) -> SinkConfig:
    """Thresholds that make about a quarter of the visual tokens V-sinks and a quarter L-sinks."""
    model = hf_model(case.vision, case.text)
    seen = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0].numpy()))
    with torch.no_grad():
        hidden = model(**data.torch(), output_hidden_states=True).hidden_states[case.layers[0]].numpy()
    hook.remove()
    visual = hidden[data.ids == IMAGE_TOKEN]
    return SinkConfig(
        criterion=case.criterion,
        vit_dims=(3, 17),
        vit_tau=between(magnitude(case.criterion, seen[0], (3, 17)), 0.25),
        llm_criterion=case.llm_criterion,
        llm_dims=(5, 30),
        llm_tau=between(magnitude(case.llm_criterion, visual, (5, 30)), 0.25),
        massive_ratio=2.0,
    )


def setup(case: Case, data: Examples):
    """Sinks, gates, and our model as (graphdef, frozen parameters)."""
    sinks = sinks_for(case, data)
    settings = {name: getattr(case, name) for name in ("signal", "grouping", "key_scale", "activation", "seed")}
    gates = random_gates(case.layers, sinks=sinks, **settings)
    config, frozen = ours(case.vision, case.text)
    graphdef, _ = abstract_model(dataclasses.replace(config, sinks=sinks), Gates(gates.gate))
    return gates, graphdef, frozen


@partial(jax.jit, static_argnames="graphdef")
def logits_and_ratios(parameters, frozen, batch, graphdef):
    vlm = assemble(graphdef, frozen, parameters)
    out = vlm(batch)
    return vlm.language_model.logits(out.hidden), out.ratios


@partial(jax.jit, static_argnames="graphdef", compiler_options=QUICK)
def loss_and_gradients(parameters, frozen, batch, labels, graphdef):
    """Mean cross-entropy of the tokens after each position, as Hugging Face shifts them."""

    def loss_of(parameters):
        logits, ratios = logits_and_ratios(parameters, frozen, batch, graphdef)
        target = labels[:, 1:]
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), jnp.maximum(target, 0)[..., None], axis=-1)[..., 0]
        return jnp.mean(nats, where=target != IGNORE), (logits, ratios)

    return jax.value_and_grad(loss_of, has_aux=True)(parameters)


@partial(jax.jit, static_argnames="graphdef", compiler_options=QUICK)
def continuation(parameters, frozen, batch, graphdef):
    return generate(assemble(graphdef, frozen, parameters), batch, max_new_tokens=12)[0]


def assert_close(ours: np.ndarray, reference: np.ndarray, what: str) -> None:
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    error = np.abs(ours - reference).max() / np.abs(reference).max()
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("case", PARAMETERS, ids=name_of)
def test_logits_loss_and_gradients(case):
    data = examples(case.side)
    gates, graphdef, frozen = setup(case, data)
    model = hf_model(case.vision, case.text)
    with torch.no_grad():
        ungated = model(**data.torch()).logits.numpy()
    with attach(model, gates, gate_position=torch.tensor(data.gate_position)) as handle:
        out = model(**data.torch(), labels=torch.tensor(data.labels))
        out.loss.backward()
    check_that_the_case_is_not_trivial(case, data, handle, out.logits.detach().numpy(), ungated)

    (loss, (logits, ratios)), gradients = loss_and_gradients(gates.parameters, frozen, data.batch(), data.labels, graphdef)
    assert_close(logits[data.mask], out.logits.detach().numpy()[data.mask], "logits")
    assert_close(loss, out.loss.item(), "loss")
    for layer in case.layers:
        assert_close(ratios[layer - case.layers[0]], handle.ratios[layer].numpy(), f"ratios of layer {layer}")
    for layer, named in to_torch_layout(gradients, case.layers).items():
        reference = dict(handle.gates[str(layer)].named_parameters())
        for name, gradient in named.items():
            assert_close(gradient, reference[name].grad.numpy(), f"gradient of {layer}.{name}")


def check_that_the_case_is_not_trivial(case, data, handle, gated, ungated):
    """Both groups of visual tokens are there at some layer, and the gate changes the logits."""
    assert np.abs(gated - ungated)[data.mask].max() > 1e-2
    visual = data.ids == IMAGE_TOKEN
    factors = [set(np.round(scale.detach().numpy()[0][visual[0]], 6)) for scale in handle.key_scales.values()]
    assert max(map(len, factors)) == (3 if case.grouping == "three" else 2)
    assert all((scale.detach().numpy()[~visual] == 1.0).all() for scale in handle.key_scales.values())


@pytest.mark.parametrize("case", PARAMETERS[1::2], ids=name_of)
def test_greedy_generation(case):
    left = examples("left", answers=False)
    gates, graphdef, frozen = setup(case, left)
    model = hf_model(case.vision, case.text)
    with attach(model, gates):
        expected = model.generate(**left.torch(), max_new_tokens=12, do_sample=False)[:, LENGTH:].numpy()
    for side in ("left", "right"):
        tokens = continuation(gates.parameters, frozen, examples(side, answers=False).batch(), graphdef)
        np.testing.assert_array_equal(np.asarray(tokens)[:, : expected.shape[1]], expected, err_msg=side)


def test_beams_gate_each_copy_of_a_row():
    data = examples("left", answers=False)
    gates, _, _ = setup(CASES[5], data)
    model = hf_model(CASES[5].vision, CASES[5].text)
    with attach(model, gates) as handle:
        model.generate(**data.torch(), max_new_tokens=2, do_sample=False)
        single = {layer: scale.clone() for layer, scale in handle.ratios.items()}
        model.generate(**data.torch(), max_new_tokens=2, do_sample=False, num_beams=3)
        for layer, ratios in single.items():
            torch.testing.assert_close(handle.ratios[layer], ratios.repeat_interleave(3, dim=0))


def test_hooks_against_attention_written_out():
    """The hooks themselves, by plain arithmetic for one layer: sinks, signal, gate, key scale, attention."""
    data, layer = examples("left"), 2
    case = dataclasses.replace(CASES[0], layers=(layer,), key_scale=1.5)
    gates, _, _ = setup(case, data)
    model = hf_model("clip", "llama")
    block, text = model.model.language_model.layers[layer], model.config.text_config
    got, features = [], []
    hooks = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: got.append(args[0])),
        model.model.vision_tower.register_forward_hook(lambda _, __, out: features.append(out.hidden_states[-2][:, 1:])),
    ]
    with torch.no_grad(), attach(model, gates, gate_position=torch.tensor(data.gate_position)):
        hidden = model(**data.torch(), output_hidden_states=True).hidden_states[layer]
    for hook in hooks:
        hook.remove()
    p = {name: torch.tensor(array[0], dtype=torch.float64) for name, array in gates.parameters.items()}
    head, share = text.head_dim, text.num_attention_heads // text.num_key_value_heads
    for row, image in zip(data.image_rows, features[0].double(), strict=True):
        keep = np.flatnonzero(data.mask[row])
        x = hidden[row].double()
        signal = x[data.gate_position[row]]
        normed = (signal - signal.mean()) / torch.sqrt(signal.var(unbiased=False) + 1e-5) * p["norm_scale"] + p["norm_bias"]
        inner = normed @ p["fc1_kernel"] + p["fc1_bias"]
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        rho = torch.softmax(inner @ p["fc2_kernel"] + p["fc2_bias"], 0)
        scale, patch = torch.ones(LENGTH, dtype=torch.float64), 0
        for t in keep:
            if data.ids[row, t] == IMAGE_TOKEN:
                is_sink = max(abs(image[patch, 3]), abs(image[patch, 17])) >= gates.sinks.vit_tau
                scale[t], patch = 1.5 * rho[0 if is_sink else 1], patch + 1
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + text.rms_norm_eps) * block.input_layernorm.weight.double()
        q, k, v = (
            (normed @ getattr(block.self_attn, f"{n}_proj").weight.double().T).view(LENGTH, -1, head).detach() for n in "qkv"
        )
        q, k = rotate(q), rotate(k) * scale[:, None, None]
        for n in range(text.num_attention_heads):
            weights = (q[keep, n] @ k[keep, n // share].T / math.sqrt(head)).masked_fill(
                torch.ones(len(keep), len(keep)).triu(1).bool(), -torch.inf
            )
            expected = torch.softmax(weights, -1) @ v[keep, n // share]
            assert_close(got[0][row, keep, n * head : (n + 1) * head], expected, f"row {row}, head {n}")


def rotate(x: torch.Tensor, theta: float = 10_000.0) -> torch.Tensor:
    """Rotary embedding of [T, N, H] at positions 0 to T - 1, dimension i paired with i + H / 2, as complex numbers."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None].double() * theta ** -(torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def forward(case: Case, gates: PortableGates | None, sinks: SinkConfig, batch: Batch) -> tuple[np.ndarray, np.ndarray | None]:
    """Our logits and ratios; gates None is the model without any."""
    config, frozen = ours(case.vision, case.text)
    graphdef, _ = abstract_model(dataclasses.replace(config, sinks=sinks), Gates(gates.gate) if gates else BASE)

    return jax.tree.map(np.asarray, logits_and_ratios(gates and gates.parameters, frozen, batch, graphdef))


@pytest.mark.parametrize("case", [CASES[8]], ids=name_of)
def test_key_scale_2_starts_as_the_ungated_model_exactly(case):
    data = examples(case.side)
    case = dataclasses.replace(case, grouping="v_sink_rest", key_scale=2.0)
    gates, _, _ = setup(case, data)
    start = {name: np.zeros_like(a) if name.startswith("fc2") else a for name, a in gates.parameters.items()}
    gates = dataclasses.replace(gates, parameters=start)
    ungated, _ = forward(case, None, gates.sinks, data.batch())
    gated, ratios = forward(case, gates, gates.sinks, data.batch())
    np.testing.assert_array_equal(ratios, 0.5)
    np.testing.assert_array_equal(gated, ungated)
    model = hf_model(case.vision, case.text)
    with torch.no_grad():
        before = model(**data.torch()).logits
        with attach(model, gates, gate_position=torch.tensor(data.gate_position)):
            assert torch.equal(model(**data.torch()).logits, before)
        assert torch.equal(model(**data.torch()).logits, before)


@pytest.mark.parametrize("pixels", [True, False])
def test_text_passes_a_gated_model_unchanged(pixels):
    case, data = CASES[5], examples("left")
    gates, _, _ = setup(case, data)
    ids = np.where(data.ids == IMAGE_TOKEN, 77, data.ids)
    batch = data.batch()
    batch = dataclasses.replace(batch, input_ids=jnp.asarray(ids), source=jnp.full_like(batch.source, -1))
    batch = batch if pixels else batch.without_images()
    np.testing.assert_array_equal(forward(case, gates, gates.sinks, batch)[0], forward(case, None, gates.sinks, batch)[0])
    model = hf_model(case.vision, case.text)
    text = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(data.mask).long()}
    with torch.no_grad():
        before = model(**text).logits
        with attach(model, gates) as handle:
            assert torch.equal(model(**text).logits, before)
            assert not handle.key_scales


@pytest.mark.parametrize("signal", ["last", "mean_all", "mean_visual"])
def test_the_answer_does_not_leak_into_the_ratios(signal):
    case = dataclasses.replace(CASES[1], signal=signal, grouping="v_sink_rest")
    gates, _, _ = setup(case, examples("left"))
    for data in (examples("left"), examples("right")):
        answer, rows = data.labels != IGNORE, np.arange(3)
        swap = lambda where, data=data: dataclasses.replace(
            data, ids=np.where(where, 4 + (data.ids + 31) % 200, data.ids)
        ).batch()
        logits, ratios = forward(case, gates, gates.sinks, data.batch())
        changed_logits, changed = forward(case, gates, gates.sinks, swap(answer))
        np.testing.assert_array_equal(ratios, changed)
        assert (logits[answer] != changed_logits[answer]).any(-1).all()
        last = np.zeros_like(answer)
        last[rows, data.gate_position] = True
        moved = forward(case, gates, gates.sinks, swap(last))[1]  # the prompt itself does count, but not for the image's mean
        assert (np.abs(moved - ratios) > 1e-5).any(axis=(0, 2)).all() == (signal != "mean_visual")
