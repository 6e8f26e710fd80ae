"""Small trained tokenizers and a model configuration."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lsg_jax.config import ImageConfig, ModelConfig, RopeConfig, TextConfig, VisionConfig

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: What is the ball? ASSISTANT: It is red.",
    "system user assistant You are a helpful assistant.\n\nthere are two  cubes and three spheres, naturally",
]


def model_config(
    *, image_token_id: int = 3, size: int = 28, family: str = "llama", aspect: str = "pad", eos: tuple[int, ...] = (2,)
) -> ModelConfig:
    """4 image tokens at the default size."""
    return ModelConfig(
        vision=VisionConfig("clip", size, 14, 16, 32, 2, 2, 1e-5, "quick_gelu"),
        text=TextConfig(family, 300, 16, 32, 2, 2, 2, 8, 1e-5, RopeConfig(1e4), 512),  # type: ignore[arg-type]
        feature_layers=(-2,),
        feature_select="default",
        image_token_id=image_token_id,
        eos_token_ids=eos,
        pad_token_id=0,
        image=ImageConfig(size, aspect, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),  # type: ignore[arg-type]
    )


def llama_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    """A SentencePiece-like BPE. `scheme`: Metaspace `first` or `always`, or `normalizer` as in older files."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    # trained on words, so that no merge crosses a space, as in the real vocabulary
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    alphabet = ["▁", "\n", *map(chr, range(33, 127))]
    specials = ["<unk>", "<s>", "</s>", "<image>", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=560, special_tokens=specials[:4], initial_alphabet=alphabet)
    )
    if scheme == "normalizer":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def byte_level_tokenizer(
    specials: tuple[str, ...] = ("<|im_start|>", "<|im_end|>"), rstrip: bool = False, image: str = "<image>"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with chat markers and no BOS, like Qwen2's (or with Phi-3's markers and `rstrip`)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, rstrip=rstrip) for s in (*specials, image)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=specials[-1],
        extra_special_tokens={"image_token": image},
    )
