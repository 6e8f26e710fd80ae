"""Records the text that the original codes make of some conversations in templates.json, next to this file.

    python tests/golden/record_templates.py --llava-next DIR --tinyllava DIR --xtuner DIR --vlmevalkit DIR

Run it only to change the cases; `tests/data/test_template_texts.py` reads the file, offline. Templates of codes that
are not given keep their recordings. It needs only pillow:

- `--llava-next`: a checkout of LLaVA-VL/LLaVA-NeXT (of April 2026), for `Conversation.get_prompt`;
- `--tinyllava`: a checkout of TinyLLaVA/TinyLLaVA_Factory (of March 2026), for `Template.prompt`;
- `--xtuner`: the unpacked distribution `xtuner` 0.2.0 of PyPI, for `llava_map_fn` and `template_map_fn`;
- `--vlmevalkit`: a checkout of open-compass/VLMEvalKit (of August 2026), for `LLaVA.chat_inner`.

`llava_llama_3` is a transcription instead. LLaVA-NeXT's `preprocess_llama3` renders a system message and the turns one by
one, with the chat template of Meta-Llama-3-8B-Instruct, which is gated. That template trims each text. `get_prompt` hands it
roles that start with `<|start_header_id|>` themselves, so prompts of LLaVA-NeXT's inference have that token twice.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

from golden_cases import TEMPLATE_CONVERSATIONS

OUT = Path(__file__).with_name("templates.json")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    codes = {"llava-next": llava_next, "tinyllava": tinyllava, "xtuner": xtuner, "vlmevalkit": vlmevalkit}
    for name in codes:
        arguments.add_argument(f"--{name}", type=Path)
    args = vars(arguments.parse_args())
    module("torch")
    module("transformers", AutoTokenizer=types.SimpleNamespace(from_pretrained=str), PreTrainedTokenizer=object)
    recorded: dict[str, list[dict[str, Any]]] = json.loads(OUT.read_text(encoding="utf-8"))
    for code, templates in codes.items():
        for name, make in (templates(folder) if (folder := args[code.replace("-", "_")]) else {}).items():
            recorded[name] = []
            for case, has_image, values in TEMPLATE_CONVERSATIONS:
                entry = {"name": case, "image": has_image, "turns": values, "text": make(values), "prompt": make(values[:-1])}
                recorded[name].append(entry)
    text = json.dumps(recorded, ensure_ascii=False, separators=(",", ":"))
    OUT.write_text(text.replace('{"name"', '\n{"name"') + "\n", encoding="utf-8")
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


def module(name: str, **attributes: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(attributes)
    sys.modules[name] = made
    return made


def tag_front(value: str) -> str:
    """What `preprocess_multimodal` of LLaVA-NeXT does to a turn with one image."""
    return f"<image>\n{value.replace('<image>', '').strip()}".strip() if "<image>" in value else value


def llava_next(folder: Path) -> dict[str, Any]:
    """Conversation templates of `llava/conversation.py`, filled as by its preprocessing and its evaluation code."""
    module("llava_next", __path__=[str(folder / "llava")])
    templates = importlib.import_module("llava_next.conversation").conv_templates

    def filled(name: str) -> Any:
        def make(values: list[str]) -> str:
            conversation = templates[name].copy()
            for i, value in enumerate([*values, None] if len(values) % 2 else values):
                conversation.append_message(conversation.roles[i % 2], value and (tag_front(value) if i % 2 == 0 else value))
            return conversation.get_prompt()

        return make

    names = {"qwen_1_5": "qwen_1_5", "chatml_direct": "chatml_direct", "mistral_instruct": "mistral_instruct"}
    return {ours: filled(theirs) for ours, theirs in names.items()} | {"llava_llama_3": llava_llama_3(templates)}


def llava_llama_3(templates: Any) -> Any:
    system = templates["llava_llama_3"].system

    def make(values: list[str]) -> str:
        messages = [("system", system), *(((("user", "assistant")[i % 2]), tag_front(value)) for i, value in enumerate(values))]
        text = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{value.strip()}<|eot_id|>" for role, value in messages)
        return text + ("<|start_header_id|>assistant<|end_header_id|>\n\n" if len(values) % 2 else "")

    return make


def tinyllava(folder: Path) -> dict[str, Any]:
    """Templates of `tinyllava/data/template`; an answer of None makes the generation prompt."""
    base = folder / "tinyllava"
    module("tinyllava", __path__=[str(base)])
    module("tinyllava.data", __path__=[str(base / "data")])
    utils = module("tinyllava.utils", __path__=[str(base / "utils")])
    vars(utils).update(vars(importlib.import_module("tinyllava.utils.constants")))
    found: dict[str, Any] = {}
    module(
        "tinyllava.data.template", __path__=[str(base / "data/template")], register_template=lambda name: partial(keep, name)
    )

    def keep(name: str, template: Any) -> Any:
        return found.setdefault(name, template)

    formatter = importlib.import_module("tinyllava.data.template.formatter")
    for kind in (formatter.EmptyFormatter, formatter.StringFormatter):
        kind.__hash__ = object.__hash__  # as defaults of a dataclass, Python 3.11 wants them hashable
    for name in ("qwen2_base", "qwen2_instruct"):
        importlib.import_module(f"tinyllava.data.template.{name}_template")

    def filled(template: Any) -> Any:
        def make(values: list[str]) -> str:
            answers = [*values[1::2], None] if len(values) % 2 else values[1::2]
            return template.prompt(values[::2], answers)

        return make

    return {name: filled(template()) for name, template in found.items()}


def xtuner(folder: Path) -> dict[str, Any]:
    """`llava_map_fn` and `template_map_fn` with the template `llama3_chat`."""

    class ConfigDict(dict):
        def __getattr__(self, name: str) -> Any:
            return ConfigDict(self[name]) if isinstance(self[name], dict) else self[name]

    module("mmengine")
    module("mmengine.config", ConfigDict=ConfigDict)
    module("mmengine.utils")
    module("mmengine.utils.misc", get_object_from_string=None)
    utils = module("xtuner.utils", __path__=[str(folder / "xtuner/utils")])
    vars(utils).update(vars(importlib.import_module("xtuner.utils.constants")))
    maps = folder / "xtuner/dataset/map_fns"
    for name, path in {
        "xtuner": folder / "xtuner",
        "xtuner.dataset": maps.parent,
        "xtuner.dataset.map_fns": maps,
        "xtuner.dataset.map_fns.dataset_map_fns": maps / "dataset_map_fns",
    }.items():
        module(name, __path__=[str(path)])
    template = importlib.import_module("xtuner.utils.templates").PROMPT_TEMPLATE.llama3_chat
    fill = importlib.import_module("xtuner.dataset.map_fns.template_map_fn").template_map_fn
    turns = importlib.import_module("xtuner.dataset.map_fns.dataset_map_fns.llava_map_fn").llava_map_fn

    def make(values: list[str]) -> str:
        turned = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate([*values, ""])]
        made = fill(turns({"conversations": turned[: len(values) + len(values) % 2]}), template)["conversation"]
        text = "".join(part["input"] + part["output"] + part.get("sep", "") for part in made)
        return text.removesuffix(template.SUFFIX) if len(values) % 2 else text

    return {"llama3": make}


def vlmevalkit(folder: Path) -> dict[str, Any]:
    """`LLaVA.chat_inner`, up to the prompt that it tokenizes; a turn is its images and the texts between them."""

    class Prompted(Exception):
        pass

    def tokenizer_image_token(prompt: str, *rest: Any, **settings: Any) -> None:
        raise Prompted(prompt)

    model = types.SimpleNamespace(cuda=lambda: None)
    module("pandas")
    module("torch", float16=None)
    module("llava")
    module("llava.constants", IMAGE_TOKEN_INDEX=None)
    module(
        "llava.mm_utils",
        KeywordsStoppingCriteria=None,
        get_model_name_from_path=str,
        process_images=lambda *_: types.SimpleNamespace(to=lambda *_, **__: None),
        tokenizer_image_token=tokenizer_image_token,
    )
    module("llava.model")
    module("llava.model.builder", load_pretrained_model=lambda **_: (None, model, None, None))
    module("vlmeval")
    module("vlmeval.dataset", DATASET_MODALITY=None, DATASET_TYPE=None)
    module("vlmeval.smp", cn_string=None, encode_image_to_base64=None, splitlen=lambda _: 2)
    module("vlmeval.vlm", __path__=[str(folder / "vlmeval/vlm")])
    module("vlmeval.vlm.base", BaseModel=object)
    module("vlmeval.vlm.llava", __path__=[str(folder / "vlmeval/vlm/llava")])
    code = importlib.import_module("vlmeval.vlm.llava.llava")
    code.Image = types.SimpleNamespace(open=lambda _: types.SimpleNamespace(convert=str))
    llava = code.LLaVA()

    def content(value: str) -> list[dict[str, str]]:
        first, *rest = value.split("<image>")
        parts = [{"type": "text", "value": first}] if first else []
        for text in rest:
            parts += [{"type": "image", "value": ""}, {"type": "text", "value": text.removeprefix("\n")}]
        return parts

    def make(values: list[str]) -> str:
        turns = [("assistant", content(v)) if i % 2 else ("user", content(tag_front(v))) for i, v in enumerate(values)]
        asks = [] if len(values) % 2 else [("user", content("?"))]  # it only renders what ends with a question
        try:
            llava.chat_inner([{"role": role, "content": parts} for role, parts in [*turns, *asks]])
        except Prompted as prompt:
            return str(prompt).removesuffix("USER: ? ASSISTANT: ") if asks else str(prompt)
        raise RuntimeError("no prompt was tokenized")

    return {"vlmevalkit_llava": make}


if __name__ == "__main__":
    main()
