"""Sink dimensions that are published for vision towers and language models: defaults of a conversion, which `lsg sinks` checks.

Fine-tuning can move them (OpenVLA, from Llama-2-7B: 1512, 1076), and models of one shape can differ (Qwen2.5-3B and the
language model of Qwen2.5-VL-3B). So a row says which shape, and where that is not enough which family or which names it is
about. A model that no row is about, or more than one, has no known dimensions: `lsg calibrate` finds them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from converters.families.family import CheckpointFiles, HFConfig
from converters.families.values import stated_sinks
from lsg_jax.config import SinkConfig, SinkSources, TextConfig, VisionConfig

STATED = "stated by the checkpoint (lsg_sinks in config.json)"

_OUTLIERS = "an-yongqi/systematic-outliers"
_BLUORION = "bluorion-com/refine_massive_activations"
_LOT = "aimagelab/LoT"
_LLAMA_2 = "seilk/VisAttnSink, locuslab/massive-activations"


@dataclass(frozen=True)
class Decoder:
    """Sink dimensions of a language model.

    Attributes:
        models: what the row is about. dims: indices into the residual stream. source: repository or paper.
        shape: hidden size, layers, heads, key-value heads.
        vocab: smallest and largest vocabulary; models that read images add some tokens.
        text: `TextConfig.family`; None for any.
        theta: base of the rotary embedding; None for any. eps: of the norms, likewise.
        families: `model_type` of the whole model; none for any.
        not_named: pattern of names of other models of this shape.
    """

    models: str
    dims: tuple[int, ...]
    source: str
    shape: tuple[int, int, int, int]
    vocab: tuple[int, int]
    text: str | None = None
    theta: float | None = None
    eps: float | None = None
    families: tuple[str, ...] = ()
    not_named: str = ""

    def fits(self, text: TextConfig, family: str, names: Sequence[str]) -> bool:
        """Whether the row is about a language model, within a model of a family, that goes by these names."""
        return (
            self.shape == (text.hidden_size, text.num_layers, text.num_heads, text.num_kv_heads)
            and self.vocab[0] <= text.vocab_size <= self.vocab[1]
            and self.text in (None, text.family)
            and self.theta in (None, text.rope.theta)
            and self.eps in (None, text.rms_norm_eps)
            and (not self.families or family in self.families)
            and not (self.not_named and any(re.search(self.not_named, name, re.IGNORECASE) for name in names))
        )


@dataclass(frozen=True)
class Tower:
    """Sink dimensions of a vision tower.

    Attributes:
        models, dims, source: as of a Decoder; dims of the features before the projector.
        shape: family, hidden size, layers, patch size, image size.
    """

    models: str
    dims: tuple[int, ...]
    source: str
    shape: tuple[str, int, int, int, int]

    def fits(self, vision: VisionConfig) -> bool:
        """Whether the row is about a tower."""
        return self.shape == (vision.family, vision.hidden_size, vision.num_layers, vision.patch_size, vision.image_size)


TOWERS = (Tower("CLIP ViT-L/14-336", (650,), "arXiv 2604.03316", ("clip", 1024, 24, 14, 336)),)

_QWEN2, _QWEN2_LARGE = (151_000, 151_936), (151_000, 152_064)
_OTHERS_OF_THAT_SHAPE = r"vicuna[\w.-]*v1\.[0-3]|llama-(7|13)b|openvla"

DECODERS = (
    Decoder(
        "Llama-2-7B, Vicuna-7B v1.5", (1415, 2533), _LLAMA_2, (4096, 32, 32, 32), (32000, 32064),
        text="llama", theta=1e4, eps=1e-5, not_named=_OTHERS_OF_THAT_SHAPE,
    ),
    Decoder(
        "Llama-2-13B, Vicuna-13B v1.5", (2100, 4743), _LLAMA_2, (5120, 40, 40, 40), (32000, 32064),
        text="llama", theta=1e4, eps=1e-5, not_named=_OTHERS_OF_THAT_SHAPE,
    ),
    Decoder(
        "Llama-3-8B, Llama-3.1-8B", (788, 1384, 4062), f"{_OUTLIERS}, {_LOT}", (4096, 32, 32, 8), (128256, 128320),
        text="llama", theta=5e5,
    ),
    Decoder(
        "Llama-3.2-1B", (400, 698, 1159, 2029), _BLUORION, (2048, 16, 32, 8), (128256, 128320), text="llama", theta=5e5
    ),
    Decoder(
        "Llama-3.2-3B", (588, 1016, 1731, 3046), _BLUORION, (3072, 28, 24, 8), (128256, 128320), text="llama", theta=5e5
    ),
    # v0.2, with the vocabulary of v0.1 and the theta of v0.3, is in no source
    Decoder(
        "Mistral-7B v0.1", (2070,), f"{_OUTLIERS}, {_BLUORION}", (4096, 32, 32, 8), (32000, 32064), text="mistral", theta=1e4
    ),
    Decoder(
        "Mistral-7B v0.3", (2070,), f"{_OUTLIERS}, {_BLUORION}", (4096, 32, 32, 8), (32768, 32832), text="mistral", theta=1e6
    ),
    Decoder("Phi-2", (743, 293), _BLUORION, (2560, 32, 32, 32), (51200, 51264), text="phi"),
    Decoder("Phi-4", (893, 1367, 1002, 3693), _BLUORION, (5120, 40, 40, 10), (100352, 100416), text="phi3"),
    Decoder("Gemma-2-2B", (334, 535), _BLUORION, (2304, 26, 8, 4), (256000, 256064), text="gemma2"),
    Decoder("Gemma-2-9B", (504,), _BLUORION, (3584, 42, 16, 8), (256000, 256064), text="gemma2"),
    Decoder("Qwen2-VL-2B", (1073, 534, 940), _LOT, (1536, 28, 12, 2), _QWEN2, families=("qwen2_vl",)),
    Decoder(
        "Qwen2-VL-7B, Qwen2.5-VL-7B", (458, 2570), f"{_LOT}, appendix of VAR", (3584, 28, 28, 4), _QWEN2_LARGE,
        families=("qwen2_vl", "qwen2_5_vl"),
    ),
    Decoder("Qwen2.5-VL-3B", (318, 1874, 1819), _LOT, (2048, 36, 16, 2), _QWEN2, families=("qwen2_5_vl",)),
    Decoder("Qwen2.5-VL-32B", (4675, 3094), _LOT, (5120, 64, 40, 8), _QWEN2_LARGE, families=("qwen2_5_vl",)),
    Decoder("Qwen3-VL-2B", (1793, 1999, 1401), _LOT, (2048, 28, 16, 8), _QWEN2, families=("qwen3_vl",)),
    Decoder("Qwen3-VL-4B", (0,), _LOT, (2560, 36, 32, 8), _QWEN2, families=("qwen3_vl",)),
    Decoder("Qwen3-VL-8B", (1838,), _LOT, (4096, 36, 32, 8), _QWEN2, families=("qwen3_vl",)),
    Decoder("InternVL3.5-1B", (35, 13), _LOT, (1024, 28, 16, 8), _QWEN2, families=("internvl",)),
    Decoder("InternVL3.5-4B", (4, 396, 0), _LOT, (2560, 36, 32, 8), _QWEN2, families=("internvl",)),
    Decoder("InternVL3.5-8B", (2276, 233), _LOT, (4096, 36, 32, 8), _QWEN2, families=("internvl",)),
    Decoder("InternVL3.5-38B", (731,), _LOT, (5120, 64, 64, 8), _QWEN2, families=("internvl",)),
    Decoder("InternVL2-8B", (3584,), "a note on InternVL2", (4096, 32, 32, 8), (92500, 92600), families=("internvl_chat",)),
)  # fmt: skip
"""What is published, for families that cannot be converted yet too."""


def sinks_of(vision: VisionConfig, text: TextConfig, hf: HFConfig, files: CheckpointFiles) -> tuple[SinkConfig, SinkSources]:
    """The sinks that a checkpoint states itself (`lsg_sinks`), else the known dimensions; and where they come from."""
    if (stated := stated_sinks(files)) is not None:
        return stated, SinkSources(STATED if stated.knows_v_sinks else "", STATED if stated.knows_l_sinks else "")
    towers = [row for row in TOWERS if row.fits(vision)]
    decoders = [row for row in DECODERS if row.fits(text, hf.model_type, names_of(files))]
    vit_dims, vit_source = _one(towers)
    llm_dims, llm_source = _one(decoders)
    return SinkConfig(vit_dims=vit_dims, llm_dims=llm_dims), SinkSources(vit_source, llm_source)


def names_of(files: CheckpointFiles) -> list[str]:
    """What a checkpoint and its language model are called: the Hub id or folder, and `_name_or_path`."""
    text: Any = files.config.get("text_config")
    stated = [files.config.get("_name_or_path"), text.get("_name_or_path") if isinstance(text, dict) else None]
    return [name for name in (files.name, *stated) if isinstance(name, str) and name]


def _one(rows: Sequence[Decoder] | Sequence[Tower]) -> tuple[tuple[int, ...], str]:
    return (rows[0].dims, f"known of {rows[0].models} ({rows[0].source})") if len(rows) == 1 else ((), "")
