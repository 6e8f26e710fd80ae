"""Records what the owners' scorers of CHAIR, AMBER, HallusionBench, MMVP and MMStar make of made answers.

    python tests/golden/record_hallucination.py --chair DIR --pattern DIR --amber DIR --hallusion DIR --cambrian DIR \\
        --mmstar DIR

writes hallucination.json beside this file. Needs lmms-eval 0.7.3, nltk 3.9, and checkouts or unpacked distributions:

- `--chair`: Maxlinn/CHAIR-metric-standalone (LisaAnne/Hallucination's chair.py for Python 3), whose synonyms are replaced by
  ours, as they are not ours to copy; `--pattern`: pattern3 3.0.0 of PyPI, for `singularize`. Sentences end at `.`, `!`, `?`;
- `--amber`: junyangwang0410/AMBER. Nouns are given and words are similar if they are equal: no tagger and no vectors are run;
- `--hallusion`: tianyi-lab/HallusionBench, for the aggregates. What GPT-4 would say of an answer is given;
- `--cambrian`: cambrian-mllm/cambrian, for its matcher of MMVP; `--mmstar`: MMStar-Benchmark/MMStar, for its scorer.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from hallucination_cases import (
    CAPTIONS,
    MMSTAR_OUTPUTS,
    MMVP_OUTPUTS,
    MMVP_ROW,
    PLURALS,
    QUESTIONS,
    RELATION,
    SAFE,
    SCENES,
    YES_NO_TABLE,
)

from lsg_jax.eval.benchmarks.coco_objects import OBJECTS
from lsg_jax.eval.benchmarks.mmstar import CATEGORIES
from lsg_jax.eval.short_answers import yes_or_no_word


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name in ("chair", "pattern", "amber", "hallusion", "cambrian", "mmstar"):
        arguments.add_argument(f"--{name}", type=Path, required=True)
    args = arguments.parse_args()
    recorded = {
        "chair": chair(args.chair, args.pattern),
        "amber": amber(args.amber),
        "hallusionbench": hallusionbench(args.hallusion),
        "mmvp": mmvp(args.cambrian),
        "mmstar": mmstar(args.mmstar),
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in recorded.items())
    Path(__file__).with_name("hallucination.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def module(name: str, **attributes: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(attributes)
    sys.modules[name] = made
    return made


def load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"recorded_{path.stem}", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def chair(folder: Path, pattern: Path) -> dict[str, list[str]]:
    """Caption -> objects, in the words of our short list."""
    import nltk

    tokenize = nltk.tokenize.NLTKWordTokenizer().tokenize
    nltk.word_tokenize = lambda text: [word for part in re.split(r"(?<=[.!?])\s+", text) for word in tokenize(part)]
    names = ("INFINITIVE", "PRESENT", "PAST", "FUTURE", "FIRST", "SECOND", "THIRD")
    names += ("SINGULAR", "PLURAL", "SG", "PL", "PROGRESSIVE", "PARTICIPLE")
    verbs = type("Verbs", (), {"__init__": lambda *_, **__: None, **dict.fromkeys(("conjugate", "lemma", "lexeme", "tenses"))})
    module("pattern3")
    module("pattern3.text", Verbs=verbs, **{name: name for name in names})
    module("pattern")
    module("pattern.en", singularize=load(pattern / "pattern3/text/en/inflect.py").singularize)
    code = load(folder / "chair.py")
    code.synonyms_txt = "\n".join(", ".join((name, *others)) for name, others in OBJECTS.items())
    code.CHAIR.get_annotations = lambda self: None
    owner = code.CHAIR("")
    forms = [form for name in OBJECTS for form in (name, PLURALS.get(name, name + "s"))]
    return {text: owner.caption_to_words(text)[1] for text in [*CAPTIONS, *(f"I see {form} there." for form in forms)]}


def amber(folder: Path) -> dict[str, float]:
    """What its evaluation prints: `section: metric` -> value."""
    equal = lambda word: types.SimpleNamespace(word=word, similarity=lambda other: float(word == other.word))
    module("nltk", word_tokenize=str.split, pos_tag=lambda words: [(word, "NN") for word in words])
    module("nltk.stem", WordNetLemmatizer=lambda: types.SimpleNamespace(lemmatize=str))
    module("spacy", load=lambda _: equal)
    annotations = [{"type": "generative", "truth": truth, "hallu": hallu} for truth, hallu, _ in SCENES]
    annotations += [{"type": kind, "truth": truth} for kind, truth, _ in QUESTIONS]
    responses = [" ".join(found) for *_, found in SCENES] + [said for *_, said in QUESTIONS]
    with tempfile.TemporaryDirectory() as base:
        files = {
            "annotations.json": [{"id": i, **row} for i, row in enumerate(annotations, 1)],
            "responses.json": [{"id": i, "response": said} for i, said in enumerate(responses, 1)],
            "relation.json": {**RELATION, "table": []},
        }
        for name, content in files.items():
            Path(base, name).write_text(json.dumps(content))
        Path(base, "safe_words.txt").write_text("\n".join(SAFE))
        code = load(folder / "inference.py")
        at = lambda name: str(Path(base, name))
        code.args = argparse.Namespace(
            word_association=at("relation.json"),
            safe_words=at("safe_words.txt"),
            inference_data=at("responses.json"),
            annotation=at("annotations.json"),
            metrics=str(folder / "data/metrics.txt"),
            similarity_score=0.8,
            evaluation_type="a",
        )
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code.main(code.args)
    found, section = {}, ""
    for line in printed.getvalue().splitlines():
        name, _, value = line.partition(":")
        section = section if value.strip() else name or section
        if value.strip():
            found[f"{section}: {name}"] = float(value)
    return found


def hallusionbench(folder: Path) -> dict[str, float]:
    """Percent of questions, figures and pairs, and of the easy and hard parts of pairs."""
    module("prettytable", PrettyTable=None)
    module("openai")
    code = load(folder / "utils.py")
    names = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "gt_answer", "said")
    rows = [dict(zip(names, row, strict=True)) for row in YES_NO_TABLE]
    for row in rows:
        said = yes_or_no_word(row["said"])
        row |= {"same": "1", "check": "2" if said is None else str(int((said == "yes") == (row["gt_answer"] == "1")))}
    rows = code.assign_correctness(rows, correctness_entry="check")
    counts = {
        "aAcc": code.get_eval_all(rows, "check"),
        "fAcc": code.get_eval_fig(rows),
        "qAcc": code.get_eval_pair_all(rows, "check"),
        "easy: qAcc": code.get_eval_pair_easy(rows),
        "hard: qAcc": code.get_eval_pair_hard(rows),
    }
    return {name: 100 * count["correct"] / count["total"] for name, count in counts.items()}


def mmvp(folder: Path) -> dict[str, Any]:
    """Prompt of lmms-eval, and {protocol: {answer: outputs that are right}}."""
    code = importlib.import_module("lmms_eval.tasks.mmvp.utils")
    suffix = "\nAnswer with the option's letter from the given choices directly."  # in the task's YAML
    tester = load(folder / "eval/eval/mmvp/mmvp_test.py")

    def lmms(output: str, answer: str) -> bool:
        row = {**MMVP_ROW, "Correct Answer": f"({answer.lower()})"}
        return code.mmvp_process_results(row, [output])["mmvp_accuracy"]["is_correct"]

    def cambrian(output: str, answer: str) -> bool:
        with tempfile.TemporaryDirectory() as base, contextlib.redirect_stdout(io.StringIO()) as printed:
            line = {"answer": output, "gt_answer": f"({answer.lower()})", "text_options": ["Open", "Closed shut"]}
            Path(base, "answers.jsonl").write_text(json.dumps(line) + "\n")
            tester.compute_metrics(*(os.path.join(base, name) for name in ("answers.jsonl", "wrong/out.jsonl", "all.csv")))
        return "'accuracy': 100.0" in printed.getvalue()

    right = lambda scorer: {answer: [text for text in MMVP_OUTPUTS if scorer(text, answer)] for answer in "AB"}
    prompt = code.mmvp_doc_to_text(MMVP_ROW, {"post_prompt": suffix})
    return {"prompt": prompt, "right": {"lmms_eval": right(lmms), "cambrian": right(cambrian)}}


def mmstar(folder: Path) -> dict[str, list[str]]:
    """Answer -> outputs that are right. The scorer runs over a table; each of its sub-categories asks about one output."""
    places = [(category, name) for category, names in CATEGORIES.items() for name in names]
    scores: dict[str, float] = {}
    tables: list[list[dict[str, str]]] = []
    module("vlmeval")
    module(
        "vlmeval.smp",
        load=lambda _: type("Table", (), {"iloc": tables[-1], "__len__": lambda self: len(tables[-1])})(),
        dump=lambda found, _: scores.update(found),
        get_logger=lambda _: types.SimpleNamespace(info=lambda _: None),
        tqdm=lambda each: each,
    )
    code = load(folder / "eval/vlmeval/evaluate/mmstar.py")
    right: dict[str, list[str]] = {answer: [] for answer in "ABCD"}
    for answer, found in right.items():
        for start in range(0, len(MMSTAR_OUTPUTS), len(places)):
            outputs = MMSTAR_OUTPUTS[start : start + len(places)]
            padded = [*outputs, *[""] * (len(places) - len(outputs))]
            tables.append(
                [
                    {"prediction": text, "answer": answer, "bench": "", "category": category, "l2_category": name}
                    for text, (category, name) in zip(padded, places, strict=True)
                ]
            )
            code.MMStar_eval("answers.xlsx")
            found += [text for text, (c, n) in zip(outputs, places, strict=False) if scores[f"{c}({n})"] == 1]
    return right


if __name__ == "__main__":
    main()
