"""Tiny random decoders: of transformers with our copy of their weights, and our own with every setting at once."""

from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from hf_models import PAD, VOCABULARY, randomise, state_arrays

from converters.families.decoders import RULES, text_config
from lsg_jax.config import RopeConfig, TextConfig
from lsg_jax.model.generate import cache_of, decode_greedily, last_token
from lsg_jax.model.language_model import LanguageModel
from lsg_jax.model.rotary import token_positions
from lsg_jax.types import Sequence

LENGTH = 27
LENGTHS = (27, 19, 12)  # of the tokens of each row
WINDOW = 7
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
GEMMA = {
    "head_dim": 12,
    "sliding_window": WINDOW,
    "layer_types": MIXED,
    "query_pre_attn_scalar": 24,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
FRAMES_ROWS_COLUMNS = {"rope_type": "default", "rope_theta": 300.0, "mrope_section": [3, 2, 2]}
KINDS = {
    "qwen3": ("Qwen3", "ForCausalLM", {"head_dim": 14, "attention_bias": True}),
    "mistral": ("Mistral", "ForCausalLM", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", "ForCausalLM", {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED}),
    "gemma3": ("Gemma3", "ForCausalLM", GEMMA),
    "gemma3-one-rope": ("Gemma3", "ForCausalLM", GEMMA | {"rope_parameters": None, "tie_word_embeddings": False}),
    "qwen2-vl": ("Qwen2VL", "TextModel", {"hidden_size": 56, "rope_parameters": FRAMES_ROWS_COLUMNS}),
    "qwen2.5-vl": ("Qwen2_5_VL", "TextModel", {"hidden_size": 56, "rope_parameters": FRAMES_ROWS_COLUMNS}),
    "qwen3-vl": ("Qwen3VL", "TextModel", {"head_dim": 14, "rope_parameters": FRAMES_ROWS_COLUMNS}),
}


@cache
def pair(kind):
    """A model of transformers, ours with its configuration, and its weights for ours."""
    torch.set_num_threads(1)
    family, head, settings = KINDS[kind]
    config = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}{'' if head == 'ForCausalLM' else 'Text'}Config")
    hf_config = getattr(transformers, config)(**_SMALL | settings)
    hf = getattr(transformers, f"{family}{head}")(hf_config).eval()
    tied = head == "ForCausalLM" and hf_config.tie_word_embeddings
    randomise(hf, torch.Generator().manual_seed(0), tied=tied)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "norm" in name and family == "Gemma3":
                parameter -= 1
            if "embed_tokens" in name and (tied or head == "TextModel"):
                parameter *= 0.2  # a tied head would else repeat the last token for ever
    # a text model has no head of its own: ours is then tied, and not looked at
    ours = text_config(hf_config, tied=tied or head == "TextModel", where="config.json")
    tensors = {"language_model." + (name if "." in name and head == "ForCausalLM" else f"model.{name}"): array
               for name, array in state_arrays(hf).items()}  # fmt: skip
    return hf, ours, parameters(ours, tensors)


def abstract(config, mesh=None):
    return nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.float32, mesh=mesh))


def parameters(config, tensors):
    """The parameters of a decoder from tensors under their canonical names, by its rules."""
    rules = {rule.leaf: rule for rule in RULES[config.family]}

    def read(path, leaf):
        rule = rules["language_model/" + "/".join(str(key.key) for key in path if hasattr(key, "key"))]
        stacked = "{layer}" in rule.source
        shape = leaf.shape[1:] if stacked else leaf.shape
        blocks = [np.empty(shape, np.float32) for _ in range(config.num_layers if stacked else 1)]
        for layer, block in enumerate(blocks):
            tensor = tensors.pop(rule.source.format(layer=layer))
            assert tensor.shape == rule.op.source_shape(shape)
            rule.op.fill(block, 0, tensor, 0)
        return np.stack(blocks) if stacked else blocks[0]

    tree = nnx.to_pure_dict(nnx.state(abstract(config)))
    tensors = dict(tensors)
    found = jax.tree.map_with_path(read, tree)
    left = set(tensors) - {"language_model.lm_head.weight"}
    assert not left, left
    return found


def assemble(config, params, mesh=None):
    return nnx.merge(nnx.graphdef(abstract(config, mesh)), params)


def everything():
    """A decoder that has every setting at once: none of transformers does."""
    return TextConfig(
        family="gemma3",
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_layers=5,
        num_heads=4,
        num_kv_heads=2,
        head_dim=12,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=300.0, sections=(2, 2, 2), interleaved=True),
        max_positions=512,
        qkv_bias=True,
        sliding_window=WINDOW,
        sliding_layers=(0, 1, 3),
        sliding_rope=RopeConfig(theta=50.0, sections=(2, 1, 3)),
        qk_norm=True,
        sandwich_norms=True,
        norm_offset=True,
        scaled_embeddings=True,
        query_scale=0.4,
        images_see_themselves=True,
    )


def random_parameters(config, seed=0):
    """Matrices have variance 1 / fan-in, the rest has deviation 1/4: no value is a default."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = str(path[-2].key if len(path) > 1 else path[-1].key)
        values = rng.normal(size=leaf.shape)
        if path[-1].key in ("scale", "bias"):
            offset = 0.0 if config.norm_offset or path[-1].key == "bias" else 1.0
            return (offset + 0.25 * values).astype(np.float32)
        fan_in = 40.0 if name == "embed_tokens" else config.hidden_size
        return (values * fan_in**-0.5).astype(np.float32)

    return jax.tree.map_with_path(draw, nnx.to_pure_dict(nnx.state(abstract(config))))


def rows(side, seed=0, vocabulary=VOCABULARY):
    """Token ids and mask of three rows of unequal length."""
    rng = np.random.default_rng(seed)
    ids, mask = np.full((3, LENGTH), PAD), np.zeros((3, LENGTH), bool)
    for row, count in enumerate(LENGTHS):
        start = LENGTH - count if side == "left" else 0
        ids[row, start : start + count] = rng.integers(4, vocabulary, count)
        mask[row, start : start + count] = True
    return ids, mask


def image_places(mask):
    """Where two images of 2 x 3 and 1 x 2 tokens lie in each row, as `block`, and positions of frame, row and column."""
    block = np.full(mask.shape, -1, np.int32)
    places = np.zeros((*mask.shape, 3), np.int32)
    for row, valid in enumerate(mask):
        first, at, position = int(np.argmax(valid)), 0, 0
        while at < valid.sum():
            shown = {2: (0, 2, 3), 9: (1, 1, 2)}.get(at)
            if shown is None:
                places[row, first + at] = position
                at, position = at + 1, position + 1
                continue
            number, height, width = shown
            for y in range(height):
                for x in range(width):
                    block[row, first + at] = number
                    places[row, first + at] = position, position + y, position + x
                    at += 1
            position += max(height, width)
    return block, places


def sequence_of(model, ids, mask, **fields):
    valid = jnp.asarray(mask)
    return Sequence(**{"x": model.embed(jnp.asarray(ids)), "valid": valid, "positions": token_positions(valid), **fields})


def continue_greedily(model, sequence, count):
    """Greedy ids int32 [B, count], over the cache."""
    out = model(sequence, rows=last_token(sequence.valid)[:, None], keep_kv=True, room=count)
    config = SimpleNamespace(eos_token_ids=(-1,), pad_token_id=PAD)
    around = SimpleNamespace(config=config, mesh=None, language_model=model)
    return decode_greedily(around, out.hidden[:, 0], cache_of(sequence, out, room=count), max_new_tokens=count)[0]


def close(ours, reference, tolerance=1e-4):
    ours, reference = np.asarray(ours), np.asarray(reference.detach() if torch.is_tensor(reference) else reference)
    assert ours.shape == reference.shape
    assert np.abs(reference).max() > 0.1  # so that the tolerance means something
    np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance)
