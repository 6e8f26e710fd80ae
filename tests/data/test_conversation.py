import json
from dataclasses import replace

import numpy as np
import pytest
from tokenizers_for_tests import byte_level_tokenizer, llama_tokenizer, model_config
from transformers import AutoTokenizer

from converters.byte_tokenizer import BOS, EOS, IMAGE, VOCAB_SIZE, write_byte_tokenizer
from lsg_jax.data.conversation import RecordError, Turn, examples, parse_record
from lsg_jax.data.processor import Processor
from lsg_jax.data.templates import TEMPLATES, render
from lsg_jax.data.tokenization import ChunkTokenizer
from lsg_jax.errors import ConfigError, InputError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte")
    write_byte_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def record(*values, image="a.png", **fields):
    """Turns of human, gpt, human, ...; `image=None` omits the field."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]
    return {"id": "r", "conversations": turns, **({} if image is None else {"image": image}), **fields}


def turn(role, value):
    return {"from": role, "value": value}


BAD = [
    ([], "not_a_record"),
    (record("<image>\nq", "a", id=1.5), "bad_id"),
    (record("<image>\nq", "a", id=True), "bad_id"),
    (record("<image>\nq", "a", image=3), "bad_image_field"),
    (record("<image>\nq", "a", image={"bytes": ""}), "bad_image_field"),
    (record("q", "a", image=["a.png", ""]), "bad_image_field"),
    (record("q", "a", image=["a.png", [""]]), "bad_image_field"),
    (record("<image>\nq", "a", image=["a.png", "b.png"]), "tags_and_images_differ"),
    (record("<image> and <image>", "a"), "tags_and_images_differ"),
    (record("<image>\nq", "a", "<image>\nq", "a"), "tags_and_images_differ"),
    (record("<image> <image>\nq", "a", "<image>\nq", "a", image=["a.png", "b.png"]), "tags_and_images_differ"),
    (record("<image>\nq", "a", image=None), "tag_without_image"),
    (record("<image>\nq", "a", image=""), "tag_without_image"),
    (record("<image>\nq", "a", image="nan"), "tag_without_image"),
    (record("<image>\nq", "a", image=float("nan")), "tag_without_image"),
    (record("<image>\nq", "see <image>"), "tag_in_answer"),
    (record(), "no_turns"),
    ({"id": "r"}, "no_turns"),
    (record(conversations="q"), "no_turns"),
    (record("<image>\nq", None), "bad_turn"),
    (record("q", "a\ud83d"), "bad_turn"),
    (record(conversations=["q", "a"]), "bad_turn"),
    (record(conversations=[turn("human", "q"), turn("tool", "a")]), "unknown_role"),
    (record(conversations=[turn("human", "q"), turn("human", "q"), turn("gpt", "a")]), "roles_not_alternating"),
    (record(conversations=[turn("human", "q"), turn("gpt", "a"), turn("gpt", "a")]), "roles_not_alternating"),
    (record(conversations=[turn("gpt", "x"), turn("gpt", "a"), turn("human", "q")]), "roles_not_alternating"),
    (record("<image>\nq", ""), "empty_answer"),
    (record("<image>\nq", " \n"), "empty_answer"),
    (record(" ", "a", image=None), "empty_question"),
    (record("<image>\nq"), "nothing_supervised"),
    (record(conversations=[turn("gpt", "hello")]), "nothing_supervised"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD, ids=[f"{i}-{r}" for i, (_, r) in enumerate(BAD)])
def test_bad_record_has_its_reason(bad, reason):
    with pytest.raises(RecordError) as caught:
        parse_record(bad)
    assert caught.value.reason == reason
    assert caught.value.exit_code == 65
    assert "\n" not in str(caught.value)


REPAIRED = [
    (record("q", "a"), "a.png", ["<image>\nq", "a"], ("image_without_tag",)),
    (record("q <image>", "a"), "a.png", ["<image>\nq", "a"], ()),
    (record("<image>", "a"), "a.png", ["<image>", "a"], ()),
    (record("", "a"), "a.png", ["<image>", "a"], ("image_without_tag",)),
    (record("q", "a", "q2\n<image>", "a2"), "a.png", ["q", "a", "<image>\nq2", "a2"], ()),
    (record("<image>\nq", "a", image=["a.png"]), "a.png", ["<image>\nq", "a"], ()),
    (record("q", "a", image=None), None, ["q", "a"], ()),
    (record("q", "a", image=" NaN "), None, ["q", "a"], ()),
    (record("q", "a", image=[]), None, ["q", "a"], ()),
    # several images: the only tag of a turn moves to its front, several stay
    (record("A <image>, then\n<image> ", "a", image=["a", "b"]), ["a", "b"], ["A <image>, then\n<image> ", "a"], ()),
    (record("q <image>", "a", "<image> r", "b", image=["a", "b"]), ["a", "b"], ["<image>\nq", "a", "<image>\nr", "b"], ()),
    (record(" q", "a", "r", "b", image=["a", "a"]), ["a", "a"], ["<image> <image>\nq", "a", "r", "b"], ("image_without_tag",)),
    (record("<image>\nq", "a", "q2"), "a.png", ["<image>\nq", "a"], ("unanswered_turn_dropped",)),
    (
        record(conversations=[turn("system", "be nice"), turn("human", "<image>\nq"), turn("gpt", "a")]),
        "a.png",
        ["<image>\nq", "a"],
        ("system_dropped",),
    ),
]


@pytest.mark.parametrize(("raw", "image", "texts", "notes"), REPAIRED)
def test_repaired_record_has_its_notes(raw, image, texts, notes):
    parsed = parse_record(raw)
    images = tuple(image) if isinstance(image, list) else (image,) if image else ()
    assert (parsed.images, [t.text for t in parsed.turns], parsed.notes) == (images, texts, notes)
    assert [t.role for t in parsed.turns] == ["human", "gpt"] * (len(texts) // 2)


def test_one_example_per_answer():
    turns = parse_record(record("<image>\nq", "a", "q2", "a2")).turns
    assert examples(turns) == [(turns[:1], "a"), (turns[:3], "a2")]


TURNS = (Turn("human", "<image>\nq {x}"), Turn("gpt", "a"), Turn("human", "q2"))


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("vicuna_v1", SYSTEM + " USER: <image>\nq {x} ASSISTANT: a</s>USER: q2 ASSISTANT:", " b</s>"),
        (
            "qwen2",
            "<|im_start|>user <image>\nq {x}<|im_end|><|im_start|>assistant\na<|im_end|><|im_start|>user \nq2<|im_end|>"
            "<|im_start|>assistant\n",
            "b<|im_end|>",
        ),
        (
            "phi3",
            "<|user|>\n<image>\nq {x}<|end|>\n<|assistant|>\na<|end|>\n<|user|>\nq2<|end|>\n<|assistant|>\n",
            "b<|end|>",
        ),
    ],
)
def test_templates_letter_by_letter(name, prompt, answer):
    assert render(TEMPLATES[name], TURNS, "b", eos="</s>") == (prompt, answer)


# ------------------------------------------------------------------------------------------------------------- tokenization


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("scheme", ["first", "always", "normalizer", "byte", "byte_level"])
def test_text_without_image_equals_whole_string(scheme, byte_tokenizer):
    tokenizer = {"byte": byte_tokenizer, "byte_level": byte_level_tokenizer()}.get(scheme) or llama_tokenizer(scheme)
    end = tokenizer.eos_token
    prompt, answer = f"{SYSTEM} USER: two  cubes ASSISTANT: red{end}USER: naïve\n\nball ASSISTANT:", f" It is\nred.{end}"
    ids, count = ChunkTokenizer(tokenizer).encode(prompt, answer, [])
    assert ids == tokenizer(prompt + answer).input_ids
    assert ids[:count] == tokenizer(prompt).input_ids
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("scheme", "equals_whole"), [("first", False), ("always", True), ("normalizer", True), ("byte", True)])
def test_chunks_around_an_image(scheme, equals_whole, byte_tokenizer):
    tokenizer = byte_tokenizer if scheme == "byte" else llama_tokenizer(scheme)
    ids, count = ChunkTokenizer(tokenizer).encode("USER: <image>\nball ASSISTANT:", " red</s>", [[IMAGE] * 5])
    before, after = plain(tokenizer, "USER: "), plain(tokenizer, "\nball ASSISTANT:")
    assert ids[:count] == [BOS, *before, *[IMAGE] * 5, *after]
    whole = tokenizer("USER: <image>\nball ASSISTANT: red</s>").input_ids
    at = whole.index(IMAGE)
    # only Metaspace "first" (legacy=False) loses the piece in front of the newline
    assert (whole[:at] + [IMAGE] * 5 + whole[at + 1 :] == ids) is equals_whole
    if scheme != "byte":
        assert tokenizer.convert_ids_to_tokens(after[:2]) == ["▁", "\n"]


@pytest.mark.parametrize("scheme", ["first", "always", "normalizer", "byte"])
@pytest.mark.parametrize("literal", ["</s>", "<s>", "<image>"])
def test_special_token_in_text_stays_text(scheme, literal, byte_tokenizer):
    tokenizer = byte_tokenizer if scheme == "byte" else llama_tokenizer(scheme)
    processor = Processor(tokenizer, model_config())
    turns = [Turn("human", f"<image>\nwhat is {literal} for?"), Turn("gpt", f"{literal} ends"), Turn("human", f"say {literal}")]
    encoded = processor.encode(turns, f"so {literal}")
    ids = encoded.ids.tolist()
    assert [i for i in ids if i in (BOS, EOS, IMAGE)] == [BOS, *[IMAGE] * 4, EOS, EOS]
    assert encoded.labels is not None and encoded.labels[-1] == EOS
    assert tokenizer.decode(ids[encoded.num_prompt : -1]).strip() == f"so {literal}"


def test_user_text_cannot_forge_a_control_token(byte_tokenizer):
    processor = Processor(byte_tokenizer, model_config())
    with pytest.raises(RecordError) as caught:
        processor.encode_question("\ue000lsg:c2\ue001")
    assert caught.value.reason == "reserved_text"
    assert EOS not in processor.encode_question("\ue000 other private characters \ue001 are fine").ids.tolist()


def test_flags_of_control_tokens_are_kept():
    """Phi-3's markers strip the newline after them (rstrip); their stand-ins must do the same."""
    tokenizer = byte_level_tokenizer(("<|user|>", "<|assistant|>", "<|end|>"), rstrip=True)
    text, _ = render(TEMPLATES["phi3"], [Turn("human", "ball")], None, eos="<|end|>")
    ids, _ = ChunkTokenizer(tokenizer).encode(text, None, [])
    assert ids == plain(tokenizer, text)
    assert plain(tokenizer, "\n")[0] not in ids


def test_bos_once_though_the_template_writes_it(byte_tokenizer):
    prompt = Processor(byte_tokenizer, model_config()).encode_question("q", image_sizes=()).ids.tolist()
    ids, _ = ChunkTokenizer(byte_tokenizer).encode(byte_tokenizer.decode(prompt), None, [])
    assert ids == prompt and ids.count(BOS) == 1
    ids, _ = ChunkTokenizer(byte_tokenizer).encode("<s><image>\nq", None, [[IMAGE]])
    assert ids[:3] == [BOS, IMAGE, *plain(byte_tokenizer, "\n")]
    without = ChunkTokenizer(byte_tokenizer, bos=False)
    assert without.encode("<s><image>\nq", None, [[IMAGE]])[0] == [IMAGE, *ids[2:]]
    assert Processor(byte_tokenizer, model_config(), bos=False).encode_question("q", image_sizes=()).ids.tolist() == prompt[1:]


def test_prompt_ids_do_not_depend_on_the_answer():
    """A merge across prompt and answer ("is" is a trained merge) must not change the prompt's tokens."""
    tokenizer = byte_level_tokenizer()
    assert len(plain(tokenizer, "is")) < len(plain(tokenizer, "i")) + len(plain(tokenizer, "s"))
    ids, count = ChunkTokenizer(tokenizer).encode("ball i", "s red", [])
    assert ids[:count] == plain(tokenizer, "ball i")
    assert tokenizer.decode(ids[count:]) == "s red"


def test_byte_tokenizer_round_trips(byte_tokenizer):
    text = "naïve\n  ball 🔴 </s"
    ids = byte_tokenizer(text).input_ids
    assert len(byte_tokenizer) == VOCAB_SIZE
    assert len(ids) == 1 + len(text.encode())
    assert byte_tokenizer.decode(ids, skip_special_tokens=True) == text
    assert byte_tokenizer("<pad><s></s><image>").input_ids == [1, 0, 1, 2, 3]


# ---------------------------------------------------------------------------------------------------------- chat templates

LLAVA_CHAT = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ONEVISION_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ '\n' + c['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRING_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("source", "prompt", "answer"),
    [
        (LLAVA_CHAT, "USER: <image>\nq ASSISTANT:", " red<|im_end|>"),
        (ONEVISION_CHAT, "<|im_start|>user <image>\nq<|im_end|><|im_start|>assistant\n", "red<|im_end|>"),
        (STRING_CHAT, "<|im_start|>user\n<image>\nq<|im_end|>\n<|im_start|>assistant\n", "red<|im_end|>"),
    ],
    ids=["llava", "onevision", "string"],
)
def test_checkpoint_template_decides(source, prompt, answer):
    tokenizer = byte_level_tokenizer()
    image = tokenizer.convert_tokens_to_ids("<image>")
    tokenizer.chat_template = source
    processor = Processor(tokenizer, model_config(image_token_id=image))
    assert processor.template == "chat_template"
    encoded = processor.encode([Turn("human", "<image>\nq")], "red")
    text = tokenizer.decode(encoded.ids[: encoded.num_prompt]).replace("<image>" * 4, "<image>")
    assert (text, tokenizer.decode(encoded.ids[encoded.num_prompt :])) == (prompt, answer)
    assert processor.encode_question("q").ids.tolist() == encoded.ids[: encoded.num_prompt].tolist()


@pytest.mark.parametrize("source", ["{{ raise_exception('no') }}", "constant", "{{ messages[0]['content'] }}"])
def test_unusable_chat_template_is_refused(source):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = source
    with pytest.raises(ConfigError, match="chat template cannot be used"):
        Processor(tokenizer, model_config())


def test_template_choice(byte_tokenizer):
    assert Processor(byte_tokenizer, model_config()).template == "vicuna_v1"
    assert Processor(byte_tokenizer, model_config(family="qwen2")).template == "vicuna_v1"  # lacks the markers
    assert Processor(byte_level_tokenizer(), model_config(family="qwen2")).template == "qwen2"
    for name, message in [
        ("qwen2", "lacks <|im_start|>"),
        ("chat_template", "no chat template"),
        ("alpaca", "unknown template"),
    ]:
        with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
            Processor(byte_tokenizer, model_config(), template=name)


# ------------------------------------------------------------------------------------------------------- encode and collate


def test_truncation_is_after_the_image(byte_tokenizer):
    processor = Processor(byte_tokenizer, model_config())
    turns = [Turn("human", "<image>\nq")]
    whole = processor.encode(turns, "red ball")
    n = whole.num_prompt
    cut = processor.encode(turns, "red ball", max_length=n + 3)
    assert cut.ids.tolist() == whole.ids[: n + 3].tolist() and cut.cut == len(whole.ids) - n - 3
    assert processor.encode(turns, "red ball", max_answer_tokens=2).ids.tolist() == whole.ids[: n + 2].tolist()
    first_image = whole.ids.tolist().index(IMAGE)
    for length, answer, reason in [
        (n, "a", "nothing_supervised"),
        (first_image + 3, "a", "image_truncated"),
        (n - 1, None, "prompt_too_long"),
    ]:
        with pytest.raises(RecordError) as caught:
            processor.encode(turns, answer, max_length=length)
        assert caught.value.reason == reason


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_slots_predict_the_answer(byte_tokenizer, side):
    processor = Processor(byte_tokenizer, model_config())
    rows = [processor.encode([Turn("human", "<image>\nq")], "red"), processor.encode([Turn("human", "longer question")], "a")]
    image = np.full((1, 28, 28, 3), 7, np.uint8)
    batch = processor.collate(rows, [image, None], max_length=260, max_answer_tokens=8, padding_side=side, row_ids=[5, 6])
    assert batch.input_ids.shape == (2, 260) and batch.input_ids.dtype == np.int32 and batch.attention_mask.dtype == bool
    for b, encoded in enumerate(rows):
        assert batch.input_ids[b][batch.attention_mask[b]].tolist() == encoded.ids.tolist()
        assert set(batch.input_ids[b][~batch.attention_mask[b]]) == {0}
        answer = encoded.ids[encoded.num_prompt :]
        used = batch.answer_target[b] != -100
        assert batch.answer_target[b][used].tolist() == answer.tolist()
        assert batch.input_ids[b][batch.answer_index[b][used] + 1].tolist() == answer.tolist()
        assert batch.gate_position[b] == batch.answer_index[b][0]
        assert not batch.answer_index[b][~used].any()
        assert batch.attention_mask[b][: batch.gate_position[b] + 1].sum() == encoded.num_prompt
    patches = batch.images.patches
    assert patches.dtype == np.uint8 and patches[0].min() == 7 and patches[1].max() == 0
    assert batch.row_id.tolist() == [5, 6]


def test_image_tokens_must_equal_features(byte_tokenizer):
    processor = Processor(byte_tokenizer, model_config())
    encoded = processor.encode([Turn("human", "<image>\nq")], "red")
    fewer = replace(encoded, ids=np.delete(encoded.ids, encoded.ids.tolist().index(IMAGE)), num_prompt=encoded.num_prompt - 1)
    limits = {"max_length": 300, "max_answer_tokens": 8}
    with pytest.raises(InputError, match="3 image tokens in a prompt whose images have 4"):
        processor.collate([fewer], [processor.blank], **limits)
    with pytest.raises(InputError, match="no image was given"):
        processor.collate([encoded], [None], **limits)
    with pytest.raises(InputError, match="exceeds"):
        processor.collate([encoded], [processor.blank], max_length=10, max_answer_tokens=8)


def test_decode_stops_at_eos(byte_tokenizer):
    processor = Processor(byte_tokenizer, model_config())
    assert processor.decode([*plain(byte_tokenizer, "  red ball \n"), EOS, *plain(byte_tokenizer, "junk")]) == "red ball"


def test_from_folder(tmp_path):
    write_byte_tokenizer(tmp_path / "m")
    assert Processor.from_folder(tmp_path / "m", model_config()).encode_question("q").ids[0] == BOS
    (tmp_path / "m/chat_template.json").write_text(json.dumps({"chat_template": LLAVA_CHAT}))
    assert Processor.from_folder(tmp_path / "m", model_config(), image_aspect="squash").template == "chat_template"
    with pytest.raises(InputError, match="no such model folder"):
        Processor.from_folder(tmp_path / "absent", model_config())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no usable tokenizer"):
        Processor.from_folder(tmp_path / "empty", model_config())
