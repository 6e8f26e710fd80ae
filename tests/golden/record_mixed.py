"""Records prompts, scores and aggregates of MMBench, MMMU, VizWiz, MathVista and V*Bench from the codes they have to equal.

    python tests/golden/record_mixed.py CHECKOUTS

writes mixed.json beside this file. CHECKOUTS is a folder with checkouts of MMMU-Benchmark/MMMU (bb0b95a), lupantech/MathVista
(53d5258) and cambrian-mllm/cambrian (539ffc3) as `MMMU`, `MathVista` and `cambrian`. Needs lmms-eval 0.7.3, nvidia-vlmeval 26.3
(NVIDIA's build of VLMEvalKit) and llava-torch 1.2.2.post1.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import importlib
import importlib.util
import io
import json
import logging
import runpy
import string
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

from mixed_cases import CHOICE_OUTPUTS, CHOICE_ROWS, CIRCULAR, OPEN_OUTPUTS, OPEN_ROWS
from record_choice import lmms_tokens, lmms_yaml
from record_short import bare

LETTERS = "ABCDEFGH"
REPOS = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else Path()
CAMBRIAN = REPOS / "cambrian" / "eval" / "eval"
LMMS_TASKS = {"mmbench": "mmbench.en_utils", "mmmu": "mmmu.utils", "vizwiz": "vizwiz_vqa.utils", "vstar": "vstar_bench.utils"}


def choices_of(benchmark, row):
    """The texts of a row's choices, A first."""
    if benchmark == "mmbench":
        return [row[letter] for letter in "ABCD" if row[letter] != "nan"]
    if benchmark == "mmmu":
        return ast.literal_eval(row["options"])
    if benchmark == "mathvista":
        return row["choices"]
    return [line[4:] for line in row["text"].split("\n") if line.startswith("(")]


def by_answer(read, choices):
    """{answer: outputs for which it is right}, of a function from an output to the letter that it is read as.

    An answer is the first letter of its text, as some questions have two equal choices.
    """
    letters = {text: read(text) for text in CHOICE_OUTPUTS}
    answers = dict.fromkeys(LETTERS[choices.index(choice)] for choice in choices)
    return {answer: [text for text, letter in letters.items() if letter == answer] for answer in answers}


# ------------------------------------------------------------------------------------------------------------------- lmms-eval


def record_lmms_eval():
    import pandas

    bare("lmms_eval.tasks")
    code = {name: importlib.import_module(f"lmms_eval.tasks.{module}") for name, module in LMMS_TASKS.items()}
    texts = {name: lmms_yaml(name)["lmms_eval_specific_kwargs"]["default"] for name in LMMS_TASKS}
    code["mmmu"].parse_mmmu_multi_choice_response.__globals__["random"] = SimpleNamespace(choice=lambda choices: None)
    asked = {"mmbench": {"category": "", "L2-category": "", "index": 0, "source": "", "split": "dev"}}

    def prompt(name, row):
        kind = {"question_type": "multiple-choice" if "options" in row else "open"}
        doc_to_text = getattr(code[name], f"{'vizwiz_vqa' if name == 'vizwiz' else name}_doc_to_text")
        return doc_to_text({**row, **kind, **asked.get(name, {})}, texts[name])

    def mmbench(row, text):
        evaluator = code["mmbench"].mmbench_evaluator
        item = {**{k: row[k] for k in "ABCD"}, "index": 0, "prediction": text.strip()}
        hits = [x for x in "ABCDE" if evaluator.eval_sub_data(pandas.DataFrame([item]), {0: x}, static_only=True)]
        return hits[0] if hits else None

    def mmmu(row, text):
        options = ast.literal_eval(row["options"])
        return code["mmmu"].parse_multi_choice_response(text.strip(), *reversed(code["mmmu"].get_multi_choice_info(options)))

    def mmmu_open(row, text):
        sample = {"id": row["id"], "question_type": "open", "answer": row["answer"]}
        sample["parsed_pred"] = [code["mmmu"].parse_open_response(text.strip())]
        return code["mmmu"].evaluate_mmmu([sample])[1]["acc"]

    def vizwiz(row, text):
        document = {"answers": list(row["answers"]), "question_id": 0}
        return code["vizwiz"].vizwiz_vqa_process_results(document, [text.strip()])["exact_match"]

    letters = {"mmbench": mmbench, "mmmu": mmmu, "vstar": lambda row, text: code["vstar"].extract_answer_letter(text)}
    yield from cases("lmms_eval", prompt, letters, {"mmmu": mmmu_open, "vizwiz": vizwiz})
    rows = [
        {"index": i, "category": c, "L2-category": l2, "answer": a, "prediction": p, **dict.fromkeys("ABCD", "x y")}
        for i, c, l2, a, p in CIRCULAR
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        whole, categories, l2 = code["mmbench"].mmbench_evaluator.eval_result(rows, eval_method="static")
    groups = {f"category: {k}": v for k, v in categories.items()} | {f"l2_category: {k}": v for k, v in l2.items()}
    yield {"protocol": "lmms_eval", "circular": {"circular": whole, **groups}}


# ------------------------------------------------------------------------------------------------------------------ VLMEvalKit


def record_vlmevalkit():
    import pandas

    bare("vlmeval")
    bare("vlmeval.dataset")
    choice = importlib.import_module("vlmeval.dataset.utils.multiple_choice")
    vqa = importlib.import_module("vlmeval.dataset.utils.vqa_eval")
    base = importlib.import_module("vlmeval.dataset.image_base").ImageBaseDataset
    dataset = base.__new__(base)  # its __init__ would download the table
    dataset.meta_only, dataset.dump_image = False, lambda line: ["image.jpg"]
    smp = importlib.import_module("vlmeval.smp")
    members = {"pd": pandas, "string": string, "cn_string": smp.cn_string}
    build_prompt = function_of(Path(sys.modules["vlmeval"].__path__[0], "vlm/llava/llava.py"), "build_prompt", members)

    def line_of(name, row):
        hint = {"hint": row["hint"]} if row.get("hint", "nan") != "nan" else {}
        stem = row.get("question") or row["text"].split("\n(A)")[0]
        return pandas.Series({"question": stem, **hint, **dict(zip(LETTERS, choices_of(name, row), strict=False))})

    def prompt(name, row):
        if name == "vizwiz":
            return dataset.build_prompt({"question": row["question"]})[-1]["value"]
        line = line_of(name, row) if "answer" not in row else pandas.Series({"question": row["question"], "A": float("nan")})
        model = SimpleNamespace(use_custom_prompt=lambda dataset: True, dump_image=lambda line, dataset: [])
        (message,) = build_prompt(model, line, dataset="MMStar")
        return message["value"]

    def letter(name):
        def read(row, text):
            item = pandas.concat([line_of(name, row), pandas.Series({"prediction": text.strip(), "GT": None})])
            return choice.extract_answer_from_item(None, item)["opt"]

        return read

    def mmmu_open(row, text):
        frame = pandas.DataFrame([{"A": float("nan"), "B": float("nan"), "answer": row["answer"], "question": row["question"]}])
        (item,) = (line for _, line in choice.MMMU_preproc(frame).iterrows())
        truth = row["answer"] if row["answer"] in list("ABCDEFGHIJKLMNOPQRSTUVWXYZ") else "A"
        return choice.eval_vanilla(None, pandas.concat([item, pandas.Series({"prediction": text.strip(), "GT": truth})]))["hit"]

    def vizwiz(row, text):
        result = vqa.process_line({"answer": str(row["answers"]), "prediction": text.strip()})
        return float(vqa.hit_calculate([result], "VizWiz")[0])

    letters = {name: letter(name) for name in ("mmbench", "mmmu", "vstar")}
    yield from cases("vlmevalkit", prompt, letters, {"mmmu": mmmu_open, "vizwiz": vizwiz})
    yield {"protocol": "vlmevalkit", "circular": vlmevalkit_circular(choice)}


def vlmevalkit_circular(choice):
    """{metric: value} of the made table, by its circular evaluation."""
    import pandas

    columns = ("index", "category", "l2-category", "answer", "prediction")
    frame = pandas.DataFrame(CIRCULAR, columns=columns).assign(question="?", A="x y", B="x y", C="x y", D="x y")
    scratch = str(Path(tempfile.mkdtemp()) / "result.pkl")
    graded = choice.mcq_circular_eval(None, frame, frame, 1, scratch, "MMBench_DEV_EN")
    report = choice.report_acc(graded).iloc[0].drop("split").rename({"Overall": "circular"})
    names = {short: long for long, short in choice.MMB_abbrs.items()}
    groups = {f"category: {name}" for name in frame["category"]} | {f"l2_category: {name}" for name in frame["l2-category"]}
    group_of = {group.partition(": ")[2]: group for group in groups}
    return {group_of.get(names.get(name, name), name): float(value) for name, value in report.items()}


def function_of(file, name, members):
    """One function of a file that cannot be imported, with the names that it uses."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    scope = dict(members)
    exec(compile(ast.Module([found], []), str(file), "exec"), scope)
    return scope[name]


# ---------------------------------------------------------------------------------------------------------------- owners, LLaVA


def record_owners():
    """Protocol `paper`: MMMU's and MathVista's own code, and LLaVA's evaluator of VizWiz."""
    sys.path.insert(0, str(REPOS / "MMMU" / "mmmu"))
    data, code = (importlib.import_module(f"utils.{name}_utils") for name in ("data", "eval"))
    code.random = SimpleNamespace(choice=lambda choices: None)
    config = {name: value[0] for name, value in data.load_yaml(REPOS / "MMMU/mmmu/configs/llava1.5.yaml").items()}
    bare("llava")
    evaluator = importlib.import_module("llava.eval.m4c_evaluator").TextVQAAccuracyEvaluator()
    mathvista = owner_of_mathvista()

    def prompt(name, row):
        if name != "mmmu":
            return None
        kind = "multiple-choice" if "options" in row else "open"
        return data.construct_prompt({"options": "[]", "answer": "A", **row, "question_type": kind}, config)[
            "final_input_prompt"
        ]

    def mmmu(row, text):
        return code.parse_multi_choice_response(text.strip(), *reversed(data.get_multi_choice_info(choices_of("mmmu", row))))

    def mmmu_open(row, text):
        truth = ast.literal_eval(row["answer"]) if row["answer"].startswith("[") else row["answer"]
        return float(code.eval_open(truth, code.parse_open_response(text.strip())))

    def vizwiz(row, text):
        with contextlib.redirect_stderr(io.StringIO()):
            return evaluator.eval_pred_list([{"pred_answer": text.strip(), "gt_answers": row["answers"]}])

    yield from cases(
        "paper", prompt, {"mmmu": mmmu, "mathvista": mathvista}, {"mmmu": mmmu_open, "vizwiz": vizwiz, "mathvista": mathvista}
    )


def owner_of_mathvista():
    """(row, output) -> the position of the choice, or the score, where the owner's code reads it without GPT-4; else None."""
    for name in ("datasets", "models", "openai", "utilities", "evaluation", "evaluation.prompts", "evaluation.prompts.ext_ans"):
        sys.modules[name] = types.ModuleType(name)
    members = {"load_dataset": None, "gpt": None, "AzureOpenAI": None, "read_json": None, "save_json": None, "demo_prompt": ""}
    for module in ("datasets", "models", "openai", "utilities", "evaluation.prompts.ext_ans"):
        vars(sys.modules[module]).update(members)
    scripts = REPOS / "MathVista" / "evaluation"
    extract = runpy.run_path(str(scripts / "extract_answer.py"))["extract_answer"]
    normalise = runpy.run_path(str(scripts / "calculate_score.py"))["normalize_extracted_answer"]

    def read(row, text):
        choices = row.get("choices", [])
        kinds = ("multi_choice", "text", None) if choices else ("free_form", row["answer_type"], row["precision"])
        problem = {"question_type": kinds[0], "answer_type": kinds[1], "choices": choices, "query": "", "pid": ""}
        asked = []
        model = SimpleNamespace(get_response=lambda user_prompt: asked.append(1) or "")
        logging.disable(logging.CRITICAL)
        extraction = extract(model, text.strip(), problem, quick_extract=False)
        if asked and text.strip() in tuple(LETTERS[: len(choices)]):
            extraction, asked = text.strip(), []  # GPT-4 would leave a letter as it is
        if asked or (choices and not text.strip()):
            return None
        answer = normalise(extraction, choices, *kinds)
        return LETTERS[choices.index(answer)] if choices else float(answer == row["answer"])

    return read


# -------------------------------------------------------------------------------------------------------------------- Cambrian


def cambrian_prompt(name, row):
    """What the function `process` of its script puts into the conversation."""
    folder_name = {"mmbench": "mmbench_en"}.get(name, name)
    file = CAMBRIAN / folder_name / f"{folder_name}_eval.py"
    said = []
    turns = SimpleNamespace(
        copy=lambda: turns, roles=(0, 1), append_message=lambda role, text: said.append(text), get_prompt=str
    )
    anything = MagicMock()
    members = {
        "conv_templates": {"": turns},
        "DEFAULT_IMAGE_TOKEN": "<image>",
        "IMAGE_TOKEN_INDEX": 0,
        "hash_image": anything,
    }
    members |= dict.fromkeys(("tokenizer_image_token", "process_images", "hf_hub_download", "Image", "copy"), anything)
    default = next(
        ast.literal_eval(line.partition("default=")[2].rstrip(")"))
        for line in file.read_text().splitlines()
        if "--question_extension" in line
    )
    args = SimpleNamespace(question_extension=default, conv_mode="")
    kinds = {"question_type": "multi_choice" if "choices" in row else "free_form"}
    line = {**row, **kinds, "decoded_image": anything, "image": "folder/name" if name == "vstar" else anything}
    function_of(file, "process", members)(line, args, None, None, SimpleNamespace(mm_use_im_start_end=False))
    return said[0].removeprefix("<image>\n")


def cambrian_scores(name, *lines):
    """The row that its scorer writes for these answers."""
    script = runpy.run_path(str(CAMBRIAN / name / f"{name}_test.py"))
    with tempfile.TemporaryDirectory() as base, contextlib.chdir(base):
        Path("answers").mkdir(), Path("out").mkdir()
        Path("in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            script["compute_metrics"](*["in.jsonl", "out/wrong.jsonl", "out/table.csv"][:: 1 if name != "vizwiz" else 2])
        with open("out/table.csv", newline="") as file:
            return next(csv.DictReader(file))


def record_cambrian():
    """Its scripts: the functions that make the prompts and read letters, and the scorers over files."""
    letter = lambda name: function_of(CAMBRIAN / name / f"{name}_test.py", "extract_mcq_answer", {})
    readers = {
        "mmbench": lambda row, text: letter("mmbench_en")(text.strip()).upper(),
        "vstar": lambda row, text: letter("vstar")(text.strip()).upper(),
    }

    def vizwiz(row, text):
        sys.path.insert(0, str(CAMBRIAN / "vizwiz"))
        line = {"answer": text.strip(), "gt_answer": row["answers"], "image_id": "", "category": "val"}
        return float(cambrian_scores("vizwiz", line)["accuracy"]) / 100

    def mathvista(row, text):
        line = {"answer": text.strip(), "category": "", "type": "free_form" if "answer" in row else "multi_choice"}
        if "answer" in row:
            return float(cambrian_scores("mathvista", {**line, "gt_answer": row["answer"]})["accuracy"])
        last = {choice: letter for letter, choice in zip(LETTERS, row["choices"], strict=False)}  # as its `eval_model` does
        right = (text for text, x in last.items() if float(cambrian_scores("mathvista", {**line, "gt_answer": x})["accuracy"]))
        return next((LETTERS[row["choices"].index(text)] for text in right), None)

    yield from cases(
        "cambrian", cambrian_prompt, readers | {"mathvista": mathvista}, {"vizwiz": vizwiz, "mathvista": mathvista}
    )
    rows = [
        {"category": c, "source_id": str(i % 1_000_000), "gt_answer": a, "prediction": p, "index": i}
        for i, c, _, a, p in CIRCULAR
    ]
    found = cambrian_scores("mmbench_en", *rows)
    categories = {row["category"]: ast.literal_eval(found[row["category"]])["circular_accuracy"] for row in rows}
    values = {"circular": found["circular_accuracy"], "accuracy": found["accuracy"]}
    groups = {f"category: {name}": value for name, value in categories.items()}
    yield {"protocol": "cambrian", "circular": {name: float(value) for name, value in (values | groups).items()}}


# ----------------------------------------------------------------------------------------------------------------------- files


def cases(protocol, prompt, letters, scores):
    """All rows whose benchmark the code knows: by {benchmark: (row, output) -> letter}, or -> score of open answers.

    `outputs` are those that MathVista's owner reads without GPT-4; else all were read.
    """
    for name, row in CHOICE_ROWS:
        if name in letters:
            right = by_answer(lambda text, name=name, row=row: letters[name](row, text), choices_of(name, row))
            case = {"benchmark": name, "protocol": protocol, "row": row, "prompt": prompt(name, row), "right": right}
            outputs = sorted(text for texts in right.values() for text in texts)
            yield case | ({"outputs": outputs} if (name, protocol) == ("mathvista", "paper") else {})
    for name, row in OPEN_ROWS:
        if name in scores:
            outputs = [[text, score] for text in OPEN_OUTPUTS[name] if (score := scores[name](row, text)) is not None]
            yield {"benchmark": name, "protocol": protocol, "row": row, "prompt": prompt(name, row), "scores": outputs}


def main():
    versions = {name: version(name) for name in ("lmms-eval", "nvidia-vlmeval", "llava-torch")}
    found = [*record_lmms_eval(), *record_vlmevalkit(), *record_owners(), *record_cambrian()]
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in found)
    settings = {"versions": versions, "lmms_max_new_tokens": lmms_tokens(LMMS_TASKS)}
    head = json.dumps({**settings, "outputs": CHOICE_OUTPUTS, "circular": CIRCULAR}, ensure_ascii=False)[:-1]
    text = f'{head}, "cases": [\n{lines}\n]}}\n'
    Path(__file__).with_name("mixed.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
