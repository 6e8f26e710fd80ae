"""Records prompts, matches and aggregates of the short-answer benchmarks from the codes they have to equal: `short.json`.

    python tests/golden/record_short.py

runs the functions of lmms-eval 0.7.3 (`lmms_eval`), VLMEvalKit (`nvidia-vlmeval` 26.3) and LLaVA 1.2.2 (`llava-torch`), where
they are installed; the cases of the others stay as they are. What is no package was written down by reading (`short_cases.py`).
"""

import contextlib
import importlib
import importlib.util
import io
import json
import sys
import tempfile
import types
from pathlib import Path

from short_cases import GOOD, ITEMS, MME_TABLE, POPE_TABLE, PROMPTS, READ_MATCHES, READ_PROMPTS

FILE = Path(__file__).with_name("short.json")


def bare(package):
    """Makes a package's modules importable without its `__init__`, which would import every model and task it knows."""
    module = types.ModuleType(package)
    module.__path__ = list(importlib.util.find_spec(package).submodule_search_locations)
    sys.modules[package] = module


def matches(protocol, score_of):
    """All `ITEMS`, scored by {benchmark: (item, output) -> (score, what it was read as, if the source tells)}."""
    for benchmark, score in score_of.items():
        for item, outputs in ITEMS[benchmark]:
            rows = []
            for output in outputs:
                # every one of the codes strips what the model said before it stores it
                value, *read = score(item, output.strip())
                rows.append([output, float(value), *read])
            yield {"benchmark": benchmark, "protocol": protocol, **item, "outputs": rows}


def prompts(protocol, prompt_of):
    """All `PROMPTS`, made by {benchmark: (question, fields) -> prompt}."""
    for benchmark, prompt in prompt_of.items():
        for question, fields in PROMPTS[benchmark]:
            made = prompt(question, fields)
            yield {"benchmark": benchmark, "protocol": protocol, "question": question, "fields": fields, "prompt": made}


def aggregates(protocol, values_of):
    """{benchmark: {metric: value of the made table}} as cases."""
    for benchmark, values in values_of.items():
        numbers = {name: float(value) for name, value in values.items()}
        yield {"benchmark": benchmark, "protocol": protocol, "values": numbers}


def mme_rows():
    """(subtask, pair, score) of the made table, as every code takes them."""
    for category, pairs in MME_TABLE.items():
        for pair, outputs in enumerate(pairs):
            yield from ((category, pair, float(said == true)) for said, true in zip(outputs, GOOD, strict=True))


def yes_no_or_none(word):
    return word if word in ("yes", "no") else None


# ------------------------------------------------------------------------------------------------------------------- lmms-eval


def record_lmms_eval():
    bare("lmms_eval.tasks")
    tasks = {name: importlib.import_module(f"lmms_eval.tasks.{name}.utils") for name in ITEMS}
    texts = lmms_texts(Path(sys.modules["lmms_eval.tasks"].__path__[0]))

    def prompt(name):
        ask = getattr(tasks[name], f"{name}_doc_to_text")
        return lambda question, fields: ask({"question": question, **fields}, texts[name])

    return {
        "prompts": list(prompts("lmms_eval", {name: prompt(name) for name in ITEMS})),
        "matches": list(matches("lmms_eval", lmms_matchers(tasks))),
        "aggregates": list(aggregates("lmms_eval", lmms_aggregates(tasks))),
    }


def lmms_texts(folder):
    """{benchmark: what the task file puts before and after the question}."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Leaves the `!function` tags unread."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    files = {name: f"{name}.yaml" for name in ITEMS} | {"textvqa": "_default_template_textvqa_yaml"}
    loaded = {name: yaml.load((folder / name / file).read_text(), Loader) for name, file in files.items()}
    return {name: task["lmms_eval_specific_kwargs"]["default"] for name, task in loaded.items()}


def lmms_matchers(tasks):
    exact = importlib.import_module("lmms_eval.api.metrics").exact_match_hf_evaluate

    def pope(item, output):
        entry = tasks["pope"].pope_process_results({"answer": item["answers"][0], "question_id": 0}, [output])["pope_accuracy"]
        return entry["score"], yes_no_or_none(entry["prediction"])

    def mme(item, output):
        document = {"answer": item["answers"][0], "question_id": 0, "category": "count"}
        entry = tasks["mme"].mme_process_results(document, [output])["mme_perception_score"]
        return entry["score"], yes_no_or_none(tasks["mme"].parse_pred_ans(output))

    def gqa(item, output):
        options = {"ignore_case": True, "ignore_punctuation": True}  # of gqa.yaml
        return (exact(predictions=[output], references=[item["answers"][0]], **options)["exact_match"],)

    def textvqa(item, output):
        entry = tasks["textvqa"].textvqa_process_results({"answers": list(item["answers"]), "question_id": 0}, [output])
        return entry["exact_match"], entry["submission"]["answer"]

    def chartqa(item, output):
        document = {"type": "human_test", "answer": item["answers"][0]}
        return (tasks["chartqa"].chartqa_process_results(document, [output])["relaxed_overall"],)

    def ocrbench(item, output):
        fields = item["fields"]
        document = {"answer": item["answers"], "dataset": fields["dataset"], "question_type": fields["category"]}
        return (tasks["ocrbench"].ocrbench_process_results(document, [output])["ocrbench_accuracy"]["score"],)

    return {"pope": pope, "mme": mme, "gqa": gqa, "textvqa": textvqa, "chartqa": chartqa, "ocrbench": ocrbench}


def lmms_aggregates(tasks):
    table = [{"prediction": said, "ground_truth": true, "score": float(said == true)} for _, true, said in POPE_TABLE]
    names = {"accuracy": "accuracy", "precision": "precision", "recall_of_read": "recall", "f1_of_read": "f1_score"}
    pope = {ours: getattr(tasks["pope"], f"pope_aggregate_{theirs}")(table) for ours, theirs in names.items()}
    rows = [{"category": category, "question_id": pair, "score": score} for category, pair, score in mme_rows()]
    sums = {name: [row for row in rows if row["category"] == name] for name in MME_TABLE}
    return {"pope": pope, "mme": {name: tasks["mme"].mme_aggregate_results(part) for name, part in sums.items()}}


# ------------------------------------------------------------------------------------------------------------------ VLMEvalKit


def record_vlmevalkit():
    bare("vlmeval")
    bare("vlmeval.dataset")
    vqa = importlib.import_module("vlmeval.dataset.image_vqa")
    yes_no = importlib.import_module("vlmeval.dataset.image_yorn").ImageYORNDataset
    scratch = str(Path(tempfile.mkdtemp()) / "table.pkl")

    def prompt(dataset_class):
        dataset = dataset_class.__new__(dataset_class)  # its __init__ would download the table
        dataset.meta_only = False
        dataset.dump_image = lambda line: ["image.jpg"]
        return lambda question, fields: dataset.build_prompt({"question": question})[-1]["value"]

    asks = {"pope": yes_no, "mme": yes_no, "ocrbench": vqa.OCRBench}
    asks |= {name: vqa.ImageVQADataset for name in ("gqa", "textvqa", "chartqa")}
    return {
        "prompts": list(prompts("vlmevalkit", {name: prompt(of) for name, of in asks.items()})),
        "matches": list(matches("vlmevalkit", vlmevalkit_matchers(vqa.OCRBench, scratch))),
        "aggregates": list(aggregates("vlmevalkit", vlmevalkit_aggregates(scratch))),
    }


def vlmevalkit_matchers(ocrbench_class, scratch):
    import pandas as pd

    yorn = importlib.import_module("vlmeval.dataset.utils.yorn")
    vqa = importlib.import_module("vlmeval.dataset.utils.vqa_eval")

    def yes_no(item, output):
        read = yorn.YOrN_Extraction(output).lower()
        return read == item["answers"][0], yes_no_or_none(read)

    def by_line(method, dataset):
        def score(item, output):
            answer = str(item["answers"]) if len(item["answers"]) > 1 else item["answers"][0]
            result = vqa.process_line({"answer": answer, "prediction": output}, method=method)
            read = [result["pred"]] if method == "vqa_score" else []
            return vqa.hit_calculate([result], dataset)[0], *read

        return score

    def ocrbench(item, output):
        row = {"prediction": output, "answer": str(item["answers"]), "category": item["fields"]["category"]}
        pd.DataFrame([row]).to_pickle(scratch)
        with contextlib.redirect_stderr(io.StringIO()):
            return (ocrbench_class.evaluate(scratch)["Final Score"]["sum"],)

    return {
        "pope": yes_no,
        "mme": yes_no,
        "gqa": by_line("accuracy", "GQA_TestDev_Balanced"),
        "textvqa": by_line("vqa_score", "TextVQA_VAL"),
        "chartqa": by_line("relaxed_accuracy", "ChartQA_TEST"),
        "ocrbench": ocrbench,
    }


def vlmevalkit_aggregates(scratch):
    import pandas as pd

    yorn = importlib.import_module("vlmeval.dataset.utils.yorn")
    table = [(split, true.title(), said.title()) for split, true, said in POPE_TABLE]
    frame = pd.DataFrame(table, columns=["category", "answer", "extracted"])
    frame["score"] = frame["answer"] == frame["extracted"]
    frame.to_pickle(scratch)
    rating = yorn.POPE_rating(scratch).set_index("split").rename(columns={"Overall": "f1", "acc": "accuracy"})
    pope = {
        metric if split == "Overall" else f"{split}: {metric}": value / 100
        for split, row in rating.iterrows()
        for metric, value in row.items()
    }
    pd.DataFrame(mme_rows(), columns=["category", "image_path", "score"]).to_pickle(scratch)
    mme = yorn.MME_rating(scratch).iloc[0].rename({"reasoning": "cognition"}).to_dict()
    return {"pope": pope, "mme": mme}


# ----------------------------------------------------------------------------------------------------------------------- LLaVA


def record_llava():
    bare("llava")
    text_vqa = importlib.import_module("llava.eval.eval_textvqa")
    evaluator = importlib.import_module("llava.eval.m4c_evaluator").TextVQAAccuracyEvaluator()
    for benchmark, protocol, _, question, _, prompt in READ_PROMPTS:  # its evaluation has to find the question in the prompt
        assert (benchmark, protocol) != ("textvqa", "paper") or text_vqa.prompt_processor(prompt) == question.lower()

    def pope(item, output):
        read = llava_pope([("yes", "Yes"), ("yes", output)])[1][1]  # the first row keeps its divisions defined
        return read == item["answers"][0], read

    def textvqa(item, output):
        with contextlib.redirect_stderr(io.StringIO()):
            score = evaluator.eval_pred_list([{"pred_answer": output, "gt_answers": item["answers"]}])
        return score, evaluator.answer_processor(output)

    words = {"answers": ITEMS["textvqa"][0][0]["answers"]}
    contractions = [[word, *textvqa(words, word)] for word in evaluator.answer_processor.CONTRACTIONS]
    values = {}
    for split in ("random", "popular", "adversarial"):
        rates, _ = llava_pope([(true, said) for group, true, said in POPE_TABLE if group == split])
        values |= {f"{split}: {name}": rate for name, rate in rates.items()}
    return {
        "prompts": [],
        "matches": [
            *matches("paper", {"pope": pope, "textvqa": textvqa}),
            {"benchmark": "textvqa", "protocol": "paper", **words, "outputs": contractions},
        ],
        "aggregates": list(aggregates("paper", {"pope": values})),
    }


def llava_pope(rows):
    """What `eval_pope` prints for rows of (true answer, output), by our names, and what it read the outputs as."""
    evaluate = importlib.import_module("llava.eval.eval_pope").eval_pope
    names = {"Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "F1 score": "f1", "Yes ratio": "yes_ratio"}
    labels = Path(tempfile.mkdtemp()) / "labels.json"
    labels.write_text("\n".join(json.dumps({"label": true}) for true, _ in rows))
    answers = [{"text": said} for _, said in rows]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate(answers, labels)
    lines = dict(line.split(": ") for line in printed.getvalue().splitlines() if ": " in line)
    return {ours: float(lines[theirs]) for theirs, ours in names.items()}, [answer["text"] for answer in answers]


# ----------------------------------------------------------------------------------------------------------------------- files


def record_read():
    """The cases that were written down by reading."""
    scores = [
        {"benchmark": benchmark, "protocol": protocol, "source": source, **item, "outputs": list(map(list, outputs.items()))}
        for benchmark, protocol, source, item, outputs in READ_MATCHES
    ]
    names = ("benchmark", "protocol", "source", "question", "fields", "prompt")
    return {"prompts": [dict(zip(names, case, strict=True)) for case in READ_PROMPTS], "matches": scores, "aggregates": []}


def main():
    old = json.loads(FILE.read_text(encoding="utf-8"))["cases"] if FILE.exists() else {}
    cases = {"read": record_read()}
    for package, record in {"lmms_eval": record_lmms_eval, "vlmeval": record_vlmevalkit, "llava": record_llava}.items():
        if importlib.util.find_spec(package):
            cases[package] = record()
        else:
            print(f"{package} is not installed: its cases stay as they are", file=sys.stderr)
            cases[package] = old[package]
    tables = {"pope": POPE_TABLE, "mme": MME_TABLE}
    lines = [  # a case a line, so that a change shows
        json.dumps(package) + ": {\n" + ",\n".join(
            json.dumps(kind) + ": [\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in rows) + "\n]"
            for kind, rows in kinds.items()
        ) + "\n}"
        for package, kinds in cases.items()
    ]  # fmt: skip
    text = '{"tables": ' + json.dumps(tables) + ',\n"cases": {\n' + ",\n".join(lines) + "\n}}\n"
    FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
