"""`find_sinks` on planted sinks and in edge cases; its attention shares against Hugging Face's attention weights."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hf_models import save_tiny, state_arrays, tiny_hf
from PIL import Image
from planted import planted_model

from converters.convert import tree_from_tensors
from converters.hf_config import model_config
from lsg_jax.analysis.sinks import find_sinks
from lsg_jax.config import SinkConfig
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.opening import load_backbone
from lsg_jax.vlm import VLM

TOLERANCE = 1e-5
CRITERIA = ["dim_abs", "dim_rms", "norm", "massive", "attention_share"]


def noise(count, side=56):
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    return {f"{index}.png": Image.fromarray(image) for index, image in enumerate(images)}


def with_settings(vlm, sinks, **config):
    return VLM(dataclasses.replace(vlm.config, sinks=sinks, **config), vlm.frozen, folder=vlm.folder)


def shares(study):
    """{(layer, head, queries): {group: share}}."""
    found = {}
    for row in study["attention"]:
        found.setdefault((row["layer"], row["head"], row["queries"]), {})[row["group"]] = row["share"]
    return found


def test_every_criterion_finds_exactly_the_planted_sinks(tiny_model):
    vlm, truth = planted_model(tiny_model)
    images = noise(2)
    images["1.png"] = images["1.png"].resize((112, 28))  # the model sees the quarter in the middle
    study = find_sinks(vlm, images, "What is it?", max_new_tokens=0)
    square, wide = study["images"].values()
    assert square["size"] == [56, 56] and wide["size"] == [112, 28]
    np.testing.assert_allclose(square["boxes"][8], np.array([1, 1, 2, 2]) / 7, atol=1e-6)
    np.testing.assert_allclose(wide["boxes"][24], [3 / 28 + 0.375, 3 / 7, 4 / 28 + 0.375, 4 / 7], atol=1e-6)
    layers = range(vlm.config.text.num_layers)
    planted = [list(truth.l_sinks) if layer >= truth.first_layer else [] for layer in layers]
    for entry in study["images"].values():
        assert entry["v_sinks"] == list(truth.v_sinks) and entry["l_sinks"] == planted
        assert entry["criteria"] == {
            "vit": {name: list(truth.v_sinks) for name in CRITERIA},
            "llm": {name: planted for name in CRITERIA},
        }
        for l_sinks, ordinary in zip(entry["l_sinks"], entry["ordinary"], strict=True):
            assert sorted([*entry["v_sinks"], *l_sinks, *ordinary]) == list(range(49))
        sizes = {(r["layer"], r["quantity"], r["group"]): r for r in entry["values"]}
        assert sizes[None, f"dim {truth.vit_dim}", "v_sink"]["mean"] > 130 > 1 > sizes[None, "norm", "ordinary"]["mean"] / 5
        assert sizes[3, f"dim {truth.llm_dims[1]}", "l_sink"]["max"] == pytest.approx(120, abs=5)
        assert sizes[0, "norm", "l_sink"] | {"tokens": 0, "mean": None, "max": None} == sizes[0, "norm", "l_sink"]
        assert entry["warnings"] == [] and entry["answer_tokens"] == 0
    assert study["warnings"] == []
    assert study["overlap"] == {
        "criteria": CRITERIA,
        "vit": [[1.0] * 5] * 5,
        "llm": [[[1.0 if layer >= truth.first_layer else None] * 5] * 5 for layer in layers],
    }
    counts = {(row["layer"], row["group"]): (row["mean"], row["std"]) for row in study["counts"]}
    assert len(counts) == len(study["counts"]) == 3 * len(layers)
    assert counts[1, "l_sink"] == (0, 0) and counts[2, "l_sink"] == (2, 0) and counts[2, "ordinary"] == (45, 0)
    # of the planted activations all layers know that they enter; LoT keeps none of the tokens that have them
    massive = study["massive_activations"]
    assert massive["layers"] == [row["layer"] for row in massive["rows"] if row["tokens"] >= 1]
    assert massive["layers"][-1] == len(layers) - 1 and all(
        row["largest"] >= 100 for row in massive["rows"][truth.first_layer :]
    )
    for entry in study["images"].values():
        assert not {*truth.l_sinks} & {*entry["lot"]["kept"]} and len(entry["lot"]["score"]) == 49
    heads = {(row["layer"], row["tokens"]): row["share"] for row in study["sink_heads"]}
    assert len(heads) == 3 * len(layers) and all(0 <= share <= 1 for share in heads.values())
    for entry in study["images"].values():  # a sink of one head at least, wherever the share of heads is not zero
        assert [bool(found) for found in entry["sink_heads"]] == [heads[layer, "visual"] > 0 for layer in layers]
    # the planted tokens, BOS among them, take nearly all attention
    found = shares(study)
    assert len(found) == 4 * len(layers)
    for (layer, _, _), by_group in found.items():
        assert sum(by_group.values()) == pytest.approx(1, abs=1e-5)
        assert (by_group["l_sink"] > 0.4) == (layer >= truth.first_layer) and by_group["v_sink"] < 0.1
    assert json.loads(json.dumps(study, allow_nan=False)) == study and next(iter(study)) == "format"


def test_nothing_but_sinks_and_no_answer(tiny_model):
    base = load_backbone(tiny_model, verify=False)
    # every patch is over both thresholds, and the answer is empty
    everywhere = SinkConfig(criterion="norm", vit_tau=0.0, llm_criterion="attention_share", llm_tau=1e-6)
    silent = with_settings(base, everywhere)
    silent.generate_batch = lambda batch, max_new_tokens: np.array([[*base.config.eos_token_ids, base.config.pad_token_id]])
    study = find_sinks(silent, noise(1), "?", max_new_tokens=2)
    (entry,) = study["images"].values()
    assert entry["criteria"]["llm"]["attention_share"] == [list(range(49))] * 6
    assert entry["v_sinks"] == list(range(49)) and entry["l_sinks"] == entry["ordinary"] == [[]] * 6
    assert entry["answer_tokens"] == 0 and entry["answer"] == "" and entry["answer_attention"] is entry["lot"] is None
    assert entry["warnings"] == [
        "every visual token is flagged as V-sink: the threshold is implausibly low",
        "every token is a sink in layers [0, 1, 2, 3, 4, 5]: none is ordinary",
        "the answer ends at once: there is no attention of answer tokens",
    ]
    for (_, _, queries), by_group in shares(study).items():
        assert queries == "prompt" and by_group["l_sink"] == by_group["ordinary"] == 0 < by_group["v_sink"]
        assert sum(by_group.values()) == pytest.approx(1, abs=1e-5)
    assert study["overlap"]["llm"][0][0] == [None] * 5  # dim_abs, whose dimensions are unknown
    json.dumps(study, allow_nan=False)

    with pytest.raises(InputError, match="no image to look at"):
        find_sinks(base, {}, "?")
    with pytest.raises(ConfigError, match="max_new_tokens is -1"):
        find_sinks(base, noise(1), "?", max_new_tokens=-1)
    embeddings = with_settings(base, SinkConfig(criterion="attention_share", vit_tau=0.3), feature_layers=(0,))
    with pytest.raises(ConfigError, match="no attention has made them"):
        find_sinks(embeddings, noise(1), "?")


def test_attention_shares_equal_those_of_hugging_face(tmp_path):
    hf = tiny_hf("clip", "llama", text_config={"max_position_embeddings": 512})
    hf.set_attn_implementation("eager")
    save_tiny(hf, tmp_path / "hf")
    config = model_config(hf.config.to_diff_dict())
    # these thresholds give the second image one V-sink and the first none
    sinks = SinkConfig(criterion="norm", vit_tau=16.5, llm_criterion="dim_abs", llm_dims=(4, 17), llm_tau=2.0)
    vlm = VLM(dataclasses.replace(config, sinks=sinks), tree_from_tensors(config, state_arrays(hf)), folder=tmp_path)
    images = noise(2, side=42)
    study = find_sinks(vlm, images, "What is it?", max_new_tokens=5)

    prompt = vlm.processor.encode_question("What is it?").ids
    visual = np.flatnonzero(prompt == config.image_token_id)
    expected = {}
    for (name, image), entry in zip(images.items(), study["images"].values(), strict=True):
        normal = (np.asarray(image) / 255 - np.array(config.image.mean)) / np.array(config.image.std)
        pixels = torch.tensor(normal.transpose(2, 0, 1)[None].astype(np.float32))
        inputs = {"pixel_values": pixels, "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64)}
        with torch.no_grad():
            ids = hf.generate(torch.tensor(prompt[None]).long(), **inputs, max_new_tokens=5, do_sample=False)
            attentions = hf(input_ids=ids, pixel_values=pixels, output_attentions=True).attentions
        assert ids.shape[1] == len(prompt) + entry["answer_tokens"], name
        # the maps are of the positions that predict the answer: from the prompt's last token to the answer's last but one
        predicting = slice(len(prompt) - 1, ids.shape[1] - 1)
        maps = [weights[0, :, predicting][..., visual].mean((0, 1)).numpy() for weights in attentions]
        np.testing.assert_allclose(entry["answer_attention"], maps, rtol=1e-3, atol=TOLERANCE)
        for layer, weights in enumerate(attentions):
            groups = {
                "text": np.setdiff1d(np.arange(ids.shape[1]), visual),
                "v_sink": visual[entry["v_sinks"]],
                "l_sink": visual[entry["l_sinks"][layer]],
                "ordinary": visual[entry["ordinary"][layer]],
            }
            queries = {"prompt": slice(visual[-1] + 1, len(prompt)), "answer": slice(len(prompt), None)}
            for kind, rows in queries.items():
                for head, by_head in enumerate(weights[0].numpy()):
                    for group, keys in groups.items():
                        share = by_head[rows][:, keys].sum(-1).mean()
                        expected.setdefault((layer, head, kind), {}).setdefault(group, []).append(share)
    found = shares(study)
    assert found.keys() == expected.keys()
    for key, by_group in expected.items():
        for group, values in by_group.items():
            assert found[key][group] == pytest.approx(np.mean(values), abs=TOLERANCE), (key, group)
    first, second = study["images"].values()
    assert first["v_sinks"] == [] and first["warnings"][0] == "no V-sink in this image" and len(second["v_sinks"]) == 1
    # every group has tokens and attention, so the comparison is not vacuous
    for group in ("text", "v_sink", "l_sink", "ordinary"):
        assert max(by_group[group] for by_group in found.values()) > 0.01, group
