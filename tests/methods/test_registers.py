"""Test-time registers against the same tokens and neurons in a Hugging Face model, by hooks."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hooked import check_close, check_logits_and_answers, inputs, pair, removed_after

from lsg_jax.analysis.registers import _activations, _norms
from lsg_jax.data.images import to_patches
from lsg_jax.errors import ConfigError
from lsg_jax.methods.method_model import assemble
from lsg_jax.methods.registers import RegistersConfig, RegisterTokens
from lsg_jax.model.vision_layers import to_registers
from lsg_jax.types import VisualInput

NEURONS = ((0, 3), (0, 17), (1, 5), (2, 40), (2, 41))


def rendered(hf, count, seen=None):
    """`hf` with `count` registers."""
    tower = hf.model.vision_tower
    first = int(tower.config.model_type == "clip_vision_model")

    def append(_, __, out):
        return torch.cat([out, torch.zeros(len(out), count, out.shape[-1])], dim=1)

    def move(layer):
        def hook(_, args):
            neurons = args[0].clone()
            for number in (neuron for at, neuron in NEURONS if at == layer):
                for row in neurons[..., number]:
                    row[-count:] = row[row.abs().argmax()].item()
                    row[first:-count] = 0
            return (neurons,)

        return hook

    hooks = [tower.embeddings.register_forward_hook(append)]
    hooks += [layer.mlp.fc2.register_forward_pre_hook(move(n)) for n, layer in enumerate(tower.encoder.layers)]
    hooks.append(hf.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: (args[0][:, :-count],)))
    return removed_after(hooks)


def ours(vision, count):
    return pair(vision)[1].with_method(RegisterTokens(RegistersConfig(NEURONS, count)))


@pytest.mark.parametrize("vision, count", [("clip", 1), ("siglip", 2)])
def test_logits_and_answers_equal_pytorch(vision, count):
    hf = pair(vision)[0]
    check_logits_and_answers(ours(vision, count), hf, lambda _: rendered(hf, count))


def test_without_a_token_it_is_the_base_model_to_the_bit():
    given = inputs("left")
    np.testing.assert_array_equal(ours("clip", 0).logits(*given), pair()[1].logits(*given))


def test_received_attention_is_that_of_patches_from_patches():
    hf, vlm = pair()[0], ours("clip", 1)
    pixels = inputs("left")[1]
    with torch.no_grad(), rendered(hf, 1):
        weights = hf.model.vision_tower(torch.tensor(pixels), output_attentions=True).attentions[2]
    patches = jnp.asarray(to_patches(pixels.transpose(0, 2, 3, 1), 14))
    model = assemble(vlm.graphdef, vlm.params)
    run = nnx.jit(lambda model: model.vision_tower(VisualInput(patches), (3,), receive=True, registers=model.registers))
    (state,), received = run(model)
    check_close(np.asarray(received.mean), weights[:, :, :-1, :-1].mean((1, 2)).numpy())
    assert state.shape == (2, 10, 40)


def test_sizes_of_neurons_equal_pytorch():
    """Norms after each layer, and mean sizes at outliers: all patches of one image, two of the other."""
    (hf, vlm), given, seen = pair(), inputs("left"), {}
    keep = lambda n: lambda _, args: seen.update({n: args[0][:, 1:].abs()})
    tower = hf.model.vision_tower
    hooks = [layer.mlp.fc2.register_forward_pre_hook(keep(n)) for n, layer in enumerate(tower.encoder.layers)]
    with torch.no_grad(), removed_after(hooks):
        hidden = tower(torch.tensor(given[1]), output_hidden_states=True).hidden_states
    batch, counted = vlm.batch(*given), np.ones(3, bool)
    norms, shown = _norms(vlm.params, batch, counted, vlm.graphdef, 3)
    assert shown[0].all() and shown[2].all() and not shown[1].any()
    reference = np.stack([state[:, 1:].norm(dim=-1).numpy() for state in hidden[1:4]])
    check_close(np.asarray(norms)[:, [0, 2]], reference)
    outliers = np.zeros((3, 9), bool)
    outliers[0], outliers[2, [1, 5]] = True, True
    sizes = _activations(vlm.params, batch, outliers, vlm.graphdef, 3)
    expected = np.stack([(seen[n][0].mean(0) + seen[n][1][[1, 5]].mean(0)).numpy() for n in range(3)])
    check_close(np.asarray(sizes), expected)


def test_the_largest_activation_moves_with_its_sign():
    """A class token, three patches, two registers; the second neuron is none of those that move."""
    neurons = np.array([[[0.5, 1], [-4, 2], [3, 3], [0, 4], [1, 5], [0, 6]]], np.float32)
    found = to_registers(neurons, np.array([True, False]), first_patch=1, count=2)
    np.testing.assert_array_equal(found, [[[0.5, 1], [0, 2], [0, 3], [0, 4], [-4, 5], [-4, 6]]])


def test_settings_that_mean_nothing_are_refused():
    base = pair()[1]
    for settings, message in [
        ({}, r"registers\.neurons is empty: `lsg calibrate"),
        ({"neurons": ((3, 0),)}, "layer 3 does not run, the features need layers 0 to 2"),
        ({"neurons": ((0, 48),)}, "neuron 48 does not exist, a layer has neurons 0 to 47"),
        ({"neurons": ((0, 1), (0, 1))}, "names a neuron twice"),
        ({"neurons": ((0, 1, 2),)}, r"registers\.neurons: \[0, 1, 2\] is no pair of layer and neuron"),
        ({"neurons": ((0, -1),)}, r"registers\.neurons\[0\]\[1\] is -1"),
        ({"count": -1}, "registers.count is -1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            base.with_method(RegisterTokens(RegistersConfig(**settings)))
    native = dataclasses.replace(base.config.vision, num_heads=5, rotary_theta=1e4)
    with pytest.raises(ConfigError, match="registers takes square images, but this model takes images of any size"):
        RegisterTokens(RegistersConfig(NEURONS)).for_model(dataclasses.replace(base.config, vision=native))
