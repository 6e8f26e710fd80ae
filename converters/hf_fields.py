"""Fields of Hugging Face configurations: which are read, and which cannot change what the model computes. Data only."""

from __future__ import annotations

from typing import Any

GENERIC = frozenset(
    {
        # what the file is
        "model_type", "architectures", "transformers_version", "_name_or_path", "_commit_hash", "auto_map", "name_or_path",
        "tokenizer_class", "finetuning_task", "task_specific_params", "prefix", "problem_type", "id2label", "label2id",
        "num_labels",
        # how a model is run or trained by PyTorch, not what it computes in evaluation
        "torch_dtype", "dtype", "use_bfloat16", "torchscript", "tf_legacy_loss", "return_dict", "output_attentions",
        "output_hidden_states", "use_cache", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
        "_flash_attn_2_enabled", "initializer_range", "initializer_factor", "attention_dropout", "dropout", "resid_pdrop",
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
    "add_cross_attention": (False,),
    "attention_bias": (False,),  # read for Llama, where it may be true
    "mlp_bias": (False,),
    "chunk_size_feed_forward": (0,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False,),
    "tie_last_hidden_states": (False, None),  # true would put the last norm into the vision features
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}
"""Fields that are fine at these values and change the model at others."""

LLAVA = frozenset(
    {
        "vision_config", "text_config", "image_token_index", "image_token_id", "projector_hidden_act",
        "multimodal_projector_bias", "vision_feature_layer", "vision_feature_select_strategy", "tie_word_embeddings",
        "lsg_sinks",
        "ignore_index", "image_seq_length", "vocab_size",  # a label, a fact about the processor, a copy of text_config's
    }
)  # fmt: skip

VISION = frozenset(
    {
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
        "patch_size", "hidden_act", "layer_norm_eps",
        "projection_dim", "vision_use_head", "vocab_size", "tie_word_embeddings",  # about parts that the model does not use
    }
)  # fmt: skip

_TEXT = frozenset(
    {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
        "rope_theta", "rope_scaling", "partial_rotary_factor",
    }
)  # fmt: skip

TEXT: dict[str, frozenset[str]] = {
    # Phi-3 in Llama's form (LLaVA-Phi-3-mini by xtuner) keeps its window, which is respected, and the latter, for longrope only
    "llama": _TEXT | {"attention_bias", "mlp_bias", "sliding_window", "original_max_position_embeddings"},
    "mistral": _TEXT | {"sliding_window"},
    "qwen2": _TEXT | {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"},
    "phi3": _TEXT | {"sliding_window", "original_max_position_embeddings"},
}
"""What is read from `text_config`, by model_type."""
