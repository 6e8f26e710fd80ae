"""What `record_mixed.py` puts to the codes that MMBench, MMMU, VizWiz, MathVista and V*Bench have to equal."""

from __future__ import annotations

from typing import Any

from choice_cases import OUTPUTS
from short_cases import SHORT, TEN

Rows = list[tuple[str, dict[str, Any]]]
LETTER = "\nAnswer with the option's letter from the given choices directly."

# fmt: off
# Choices are right by letter: each row is scored with every letter as its answer.
CHOICE_ROWS: Rows = [
    ("mmbench", {
        "question": "What is on the mat?", "hint": "nan", "A": "A cat", "B": "A dog", "C": "Two cars", "D": "an Antenna",
    }),
    ("mmbench", {
        "question": "Is it a dog?", "hint": "Dogs bark.\nCats do not.", "A": "yes", "B": "no", "C": "nan", "D": "nan",
    }),
    ("mmmu", {
        "id": "validation_Art_1", "question": "What is on the mat of <image 1>?",
        "options": "['A cat', 'a dog', '2', \"it's <image 2>\"]",
    }),
    ("mmmu", {"id": "validation_Art_Theory_2", "question": "Is <image 2> a dog?", "options": "['yes', 'no']"}),
    ("mathvista", {
        "query": "Hint: Give the letter.\nQuestion: Is it 35?\nChoices:\n(A) 35°\n(B) 145°\n(C) 35°",
        "choices": ["35°", "145°", "35°"],
    }),
    ("mathvista", {"query": "Question: Which?\nChoices:\n(A) E\n(B) A\n(C) B", "choices": ["E", "A", "B"]}),
    ("vstar", {
        "text": "What is the glove made of?\n(A) rubber\n(B) cotton\n(C) kevlar (black)\n(D) leather" + LETTER,
        "category": "direct_attributes",
    }),
    ("vstar", {
        "text": "Is the dog left or right of the cat?\n(A) left.\n(B) right." + LETTER, "category": "relative_position",
    }),
]
MORE_OUTPUTS = [
    "A", "C", "a", "c", "A.", "(C)",
    "A cat, banana, and more of it", "I think it is an Antenna", "It is an antenna on the roof of it",
    "It is a dog on the mat of it", "is it a cat or a dog that lies here", "A cat or a dog: A cat is what I see here",
    "The letters are A, B and C", "A and then B.", "(A) or (B)", "(B) or (A), I say (A)", ":B", ":B)", "B).", "(B).", "A B",
    "A. B.", "B. A.", "Not A but B", "xB y", "xB. yA.", "ANSWER: B", "Option: C", "the choice is d", "d", "Cats are b", "bd",
    "B]", "[B]", "the answer is: (b)", "Answer:\nB", "rubber", "kevlar (black)", "It is made of cotton", "145°", "35°",
    "145°.", "The answer is 145°", "It is (B) 145°.", "E", "yes", "no", "It is not the case that this is one",
    "I know that it is not that one", "'B'", "B'", "it's <image 2>",
]
CHOICE_OUTPUTS = list(dict.fromkeys((*OUTPUTS, *MORE_OUTPUTS)))

# Open answers: scores of each row as it is.
MMMU_ANSWERS = [
    "1.06", "C", "B", "Transformation", "1,249", "-120", "['$MgS$', 'MgS']", "['24/7', '3.429']", "9.20", "1/64",
]
MATHVISTA_ANSWERS = [
    ("14", "integer", None), ("-3", "integer", None), ("0", "integer", None), ("1.2", "float", 1.0), ("130.4", "float", 1.0),
    ("0.21", "float", 2.0), ("2372.1", "float", 1.0), ("[2014, 2016]", "list", None),
]
OPEN_ROWS: Rows = [
    *(
        ("mmmu", {"id": f"validation_Math_{number}", "question": "How long is <image 1>?", "answer": answer})
        for number, answer in enumerate(MMMU_ANSWERS)
    ),
    *(
        ("vizwiz", {"question": "what is THIS? Please tell", "answers": answers})
        for answers in [*TEN.values(), ["unanswerable"] * 4 + ["unsuitable"] * 3 + ["dog"] * 3]
    ),
    *(
        ("mathvista", {"query": f"Hint: {kind}\nQuestion: ?", "answer": answer, "answer_type": kind, "precision": precision})
        for answer, kind, precision in MATHVISTA_ANSWERS
    ),
]
OPEN_OUTPUTS = {
    "mmmu": [
        "1.06", "1.060", "1.0649", "1.07", "The answer is 1.06.", "x = 1.06", "x = 1.06\nDone", "It is 1.06 m",
        "So 1.06, thus 2", "C", "c", " c", "C.", "a c d", "The answer is C", "abc", "cab", "B", "b c", "It is b",
        "Other answers", "A", "transformation", "It is a Transformation.", "transformations", "Trans formation", "1249",
        "1,249", "1,249.0", "12,49", "the result is 1,249 m", "1.249e3", "1.249e+3", "-120", "- 120", "120", "minus 120",
        "-120.004", "MgS", "$MgS$", "mgs.", "It could be MgS", "['$MgS$', 'MgS']", "24/7", "3.429", "3.43", "24", "7",
        "['24/7', '3.429']", "9.2", "9.20", "9.199", "1/64", "64", "1", "is", "is :", "answer is .", "so so",
        "final answer: 9.2", "", ".", "=", "=9.2", "a=1\nb=9.2", "a=9.2\nb=1", "nan", "inf", "1e3", "9.2e0",
        "No answer. The result is 9.2", "therefore it is\n9.2", ".5", "1.5.6", "1,2,3", "1,249,000", "x9.2",
        "It is the final thing so 9.2", "Is B.", "so = 9.2 = 3", "The answer is 9.2\nThe end",
    ],
    "vizwiz": [*SHORT, "unanswerable", "Unanswerable", "Unanswerable.", "unsuitable", "unsuitable image"],
    "mathvista": [
        "14", " 14 ", "14.0", "14.7", "-3", "- 3", "0", "0.0", "-0", "1.2", "1.24", "1.25", "1.16", "130.4", "130.43",
        "0.21", "0.2149", ".21", "2372.1", "2,372.1", "1e1", "14%", "fourteen", "", "nan", "inf", "14.", "+14",
        "14.69", "[2014, 2016]", "[2014,2016]", "2014", "13.4", "13.3", "2491", "0.2", "b", "The answer is 14", "1e400",
    ],
}

# (index, category, l2-category, answer, prediction) of two questions of four choices, two of two and one of three.
CIRCULAR = [
    *((turn * 1_000_000 + 1, "ocr", "coarse_perception", "BADC"[turn], "BADC"[turn]) for turn in range(4)),
    *((turn * 1_000_000 + 2, "ocr", "coarse_perception", "BADC"[turn], "BADA"[turn]) for turn in range(4)),
    *((turn * 1_000_000 + 3, "image_topic", "coarse_perception", "BA"[turn], "BA"[turn]) for turn in range(2)),
    *((turn * 1_000_000 + 4, "future_prediction", "logic_reasoning", "BA"[turn], "AB"[turn]) for turn in range(2)),
    *((turn * 1_000_000 + 5, "future_prediction", "logic_reasoning", "CBA"[turn], "CBA"[turn]) for turn in range(3)),
]
# fmt: on
