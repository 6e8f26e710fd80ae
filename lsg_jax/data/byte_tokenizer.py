"""A tokenizer that needs no download: four special tokens and one token a byte. For random tiny models and tests."""

from __future__ import annotations

from pathlib import Path

from lsg_jax.data.conversation import IMAGE_TAG

PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
"""Ids of the special tokens; byte b has id 4 + its rank among the byte-level characters."""

VOCAB_SIZE = 4 + 256


def write_byte_tokenizer(folder: str | Path, *, image_token: str = IMAGE_TAG) -> None:
    """Writes a Hugging Face fast tokenizer of 260 tokens: `<pad>` 0, `<s>` 1, `</s>` 2, the image token 3, then the bytes.

    It puts `<s>` in front, has no chat template, and round-trips any text. `AutoTokenizer.from_pretrained(folder)` loads it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", image_token]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": image_token},
    ).save_pretrained(folder)
