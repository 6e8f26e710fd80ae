"""LoRA at one layer: against the same update in a Hugging Face model, against merged weights, and trained by `lsg train`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from test_gated_parity import LENGTH, assert_close, continuation, examples, hf_model, ours
from whole_model import loss_and_gradients, plain_logits

from lsg_jax.checkpoint import read_step
from lsg_jax.cli import main
from lsg_jax.config import RopeConfig, TextConfig
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.methods.lora import PROJECTIONS, Lora, LoraConfig, LowRankUpdate
from lsg_jax.methods.method_model import abstract_model
from lsg_jax.opening import load_backbone, open_gates, open_trained

LORA = LoraConfig(layer=2, rank=3, alpha=5.0)


@pytest.mark.parametrize("kv_heads, parameters", [(32, 262_144), (8, 4096 * 8 * 4 + 2 * 8 * (4096 + 1024))])
def test_parameter_count_at_7b(kv_heads, parameters):
    rope = RopeConfig(theta=10_000.0)
    config = TextConfig("llama", 32_064, 4096, 11_008, 32, 32, kv_heads, 128, 1e-5, rope, 4096)
    update = nnx.eval_shape(lambda: LowRankUpdate(config, LoraConfig(), rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(update))) == parameters


def trained(config, seed=0):
    """Parameters far from their start."""
    start = Lora(LORA).initial(config, {}, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=leaf.shape) * leaf.shape[0] ** -0.5, jnp.float32) for name, leaf in start.items()}


def attach(model, parameters):
    """y += (alpha / r) B A x at the projections of one layer, as hooks. Returns the torch parameters and the hooks."""
    attention = model.model.language_model.layers[LORA.layer].self_attn
    tensors, hooks = {}, []
    for name in PROJECTIONS:
        down, up = (torch.tensor(np.asarray(parameters[f"{name}_{part}"])) for part in "ab")
        down, up = down.reshape(-1, LORA.rank).requires_grad_(), up.reshape(LORA.rank, -1).requires_grad_()
        tensors |= {f"{name}_a": down, f"{name}_b": up}
        add = lambda _, args, out, down=down, up=up: out + LORA.alpha / LORA.rank * (args[0] @ down @ up)
        hooks.append(getattr(attention, name).register_forward_hook(add))
    return tensors, hooks


def test_logits_gradients_and_generation_against_hugging_face():
    data, model = examples("left"), hf_model("siglip", "qwen2")  # grouped keys, and biases of its own
    config, frozen = ours("siglip", "qwen2")
    graphdef, _ = abstract_model(config, Lora(LORA))
    parameters = trained(config)
    plain = plain_logits(frozen, data.batch(), abstract_model(config)[0])
    (loss, logits), gradients = loss_and_gradients(parameters, frozen, data.batch(), data.labels, graphdef)
    for row in range(len(logits)):  # rows without an image as well
        assert np.abs(logits - plain)[row][data.mask[row]].max() > 1e-2

    tensors, hooks = attach(model, parameters)
    out = model(**data.torch(), labels=torch.tensor(data.labels))
    out.loss.backward()
    assert_close(logits[data.mask], out.logits.detach().numpy()[data.mask], "logits")
    assert_close(loss, out.loss.item(), "loss")
    assert gradients.keys() == tensors.keys()
    for name, gradient in gradients.items():
        assert_close(np.asarray(gradient).reshape(tensors[name].shape), tensors[name].grad.numpy(), f"gradient of {name}")

    prompts = examples("left", answers=False)  # every new token goes through the update as well
    expected = model.generate(**prompts.torch(), max_new_tokens=12, do_sample=False)[:, LENGTH:].numpy()
    tokens = np.asarray(continuation(parameters, frozen, prompts.batch(), graphdef))
    np.testing.assert_array_equal(tokens[:, : expected.shape[1]], expected)
    for hook in hooks:
        hook.remove()

    start = Lora(LORA).initial(config, frozen, jax.random.key(0))
    (_, untrained), _ = loss_and_gradients(start, frozen, data.batch(), data.labels, graphdef)
    np.testing.assert_allclose(untrained, plain, rtol=0, atol=1e-6 * np.abs(plain).max())
    merged = plain_logits(merge(frozen, parameters), data.batch(), abstract_model(config)[0])
    np.testing.assert_allclose(logits, merged, rtol=0, atol=1e-5 * np.abs(merged).max())


def merge(frozen, parameters):
    """The plain model's parameters with (alpha / r) B A added to the kernels of the layer."""
    attention = dict(frozen["language_model"]["layers"]["attention"])
    for name in PROJECTIONS:
        product = np.tensordot(parameters[f"{name}_a"], parameters[f"{name}_b"], axes=1) * LORA.alpha / LORA.rank
        kernel = np.array(attention[name]["kernel"])
        kernel[LORA.layer] += product
        attention[name] = {**attention[name], "kernel": kernel}
    layers = {**frozen["language_model"]["layers"], "attention": attention}
    return {**frozen, "language_model": {**frozen["language_model"], "layers": layers}}


def test_settings_that_mean_nothing_are_refused():
    config, _ = ours("siglip", "qwen2")
    with pytest.raises(ConfigError, match=r"lora\.layer: layer 5 does not exist, the model has layers 0 to 4"):
        Lora(LoraConfig(layer=5)).for_model(config)
    for settings, message in [
        ({"layer": -1}, "lora.layer is -1"),
        ({"layer": 2, "alpha": float("nan")}, "lora.alpha is nan"),
        ({"rank": 0}, "lora.rank is 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            LoraConfig(**settings)


@pytest.fixture
def config_file(tiny_model, records, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        f'model = "{tiny_model}"\noutput = "{tmp_path / "run"}"\n'
        f'[data]\nrecords = "{records}"\nmax_length = 256\nmax_answer_tokens = 8\n'
        "[train]\nbatch_size = 4\nepochs = 4\nlearning_rate = 0.01\nsave_every = 3\n"
    )
    return path


def test_trained_on_the_command_line_and_opened_again(config_file, tiny_model, scenes, tmp_path, capfd):
    train = ["train", str(config_file), "--set", "method=lora"]
    for wrong, message in [
        (["lora.layer=99"], "lora.layer: layer 99 does not exist, the model has layers 0 to 5"),
        (["method=var"], 'method = "var" has nothing to train'),
    ]:
        assert main([*train, *wrong]) == 65 and message in capfd.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()

    assert main([*train, "lora.layer=2"]) == 0
    run = tmp_path / "run"
    assert capfd.readouterr().out == f"{run}\n"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert "ratios" not in lines[0] and "gate_norm" not in lines[0]
    assert main([*train, "lora.layer=3"]) == 65 and "another lora.layer" in capfd.readouterr().err

    base = load_backbone(tiny_model)
    vlm = open_trained(base, run, method="lora")
    assert vlm.method == Lora(LoraConfig(layer=2)) and vlm.gate is None
    stored = read_step(run)[1]["trained"]
    assert stored.keys() == {f"{name}_{part}" for name in PROJECTIONS for part in "ab"}
    assert all(np.abs(leaf).max() > 0 for leaf in stored.values())
    jax.tree.map(np.testing.assert_array_equal, vlm.trained, stored)
    image, question = scenes / "images/0.png", "How many?"
    assert len(vlm.generate([image], [question], 4)) == 1
    assert vlm.plain().params is vlm.frozen

    for refused, message in [
        (lambda: open_gates(run), "a run of method lora holds no gates"),
        (lambda: open_trained(base, run, method="diysink"), "what was trained there is lora, not diysink"),
        (lambda: open_trained(base, tmp_path / "none"), "none"),
        (lambda: base.with_method(Lora(LORA)), "method lora is trained"),
    ]:
        with pytest.raises((InputError, ConfigError), match=message):
            refused()
