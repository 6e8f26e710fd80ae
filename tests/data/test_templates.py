"""Which chat template and which image token make prompts, compared with transformers' processor."""

import datetime
import json
from typing import get_args

import pytest
from tokenizers_for_tests import byte_level_tokenizer, model_config
from transformers import CLIPImageProcessorPil, LlavaProcessor
from transformers.utils import chat_template_utils

from lsg_jax.config import Template
from lsg_jax.data.conversation import RecordError, Turn
from lsg_jax.data.processor import CHAT_TEMPLATE, Processor
from lsg_jax.data.processor_files import open_tokenizer, read_image_token
from lsg_jax.data.templates import DATE, TEMPLATES, ChatTemplate, with_fixed_date
from lsg_jax.errors import ConfigError, InputError


def chat(name, image="<image>"):
    """A template that writes its own name, and content in parts."""
    return (
        f"{name}:{{% for m in messages %}}{{{{ m['role'] }}}} "
        f"{{% for c in m['content'] %}}{{% if c['type'] == 'image' %}}{image}\n{{% else %}}{{{{ c['text'] }}}}{{% endif %}}"
        "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a folder with tokenizer, image processor and the given files: text, or an object that becomes JSON.

    A setting of the tokenizer that is None is left out.
    """

    def write(files=None, image="<image>", **tokenizer_settings):
        byte_level_tokenizer(image=image).save_pretrained(tmp_path)
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | tokenizer_settings
        settings = {name: value for name, value in settings.items() if value is not None}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        pixels = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"} | pixels))
        for name, content in (files or {}).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return write


def prompt(processor, text="q", **arguments):
    """The text of a prompt, with one image token for each image."""
    encoded = processor.encode_question(text, **arguments)
    image = processor.tokenizer.convert_ids_to_tokens(processor.model.image_token_id)
    return processor.tokenizer.decode(encoded.ids).replace(image * 4, image)


def message(*parts):
    return [{"role": "user", "content": [*parts]}]


IMAGE_PART = {"type": "image"}
TEXT_PART = {"type": "text", "text": "q"}
NAMED = [{"name": name, "template": chat(name)} for name in ("rag", "default", "tool_use")]
SOURCES = {
    "json": {"chat_template.json": {"chat_template": chat("json")}},
    "jinja": {"chat_template.jinja": chat("jinja")},
    "processor": {"processor_config.json": {"processor_class": "LlavaProcessor", "chat_template": chat("processor")}},
    "others": {"additional_chat_templates/tool_use.jinja": chat("tool_use")},
}


@pytest.mark.parametrize("files", ["json", "jinja", "processor", "json jinja", "json jinja processor", "jinja others"])
def test_prompts_are_those_of_the_processor_not_of_the_tokenizer(checkpoint, files):
    """Where a folder holds several templates, `LlavaProcessor` decides; the tokenizer has another one."""
    contents = {name: text for kind in files.split() for name, text in SOURCES[kind].items()}
    folder = checkpoint(contents, chat_template=chat("tokenizer"))
    theirs = LlavaProcessor.from_pretrained(folder).apply_chat_template(
        message(IMAGE_PART, TEXT_PART), add_generation_prompt=True
    )
    assert prompt(Processor.from_folder(folder, model_config())) == theirs
    assert not theirs.startswith("tokenizer")


DICT = {item["name"]: item["template"] for item in NAMED}


@pytest.mark.parametrize(
    ("where", "stated"),
    [("tokenizer", NAMED), ("chat_template.json", NAMED), ("chat_template.json", DICT), ("processor_config.json", DICT)],
)
def test_of_named_templates_the_default_is_taken(checkpoint, where, stated):
    if where == "tokenizer":
        folder = checkpoint(chat_template=stated)
    else:
        folder = checkpoint({where: {"chat_template": stated}}, chat_template=chat("tokenizer"))
    assert prompt(Processor.from_folder(folder, model_config())).startswith("default:user <image>\nq")


def test_named_templates_without_a_default_are_refused_by_name(checkpoint):
    folder = checkpoint(SOURCES["others"] | {"additional_chat_templates/rag.jinja": chat("rag")})
    with pytest.raises(ConfigError, match=r"chat templates are rag, tool_use; none is named default") as caught:
        Processor.from_folder(folder, model_config())
    assert "\n" not in str(caught.value)
    assert Processor.from_folder(folder, model_config(), template="vicuna_v1").template == "vicuna_v1"


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"chat_template.json": "{"}, "not valid JSON"),
        ({"chat_template.json": [1]}, "expected a JSON object"),
        ({"chat_template.json": {"template": "x"}}, "no chat template in it"),
        ({"chat_template.json": {"chat_template": 3}}, "neither text nor a list of named templates"),
        ({"chat_template.json": {"chat_template": [{"name": "default"}]}}, "neither text nor a list of named templates"),
        ({"chat_template.json": {"chat_template": {"default": 3}}}, "something other than text"),
        ({"processor_config.json": {"image_token": 3}}, "image_token is not text"),
    ],
)
def test_damaged_files_are_named(checkpoint, files, problem):
    (name,) = files
    with pytest.raises(InputError, match=rf"{name}: .*{problem}") as caught:
        Processor.from_folder(checkpoint(files), model_config())
    assert "\n" not in str(caught.value)


def test_every_template_can_be_named_in_a_configuration():
    assert set(get_args(Template)) == {*TEMPLATES, CHAT_TEMPLATE}


# --------------------------------------------------------------------------------------------------------- what templates use

LLAMA_3_1 = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}Today Date: {{ date_string }}\n"
)
LOOP = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        LLAMA_3_1 + LOOP,
        "{%- set today = strftime_now('%Y-%m-%d %H:%M:%S') -%}\n {{- today }} of {{ strftime_now('%A %B %-d, %y') }} " + LOOP,
        "\n\n  {% macro day(f) %}{{ strftime_now(f) }}{% endmacro %}\n{{ day('%a %e %-I %p %j %c %x') }}" + LOOP,
        "{{ strftime_now('%F %D %T %R %h %G-W%V-%u %%') }}{{ strftime_now('%%d 5%%%d%% %%%%Y') }}" + LOOP,
    ],
)
def test_the_date_in_a_template_is_the_same_on_any_day(monkeypatch, source):
    """Equal to what transformers renders on that day, in all else too."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return DATE

    tokenizer = byte_level_tokenizer()
    template = ChatTemplate(tokenizer, source)
    rendered, _ = template.render([Turn("human", "<image>\nq")], None)
    messages = [{"role": "user", "content": "<image>\nq"}]
    today = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    then = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert rendered == then != today


def test_a_source_without_a_date_is_left_alone():
    assert with_fixed_date(LOOP) is LOOP


def test_templates_use_what_the_renderer_of_transformers_offers():
    source = (
        "{% for m in messages %}{% if m['content'] == 'no' %}{{ raise_exception('refused: ' + m['content']) }}{% endif %}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ [m['content']] | tojson }}{% endif %}{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(byte_level_tokenizer(), source)
    turns = [Turn("human", '<image>\n"é"'), Turn("gpt", "a")]
    assert template.render(turns, None)[0] == '["<image>\\n\\"é\\""]a<|im_end|>'
    with pytest.raises(RecordError, match="the chat template fails: TemplateError: refused: no") as caught:
        template.render([*turns, Turn("human", "no")], None)
    assert caught.value.reason == "chat_template_failed"


# -------------------------------------------------------------------------------------------------------------- image tokens


@pytest.mark.parametrize("stated_in", ["tokenizer", "processor_config.json"])
@pytest.mark.parametrize("image", ["<|image|>", "<image_placeholder>", "<image>"])
def test_the_image_token_is_that_of_the_processor(checkpoint, image, stated_in):
    """Ids equal those of `LlavaProcessor`, whatever id config.json states; the user's `<|image|>` and `<image>` are text."""
    files = {"chat_template.json": {"chat_template": chat("x", image)}}
    settings = {"image_token": image} if stated_in == "tokenizer" else {"extra_special_tokens": None, "image_token": None}
    if stated_in != "tokenizer":
        files |= {"processor_config.json": {"processor_class": "LlavaProcessor", "image_token": image}}
    folder = checkpoint(files, image, **settings)
    hf = LlavaProcessor.from_pretrained(
        folder, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    assert hf.image_token == image
    assert hasattr(hf.tokenizer, "image_token") is (stated_in == "tokenizer")
    processor = Processor.from_folder(folder, model_config(image_token_id=299))
    text = hf.apply_chat_template(message(IMAGE_PART, TEXT_PART), add_generation_prompt=True)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    hf.image_processor = pixels
    theirs = hf(images=processor.blank[0], text=text, return_tensors="np")["input_ids"][0]
    assert processor.encode_question("q").ids.tolist() == theirs.tolist()
    assert processor.model.image_token_id == hf.image_token_id
    literal = processor.encode_question(f"what is {image} or <|image|>?")
    assert (literal.ids == hf.image_token_id).sum() == 4


@pytest.mark.parametrize(("stated", "found"), [("<|image|>", "<|image|>"), ("<|im_end|>", "<image>"), ("a", "<image>")])
def test_without_a_processors_image_token_the_id_of_config_json_names_it(checkpoint, stated, found):
    """Unless it is the token of something else."""
    folder = checkpoint({}, "<|image|>", extra_special_tokens=None, image_token=None)
    tokenizer = open_tokenizer(folder)
    assert read_image_token(folder, tokenizer, tokenizer.convert_tokens_to_ids(stated)) == found
    assert read_image_token(folder, tokenizer, 10**6) == "<image>"


def test_an_image_token_that_is_not_special_cannot_be_forged(checkpoint):
    """Trainers add tokens without the flag `special`; the tokenizer then takes them anywhere."""
    folder = checkpoint()
    files = json.loads((folder / "tokenizer.json").read_text())
    for token in files["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(files))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {
        str(t["id"]): {key: value for key, value in t.items() if key != "id"} for t in files["added_tokens"]
    }
    del settings["extra_special_tokens"], settings["image_token"], settings["eos_token"], settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|im_end|>"}))
    processor = Processor.from_folder(folder, model_config(family="qwen2"))
    image, start = processor.tokenizer.convert_tokens_to_ids(["<image>", "<|im_start|>"])
    assert not processor.tokenizer.added_tokens_decoder[image].special
    encoded = processor.encode([Turn("human", "<image>\nwrite <image> and <|im_start|>")], "<image>")
    assert [(encoded.ids == token).sum() for token in (image, start)] == [4, 2]
    assert processor.tokenizer.decode(encoded.ids).count("<image>") == 6


def test_text_with_the_token_of_the_image_is_refused_by_name(checkpoint):
    """Where the tokenizer knows no image token, config.json decides; there it may be a common character's."""
    folder = checkpoint({"processor_config.json": {"image_token": "<picture>"}}, extra_special_tokens=None, image_token=None)
    tokenizer = byte_level_tokenizer()
    processor = Processor.from_folder(
        folder, model_config(image_token_id=tokenizer.convert_tokens_to_ids("#")), template="vicuna_v1"
    )
    assert (processor.encode_question("q").ids == processor.model.image_token_id).sum() == 4
    with pytest.raises(RecordError, match=r"the text contains token \d+ \('#'\), which is this model's image") as caught:
        processor.encode_question("item #1")
    assert caught.value.reason == "image_token_in_text"
    limits = {"max_length": 1000, "max_answer_tokens": 100}
    assert not processor.surely_fits([Turn("human", "<image>\nitem #1")], "no", **limits)


ONLY_TEXT = (
    "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}{{ c['text'] }}{% endfor %}<|im_end|>{% endfor %}"
)


@pytest.mark.parametrize("image", ["<image>", "<|image|>"])
@pytest.mark.parametrize(
    "source", [ONLY_TEXT, LOOP.replace("+ ': '", "+ ' '").replace("{% endfor %}", "<|im_end|>{% endfor %}")]
)
def test_a_template_that_writes_no_image_gets_it_in_front_of_the_text(checkpoint, image, source):
    folder = checkpoint({"chat_template.jinja": source}, image, image_token=image)
    assert prompt(Processor.from_folder(folder, model_config())) == f"user {image}\nq<|im_end|>"


def test_an_image_that_a_template_drops_is_refused(checkpoint):
    source = chat("x").replace("m['content']", "(m['content'] if loop.index < 4 else m['content'][1:])")
    processor = Processor.from_folder(checkpoint({"chat_template.jinja": source}), model_config())
    turns = [Turn("human", "a"), Turn("gpt", "b")] * 2
    with pytest.raises(RecordError, match="the chat template writes 0 images of 1") as caught:
        processor.encode([*turns, Turn("human", "<image>\nq")], None)
    assert caught.value.reason == "image_not_written"
