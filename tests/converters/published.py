"""Gates as plain torch modules, and folders that hold them as their authors publish them."""

import json

import torch
from test_gates import WIDTH, WIDTH_IN

STACK = (3, 6, 7, 10, 19)
STACK_NAME = "llava15_stack_L3_6_7_10_19_PEFT"
PEFT = "base_model.model.model.layers.{l}.self_attn.sink_gate"


def plain_gate(seed: int, *, biases: bool = True) -> torch.nn.Sequential:
    """LayerNorm, linear, GELU, linear, softmax, of random parameters."""
    torch.manual_seed(seed)
    norm, first = torch.nn.LayerNorm(WIDTH_IN), torch.nn.Linear(WIDTH_IN, WIDTH, bias=biases)
    last = torch.nn.Linear(WIDTH, 2, bias=biases)
    gate = torch.nn.Sequential(norm, first, torch.nn.GELU(), last, torch.nn.Softmax(-1))
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    return gate.eval()


class NamedGate(torch.nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.pre_norm, self.mlp = gate[0], torch.nn.Sequential(*gate[1:])


class Stack(torch.nn.Module):
    def __init__(self, gates):
        super().__init__()
        self.sink_gates = torch.nn.ModuleList(gates)


def tensors_of(modules: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    return {f"{at}.{name}": tensor for at, module in modules.items() for name, tensor in module.state_dict().items()}


def gate_folder(tmp_path, state, *, name=STACK_NAME, settings=None):
    folder = tmp_path / name
    folder.mkdir()
    torch.save(state, folder / "non_lora_trainables.bin")
    if settings is not None:
        (folder / "sink_cfg.json").write_text(json.dumps(settings))
    return folder


def list_of(count: int) -> dict[str, torch.Tensor]:
    """The state dict of a list of gates."""
    return Stack([plain_gate(seed) for seed in range(count)]).state_dict()
