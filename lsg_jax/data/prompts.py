"""Prompts of benchmark questions in the format that LLaVA-1.5 was trained on. Training data and evaluation share them."""

from __future__ import annotations

import string
from collections.abc import Sequence

LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
WORD_SUFFIX = "\nAnswer the question using a single word or phrase."


def multiple_choice_prompt(question: str, choices: Sequence[str]) -> str:
    """The question, a line `A. choice` for each of at most 26 choices, and the letter suffix."""
    return question_with_options(question, choices) + LETTER_SUFFIX


def question_with_options(question: str, choices: Sequence[str]) -> str:
    """`multiple_choice_prompt` without its suffix."""
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False))
    return question + options
