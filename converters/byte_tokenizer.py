"""A tokenizer that needs no download: one token a byte, for random tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lsg_jax.data.conversation import IMAGE_TAG
from lsg_jax.installed import transformers

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
"""Ids of the special tokens; byte b has id 4 + its rank among the byte-level characters."""

VOCAB_SIZE = 4 + 256


def write_byte_tokenizer(folder: str | Path, *, image_token: str = IMAGE_TAG) -> None:
    """Writes a Hugging Face fast tokenizer of 260 tokens: `<pad>` 0, `<s>` 1, `</s>` 2, the image token 3, then the bytes.

    It prepends `<s>`, has no chat template, and round-trips any text. `AutoTokenizer.from_pretrained(folder)` loads it.
    """
    save_tokenizer(folder, byte_level(image_token), image_token)


def special_tokens(image_token: str) -> list[str]:
    """The special tokens in the order of their ids."""
    return ["<pad>", "<s>", "</s>", image_token]


def byte_level(image_token: str) -> Tokenizer:
    """A byte-level BPE tokenizer without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special_tokens(image_token), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def save_tokenizer(folder: str | Path, tokenizer: Tokenizer, image_token: str, *, chat_template: str | None = None) -> None:
    """Saves it as `AutoTokenizer` and `AutoProcessor` of transformers load it."""
    PreTrainedTokenizerFast = transformers().PreTrainedTokenizerFast
    template = {} if chat_template is None else {"chat_template": chat_template}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": image_token},
        **template,
    ).save_pretrained(folder)
