"""Gated attention outputs: against the same factors in a Hugging Face model, its start, and trained by `lsg train`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_gated_parity import LENGTH, assert_close, continuation, examples, hf_model, ours
from whole_model import loss_and_gradients, plain_logits

from lsg_jax.checkpoint import RunFolder, read_step
from lsg_jax.cli import main
from lsg_jax.errors import ConfigError, Preempted
from lsg_jax.methods.gated_output import GatedOutput, GatedOutputConfig
from lsg_jax.methods.method_model import abstract_model
from lsg_jax.opening import load_backbone, open_trained
from lsg_jax.plan.programs import train_program
from lsg_jax.run_config import load_run_config
from lsg_jax.sharding import make_mesh
from lsg_jax.train.loop import _loop, set_up

METHOD = GatedOutput(GatedOutputConfig((1, 3)))  # a layer between them and the last one have none


def attach(model, parameters):
    """o_proj(2 sigmoid(W x + b) O) by hooks, x the normed input of the layer. Returns the torch parameters and the hooks."""
    tensors = {name: torch.tensor(np.asarray(leaf)).requires_grad_() for name, leaf in parameters.items()}
    seen, hooks = {}, []
    for slot, layer in enumerate(METHOD.settings.layers):
        attention = model.model.language_model.layers[layer].self_attn

        def see(_, args, kwargs, slot=slot):
            seen[slot] = kwargs["hidden_states"]

        def gate(_, args, slot=slot):
            factor = 2 * torch.sigmoid(seen[slot] @ tensors["kernel"][slot] + tensors["bias"][slot])
            return (args[0] * factor.repeat_interleave(args[0].shape[-1] // factor.shape[-1], dim=-1),)

        hooks += [attention.register_forward_pre_hook(see, with_kwargs=True), attention.o_proj.register_forward_pre_hook(gate)]
    return tensors, hooks


def test_logits_gradients_and_generation_against_hugging_face():
    data, model = examples("left"), hf_model("siglip", "qwen2")  # grouped keys
    config, frozen = ours("siglip", "qwen2")
    graphdef, _ = abstract_model(config, METHOD)
    start = METHOD.initial(config, frozen, jax.random.key(0))
    assert {name: leaf.shape for name, leaf in start.items()} == {"kernel": (2, 40, 4), "bias": (2, 4)}
    plain = plain_logits(frozen, data.batch(), abstract_model(config)[0])
    (_, untrained), _ = loss_and_gradients(start, frozen, data.batch(), data.labels, graphdef)
    np.testing.assert_array_equal(untrained, plain)

    rng = np.random.default_rng(0)
    parameters = {name: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, jnp.float32) for name, leaf in start.items()}
    (loss, logits), gradients = loss_and_gradients(parameters, frozen, data.batch(), data.labels, graphdef)
    for row in range(len(logits)):  # rows without an image as well
        assert np.abs(logits - plain)[row][data.mask[row]].max() > 1e-2

    tensors, hooks = attach(model, parameters)
    out = model(**data.torch(), labels=torch.tensor(data.labels))
    out.loss.backward()
    assert_close(logits[data.mask], out.logits.detach().numpy()[data.mask], "logits")
    assert_close(loss, out.loss.item(), "loss")
    for name, gradient in gradients.items():
        assert_close(gradient, tensors[name].grad.numpy(), f"gradient of {name}")

    expected = model.generate(**examples("left", answers=False).torch(), max_new_tokens=12, do_sample=False)[:, LENGTH:].numpy()
    for side in ("left", "right"):  # every new token is gated as well
        tokens = np.asarray(continuation(parameters, frozen, examples(side, answers=False).batch(), graphdef))
        np.testing.assert_array_equal(tokens[:, : expected.shape[1]], expected)
    for hook in hooks:
        hook.remove()


def test_layers():
    config, _ = ours("siglip", "qwen2")
    assert GatedOutput().for_model(config).settings.layers == (0, 1, 2, 3, 4)
    for layers, message in [
        ((1, 5), r"gated_output\.layers: layer 5 does not exist, the model has layers 0 to 4"),
        ((3, 1), r"gated_output\.layers must ascend and name no layer twice: \[3, 1\]"),
        ((-1,), r"gated_output\.layers\[0\] is -1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            GatedOutput(GatedOutputConfig(layers)).for_model(config)


def test_trained_resumed_planned_and_opened_again(tiny_model, records, scenes, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        f'model = "{tiny_model}"\noutput = "{tmp_path / "run"}"\nmethod = "gated_output"\n[gated_output]\nlayers = [2, 3]\n'
        f'[data]\nrecords = "{records}"\nmax_length = 256\nmax_answer_tokens = 8\n'
        "[train]\nbatch_size = 4\nepochs = 2\nlearning_rate = 0.03\nsave_every = 2\n"
    )
    config, run = load_run_config(path), RunFolder(tmp_path / "run")
    stops = iter([False, False, True])
    with run.lock(), pytest.raises(Preempted, match="stopped at step 3 of 6"):
        _loop(set_up(config, run), lambda: next(stops), None)
    assert main(["train", str(path)]) == 0  # resumes at step 3
    assert main(["train", str(path), "--set", f"output={tmp_path / 'whole'}"]) == 0
    (step, tree, _), (_, whole, _) = read_step(run.path), read_step(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, tree["trained"], whole["trained"])
    assert step == 6 and tree["trained"]["kernel"].shape == (2, 64, 4) and (np.abs(tree["trained"]["bias"]) > 0).all()

    base = load_backbone(tiny_model)
    vlm = open_trained(base, run.path, method="gated_output")
    image, asked = [scenes / "images/0.png"], ["How many?"]
    assert vlm.method == GatedOutput(GatedOutputConfig((2, 3)))
    assert vlm.plain().generate(image, asked, 4) == base.generate(image, asked, 4)
    planned = train_program(config, base.config, make_mesh(config.mesh), dtype=jnp.float32)
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
    assert shapes(planned.arguments[0].trained) == shapes(tree["trained"])
