"""Hugging Face `config.json` -> ModelConfig.

Strict: a field that is not known (`hf_fields.py`) is refused by name, since it may change the numbers. What is left out is
filled in by the configuration classes of transformers, which also know how older versions wrote things. PyTorch is not needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from converters.hf_fields import GENERIC, LLAVA, ONLY, TEXT, VISION
from converters.json_file import read_object
from lsg_jax.config import Activation, ModelConfig, RopeConfig, SinkConfig, TextConfig, VisionConfig, from_dict
from lsg_jax.data.images import image_config_from_hf
from lsg_jax.errors import ConfigError

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
"""Names of transformers -> ours."""

VISION_FAMILIES: dict[str, Literal["clip", "siglip"]] = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}

_ROPE_FIELDS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def read_config(folder: str | Path) -> ModelConfig:
    """Reads the configuration of a local checkpoint in Hugging Face format.

    Args:
        folder: holds `config.json` and, where the checkpoint has them, `generation_config.json` and `preprocessor_config.json`
            or `processor_config.json`.

    Raises:
        InputError: a file is missing or no proper JSON. ConfigError: the model or one of its settings is not supported.
    """
    folder = Path(folder)
    optional = lambda name: read_object(folder / name) if (folder / name).is_file() else None
    return model_config(
        read_object(folder / "config.json"),
        generation=optional("generation_config.json"),
        preprocessor=optional("preprocessor_config.json") or optional("processor_config.json"),
        where=str(folder / "config.json"),
    )


def model_config(
    config: Mapping[str, Any],
    *,
    generation: Mapping[str, Any] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
    where: str = "config.json",
) -> ModelConfig:
    """The ModelConfig of a LLaVA `config.json`.

    Args:
        config: its contents. generation, preprocessor: those of `generation_config.json` and of the image processor's file.
        where: names the file in errors.

    Raises:
        ConfigError: an architecture, a field or a value is not supported; it is named.
    """
    _check_architecture(config, where)
    _check_fields(config, LLAVA, where)
    _check_fields(config["vision_config"], VISION, f"{where}: vision_config")
    text_type = config["text_config"].get("model_type", "llama")
    _check_fields(config["text_config"], TEXT[text_type], f"{where}: text_config")
    full = _with_defaults(config, where)
    vision = _vision(full.vision_config, f"{where}: vision_config")
    text = _text(full.text_config, text_type, bool(full.tie_word_embeddings), f"{where}: text_config")
    stated = full.vision_feature_layer
    layers = (stated,) if isinstance(stated, int) else tuple(stated)
    states = vision.num_layers + 1
    if bad := [layer for layer in layers if not -states <= layer < states]:
        raise ConfigError(
            f"{where}: vision_feature_layer {bad[0]} does not exist, the tower has hidden states 0 to {states - 1}"
        )
    eos = _token_ids(full, config, generation, "eos_token_id", where)
    pad = _token_ids(full, config, None, "pad_token_id", where) or eos or (0,)
    return ModelConfig(
        vision=vision,
        text=text,
        feature_layers=layers,
        feature_select=full.vision_feature_select_strategy,
        image_token_id=full.image_token_index,
        eos_token_ids=eos,
        pad_token_id=pad[0],
        image=image_config_from_hf(dict(preprocessor) if preprocessor else None, size=vision.image_size, family=vision.family),
        projector_hidden_act=_activation(full.projector_hidden_act, f"{where}: projector_hidden_act"),
        projector_bias=full.multimodal_projector_bias,
        sinks=_sinks(config, vision, text, where),
    )


def _sinks(config: Mapping[str, Any], vision: VisionConfig, text: TextConfig, where: str) -> SinkConfig:
    """What the checkpoint itself states in `lsg_sinks`, the fields of SinkConfig; else what is published."""
    if "lsg_sinks" in config:
        return from_dict(SinkConfig, config["lsg_sinks"], where=f"{where}: lsg_sinks")
    return known_sinks(vision, text)


def known_sinks(vision: VisionConfig, text: TextConfig) -> SinkConfig:
    """The sink dimensions that are published for a backbone (paper.md); none for one that is not recognised.

    CLIP ViT-L/14-336 has its V-sinks in dimension 650; Llama-2 7B its L-sinks in 1415 and 2533, and 13B in 2100 and 4743.
    """
    shape = (vision.family, vision.hidden_size, vision.num_layers, vision.patch_size, vision.image_size)
    vit_dims = (650,) if shape == ("clip", 1024, 24, 14, 336) else ()
    llm_dims: tuple[int, ...] = ()
    if text.family == "llama" and 32000 <= text.vocab_size <= 32064:  # up to 64 tokens were added to Llama 2's own
        llm_dims = {(4096, 32): (1415, 2533), (5120, 40): (2100, 4743)}.get((text.hidden_size, text.num_layers), ())
    return SinkConfig(vit_dims=vit_dims, llm_dims=llm_dims)


def _with_defaults(config: Mapping[str, Any], where: str) -> Any:
    """The same configuration as a LlavaConfig of transformers, with every default filled in."""
    from transformers import LlavaConfig

    try:
        return LlavaConfig(**copy.deepcopy(dict(config)))
    except Exception as error:  # its validators raise many kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"{where}: transformers refuses it: {' '.join(lines)[:300]}") from None


def _check_architecture(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("model_type")
    if kind != "llava":
        raise ConfigError(f"{where}: model_type {kind!r} is not supported; supported: 'llava' (LlavaForConditionalGeneration)")
    for name, default, known in (
        ("vision_config", "clip_vision_model", VISION_FAMILIES),
        ("text_config", "llama", TEXT),
    ):
        part = config.get(name)
        if not isinstance(part, Mapping):
            raise ConfigError(f"{where}: {name} is missing")
        kind = part.get("model_type", default)
        if not isinstance(kind, str) or kind not in known:
            raise ConfigError(
                f"{where}: {name} is of model_type {kind!r}, which is not supported; supported: {', '.join(known)}"
            )


def _check_fields(config: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuses what is neither in the list for this part, nor without effect, nor at the one value that is supported."""
    known = set(known)
    unknown = []
    for name, value in config.items():
        if name in known or name in GENERIC:
            continue
        if name in ONLY and any(value == allowed and type(value) is type(allowed) for allowed in ONLY[name]):
            continue
        unknown.append(f"{name} = {_short(value)}")
    if unknown:
        raise ConfigError(f"{where}: not understood, so it might change the results: {', '.join(unknown)}")


def _vision(config: Any, where: str) -> VisionConfig:
    if config.num_channels != 3:
        raise ConfigError(f"{where}: num_channels = {config.num_channels}, only 3 is supported")
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(f"{where}: hidden_size {config.hidden_size} is no multiple of {config.num_attention_heads} heads")
    return VisionConfig(
        family=VISION_FAMILIES[config.model_type],
        image_size=_square(config.image_size, f"{where}: image_size"),
        patch_size=_square(config.patch_size, f"{where}: patch_size"),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        layer_norm_eps=float(config.layer_norm_eps),
        hidden_act=_activation(config.hidden_act, f"{where}: hidden_act"),
    )


def _text(config: Any, family: Any, tied: bool, where: str) -> TextConfig:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ConfigError(f"{where}: {heads} attention heads are no multiple of {kv_heads} key-value heads")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    llama_bias = family == "llama" and config.attention_bias
    return TextConfig(
        family=family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(config.rms_norm_eps),
        rope=_rope(config.rope_parameters, family, head_dim, where),
        max_positions=config.max_position_embeddings,
        hidden_act=_activation(config.hidden_act, f"{where}: hidden_act"),
        qkv_bias=family == "qwen2" or llama_bias,
        out_bias=llama_bias,
        mlp_bias=family == "llama" and config.mlp_bias,
        tied_embeddings=tied,
        sliding_window=_sliding_window(config, where),
    )


def _rope(parameters: Mapping[str, Any] | None, family: str, head_dim: int, where: str) -> RopeConfig:
    """Reads `rope_parameters` as transformers 5 has them; older spellings were translated by its configuration class."""
    given = dict(parameters or {})
    kind = given.pop("rope_type", "default")
    given.pop("type", None)  # the older name of the same
    if kind not in _ROPE_FIELDS:
        raise ConfigError(f"{where}: rope type {kind!r} is not supported; supported: {', '.join(_ROPE_FIELDS)}")
    theta, share = given.pop("rope_theta", None), given.pop("partial_rotary_factor", 1.0)
    if theta is None:
        raise ConfigError(f"{where}: rope_parameters has no rope_theta")
    if unknown := sorted(given.keys() - _ROPE_FIELDS[kind]):
        raise ConfigError(f"{where}: rope_parameters of type {kind}: not understood: {', '.join(unknown)}")
    if missing := sorted(_ROPE_FIELDS[kind] - given.keys()):
        raise ConfigError(f"{where}: rope_parameters of type {kind}: missing: {', '.join(missing)}")
    rotary_dim = int(head_dim * share)
    if share != 1.0 and (family != "phi3" or not 0 < rotary_dim <= head_dim):
        raise ConfigError(f"{where}: partial_rotary_factor = {share} is not supported for {family}")
    if rotary_dim % 2:
        raise ConfigError(f"{where}: {rotary_dim} rotary dimensions; an even number is needed")
    return RopeConfig(
        theta=float(theta),
        kind=kind,
        factor=float(given.get("factor", 1.0)),
        low_freq_factor=float(given.get("low_freq_factor", 1.0)),
        high_freq_factor=float(given.get("high_freq_factor", 4.0)),
        original_max_positions=int(given.get("original_max_position_embeddings", 8192)),
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
    )


def _sliding_window(config: Any, where: str) -> int | None:
    """The window if any layer has one: a longer sequence is refused when the model runs."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise ConfigError(f"{where}: layer_types {', '.join(unknown)} are not supported")
    if kinds == {"full_attention"}:
        return None
    return getattr(config, "sliding_window", None)


def _token_ids(
    llava: Any, config: Mapping[str, Any], generation: Mapping[str, Any] | None, name: str, where: str
) -> tuple[int, ...]:
    """Token ids from the first place that states any: generation_config.json, config.json, its text_config with defaults."""
    for value in ((generation or {}).get(name), config.get(name), getattr(llava.text_config, name, None)):
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ConfigError(f"{where}: {name} = {_short(value)} is neither a token id nor a list of them")
        return tuple(ids)
    return ()


def _activation(name: str, where: str) -> Activation:
    if name not in ACTIVATIONS:
        raise ConfigError(f"{where} = {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _square(value: Any, where: str) -> int:
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    side = sides.pop() if len(sides) == 1 else None
    if not isinstance(side, int) or side < 1:
        raise ConfigError(f"{where} = {_short(value)} is not the side of a square")
    return side


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
