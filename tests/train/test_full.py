"""Training of the model itself: against PyTorch, against conversations split into answers, and as a run that is exported."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from hf_models import save_tiny, state_arrays, tiny_hf

from converters.convert import convert, tree_from_tensors
from converters.export import export, trained_leaves
from lsg_jax.checkpoint import read_step
from lsg_jax.config import DataConfig, GateConfig, SinkConfig, TrainConfig
from lsg_jax.data.conversation import Turn, examples
from lsg_jax.data.pipeline import TrainingData
from lsg_jax.data.records import prepare_llava
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.methods.full import Full, FullConfig
from lsg_jax.methods.method_model import abstract_model
from lsg_jax.opening import load_backbone, open_trained
from lsg_jax.run_config import RunConfig
from lsg_jax.train.loop import METRICS, train
from lsg_jax.train.step import _loss_and_gradients

PARTS = ("vision_tower", "projector", "language_model")
TURNS = [
    Turn("human", "<image>\nWhat is it?"),
    Turn("gpt", "A red square."),
    Turn("human", "And left of it?"),
    Turn("gpt", "Nothing"),
    Turn("human", "Sure?"),
    Turn("gpt", "yes"),
]


@pytest.fixture(scope="module")
def torch_model():
    return tiny_hf("clip", "llama")


@pytest.fixture(scope="module")
def model(torch_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    convert(save_tiny(torch_model, folder / "hf"), folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def vlm(model):
    return load_backbone(model)


def image_of(seed=0):
    return np.random.default_rng(seed).integers(0, 255, (42, 42, 3), np.uint8)


def batch_of(vlm, encoded, seed=0):
    pixels = image_of(seed)
    return vlm.processor.collate(encoded, [pixels[None]] * len(encoded), max_length=400, max_answer_tokens=40)


def gradients_of(vlm, batch, parts=PARTS):
    method = Full(FullConfig(parts=parts))
    graphdef, _ = abstract_model(vlm.config, method)
    trained = method.initial(vlm.config, vlm.frozen, jax.random.key(0))
    frozen = {part: leaf for part, leaf in vlm.frozen.items() if part not in trained}
    return jax.jit(lambda frozen, trained: _loss_and_gradients(graphdef, frozen, trained, batch, remat="full"))(frozen, trained)


def test_gradients_of_all_parts_equal_those_of_pytorch(torch_model, vlm):
    encoded = vlm.processor.encode_conversation(TURNS, max_length=400, max_answer_tokens=40)
    batch = batch_of(vlm, [encoded])
    image = vlm.config.image
    pixels = (image_of()[None].astype(np.float32) / 255 - np.array(image.mean)) / np.array(image.std)
    out = torch_model(
        input_ids=torch.tensor(encoded.ids[None].astype(np.int64)),
        pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32),
        labels=torch.tensor(encoded.labels[None].astype(np.int64)),
    )
    torch_model.zero_grad()
    out.loss.backward()
    named = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in torch_model.named_parameters()}
    reference = tree_from_tensors(
        vlm.config, {name: named.get(name, torch.zeros(1)).numpy() for name in state_arrays(torch_model)}
    )

    loss, _, gradients = gradients_of(vlm, batch)
    assert float(loss) == pytest.approx(out.loss.item(), rel=1e-5)
    assert set(gradients) == set(PARTS)
    # the bias of a key has no effect, so its gradient is rounding alone: measured against the largest of its part
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(reference))
    compared = jax.tree.map(
        lambda ours, theirs: np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-3 * largest), gradients, reference
    )
    assert max(jax.tree.leaves(compared)) < 1e-4, compared
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients["projector"]))


def test_a_whole_conversation_is_its_answers_one_by_one(vlm):
    """Same tokens, same places, and a loss that is the mean over all answer tokens of the split examples."""
    encode = vlm.processor.encode
    whole = vlm.processor.encode_conversation(TURNS, max_length=400, max_answer_tokens=40)
    split = [encode(prompt, answer) for prompt, answer in examples(TURNS)]
    assert whole.answers == tuple((one.num_prompt, len(one.ids)) for one in split) and whole.cut == 0
    for one in split:
        np.testing.assert_array_equal(whole.ids[: len(one.ids)], one.ids)
        np.testing.assert_array_equal(whole.labels[one.num_prompt : len(one.ids)], one.labels[one.num_prompt :])
    loss, told, gradients = gradients_of(vlm, batch_of(vlm, [whole]), ("projector",))
    apart, also, others = gradients_of(vlm, batch_of(vlm, split), ("projector",))
    assert int(told["tokens"]) == int(also["tokens"]) == sum(len(one.answered) for one in split)
    assert float(loss) == pytest.approx(float(apart), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), gradients, others)


@pytest.mark.parametrize(("length", "answers"), [(400, 1), (400, 20), (250, 60), (225, 60)])
def test_a_conversation_is_cut_from_its_right_end(vlm, length, answers):
    whole = vlm.processor.encode_conversation(TURNS, max_length=1000, max_answer_tokens=1000)
    cut = vlm.processor.encode_conversation(TURNS, max_length=length, max_answer_tokens=answers)
    places = [place for place in whole.answered[:answers] if place < length]
    np.testing.assert_array_equal(cut.answered, places)
    np.testing.assert_array_equal(cut.ids, whole.ids[: len(cut.ids)])
    assert cut.cut == len(whole.answered) - len(places)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    from recipes.embedded_model.conversations import write_conversations

    folder = tmp_path_factory.mktemp("conversations")
    prepare_llava(write_conversations(folder / "raw", "train", 6, side=56), folder / "raw", folder / "records")
    return folder / "records"


@pytest.fixture(scope="module")
def config(model, records, tmp_path_factory):
    return RunConfig(
        model=str(model),
        output=str(tmp_path_factory.mktemp("runs") / "full"),
        method="full",
        sinks=SinkConfig(criterion="norm", vit_tau=10.0),
        data=DataConfig(records=str(records), max_length=1200, max_answer_tokens=400, conversations="whole"),
        train=TrainConfig(batch_size=2, epochs=2, learning_rate=0.01, save_every=3),
    )


def test_a_run_changes_its_parts_alone_and_becomes_a_checkpoint(config, vlm, tmp_path):
    run = train(config)
    losses = [json.loads(line)["loss"] for line in (run / METRICS).read_text().splitlines()]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.5
    opened = open_trained(vlm, run)
    jax.tree.map(np.testing.assert_array_equal, opened.frozen["vision_tower"], vlm.frozen["vision_tower"])
    trained = read_step(run)[1]["trained"]
    assert set(trained) == {"projector", "language_model"}
    jax.tree.map(np.testing.assert_array_equal, {part: opened.frozen[part] for part in trained}, trained)

    export(config.model, tmp_path / "hf", trained=trained_leaves(config.model, run))
    convert(tmp_path / "hf", tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, load_backbone(tmp_path / "again").frozen, opened.frozen)
    export(config.model, tmp_path / "untouched")
    convert(tmp_path / "untouched", tmp_path / "same")
    jax.tree.map(np.testing.assert_array_equal, load_backbone(tmp_path / "same").frozen, vlm.frozen)


def test_whole_conversations_are_one_example_each(config, vlm, records):
    make = lambda data: TrainingData(records, vlm.make_processor(), data, batch_size=1, seed=0, epochs=1)
    whole, split = make(config.data), make(replace(config.data, conversations="split"))
    lines = (records.parent / "raw" / "conversations.jsonl").read_text().splitlines()
    answers = sum(len(json.loads(line)["conversations"]) // 2 for line in lines)
    assert (whole.num_examples, split.num_examples) == (6, answers) and answers > 6
    tokens = lambda data: sum(int((batch.answer_target >= 0).sum()) for batch in data)
    assert tokens(whole) == tokens(split)
    whole.close(), split.close()


def test_refusals(config, model, tmp_path):
    with pytest.raises(ConfigError, match="no one place for a gate"):
        replace(config.with_settings(GateConfig(layers=(1,))), method="lsg")
    with pytest.raises(ConfigError, match="each once"):
        FullConfig(parts=("projector", "projector"))
    gates = replace(
        config,
        output=str(tmp_path / "gates"),
        method="lsg",
        tables={"gate": GateConfig(layers=(1,))},
        data=replace(config.data, conversations="split"),
        train=replace(config.train, max_steps=1),
    )
    with pytest.raises(InputError, match="what was trained there is lsg"):
        trained_leaves(model, train(gates))
