"""Matchers of short answers shared by several benchmarks, equal to the code that published scores were computed with.

Quirks of that code are kept and documented: scores are comparable only if outputs are read in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lsg_jax.errors import InputError

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
} | {"none": "0"}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# spelling without one of the apostrophes -> correct spelling; `somebody'd` is reversed, as in the VQA evaluation
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def yes_or_no(answer: object, where: str) -> str:
    """The correct answer of a yes/no question in lower case. Raises InputError, which starts with `where`, for any other."""
    text = str(answer).strip().lower().removesuffix(".")
    if text not in ("yes", "no"):
        raise InputError(f"{where}: answer {repr(answer)[:80]} is neither yes nor no")
    return text


def yes_or_no_word(output: str) -> str | None:
    """`yes` or `no` if exactly one of them is a word of the output (VLMEvalKit's `YOrN_Extraction`); else None."""
    words = strip_punctuation(output.lower()).split()
    found = [word for word in ("yes", "no") if word in words]
    return found[0] if len(found) == 1 else None


def strip_punctuation(text: str) -> str:
    """Removes punctuation as the VQA evaluation does.

    A mark that is next to a space anywhere in the text is deleted; every mark is deleted if the text has a comma between digits
    (1,000); otherwise it becomes a space. The first 32 periods that no digit follows are deleted: the original passes
    `re.UNICODE`, which is 32, as the count.
    """
    deletes_all = re.search(r"\d,\d", text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if deletes_all or beside_space else " ")
    return re.sub(r"\.(?!\d)", "", stripped, count=32)


def vqa_answer(text: str) -> str:
    """The normal form in which VLMEvalKit compares answers: punctuation, number words, articles, contractions."""
    text = strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def m4c_answer(text: str) -> str:
    """The normal form in which LLaVA, Cambrian and lmms-eval compare answers (their M4C evaluator).

    Commas and question marks are deleted first, so 1,000 becomes 1000, and a possessive 's becomes a separate word.
    """
    return vqa_answer(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def soft_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """VQA accuracy: for every annotator min(1, number of others who gave this answer / 3), averaged over annotators.

    With ten annotators it is 0, 0.3, 0.6, 0.9 and 1 for an answer that 0, 1, 2, 3 and 4 or more of them gave. Both sides must
    have the same normal form.
    """
    same = sum(answer == other for other in annotators)
    others = len(annotators) - same
    return (same * min(1.0, (same - 1) / 3) + others * min(1.0, same / 3)) / len(annotators)


def relaxed_match(output: str, target: str) -> bool:
    """ChartQA's relaxed accuracy: within 5 % of the target if both are numbers, else equal up to case.

    `10%` is 0.1; digits grouped by commas are text. A target of 0 is compared as text, since 5 % of it is 0.
    """
    found, wanted = _number(output), _number(target)
    if found is not None and wanted:
        return abs(found - wanted) / abs(wanted) <= 0.05
    return output.lower() == target.lower()


def cambrian_relaxed_match(output: str, target: str) -> bool:
    """Cambrian's relaxed accuracy on ChartQA and MathVista: `10%` is text, and a target of 0 is a number."""
    try:
        found, wanted = float(output), float(target)
    except ValueError:
        return output == target
    return abs(found - wanted) <= abs(wanted) * 0.05


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None
