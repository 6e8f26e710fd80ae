"""What `record_short.py` asks the evaluation codes, and the cases of those that are no package, written down by reading."""

# ruff: noqa: RUF001 (full-width letters are among the cases)

YES_NO = [
    "Yes", "yes", "YES", "yes.", "Yes.", " Yes ", "Yes, there is a dog.", "No", "no", "NO", "No.", "no,", "No, there is no dog",
    "There is not", "There is not a dog.", "There isn't", "There is a dog. No cat", "Yes and no", "yes/no", "Yes. No.", "", " ",
    ".", "y", "Y", "n", "N.", "nope", "none", "Not sure", "Know", "Nobody", "I don't know", "yes\nno", "No\nthere", "yes:",
    "Yes!", "'yes'", "Yep", "The answer is yes", "The answer is no.", "unknown", "ja", "ｙｅｓ", "no-one", "yes, no", "nO",
    "1,000 yes",
]  # fmt: skip
SHORT = [
    "dog", "Dog", "DOG ", "a dog", "The dog", "the dog.", "dogs", "dog .", "dog?", "dog,", "dog, cat", "dog/cat", "dog / cat",
    "hot-dog", "hot dog", "2", "two", "Two", "The answer is 2.", "2.0", "2.", "02", "10%", "0.1", "10 %", "1,000", "1000",
    "1 000", "1,,000", "$5", "5 dollars", "dont", "don't", "its", "it's", "dog's", "none", "0", "a", "", "café", "CAFÉ",
    "Straße", "x_y", "line\nbreak", "tab\there", "wed've", "somebody'd", "u.s.a.", "3.5 m.", "12:30", "12:30 p.m.", "(left)",
    "left!", "yes", "no.", "." * 40 + "dog", "a.b.c", '"dog"', "@home", "ten", "TEN!", "the", "an apple a day",
    "top-left, 1,000",
]  # fmt: skip
NUMBERS = [
    "10", "10.0", "10.5", "10.6", "9.5", "9.52", "9.4", "10.51", "10%", "0.1", "0.105", "0.1%", "%", "10 %", "10%%", "1,000",
    "1000", "1_000", "1050", "1051", "0", "0.0", "-0", "0%", "-10", "inf", "nan", "NaN", "ten", "Ten", "Yes", "yes", "yes.", "",
    "10.", ".5", "1e1", "2019", "2000", "The answer is 10", "United States", "united states", "10 million", "²", "１０",
    "[Yes, No]", "4%", "0.04",
]  # fmt: skip
OCR = [
    "CENTRE", "centre", "The word is CENTRE.", "CEN TRE", "cen\ntre", "CENTER", "", "  centre  ", "ＣＥＮＴＲＥ", "Exit\nonly",
    "exit only", "EXIT  ONLY", "exitonly", "line one\nexit only\nline three", "$12.50", "12.50", "12,50", "Total: $ 12.50",
    "１２．５０", "Café", "CAFE", "éa", "é", "a", "x^{2} + 1", "x^{2}+1", "X^{2}+1", "\\frac{1}{2}", "\\frac { 1 } { 2 }",
    "\\frac{1}\n{2}", "\\Frac{1}{2}", "$ \\frac{1}{2} $", "=x^{2}+1=", "x^2+1", "2023-01-05", "05/01/2023", "ﬁre", "fire",
    "İzmir", "izmir",
]  # fmt: skip
TEN = {
    "dog": ["dog"] * 10,
    "mixed": ["dog", "Dog.", "a dog", "dogs", "cat", "hot dog", "the cat", "", "2", "two"],
    "numbers": ["1,000", "1000", "1000", "1 000", "10%", "0.1", "2", "two", "Two", "2.0"],
    "words": ["don't", "dont", "its", "it's", "yes", "no", "none", "0", "dog's", "dog 's"],
    "marks": ["hot-dog", "hot dog", "hotdog", "dog/cat", "dog cat", "x_y", "x y", "12:30 pm", "u.s.a.", "usa"],
    "breaks": ["line break", "line\nbreak", "tab here", "left", "(left)", "café", "CAFÉ", "a.b.c", "3.5 m", "abc"],
}

FORMULA = {"category": "Handwritten Mathematical Expression Recognition", "dataset": "HME100k"}
SCENE = {"category": "Scene Text-centric VQA", "dataset": "STVQA"}

# read, not run: (benchmark, protocol, source, item, {output: score})
MME_SOURCE = "MME_Benchmark_release_version/eval_tool/calculation.py, parse_pred_ans"
GQA_SOURCE = "haotian-liu/LLaVA scripts/convert_gqa_for_eval.py; GQA's eval.py compares for equality"
CAMBRIAN = "cambrian-mllm/cambrian eval/eval/"
READ_MATCHES = [
    ("mme", "paper", MME_SOURCE, {"answers": ["yes"]}, {
        "Yes": 1, "yes": 1, "yes.": 1, "Yes, there is": 1, "a yes": 0, "Yep": 0, "y": 0, "No": 0, "": 0, "Yes and no": 1,
        "yes/no": 1, ".yes": 1, "..yes": 0}),
    ("mme", "paper", MME_SOURCE, {"answers": ["no"]}, {
        "No": 1, "no.": 1, "NO": 1, "Not a dog": 1, "Know": 1, "nope": 1, "n": 0, "There is not": 0, "Yes and no": 0, "": 0,
        "unno": 1, "I'm not sure": 0}),
    ("gqa", "paper", GQA_SOURCE, {"answers": ["dog"]}, {
        "dog": 1, "Dog": 1, "dog.": 1, "dog..": 1, "DOG ": 1, "dog .": 0, "a dog": 0, "dogs": 0, "dog!": 0, "": 0, "dog,": 0}),
    ("pope", "cambrian", CAMBRIAN + "pope/pope_test.py", {"answers": ["yes"]}, {
        "Yes": 1, "yes.": 1, "Yes, there is": 1, "yes:": 1, "Yes.,": 1, "yes!": 0, "A yes": 0, "No": 0, "y": 0, "yes\nno": 1}),
    ("pope", "cambrian", CAMBRIAN + "pope/pope_test.py", {"answers": ["no"]}, {
        "No": 1, "No, there is no dog": 1, "There is not": 0, "NO.": 1, "not": 0, "Yes": 0}),
    ("mme", "cambrian", CAMBRIAN + "mme/mme_test.py", {"answers": ["yes"]}, {
        "Yes": 1, "yes.": 1, "YES..": 1, "Yes, there is": 0, "yes!": 0, "y": 0, "": 0, "No": 0}),
    ("mme", "cambrian", CAMBRIAN + "mme/mme_test.py", {"answers": ["no"]}, {"No": 1, "no.": 1, "Not": 0, "no,": 0, "": 0}),
    ("gqa", "cambrian", CAMBRIAN + "gqa/gqa_test.py", {"answers": ["dog"]}, {
        "dog": 1, "Dog.": 1, "dog .": 0, "the dog": 0, "dogs": 0, "": 0}),
    ("textvqa", "cambrian", CAMBRIAN + "textvqa/textvqa_test.py", {"answers": TEN["mixed"]}, {
        "dog": 0.9, "A DOG.": 0.9, "cat": 0.6, "dogs": 0.3, "2": 0.6, "horse": 0}),
    ("chartqa", "cambrian", CAMBRIAN + "chartqa/chartqa_test.py", {"answers": ["10"]}, {
        "10": 1, "10.5": 1, "10.6": 0, "9.5": 1, "9.4": 0, "10%": 0, "ten": 0, "10.": 1, "1e1": 1, "nan": 0, "": 0}),
    ("chartqa", "cambrian", CAMBRIAN + "chartqa/chartqa_test.py", {"answers": ["0"]}, {
        "0": 1, "0.0": 1, "-0": 1, "0.01": 0, "zero": 0}),
    ("chartqa", "cambrian", CAMBRIAN + "chartqa/chartqa_test.py", {"answers": ["10%"]}, {
        "10%": 1, "10": 0, "0.1": 0, "10.1%": 0}),
    ("chartqa", "cambrian", CAMBRIAN + "chartqa/chartqa_test.py", {"answers": ["Yes"]}, {"yes": 1, "Yes.": 0, "YES": 1}),
    ("ocrbench", "cambrian", CAMBRIAN + "ocrbench/ocrbench_test.py, without --extra_penalization as in run_benchmark.sh",
     {"answers": ["CENTRE"], "fields": SCENE}, {
        "centre": 1, "The word is Centre.": 1, "cen\ntre": 0, "cen tre": 0, "ＣＥＮＴＲＥ": 0, "": 0}),
    ("ocrbench", "cambrian", CAMBRIAN + "ocrbench/ocrbench_test.py",
     {"answers": ["\\frac { 1 } { 2 }"], "fields": FORMULA}, {
        "\\frac{1}{2}": 1, "\\frac{1}\n{2}": 1, "$ \\frac {1} {2} $": 1, "\\Frac{1}{2}": 0}),
]  # fmt: skip
WORD = "\nAnswer the question using a single word or phrase."
# read, not run: (benchmark, protocol, source, question, fields, prompt). LLaVA's question files are no part of its repository;
# their form is known from its documentation and from how its evaluation parses it
QUESTION_FILE = "LLaVA-1.5's question file"
READ_PROMPTS = [
    ("pope", "paper", QUESTION_FILE, "Is there a dog in the image?", {}, "Is there a dog in the image?" + WORD),
    ("mme", "paper", QUESTION_FILE, "Is it a cat? Please answer yes or no.", {}, "Is it a cat?" + WORD),
    ("mme", "paper", QUESTION_FILE, "Is it a cat?  Please answer yes or no.", {}, "Is it a cat?" + WORD),
    ("gqa", "paper", QUESTION_FILE, "Is it wet?", {}, "Is it wet?" + WORD),
    ("textvqa", "paper", QUESTION_FILE, "what brand is it?", {"ocr_tokens": "NOKIA, 3310"},
     "what brand is it?\nReference OCR token: NOKIA, 3310" + WORD),
    ("textvqa", "paper", QUESTION_FILE, "what brand is it?", {"ocr_tokens": ""},
     "what brand is it?\nReference OCR token: " + WORD),
    ("pope", "cambrian", CAMBRIAN + "pope/pope_eval.py", "Is there a dog?", {}, "Is there a dog?" + WORD),
    ("mme", "cambrian", CAMBRIAN + "mme/mme_eval.py", "Is it a cat? Please answer yes or no.", {},
     "Is it a cat? Please answer yes or no." + WORD),
    ("gqa", "cambrian", CAMBRIAN + "gqa/gqa_eval.py", "Is it wet?", {}, "Is it wet?" + WORD),
    ("textvqa", "cambrian", CAMBRIAN + "textvqa/textvqa_eval.py", "what brand is it?", {"ocr_tokens": "NOKIA, 3310"},
     "what brand is it?\nReference OCR tokens: NOKIA, 3310" + WORD),
    ("textvqa", "cambrian", CAMBRIAN + "textvqa/textvqa_eval.py", "what brand?", {"ocr_tokens": ""},
     "what brand?\nReference OCR tokens:" + WORD),
    ("chartqa", "cambrian", CAMBRIAN + "chartqa/chartqa_eval.py", "How many?", {},
     "How many?\nAnswer the question using a single number or phrase."),
    ("ocrbench", "cambrian", CAMBRIAN + "ocrbench/ocrbench_eval.py", "what is written in the image?", {},
     "what is written in the image?\nGive the short answer directly."),
]  # fmt: skip

CHART_ANSWERS = ["10", "10%", "0.1", "1000", "0", "2019", "Yes", "United States", "[Yes, No]", "4%"]
TEXT_ANSWERS = [["CENTRE"], ["exit only", "$12.50"], ["Café"], ["2023-01-05"], ["fire", "İzmir"]]
FORMULA_ANSWERS = [["x^{2} + 1"], ["\\frac { 1 } { 2 }", "a"]]
ITEMS = {  # benchmark -> [(item, outputs)]
    "pope": [({"answers": [answer]}, YES_NO) for answer in ("yes", "no")],
    "mme": [({"answers": [answer]}, YES_NO) for answer in ("yes", "no")],
    "gqa": [({"answers": [answer]}, SHORT) for answer in ("dog", "hot dog", "2", "yes", "t-shirt", "café")],
    "textvqa": [({"answers": answers}, SHORT) for answers in TEN.values()],
    "chartqa": [({"answers": [a]}, NUMBERS) for a in CHART_ANSWERS],
    "ocrbench": [
        *(({"answers": answers, "fields": SCENE}, OCR) for answers in TEXT_ANSWERS),
        *(({"answers": answers, "fields": FORMULA}, OCR) for answers in FORMULA_ANSWERS),
    ],
}
PROMPTS = {  # benchmark -> [(question, fields)]
    "pope": [("Is there a dog in the image?", {}), (" Is there a dog? ", {})],
    "mme": [("Is it? Please answer yes or no.", {}), ("Is it?  Please answer yes or no.", {}), ("Is it this? ", {})],
    "gqa": [("Is it wet?", {}), (" Is it wet? ", {})],
    "textvqa": [("what does NASA say?", {"ocr_tokens": "NASA, 50"}), ("What IS it? ", {"ocr_tokens": ""})],
    "chartqa": [("How many people?", {}), ("How many? ", {})],
    "ocrbench": [("what is written in the image?", {}), (" What is it? ", {})],
}

# a made table: how many questions have this split, true answer and output
POPE_COUNTS = {
    ("random", "yes", "yes"): 5, ("random", "yes", "no"): 2, ("random", "no", "yes"): 1, ("random", "no", "no"): 3,
    ("popular", "yes", "yes"): 2, ("popular", "yes", "maybe"): 1, ("popular", "no", "yes"): 1, ("popular", "no", "no"): 1,
    ("adversarial", "yes", "yes"): 1, ("adversarial", "yes", "perhaps"): 1, ("adversarial", "no", "yes"): 2,
    ("adversarial", "no", "no"): 1,
}  # fmt: skip
POPE_TABLE = [row for row, count in POPE_COUNTS.items() for _ in range(count)]
# a made table: what is said to each pair of a subtask, whose true answers are yes and no
GOOD, HALF, BAD = ("yes", "no"), ("yes", "yes"), ("no", "yes")
MME_TABLE = {
    "existence": [GOOD, HALF, BAD], "count": [GOOD], "position": [HALF], "color": [BAD], "posters": [GOOD, GOOD, GOOD],
    "celebrity": [HALF, GOOD], "scene": [HALF, HALF], "landmark": [GOOD], "artwork": [BAD, GOOD], "OCR": [GOOD],
    "commonsense_reasoning": [HALF], "numerical_calculation": [GOOD, BAD], "text_translation": [BAD], "code_reasoning": [GOOD],
}  # fmt: skip
