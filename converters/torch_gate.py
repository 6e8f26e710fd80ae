"""Gates for Hugging Face PyTorch models, by hooks (extra [torch]).

    with attach(model, "gates.safetensors") as handle:
        model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
        handle.ratios  # {layer: float32 [B, G]}

The model itself is not changed. V-sinks are found in the input of the projector. The gate reads the input of its decoder layer,
and the output of that layer's key projection, or of the norm after it, is scaled at the visual tokens. Rotary embedding is
linear in each key, so this equals scaling the rotated keys. Decode steps need no hook: the cache holds scaled keys.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from converters.families.decoders import DECODERS
from converters.torch_stacks import Qwen, stack_of
from lsg_jax.config import SinkConfig
from lsg_jax.errors import InputError
from lsg_jax.gating.portable import PortableGates, check_width, read_gates, to_torch_layout

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "gelu_exact": nn.functional.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": nn.functional.silu,
    "relu": nn.functional.relu,
}


class TorchGate(nn.Module):
    """One gate in float32: [B, D] -> ratios [B, G]. Its parameters have the names of the portable file."""

    def __init__(self, width_in: int, width: int, groups: int, *, activation: str, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(width_in, eps=eps)
        self.fc1 = nn.Linear(width_in, width)
        self.fc2 = nn.Linear(width, groups)
        self.activation = activation

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        hidden = _ACTIVATIONS[self.activation](self.fc1(self.norm(signal.float())))
        return torch.softmax(self.fc2(hidden), dim=-1)


class GateHandle:
    """Gates attached to a model; a context manager that detaches them at its end.

    Attributes:
        gates: one TorchGate a layer, keyed by the layer as a string; their parameters may be trained.
        gate_position: int64 [B], the token that the gates read; None for the last unpadded one. Training examples also hold the
            answer and must set it to the last prompt token.
        ratios: {layer: float32 [B, G]} of the last prefill.
        key_scales: {layer: float32 [B, T]} of the last prefill, key_scale included; text tokens have exactly 1.
    """

    def __init__(self, model: Any, gates: PortableGates, sinks: SinkConfig):
        self.config = gates.gate
        self.sinks = sinks
        self.gate_position: torch.Tensor | None = None
        self.ratios: dict[int, torch.Tensor] = {}
        self.key_scales: dict[int, torch.Tensor] = {}
        self._stack = stack = stack_of(model)
        ids = (getattr(model.config, name, None) for name in ("image_token_id", "video_token_id"))
        self._visual_ids = torch.tensor([token for token in ids if token is not None])
        self._v_sinks: list[torch.Tensor] | None = None  # of the images encoded last: bool [P] of each square or image
        self._tokens: _Tokens | None = None  # of the forward pass that is running
        self.gates = nn.ModuleDict()
        self._hooks: list[RemovableHandle] = [
            stack.connector.register_forward_pre_hook(self._before_connector),
            model.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.model.register_forward_hook(self._after_model, always_call=True),
        ]
        if isinstance(stack, Qwen):
            self._hooks.append(model.model.visual.register_forward_pre_hook(stack.before_tower, with_kwargs=True))
        for layer, tensors in to_torch_layout(gates.parameters, gates.gate.layers).items():
            groups, width = tensors["fc2.weight"].shape
            gate = TorchGate(gates.width_in, width, groups, activation=gates.gate.activation, eps=gates.gate.layer_norm_eps)
            gate.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
            block: Any = stack.decoder.layers[layer]
            self.gates[str(layer)] = gate.to(next(block.parameters()).device)
            self._hooks.append(block.register_forward_pre_hook(self._before_layer(layer), with_kwargs=True))
            self._hooks.append(self._scale_keys_of(block.self_attn, layer))

    def remove(self) -> None:
        """Detaches the gates; the model is as before. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> GateHandle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def _before_connector(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._v_sinks = [self._judged(features) for features in self._stack.patches(args[0])]

    def _judged(self, features: torch.Tensor) -> torch.Tensor:
        """V-sinks among the patches [P, D] of one square or image: bool [P]."""
        s, everywhere = self.sinks, torch.ones(len(features), dtype=torch.bool, device=features.device)
        if s.criterion in ("dim_abs", "dim_rms") and not s.vit_dims:
            return ~everywhere
        return _sinks(s.criterion, features[None], s.vit_dims, s.vit_tau, s.massive_ratio, everywhere[None])[0]

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tokens = None
        self.key_scales = {}
        self._stack.before_model(kwargs)
        ids = args[0] if args else kwargs.get("input_ids")
        past = kwargs.get("past_key_values")
        decoding = past is not None and int(past.get_seq_length()) > 0
        if ids is None and not decoding:
            raise InputError("gated models need input_ids: inputs_embeds do not say which tokens are image patches")
        if ids is None or not (is_image := torch.isin(ids, self._visual_ids.to(ids.device))).any():
            return
        pixels = [args[1] if len(args) > 1 else kwargs.get("pixel_values"), kwargs.get("pixel_values_videos")]
        if all(given is None for given in pixels) and self._v_sinks is None:
            if kwargs.get("mm_encoder_outputs"):
                raise InputError("gates saw no image being encoded: attach them first, and generate with use_cache=True")
            return  # without an image, image tokens are text; a model may also generate them
        if decoding:
            raise InputError("an image after a filled cache: give the whole prompt in one prefill")
        self._tokens = _Tokens(ids, is_image, kwargs, self.gate_position)

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # keep key_scales: a layer with activation checkpointing runs again in the backward pass
        self._tokens = None
        self._v_sinks = None

    def _before_layer(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.key_scales.pop(layer, None)
            if self._tokens is None or self._v_sinks is None:
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            tokens = self._tokens
            found = self._stack.tokens([mask.float() for mask in self._v_sinks], tokens.kwargs)
            marks = tokens.spread(found).to(hidden.device)
            visual = tokens.is_image & tokens.valid & (marks >= 0)
            members = self._members(hidden, visual & (marks > 0), visual, tokens.valid)
            ratios = self.gates[str(layer)](self._signal(hidden, tokens, visual))
            self.ratios[layer] = ratios.detach()
            # text tokens are in no group and keep exactly 1
            scale = torch.ones(visual.shape, dtype=torch.float32, device=hidden.device)
            for group, member in enumerate(members):
                scale = torch.where(member, self.config.key_scale * ratios[:, group, None], scale)
            self.key_scales[layer] = scale

        return hook

    def _members(
        self, hidden: torch.Tensor, v_sink: torch.Tensor, visual: torch.Tensor, valid: torch.Tensor
    ) -> list[torch.Tensor]:
        """bool [B, T] for each group, in the order of the gate's outputs."""
        if self.config.grouping == "v_sink_rest":
            return [v_sink, visual & ~v_sink]
        s = self.sinks
        raised = _sinks(s.llm_criterion, hidden, s.llm_dims, s.llm_tau, s.massive_ratio, valid)
        l_sink = raised & visual & ~v_sink
        if self.config.grouping == "l_sink_rest":
            return [l_sink, visual & ~l_sink]
        return [v_sink, l_sink, visual & ~v_sink & ~l_sink]

    def _signal(self, hidden: torch.Tensor, tokens: _Tokens, visual: torch.Tensor) -> torch.Tensor:
        """The input of the gate [B, D]. Positions after the gate position hold the answer and are excluded."""
        position = tokens.gate_position.to(hidden.device)
        if self.config.signal == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), position]
        prompt = torch.arange(hidden.shape[1], device=hidden.device)[None] <= position[:, None]
        chosen = prompt & (visual if self.config.signal == "mean_visual" else tokens.valid)
        total = torch.where(chosen[..., None], hidden.float(), 0.0).sum(1)
        return total / chosen.sum(1, keepdim=True).clamp(min=1)

    def _scale_keys_of(self, attention: Any, layer: int) -> RemovableHandle:
        """Hooks what makes the keys last: their norm, the key projection, or the middle part of Phi-3's fused one."""

        def scaled(key: torch.Tensor, axis: int = 1) -> torch.Tensor:
            batch, length = self.key_scales[layer].shape
            others = [1] * (key.ndim - axis - 1)
            return (key * self.key_scales[layer].reshape(batch, *[1] * (axis - 1), length, *others)).to(key.dtype)

        def hook(axis: int) -> Callable[..., torch.Tensor | None]:
            return lambda module, args, out: scaled(out, axis) if layer in self.key_scales else None

        if hasattr(attention, "k_norm"):
            return attention.k_norm.register_forward_hook(hook(self._stack.key_axis))
        if hasattr(attention, "k_proj"):
            return attention.k_proj.register_forward_hook(hook(1))
        config, head = attention.config, attention.head_dim
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head

        def fused(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor | None:
            if layer not in self.key_scales:
                return None
            query, key, value = out.split([queries, keys, out.shape[-1] - queries - keys], dim=-1)
            return torch.cat([query, scaled(key), value], dim=-1)

        return attention.qkv_proj.register_forward_hook(fused)


class _Tokens:
    """Image positions bool [B, T], unpadded positions bool [B, T] and gate position int64 [B] of a prefill."""

    def __init__(self, ids: torch.Tensor, is_image: torch.Tensor, kwargs: dict[str, Any], position: torch.Tensor | None):
        self.is_image = is_image
        self.kwargs = kwargs
        mask = kwargs.get("attention_mask")
        if mask is not None and tuple(mask.shape) != tuple(ids.shape):
            raise InputError(f"attention_mask has shape {list(mask.shape)}, gates need [batch, tokens] = {list(ids.shape)}")
        self.valid = torch.ones_like(is_image) if mask is None else mask.to(ids.device).bool()
        last = ids.shape[1] - 1 - self.valid.flip(1).int().argmax(1)
        if position is not None and tuple(position.shape) != tuple(last.shape):
            raise InputError(f"gate_position has shape {list(position.shape)}, expected [batch] = {list(last.shape)}")
        self.gate_position = last if position is None else position.to(ids.device)

    def spread(self, flat: torch.Tensor) -> torch.Tensor:
        """Scatters the values of all image tokens [n], in order: [B, T], 0 elsewhere."""
        slots = int(self.is_image.sum())
        # with beams, or several sequences a prompt, each row is repeated `copies` times and its image is encoded once
        copies = slots // max(flat.numel(), 1)
        if slots != copies * flat.numel() or len(self.is_image) % max(copies, 1):
            raise InputError(f"{slots} image tokens for {flat.numel()} image features")
        rows = self.is_image[::copies]
        out = torch.zeros(rows.shape, device=rows.device)
        out[rows] = flat.to(rows.device)
        return out.repeat_interleave(copies, dim=0)


def attach(
    model: Any,
    gates: PortableGates | str | Path,
    *,
    sinks: SinkConfig | None = None,
    gate_position: torch.Tensor | None = None,
) -> GateHandle:
    """Attaches gates to a model of transformers of one of the classes in `torch_stacks.STACKS`.

    Works in `model(...)` and `model.generate(...)`, with padding on either side. Input without an image is not affected.

    Args:
        gates: a portable gate file, or its content.
        sinks: sink criteria; None for those of the gate file.
        gate_position: int64 [B], see GateHandle; may be set on the handle later.

    Raises:
        InputError: another kind of model, gates of another width or layer, or sink settings that cannot be applied. Later, from
            the model's forward: inputs without positions of the image tokens.
    """
    gates = gates if isinstance(gates, PortableGates) else read_gates(gates)
    stack_of(model)
    text: Any = model.config.text_config
    if text.model_type not in DECODERS:
        raise InputError(f"gates attach to language models {', '.join(DECODERS)}, not to {text.model_type}")
    check_width(gates, text.hidden_size, text.num_hidden_layers)
    sinks = sinks or gates.sinks
    # a gate of L-sinks works without V-sink dimensions; then there are no V-sinks
    _check_criterion(sinks.criterion, sinks.vit_dims or gates.gate.grouping == "l_sink_rest", "criterion", "vit_dims")
    if gates.gate.grouping != "v_sink_rest":
        _check_criterion(sinks.llm_criterion, sinks.llm_dims, "llm_criterion", "llm_dims")
    handle = GateHandle(model, gates, sinks)
    handle.gate_position = gate_position
    return handle


def _check_criterion(criterion: str, dims: tuple[int, ...] | bool, criterion_field: str, dims_field: str) -> None:
    if criterion == "attention_share":
        raise InputError(
            f"sinks.{criterion_field} attention_share needs attention weights, which hooks do not see: choose another"
        )
    if criterion in ("dim_abs", "dim_rms") and not dims:
        raise InputError(f"sinks.{dims_field} is empty: name the sink dimensions, or choose another sinks.{criterion_field}")


def _sinks(
    criterion: str, features: torch.Tensor, dims: tuple[int, ...], tau: float, ratio: float, valid: torch.Tensor
) -> torch.Tensor:
    """Sinks among features [B, T, D] by the criterion of that name: bool [B, T], False outside `valid` [B, T]."""
    x = features.detach().float()
    if criterion in ("dim_abs", "dim_rms"):
        if bad := [d for d in dims if not 0 <= d < x.shape[-1]]:
            raise InputError(f"sink dimension {bad[0]} is outside the width {x.shape[-1]}")
        peak = x[..., list(dims)].abs().amax(-1)
        if criterion == "dim_abs":
            return (peak >= tau) & valid
        rms = x.pow(2).mean(-1).sqrt()
        return (peak >= tau * rms) & (rms > 0) & valid
    if criterion == "norm":
        return (x.norm(dim=-1) >= tau) & valid
    if criterion == "massive":
        rows = []
        for row, keep in zip(x.abs(), valid, strict=True):
            if not keep.any():
                rows.append(keep)
                continue
            ordered = row[keep].flatten().sort().values  # torch.median takes the lower of the middle two
            middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
            peak = row.amax(-1)
            rows.append((peak >= tau) & (peak >= ratio * middle) & keep)
        return torch.stack(rows)
    raise InputError(f"unknown sink criterion {criterion}")
