"""What `record_choice.py` puts to the presets' own code, and what Cambrian's evaluation makes of it.

That is no package, so its prompts and outcomes are written down from reading `eval/eval/<name>/<name>_eval.py` and
`<name>_test.py` of cambrian-mllm/cambrian, commits 0d7ca41 and a220b3f (CV-Bench there is `coco` and `omni`).
"""

from __future__ import annotations

from typing import Any

# fmt: off
OUTPUTS = [
    "B", "(B)", "B.", "B)", "B:", "(B).", "(B", "B )", "( B)", "b", "b.", "(b)", "[B]", "**B**", "'B'", "\"B\"", "B!", "\uff22",
    "B. a cat", "B, a cat", "B: a cat", "B a cat", "B) a cat", "b. a cat", "B.a cat", "B\nBecause of the tail",
    "B.\n\nWhy: A", "Answer: B", "answer: (B).", "The answer is B", "The answer is B.", "The answer is: B",
    "The answer is (B).", "Option B", "The correct answer is B", "the answer is b", "I choose B because A is wrong",
    "option B is right", "정답은 B", "选B", "Based on the image, C", "It is a dog, so B", "The best option is C, not D",
    "The answer is B, not D", "So C it is", "A or B", "A and B", "A, B", "A cat", "A dog", "ABC", "I think it is a dog",
    "The image shows a cat on a mat.", "C. The answer is B.", "1. The answer is B.", "The answer is A. The answer is B.",
    "The answer is A. Or answer: B", "", ".", "1", "1.", "(1)", "E", "F", "Z", "None of them",
    "Cannot determine the answer: B", "D", "The answer is D!", "Yes", "No", "no.", "No, it is not", "2", "2.", "Two",
    "2 cars", "The answer is 2", "the answer is no.", "(A) no; the best option is C here", "(A) no; option is C here",
    "(A) no, correct choice is C here", "(A) no, I pick C here", "(A)? 정답은 C 입니다", "(A)? 选 C 项", "A: no, B. yes",
    "A) no, B: yes", "B) no, (A) yes", "B or A but", "E. a cat", "F. The answer is B.", "The answer is C?", "No (A)",
    "in B, C, or D they are", "So A. no, B: yes now", "So A: no, B) yes now", "No (A), so B", "xABAx", "Z: a dog",
]

# `choices` are what VLMEvalKit's own file would hold in columns A, B, ...; `stem` its question where it differs.
CASES: list[dict[str, Any]] = [
    {
        "benchmark": "mmstar",
        "row": {
            "question": "What is on the mat?\nOptions: A: Cats, black, on a mat., B: A dog, C: 3 birds, D: Nothing of these",
        },
        "stem": "What is on the mat?",
        "choices": ["Cats, black, on a mat.", "A dog", "3 birds", "Nothing of these"],
    },
    {
        "benchmark": "mmstar",
        "row": {
            "question": " Is it a dog? Please answer yes or no.\nOptions: A: Yes, B: No, C: nan, D: nan",
        },
        "stem": " Is it a dog? Please answer yes or no.",
        "choices": ["Yes", "No"],
    },
    {
        "benchmark": "mmstar",
        "row": {
            "question": "Hint: Give the option letter.\n"
                "Question: How long is <image 1>?\nChoices:\n(A) 12\n(B) 2\n(C) 1/8, 9\n(D) -1",
        },
        "stem": "Hint: Give the option letter.\nQuestion: How long is <image 1>?",
        "choices": ["12", "2", "1/8, 9", "-1"],
    },
    {
        "benchmark": "cv_bench",
        "row": {
            "question": "How many cars are in the image?",
            "prompt": "How many cars are in the image? Select from the following choices.\n(A) 1\n(B) 2\n(C) 0\n(D) 3",
            "choices": ["1", "2", "0", "3"],
        },
        "choices": ["1", "2", "0", "3"],
    },
    {
        "benchmark": "cv_bench",
        "row": {
            "question": "Which is closer to the camera, the cat (red box) or the dog (blue box)?",
            "prompt": "Which is closer to the camera, the cat (red box) or the dog (blue box)?\n(A) cat\n(B) dog",
            "choices": ["cat", "dog"],
        },
        "choices": ["cat", "dog"],
    },
    {
        "benchmark": "scienceqa_img",
        "row": {
            "question": "Which is a mammal?",
            "hint": "Mammals have fur.\nBirds do not.",
            "choices": ["a trout", "a cat", "an old dog."],
        },
        "choices": ["a trout", "a cat", "an old dog."],
        "hint": "Mammals have fur.\nBirds do not.",
    },
    {
        "benchmark": "scienceqa_img",
        "row": {
            "question": "Is it a dog?",
            "hint": "",
            "choices": ["yes", "no"],
        },
        "choices": ["yes", "no"],
    },
    {
        "benchmark": "ai2d",
        "row": {
            "question": "What eats the plant?",
            "options": ["a cat", "A dog", "1", "both"],
        },
        "choices": ["a cat", "A dog", "1", "both"],
    },
    {
        "benchmark": "seed_img",
        "row": {
            "question": "What is on the mat?",
            "choice_a": "A cat",
            "choice_b": "A dog",
            "choice_c": "Two cars",
            "choice_d": "狗",
        },
        "choices": ["A cat", "A dog", "Two cars", "狗"],
    },
    {
        "benchmark": "realworldqa",
        "row": {
            "question": "Is the light red?\nA. Yes\n"
                "B. No\nC. Unsure\nPlease answer directly with only the letter of the correct option and nothing else. ",
        },
        "answers": ["A", "B", "C", "D"],
    },
    {
        "benchmark": "realworldqa",
        "row": {
            "question": "How many cars?\nPlease answer directly with a single word or number.",
        },
        "answers": ["No", "Two", "2", "E"],
    },
]

LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_ONLY = "\nPlease answer directly with only the letter of the correct option and nothing else."

# Outputs that are read as B or A: by their first word, by what stands before the first period, by their first character.
WORD_A = ("A or B", "A and B", "A, B", "A cat", "A dog", "A: no, B. yes")
WORD_B = (
    "B", "B.", "B:", "B )", "b", "b.", "B. a cat", "B, a cat", "B: a cat", "B a cat", "b. a cat", "B\nBecause of the tail",
    "B.\n\nWhy: A", "B or A but",
)
SAID_B = (
    "Answer: B", "The answer is B", "The answer is B.", "The correct answer is B", "the answer is b", "C. The answer is B.",
    "F. The answer is B.", "1. The answer is B.", "The answer is A. The answer is B.", "The answer is A. Or answer: B",
    "Cannot determine the answer: B",
)
PERIOD_B = ("B", "B.", "b", "b.", "B. a cat", "b. a cat", "B.a cat", "B.\n\nWhy: A", *SAID_B)
FIRST_A = (
    *WORD_A, "ABC", "A) no, B: yes", "(A) no; the best option is C here", "(A) no; option is C here",
    "(A) no, correct choice is C here", "(A) no, I pick C here", "(A)? 정답은 C 입니다", "(A)? 选 C 项",
)
FIRST_B = (
    *WORD_B, *SAID_B, "(B)", "B)", "(B).", "(B", "(b)", "B!", "B) a cat", "B.a cat", "answer: (B).", "The answer is (B).",
    "Based on the image, C", "The answer is B, not D", "B) no, (A) yes",
)
FIRST_D = ("D", "The answer is D!")

# In the order of CASES: Cambrian's prompt, and {answer: outputs for which it is right}.
CAMBRIAN: list[tuple[str, dict[str, tuple[str, ...]]]] = [
    (CASES[0]["row"]["question"] + LETTER_ONLY, {
        "A": (*WORD_A, "a dog."), "B": WORD_B, "C": ("C. The answer is B.",), "D": ("D",),
    }),
    (CASES[1]["row"]["question"] + LETTER_ONLY, {"A": WORD_A, "B": WORD_B}),
    (CASES[2]["row"]["question"] + LETTER_ONLY, {"A": WORD_A, "B": WORD_B, "C": ("C. The answer is B.",), "D": ("D",)}),
    (CASES[3]["row"]["prompt"] + LETTER, {"A": FIRST_A, "B": FIRST_B, "C": ("The answer is C?",), "D": FIRST_D}),
    (CASES[4]["row"]["prompt"] + LETTER, {"A": FIRST_A, "B": FIRST_B}),
    ("Mammals have fur.\nBirds do not. Which is a mammal?\nA. a trout\nB. a cat\nC. an old dog." + LETTER_ONLY, {
        "A": ("a trout", "a trout."), "B": (*PERIOD_B, "A cat", "a cat", "a cat."), "C": ("an old dog.",),
    }),
    ("Is it a dog?\nA. yes\nB. no" + LETTER_ONLY, {
        "A": ("Yes", "yes", "yes."), "B": (*PERIOD_B, "No", "no.", "the answer is no.", "no"),
    }),
    ("What eats the plant?\nA. a cat\nB. A dog\nC. 1\nD. both" + LETTER, {
        "A": (*FIRST_A, "a cat", "a cat.", "a dog."),
        "B": (*FIRST_B, "1", "1.", "(1)", "both", "both."),
        "C": ("2", "2.", "2 cars", "The answer is 2", "The answer is C?"),
        "D": FIRST_D,
    }),
    ("What is on the mat? Options:\nA. A cat\nB. A dog\nC. Two cars\nD. 狗" + LETTER, {
        "A": (*FIRST_A, "a cat.", "a dog."), "B": FIRST_B, "C": ("The answer is C?",), "D": FIRST_D,
    }),
    (CASES[9]["row"]["question"], {
        "A": ("A or B", "A and B", "A cat", "A dog"),
        "B": ("B", "B.", "B )", "b", "b.", "B a cat", "B\nBecause of the tail", "B or A but", *SAID_B),
        "D": ("D",),
    }),
    (CASES[10]["row"]["question"], {
        "No": ("No", "no.", "the answer is no.", "No (A)", "No (A), so B"), "Two": ("Two",), "E": ("E",),
        "2": ("2", "2.", "2 cars", "The answer is 2"),
    }),
]
# fmt: on
