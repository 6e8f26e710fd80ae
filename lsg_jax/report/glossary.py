"""The words of this field, in one place: the report explains them where they stand, and docs/glossary.md lists them."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

TERMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "attention sink": (
        "A token that draws much attention though it carries little information that is its own. Attention weights must sum "
        "to 1, so attention that has nothing to look at goes there.",
        ("attention sinks",),
    ),
    "V-sink": (
        "A visual token that is a sink already where the vision tower ends. V-sinks are decided before the projector, once an "
        "image, and stay the same in all layers. They carry the scene as a whole.",
        ("V-sinks",),
    ),
    "L-sink": (
        "A visual token that becomes a sink inside the language model. L-sinks are decided anew at each decoder layer, among "
        "the visual tokens that are no V-sinks.",
        ("L-sinks",),
    ),
    "criterion": (
        "The rule that says which token is a sink. dim_abs: a sink dimension is large. dim_rms: it is large beside the token's "
        "other dimensions. norm: the whole vector is long. massive: a value is large, also beside the layer's median. "
        "attention_share: the token gets a large share of the attention.",
        ("criteria",),
    ),
    "tau": (
        "The threshold of a criterion: a token that reaches it is a sink. vit_tau is that of V-sinks, llm_tau that of L-sinks. "
        "It depends on the model; lsg calibrate proposes one from images.",
        ("vit_tau", "llm_tau", "threshold"),
    ),
    "map without sinks": (
        "The attention on visual tokens that are no sinks, as shares of its sum. Beside the map of all attention it shows what "
        "the sinks hide.",
        ("without sinks", "no_sinks"),
    ),
    "gate ratio": (
        "What a gate multiplies the keys of a token group by, in one layer and for one question. The ratios of all groups "
        "sum to 1 before key_scale. A small ratio of V-sinks turns attention away from them.",
        ("gate ratios",),
    ),
    "key_scale": (
        "A number that multiplies all gate ratios. An untrained gate of two groups gives 0.5 to both; with key_scale 2 it "
        "changes nothing.",
        (),
    ),
    "v_sink_rest": (
        "A grouping of visual tokens into two: V-sinks, and the rest, which is L-sinks and ordinary tokens together. A gate "
        "with this grouping has two ratios.",
        (),
    ),
    "oracle map": (
        "The best and the worst change that fixed coefficients reach in each layer on each task. The best are chosen on the "
        "same questions, so it is an upper bound and no estimate.",
        ("upper bound", "oracle sweep"),
    ),
    "majority answer": (
        "The score of always giving the most frequent answer. A model that does not beat it has learnt nothing.",
        (),
    ),
    "interval at 95 %": (
        "Where a score would fall in 95 of 100 repetitions with other questions of the same kind, by resampling the questions "
        "asked; Wilson's interval where all answers are right or all are wrong. A change whose interval covers 0 may be "
        "chance.",
        ("interval", "intervals at 95 %"),
    ),
    "remat": (
        "What training keeps of the forward pass for the backward pass. full keeps the input of each layer and computes the "
        "rest again: little memory, more time. none keeps everything. The results are the same.",
        (),
    ),
}
"""Term -> what it means, and other forms under which texts use it."""

_TERM_OF = {form.lower(): term for term, (_, forms) in TERMS.items() for form in (term, *forms)}
_FORM = re.compile(
    r"`([^`\n]+)`|(?<![\w-])(" + "|".join(map(re.escape, sorted(_TERM_OF, key=len, reverse=True))) + r")(?![\w-])",
    re.IGNORECASE,
)


def id_of(term: str) -> str:
    """The id of a term's explanation in a page."""
    return "term-" + re.sub(r"\W+", "-", term).strip("-").lower()


def explained(text: str) -> Markup:
    """Text as HTML: what is between backticks becomes code.

    The first use of each term is a button that opens its explanation, by mouse, touch and keyboard.
    """
    seen: set[str] = set()

    def element(match: re.Match[str]) -> str:
        if match[1]:
            return f"<code>{match[1]}</code>"
        term = _TERM_OF[match[0].lower()]
        if term in seen:
            return match[0]
        seen.add(term)
        return f'<button type="button" class="term" popovertarget="{id_of(term)}">{match[0]}</button>'

    return Markup(_FORM.sub(element, str(escape(text))))


def as_markdown() -> str:
    """The content of docs/glossary.md."""
    lines = [f"**{term}**: {text}\n" for term, (text, _) in sorted(TERMS.items(), key=lambda item: item[0].lower())]
    return "# Glossary\n\nThe report explains the same words where they stand.\n\n" + "\n".join(lines)


if __name__ == "__main__":
    print(as_markdown(), end="")
