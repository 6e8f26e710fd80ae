"""Text that is sent while an answer is generated: its pieces are the whole text, and a stop string is never in it."""

import numpy as np
import pytest

from lsg_jax.checkpoint import read_manifest
from lsg_jax.data.processor import Processor
from lsg_jax.serve.answer_text import AnswerText
from lsg_jax.serve.batching import padded_length, row_counts, rows_for


@pytest.fixture(scope="module")
def processor(tiny_model):
    return Processor.from_folder(tiny_model / "hf", read_manifest(tiny_model).config)


class Bytes:
    """A tokenizer in which every byte is a token, as SentencePiece falls back to bytes: a broken run of them is all broken."""

    def decode(self, ids, **_):
        data = bytes(i - 3 for i in ids)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(data)

    def convert_ids_to_tokens(self, index):
        return f"<0x{index - 3:02X}>" if index - 3 > 127 else chr(index - 3)


def pieces_of(processor, tokens, size, stop=(), limit=1000):
    answer = AnswerText(processor, stop, limit)
    pieces = []
    for start in range(0, len(tokens), size):
        pieces.append(answer.add(tokens[start : start + size]))
        if answer.finish:
            break
    return answer, pieces


@pytest.mark.parametrize("size", [1, 3, 8])
def test_pieces_are_the_whole_text(processor, size):
    rng, (end, *_) = np.random.default_rng(0), processor.model.eos_token_ids
    for _ in range(40):
        tokens = [int(token) for token in rng.integers(3, processor.model.text.vocab_size, 60) if token != end]
        for ended in ([*tokens, end, 5], tokens):
            answer, pieces = pieces_of(processor, ended, size, limit=len(tokens) + 5 if ended != tokens else len(tokens))
            assert "".join(pieces) == processor.decode(ended)
            assert answer.finish == ("length" if ended == tokens else "stop")
            assert answer.tokens == ended[: len(tokens) + (ended != tokens)]


def test_characters_of_several_bytes(processor, monkeypatch):
    monkeypatch.setattr(processor, "tokenizer", Bytes())
    tokens = [byte + 3 for byte in "  né 你好 😀 x\n".encode()]
    answer, pieces = pieces_of(processor, tokens, 1, limit=len(tokens))
    assert "".join(pieces) == "né 你好 😀 x" and "\ufffd" not in "".join(pieces)
    assert sum(map(bool, pieces)) > 4 and answer.finish == "length"


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_stop_strings(processor, monkeypatch, size):
    monkeypatch.setattr(processor, "tokenizer", Bytes())
    tokens = [byte + 3 for byte in b" one two, three. four"]
    for stop, text, count in (
        (["three"], "one two,", 15), ([", thx", "four"], "one two, three.", 21), (["tw", "o t"], "one", 7), ([" "], "", 1),
        (["five"], "one two, three. four", 21), ([". f", "."], "one two, three", 16),
    ):  # fmt: skip
        answer, pieces = pieces_of(processor, tokens, size, stop, limit=len(tokens))
        assert ("".join(pieces), len(answer.tokens)) == (text, count), stop
        assert answer.finish == ("length" if stop == ["five"] else "stop")


def test_few_shapes():
    lengths = {padded_length(tokens) for tokens in range(1, 4097)}
    assert lengths == {*range(64, 513, 64), *range(640, 1025, 128), *range(1280, 2049, 256), *range(2560, 4097, 512)}
    assert all(tokens <= padded_length(tokens) < 1.25 * tokens + 64 for tokens in range(1, 4097))
    assert [row_counts(most) for most in (1, 3, 4, 8, 16)] == [[1], [1, 2, 3], [1, 2, 4], [1, 2, 4, 8], [1, 2, 4, 8, 16]]
    assert [rows_for(n, 8) for n in (1, 2, 4, 5, 8)] == [1, 2, 4, 8, 8] and rows_for(3, 8, of=8) == 8
