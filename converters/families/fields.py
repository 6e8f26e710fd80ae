"""Which fields of a Hugging Face configuration change the model, and which do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from converters.families.values import shortened
from lsg_jax.errors import ConfigError
from lsg_jax.installed import transformers

GENERIC = frozenset(
    {
        # what the file is
        "model_type", "architectures", "transformers_version", "_name_or_path", "_commit_hash", "auto_map", "name_or_path",
        "tokenizer_class", "finetuning_task", "task_specific_params", "prefix", "problem_type", "id2label", "label2id",
        "num_labels",
        # how a model is run or trained by PyTorch, not what it computes in evaluation
        "torch_dtype", "dtype", "use_bfloat16", "torchscript", "tf_legacy_loss", "return_dict", "output_attentions",
        "output_hidden_states", "use_cache", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
        "experts_implementation", "_flash_attn_2_enabled",
        "initializer_range", "initializer_factor", "attention_dropout", "dropout", "resid_pdrop",
        "embd_pdrop", "pretraining_tp", "gradient_checkpointing", "max_sequence_length",
        # tokens: read where they matter
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
        # defaults of generation: ours is greedy
        "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
        "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
        "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
        "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens",
        "exponential_decay_length_penalty", "begin_suppress_tokens",
    }
)  # fmt: skip
"""Fields of any part that do not change the numbers of a forward pass in evaluation mode."""

ONLY: dict[str, tuple[Any, ...]] = {
    # of some classes
    "add_cross_attention": (False,),
    "attention_bias": (False,),  # Llama's may be true: there it is handled
    "mlp_bias": (False,),
    "chunk_size_feed_forward": (0,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
    # transformers reads these from any configuration, whether its class defines them or not
    "attention_chunk_size": (None,),
    "is_causal": (True,),
    "layer_types": (None,),
    "per_layer_config": (None, {}),
    "quantization_config": (None,),
    "tie_last_hidden_states": (False, None),  # true would put the last norm into the vision features
}
"""Fields that are fine at these values and change the model at others, unless a family handles them."""


def undefined_fields(part: Mapping[str, Any], handled: frozenset[str], model_type: str, where: str) -> dict[str, Any]:
    """Sorts the fields of one part of a config.json that its family does not handle.

    A field in GENERIC has no effect. A field in ONLY must have one of its values. Any other field that the installed
    transformers defines for this model_type must have its default, with which the parity tests run. A field that it does not
    define cannot change what transformers computes.

    Args:
        part: config.json or one of its nested configurations. handled: fields that the family reads.

    Returns:
        Name -> value of the fields that transformers does not define.

    Raises:
        ConfigError: names every field that might change the results.
    """
    defaults = defined_fields(model_type)
    refused: dict[str, Any] = {}
    undefined: dict[str, Any] = {}
    for name, value in part.items():
        if name in handled or name in GENERIC:
            continue
        if name in ONLY or name in defaults:
            allowed = ONLY[name] if name in ONLY else (defaults[name],)
            if not any(_same(value, other) for other in allowed):
                refused[name] = value
        else:
            undefined[name] = value
    if refused:
        listed = ", ".join(f"{name} = {shortened(value)}" for name, value in refused.items())
        raise ConfigError(f"{where}: not understood, so it might change the results: {listed}")
    return undefined


def defined_fields(model_type: str) -> dict[str, Any]:
    """The fields of the configuration class that the installed transformers has for a model_type -> their defaults."""
    CONFIG_MAPPING = transformers().CONFIG_MAPPING
    cls = CONFIG_MAPPING[model_type]
    members = {name: getattr(cls, name) for name in dir(cls)}
    defaults: dict[str, Any] = {name: None for name, value in members.items() if isinstance(value, property) and value.fset}
    for field in fields(cls):
        defaults[field.name] = field.default if field.default_factory is MISSING else field.default_factory()
    return defaults | {alias: defaults.get(name) for alias, name in cls.attribute_map.items()}


def _same(value: Any, other: Any) -> bool:
    """Equality of JSON values: true is not 1, and a list equals a tuple."""
    if isinstance(value, bool) != isinstance(other, bool):
        return False
    return value == (list(other) if isinstance(other, tuple) else other)
