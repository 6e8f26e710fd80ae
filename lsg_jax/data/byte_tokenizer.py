"""Tokenizers that need no download: one token a byte for random tiny models, and byte-level BPE learned from given texts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lsg_jax.data.conversation import IMAGE_TAG

PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
"""Ids of the special tokens; byte b has id 4 + its rank among the byte-level characters."""

VOCAB_SIZE = 4 + 256


def write_byte_tokenizer(folder: str | Path, *, image_token: str = IMAGE_TAG) -> None:
    """Writes a Hugging Face fast tokenizer of 260 tokens: `<pad>` 0, `<s>` 1, `</s>` 2, the image token 3, then the bytes.

    It puts `<s>` in front, has no chat template, and round-trips any text. `AutoTokenizer.from_pretrained(folder)` loads it.
    """
    _write(folder, _byte_level(image_token), image_token)


def write_bpe_tokenizer(
    folder: str | Path, texts: Iterable[str], *, vocab_size: int, chat_template: str, image_token: str = IMAGE_TAG
) -> None:
    """Writes a tokenizer that begins as the byte tokenizer does and goes on with merges learned from texts, to `vocab_size`."""
    from tokenizers import pre_tokenizers, trainers

    tokenizer = _byte_level(image_token)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_specials(image_token),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _write(folder, tokenizer, image_token, chat_template=chat_template)


def _specials(image_token: str) -> list[str]:
    return ["<pad>", "<s>", "</s>", image_token]


def _byte_level(image_token: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*_specials(image_token), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def _write(folder: str | Path, tokenizer: Any, image_token: str, **options: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": image_token},
        **options,
    ).save_pretrained(folder)
