"""How each protocol extracts the letter of a multiple-choice answer from an output.

They agree on `B` and differ on longer outputs. Each has its own matcher, quirks included, since scores are comparable only
if outputs are read in the same way. Outputs come without surrounding white space. All matchers are tested against outcomes of
the original code (`tests/golden/record_choice.py`).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import Row
from lsg_jax.data.prompts import LETTER_SUFFIX, multiple_choice_prompt
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Item, Match

LETTERS = string.ascii_uppercase


def letter_match(item: Item, letter: str | None) -> Match:
    """Scores a letter against the correct one."""
    return Match(letter, float(letter == item.answers[0]))


def answer_letter(index: object, choices: Sequence[str], where: str) -> str:
    """The letter of the correct choice from its position, 0 for A. Raises InputError if there is no such choice."""
    position = int(str(index)) if is_number(str(index)) else -1
    if not 0 <= position < min(len(choices), len(LETTERS)):
        raise InputError(f"{where}: answer {repr(index)[:80]} is no position among {len(choices)} choices, counted from 0")
    return LETTERS[position]


def row_choices(row: Row, column: str) -> tuple[str, ...]:
    """The texts of a row's choices, A first. Raises InputError for more of them than there are letters."""
    choices = row.texts(column)
    if len(choices) > len(LETTERS):
        raise InputError(f"{row.where}: {column} holds {len(choices)} choices; only {len(LETTERS)} have a letter")
    return choices


def is_number(text: str) -> bool:
    """Whether a text is a whole number from 0 on, of at most 18 digits: Python refuses to read one of thousands."""
    return text.isdecimal() and len(text) <= 18


def check_letter(letter: object, count: int, where: str) -> str:
    """The correct letter as given in the file. Raises InputError unless it is one of the first `count`."""
    if not isinstance(letter, str) or len(letter) != 1 or letter not in LETTERS[:count]:
        raise InputError(f"{where}: answer {repr(letter)[:80]} is none of {', '.join(LETTERS[:count])}")
    return letter


def chosen_letter(output: str, count: int) -> str | None:
    """The letter of an output: `B`, `(B)`, `B.`, `B. a cat`; None for other outputs. Our own rule, for protocol `paper`."""
    match = re.match(rf"\(?([A-{LETTERS[count - 1]}])(?:[).:,]|\s*$)", output.strip())
    return match[1] if match else None


def llava_letter(output: str, count: int) -> str | None:
    """LLaVA-1.5 on ScienceQA: `B`, `B. ...`, or a single `The answer is B.` (any character after it) anywhere."""
    if output[:1] in tuple("ABCDE") and output[1:3] in ("", ". "):
        said = [output[0]]
    else:
        said = re.findall(r"The answer is ([A-Z]).", output)
    return said[0] if len(said) == 1 and said[0] in LETTERS[:count] else None


# ------------------------------------------------------------------------------------------------------------------ lmms-eval

_LMMS_MARKS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
_LMMS_PHRASES = (
    *(f"{the}{kind} answer is" for the in ("the ", "") for kind in ("correct", "best")),
    *(f"{the}{kind} option is" for the in ("the ", "") for kind in ("correct", "best")),
    *("the answer is", "answer is", "the choice is", "choice is", "the correct choice is", "correct choice is"),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def lmms_letter(output: str, letters: str = "ABCD") -> str | None:
    """lmms-eval's shared extractor (MMStar, RealWorldQA): the match of highest rank, among equal ranks the last in the text.

    It needs no word boundaries: `A cat` is A, and `The answer is B, not D` is D.
    """
    text = output.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    inner = text.strip()
    text = f" {text} "
    found = [(rank, text.rfind(mark.format(letter)), letter) for mark, rank in _LMMS_MARKS for letter in letters]
    lower = text.lower()
    for phrase in _LMMS_PHRASES:
        if phrase in lower:
            after = lower.find(phrase) + len(phrase)
            found += [(7, text.find(letter, after), letter) for letter in letters]
    found += [(10, 0, x) for x in letters if inner.startswith(x) and not inner[1:2].isalpha()]
    found += [(9, len(text) - 1, x) for x in letters if inner.endswith(x) and not inner[-2:-1].isalpha()]
    found = [reading for reading in found if reading[1] >= 0]
    if not found:
        found = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found)[2] if found else None


def lmms_dotted_letter(output: str) -> str | None:
    """lmms-eval on AI2D: `B. ...`, or a single letter in either case with only punctuation around it."""
    if match := re.match(r"\s*([A-Z])\.", output):
        return match[1]
    bare = "".join(char for char in output if char not in string.punctuation).upper()
    return bare if len(bare) == 1 and bare in LETTERS else None


def lmms_scienceqa_letter(output: str) -> str | None:
    """lmms-eval on ScienceQA: one letter in either case, or a capital followed by a period."""
    letter = output.strip()
    if letter[1:2] == "." and letter[0].isupper():
        letter = letter[0]
    return letter.upper() if len(letter) == 1 and letter.upper() in LETTERS else None


def lmms_first_letter(output: str) -> str | None:
    """lmms-eval on CV-Bench: the first letter after brackets and spaces, even of a word (`Based on` is B)."""
    match = re.match(r"[(\s]*([A-Za-z])", output)
    return match[1].upper() if match else None


def lmms_first_character(output: str) -> str | None:
    """lmms-eval on SEED-Bench: the first character, so `(B)` is wrong and `Based on` is B."""
    first = output.strip()[:1].upper()
    return first if first and first in LETTERS else None


_LMMS_MMVP = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^\s*\(?([AB])\)?\.?\s*$",
        r"^\s*\(?([AB])\)?[\.\s]",
        r"answer\s+is\s+\(?([AB])\)?",
        r"option\s+\(?([AB])\)?",
        r"\(?([AB])\)?(?:\s|$)",
        r"^([AB])",
    )
)


def lmms_mmvp_letter(output: str) -> str | None:
    """lmms-eval on MMVP: A or B alone, at the start, after `answer is` or `option`, or before a space, even of a word."""
    found = next((match for match in (pattern.search(output.strip()) for pattern in _LMMS_MMVP) if match), None)
    return found[1].upper() if found else None


# ----------------------------------------------------------------------------------------------------------------- VLMEvalKit

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_TO_SPACE = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def vlmevalkit_prompt(question: str, choices: Sequence[str]) -> str:
    """VLMEvalKit's LLaVA prompt for multiple choice: that of LLaVA-1.5, with a Chinese request if the question is Chinese."""
    prompt = multiple_choice_prompt(question, choices)
    return prompt.removesuffix(LETTER_SUFFIX) + "\n请直接回答选项字母。" if re.search("[\u4e00-\u9fff]", prompt) else prompt


def vlmevalkit_letter(output: str, choices: Sequence[str]) -> str | None:
    """VLMEvalKit without a judge: the only letter that is a word, else the only choice whose text is in the output.

    Two letters or two texts are no answer. An article counts as a letter: `A cat` is A.

    Args:
        choices: texts, A first; "" for an unknown one.
    """
    if any(refusal in output for refusal in _REFUSALS):
        return None
    words = output.translate(_TO_SPACE).split()
    named = [letter for letter in LETTERS[: len(choices)] if letter in words]
    if not named and "Z" in words:  # the letter by which its judge says "none of them"
        return None
    if len(named) != 1:
        named = [letter for letter, text in zip(LETTERS, choices, strict=False) if text.lower() in output.lower()]
    return named[0] if len(named) == 1 else None


# --------------------------------------------------------------------------------------------------------------------- MMStar


def mmstar_letter(output: str) -> str | None:
    """MMStar's own scorer, in any case: the first character, even of a word, or that after `(`, `option `, `the answer is `."""
    text = output.lower().strip().replace("\n", " ")
    start = next((start for start in ("(", "option ", "the answer is ") if text.startswith(start)), "")
    letter = text[len(start) : len(start) + 1].upper()
    return letter if letter and letter in LETTERS else None


# ------------------------------------------------------------------------------------------------------------------- Cambrian


def cambrian_text(output: str) -> str:
    """Cambrian-1's evaluation: the text after the last `answer is` or `answer:`, in lower case.

    A colon after `answer is` stays: `The answer is: B` becomes `: b`, whose first character is no letter.
    """
    return output.lower().split("answer is")[-1].split("answer:")[-1].strip()


def cambrian_letter(output: str) -> str | None:
    """Cambrian-1 on CV-Bench, SEED-Bench and AI2D: the first character after opening brackets, even of a word."""
    first = cambrian_text(output).lstrip("(")[:1].upper()
    return first if first and first in LETTERS else None


def cambrian_word(output: str) -> str | None:
    """Cambrian-1 on MMStar: the first word without `.:,` at its end; `(B)` is wrong."""
    words = output.upper().split()
    word = words[0].rstrip(".:,") if words else ""
    return word if len(word) == 1 and word in LETTERS else None


def choice_match(item: Item, output: str, protocol: Protocol, *, lmms: Callable[[str], str | None]) -> Match:
    """The letter as the protocol reads it; `lmms` is the reader of lmms-eval, which differs from benchmark to benchmark."""
    if protocol == "lmms_eval":
        return letter_match(item, lmms(output))
    if protocol == "vlmevalkit":
        return letter_match(item, vlmevalkit_letter(output, item.choices))
    if protocol == "cambrian":
        return letter_match(item, cambrian_letter(output))
    return letter_match(item, chosen_letter(output, len(item.choices)))
