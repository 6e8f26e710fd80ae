"""Tokens of a question and of its content words, under the tokenizers and templates of the families."""

import numpy as np
import pytest
from tokenizers_for_tests import byte_level_tokenizer, llama_tokenizer, model_config

from lsg_jax.data.conversation import RecordError, Turn
from lsg_jax.data.text_processor import TextProcessor
from lsg_jax.data.words import word_kinds
from lsg_jax.types import CONTENT, QUESTION

SQUARE = (28, 28)


def test_kinds_by_hand():
    """Each character is a token: words of closed classes, a contraction, a number, a word of another language."""
    text = "Is: Don't the 3 cats' Übergröße?:"
    kinds = word_kinds(text, (4, len(text) - 1), [(i, i + 1) for i in range(len(text))])
    assert "".join(c for c, kind in zip(text, kinds, strict=True) if kind) == "Don't the 3 cats' Übergröße?"
    assert "".join(c for c, kind in zip(text, kinds, strict=True) if kind == CONTENT) == "3catsÜbergröße"


def test_a_token_counts_for_any_part_of_a_word():
    kinds = word_kinds("USER: a cat sits\nEND", (6, 16), [(0, 6), (6, 8), (8, 11), (11, 14), (14, 20), (20, 20)])
    np.testing.assert_array_equal(kinds, [0, QUESTION, CONTENT, CONTENT, CONTENT, 0])


@pytest.mark.parametrize(
    "tokenizer, template",
    [
        (lambda: llama_tokenizer("first"), "vicuna_v1"),
        (lambda: llama_tokenizer("always"), "vicuna_v1"),
        (lambda: llama_tokenizer("normalizer"), "vicuna_v1"),
        (byte_level_tokenizer, "qwen_1_5"),
    ],
    ids=["first", "always", "normalizer", "byte level"],
)
@pytest.mark.parametrize(
    "question, images, asked, content",
    [
        ("Is the large cat of 2 dogs red?", 1, "Is the large cat of 2 dogs red?", "large cat 2 dogs red"),
        ("USER: is it </s> blue? ", 1, "USER: is it </s> blue?", "USER s blue"),
        ("Compare <image> with <image> and say more.", 2, "and say more.", "say more"),
        ("A", 1, "A", ""),  # as in ASSISTANT
        ("c", 1, "c", "c"),  # as in the stand-ins of control tokens
        ("How does it end: <image>", 1, "How does it end:", "end"),  # a single image goes to the front
        ("<image> to <image>", 2, "", ""),
    ],
)
def test_words_through_template_and_tokenizer(tokenizer, template, question, images, asked, content):
    processor = TextProcessor(tokenizer(), model_config(), template=template, words=True)
    encoded = processor.encode_question(question, image_sizes=(SQUARE,) * images)
    kinds = np.zeros(len(encoded.ids), int)
    kinds[encoded.num_prompt - len(encoded.words) : encoded.num_prompt] = encoded.words
    plain = TextProcessor(tokenizer(), model_config(), template=template).encode_question(
        question, image_sizes=(SQUARE,) * images
    )
    np.testing.assert_array_equal(encoded.ids, plain.ids)
    assert plain.words is None
    text = lambda chosen: processor.tokenizer.decode(encoded.ids[chosen], skip_special_tokens=False)
    squeezed = lambda text: text.replace(" ", "").strip()
    assert squeezed(text(kinds >= QUESTION)) == squeezed(asked)
    assert squeezed(text(kinds == CONTENT)) == squeezed(content)


def test_a_template_that_changes_the_question_is_refused():
    chat = "{% for m in messages %}{{ m['content'] | replace('colour', 'color') }}{% endfor %}"
    processor = TextProcessor(byte_level_tokenizer(), model_config(), chat_template=chat, words=True)
    with pytest.raises(RecordError, match="the template writes the question differently"):
        processor.encode([Turn("human", "which colour?")], None, image_sizes=())
