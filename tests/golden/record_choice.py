"""Records prompts and outcomes of multiple-choice benchmarks from the presets' own code, into choice.json beside this file.

    python tests/golden/record_choice.py

Needs lmms-eval 0.7.3, nvidia-vlmeval 26.3 (NVIDIA's build of VLMEvalKit) and llava-torch 1.2.2.post1. What Cambrian's
evaluation does is written down in choice_cases.py. `right` lists, for each answer that the row could have, the outputs that
would be right.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from choice_cases import CAMBRIAN, CASES, OUTPUTS


def main() -> None:
    outputs = {i: OUTPUTS + case_texts(case) for i, case in enumerate(CASES)}
    cases = []
    for i, case in enumerate(CASES):
        answers = case.get("answers") or list("ABCDEF"[: len(case["choices"])])
        sources: dict[str, Any] = {"lmms_eval": LmmsEval(case), "cambrian": Cambrian(i)}
        if "choices" in case:
            sources["vlmevalkit"] = VlmEvalKit(case)
        if case["benchmark"] == "scienceqa_img":
            sources["paper"] = Llava(case, outputs[i])
        cases.append(
            {
                "benchmark": case["benchmark"],
                "row": case["row"],
                "outputs": outputs[i],
                "protocols": {
                    name: {
                        "prompt": source.prompt(),
                        "right": {a: [text for text in outputs[i] if source.right(text, a)] for a in answers},
                    }
                    for name, source in sources.items()
                },
            }
        )
    versions = {name: version(name) for name in ("lmms-eval", "nvidia-vlmeval", "llava-torch")}
    head = json.dumps(
        {"versions": versions, "lmms_max_new_tokens": lmms_tokens(dict.fromkeys(case["benchmark"] for case in CASES))}
    )[:-1]
    body = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    Path(__file__).with_name("choice.json").write_text(f'{head}, "cases": [\n{body}\n]}}\n', encoding="utf-8")


def case_texts(case: dict[str, Any]) -> list[str]:
    """The choices as the model would repeat them."""
    texts = case.get("choices", [])
    return [text for choice in texts for text in (choice, choice.lower().rstrip(".") + ".", f"It is {choice}")]


class LmmsEval:
    """Prompt and score by the task's own functions and its YAML."""

    TASKS: ClassVar = {"scienceqa_img": "scienceqa", "seed_img": "seedbench"}

    def __init__(self, case: dict[str, Any]):
        self.case = case
        self.task = self.TASKS.get(case["benchmark"], case["benchmark"])
        self.code = importlib.import_module(f"lmms_eval.tasks.{self.task}.utils")
        self.settings = lmms_yaml(case["benchmark"])

    def prompt(self) -> str:
        if self.task == "seedbench":
            return self.code.seed_doc_to_text(self.case["row"])
        function = {
            "mmstar": "mmstar",
            "cv_bench": "cv_bench",
            "scienceqa": "sqa",
            "ai2d": "ai2d",
            "realworldqa": "realworldqa",
        }
        to_text = getattr(self.code, f"{function[self.task]}_doc_to_text")
        return to_text(self.case["row"], self.settings["lmms_eval_specific_kwargs"]["default"])

    def right(self, output: str, answer: str) -> bool:
        doc = dict(self.case["row"])
        if self.task == "mmstar":
            doc |= {"answer": answer, "category": "c", "l2_category": "l", "index": 0}
            return self.code.mmstar_process_results(doc, [output])["average"]["score"] == 1
        if self.task == "cv_bench":
            doc |= {"answer": f"({answer})", "idx": 0, "type": "2D", "task": "Count", "source": "COCO"}
            return self.code.cv_bench_process_results(doc, [output])["cv_bench_acc"]["is_correct"]
        if self.task == "scienceqa":
            return self.code.sqa_process_results(doc | {"answer": "ABCDEF".index(answer)}, [output])["exact_match"] == 1
        if self.task == "seedbench":
            doc |= {"answer": answer, "data_type": "image", "question_id": "0"}
            return self.code.seed_aggregation_result([self.code.seed_process_result(doc, [output])["seed_image"]]) == 1
        if self.task == "realworldqa":
            return self.code.realworldqa_process_results(doc | {"answer": answer}, [output])["exact_match"] == 1
        from lmms_eval.api.metrics import exact_match_hf_evaluate

        flags = {"ignore_case": True, "ignore_punctuation": True}
        read = self.code.MultiChoiceRegexFilter(regex_pattern=r"([A-Z])\.", group_select=0, **flags).apply([[output]], [doc])
        return exact_match_hf_evaluate(predictions=read, references=[answer], **flags)["exact_match"] == 1


def lmms_yaml(benchmark: str) -> dict[str, Any]:
    """A task's settings, with those it includes; functions are left out."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    names = {
        "scienceqa_img": "scienceqa/scienceqa_img",
        "seed_img": "seedbench/seedbench",
        "mmbench": "mmbench/mmbench_en_dev_static",
        "mmmu": "mmmu/mmmu_val",
        "vizwiz": "vizwiz_vqa/vizwiz_vqa_val",
        "vstar": "vstar_bench/vstar_bench",
    }
    root = Path(importlib.import_module("lmms_eval").__file__).parent / "tasks"
    file = root / (names.get(benchmark, f"{benchmark}/{benchmark}") + ".yaml")
    settings = yaml.load(file.read_text(), Loader)
    if "include" in settings:
        settings = yaml.load((file.parent / settings["include"]).read_text(), Loader) | settings
    return settings


def lmms_tokens(names: Iterable[str]) -> dict[str, int | None]:
    """The tasks' own numbers of new tokens; null where the task leaves it to the model class."""
    return {name: lmms_yaml(name).get("generation_kwargs", {}).get("max_new_tokens") for name in names}


class VlmEvalKit:
    """Prompt by its LLaVA class, score by its exact matching, which is what it does without a judge."""

    def __init__(self, case: dict[str, Any]):
        import pandas

        texts = dict(zip("ABCDEF", case["choices"], strict=False))
        hint = {"hint": case["hint"]} if "hint" in case else {}
        self.line = pandas.Series({"question": case.get("stem", case["row"]["question"]), **hint, **texts})

    def prompt(self) -> str:
        from vlmeval.vlm.llava.llava import LLaVA

        model = SimpleNamespace(use_custom_prompt=lambda dataset: True, dump_image=lambda line, dataset: [])
        (message,) = LLaVA.build_prompt(model, self.line, dataset="MMStar")
        return message["value"]

    def right(self, output: str, answer: str) -> bool:
        import pandas
        from vlmeval.dataset.utils.multiple_choice import eval_vanilla

        return eval_vanilla(None, pandas.concat([self.line, pandas.Series({"prediction": output, "GT": answer})]))["hit"] == 1


class Llava:
    """Outcomes of LLaVA-1.5's script for ScienceQA, which runs over a file; its prompt is lmms-eval's."""

    def __init__(self, case: dict[str, Any], outputs: list[str]):
        self.case = case
        folder = importlib.util.find_spec("llava").submodule_search_locations[0]
        problems = {str(i): {"choices": case["choices"], "answer": 0} for i in range(len(outputs))}
        answers = [{"question_id": str(i), "text": text, "prompt": "<image>"} for i, text in enumerate(outputs)]
        with tempfile.TemporaryDirectory() as base:
            at = lambda name: str(Path(base, name))
            Path(at("pid_splits.json")).write_text(json.dumps({"test": list(problems)}))
            Path(at("problems.json")).write_text(json.dumps(problems))
            Path(at("answers.jsonl")).write_text("".join(json.dumps(line) + "\n" for line in answers))
            arguments = ["--base-dir", base, "--result-file", at("answers.jsonl")]
            arguments += ["--output-file", at("out.json"), "--output-result", at("result.json")]
            before, sys.argv = sys.argv, ["eval_science_qa.py", *arguments]
            runpy.run_path(str(Path(folder, "eval", "eval_science_qa.py")), run_name="__main__")
            sys.argv = before
            read = json.loads(Path(at("result.json")).read_text())["results"]
        self.read = {text: read[str(i)] for i, text in enumerate(outputs)}

    def prompt(self) -> str:
        return LmmsEval(self.case).prompt()

    def right(self, output: str, answer: str) -> bool:
        return self.read[output] == "ABCDEF".index(answer)


class Cambrian:
    """What was written down."""

    def __init__(self, number: int):
        self.written, self.outcomes = CAMBRIAN[number]

    def prompt(self) -> str:
        return self.written

    def right(self, output: str, answer: str) -> bool:
        return output in self.outcomes.get(answer, ())


if __name__ == "__main__":
    main()
