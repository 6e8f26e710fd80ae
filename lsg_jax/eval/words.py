"""Words of captions by rule: tokens, and the singular of a word among those that are looked for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "mice": "mouse", "geese": "goose", "oxen": "ox",
    "feet": "foot", "teeth": "tooth", "dice": "die", "cacti": "cactus",
}  # fmt: skip
_ENDINGS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))
_TOKEN = re.compile(r"[^\W_]+(?:[-./][^\W_]+)*|'[^\W_]+|[^\w\s]")


def tokens(text: str) -> list[str]:
    """Words and punctuation marks in order, as nltk separates them: `dog's` is two words, `t-shirt` and `cat/dog` are one."""
    return _TOKEN.findall(text)


def singular(word: str, known: Collection[str]) -> str:
    """The word of `known` whose plural `word` is; `word` itself if it is known, or is the plural of none of them.

    Only known words have to be told apart, so that plain endings suffice: `vases` is `vase` where that is known, not `vas`.
    """
    return next((form for form in (word, *_singulars(word)) if form in known), word)


def _singulars(word: str) -> Iterator[str]:
    if word in _IRREGULAR:
        yield _IRREGULAR[word]
    yield from (stem + "man" for stem in [word.removesuffix("men")] if stem != word)  # policemen
    yield from (word.removesuffix(plural) + end for plural, end in _ENDINGS if word.endswith(plural))
