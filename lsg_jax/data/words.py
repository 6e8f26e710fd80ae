"""Which tokens of a question belong to its content words, for methods that read the question word by word."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from lsg_jax.types import CONTENT, QUESTION

WORD = re.compile("\\w+(?:['\u2019]\\w+)*")

FUNCTION_WORDS = frozenset(
    WORD.findall("""
    a an the this that these those each every either neither both all some any no another such
    i you he she it we they me him her us them my your his its our their mine yours hers ours theirs
    myself yourself himself herself itself ourselves themselves who whom whose which what whatever something anything nothing
    someone anyone everyone nobody everything one's there
    is are was were be been being am do does did have has had having will would shall should can could may might must
    isn't aren't wasn't weren't don't doesn't didn't haven't hasn't hadn't won't wouldn't can't cannot couldn't shouldn't not
    it's that's there's what's who's i'm you're we're they're
    of in on at by for with about against between into through during before after above below to from up down out off over
    under near behind beside inside outside within without across along around toward towards onto upon per via as like than
    and or but nor so yet if because while although though unless until since whether when where why how then
    """)
)
"""English words of the closed classes: determiners, pronouns, prepositions, auxiliaries, conjunctions and particles."""


def word_kinds(text: str, question: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The kind of each token of a text.

    A content word is one that is not in `FUNCTION_WORDS`, so words of other languages all are. A token counts if it covers any
    part of the word.

    Args:
        question: where the question starts and ends in the text.
        offsets: where each token starts and ends.

    Returns:
        int8 [tokens], of 0, QUESTION and CONTENT.
    """
    start, stop = question
    content = np.zeros(len(text), bool)
    for word in WORD.finditer(text, start, stop):
        content[word.start() : word.end()] = word[0].lower().replace("\u2019", "'") not in FUNCTION_WORDS
    within = lambda first, last: min(last, stop) > max(first, start)
    kinds = [within(*span) * (CONTENT if content[slice(*span)].any() else QUESTION) for span in offsets]
    return np.array(kinds, np.int8)
