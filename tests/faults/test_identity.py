"""What an answer, run or set of records depends on: changed, it is asked again or refused by name; else it is kept."""

import dataclasses
import json
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_vlm import SINKS, gates

import lsg_jax
from lsg_jax import quickstart
from lsg_jax.checkpoint import RunFolder, read_manifest, write_manifest
from lsg_jax.checkpoint.run_record import RUN, Computation, RunRecord
from lsg_jax.cli import main
from lsg_jax.config import EvalConfig, MeshConfig, ModelConfig, SinkConfig, from_dict, to_dict
from lsg_jax.data.records import LAYOUT, open_records, prepare_llava
from lsg_jax.digest import file_sha256, json_sha256
from lsg_jax.errors import CheckpointError, ConfigError, InputError
from lsg_jax.eval import identity, runner
from lsg_jax.eval.answering import Answer
from lsg_jax.gating.portable import write_gates
from lsg_jax.json_files import read_sealed, write_sealed
from lsg_jax.opening import with_gates
from lsg_jax.report.parts import Note
from lsg_jax.report.results import OTHER_GATES, eval_section
from lsg_jax.run_config import RunConfig
from lsg_jax.sharding import make_mesh
from lsg_jax.train.run_record import check_same, record_start
from lsg_jax.vlm import VLM

CONFIG = EvalConfig(batch_size=4, max_new_tokens=4)


@pytest.fixture(scope="module")
def base(tiny_model):
    return lsg_jax.load(tiny_model)


@dataclasses.dataclass
class Case:
    """An evaluation: its model, settings and folder of questions, and how many questions each method is asked."""

    models: dict
    config: EvalConfig
    folder: object
    asked: dict

    def run(self):
        """Evaluates; returns method -> number of questions that were asked."""
        self.asked.clear()
        file = self.folder / "questions.jsonl"
        return runner.evaluate(self.models, replace(self.config, benchmarks={"mine": str(file)}), self.folder / "out")

    def edit(self, change):
        """Changes the rows of the question file."""
        file = self.folder / "questions.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = change(rows) or rows
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def case(base, scenes, tmp_path, monkeypatch):
    """Base and gates, asked once. No model runs: an answer is the digest of the pixels and the prompt."""
    shutil.copytree(scenes, tmp_path / "scenes")
    folder, asked = tmp_path / "scenes", {}
    models = {"base": base, "lsg": with_gates(base, gates())}

    def answer_all(models, items, prompts, config, *, max_new_tokens, known, on_batch):
        for name in models:
            new = [i for i in range(len(items)) if i not in known[name]]
            asked[name] = len(new)
            for i in new:
                known[name][i] = Answer(f"{prompts[i]} {len(items[i].images[0].read())}", np.full((2, 2), 0.5, np.float32))
                on_batch(name, {i: known[name][i]})
        return {name: [known[name][i] for i in range(len(items))] for name in models}

    monkeypatch.setattr(runner, "answer_all", answer_all)
    case = Case(models, CONFIG, folder, asked)
    case.run()
    assert asked == {"base": 12, "lsg": 12}
    return case


def other_image(case):
    Image.new("RGB", (64, 64), (1, 2, 3)).save(case.folder / "images" / "3.png")


def of_config(**changes):
    return lambda case: setattr(case, "config", replace(case.config, **changes))


def of_rows(change):
    return lambda case: case.edit(change)


def of_models(make):
    def change(case):
        case.models = {name: make(model) for name, model in case.models.items()}

    return change


def rebuilt(model, config=None, frozen=None, digest=None):
    return VLM(
        config or model.config,
        frozen or model.frozen,
        method=model.method,
        trained=model.trained,
        folder=model.folder,
        digest=digest or model.digest,
    )


def other_image_settings(model):
    return rebuilt(model, replace(model.config, image=replace(model.config.image, mean=(0.1, 0.2, 0.3))))


def as_bfloat16(model):
    return rebuilt(model, frozen={**model.frozen, "projector": {"fc1": jnp.zeros(2, jnp.bfloat16)}})


def other_sinks_of_base(case):
    base = case.models["base"]
    case.models["base"] = rebuilt(base, replace(base.config, sinks=SINKS))


def other_gates(**changes):
    def change(case):
        made = gates(**{name: value for name, value in changes.items() if name == "seed"})
        made = replace(made, gate=replace(made.gate, **{k: v for k, v in changes.items() if k == "key_scale"}))
        case.models["lsg"] = with_gates(case.models["base"], made, sinks=changes.get("sinks"))

    return change


ALL = {"base": 12, "lsg": 12}
GATES = {"base": 0, "lsg": 12}
ONE = {"base": 1, "lsg": 1}
NONE = {"base": 0, "lsg": 0}


@pytest.mark.parametrize(
    "change, again",
    [
        (lambda case: None, NONE),
        (other_image, ONE),
        (of_rows(lambda rows: rows[5].update(question="Which colour?")), ONE),
        (of_rows(lambda rows: rows[5].update(image=rows[4]["image"])), ONE),
        (of_rows(lambda rows: rows[1].update(choices=rows[1]["choices"][::-1])), ONE),
        (of_rows(lambda rows: rows.append(rows[0] | {"id": "new"})), ONE),
        (of_rows(lambda rows: rows[0].update(category="other")), NONE),
        (of_rows(lambda rows: rows[0].update(answer="other")), NONE),
        (of_rows(lambda rows: rows[::-1]), NONE),
        (of_config(limit=5), NONE),
        (of_config(batch_size=1, num_threads=1), NONE),
        (of_config(max_new_tokens=5), ALL),
        (of_config(max_length=500), ALL),
        (of_config(image_aspect="pad"), ALL),
        (of_config(template="vicuna_v1"), ALL),
        (of_config(near_tie=0.5), ALL),
        (of_models(other_image_settings), ALL),
        (of_models(as_bfloat16), ALL),
        (of_models(lambda model: rebuilt(model, digest="1" * 64)), ALL),
        (other_sinks_of_base, NONE),
        (other_gates(), NONE),
        (other_gates(seed=1), GATES),
        (other_gates(key_scale=1.5), GATES),
        (other_gates(sinks=SinkConfig(criterion="norm", vit_tau=3.0)), GATES),
    ],
)  # fmt: skip
def test_what_an_answer_depends_on(case, change, again):
    change(case)
    case.run()
    assert case.asked == again


@pytest.mark.parametrize("part", ["versions", "device", "files"])
def test_answers_of_another_version_device_or_tokenizer_are_asked_again(case, monkeypatch, part):
    if part == "files":
        monkeypatch.setattr(identity, "text_files", lambda model: {"tokenizer.json": "0" * 64})
    else:
        monkeypatch.setattr(identity, "surroundings", lambda: {"versions": {"jax": "9"}, "device": "cpu", part: "another"})
    case.run()
    assert case.asked == ALL


def test_a_result_states_what_it_depends_on(case, tiny_model):
    before = case.run()
    assert before.files == read_manifest(tiny_model).text_files and "tokenizer.json" in before.files
    assert set(before.trained) == {"lsg"} and len(before.benchmarks["mine"].questions_sha256) == 64
    other_image(case)
    after = case.run()
    assert after.benchmarks["mine"].prompts_sha256 == before.benchmarks["mine"].prompts_sha256
    assert after.benchmarks["mine"].questions_sha256 != before.benchmarks["mine"].questions_sha256
    assert read_sealed(case.folder / "out" / "result.json")["trained"] == after.trained


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda hf: (hf / "tokenizer.json").write_text("{}"), "hf/tokenizer.json: does not match its sha256"),
        (lambda hf: (hf / "tokenizer_config.json").unlink(), "hf/tokenizer_config.json: is missing"),
        (lambda hf: (hf / "chat_template.json").write_text("{}"), "hf/chat_template.json: does not belong to the model"),
    ],
)
def test_a_model_folder_with_other_text_files_is_refused(tiny_model, tmp_path, change, message):
    shutil.copytree(tiny_model, tmp_path / "model")
    change(tmp_path / "model" / "hf")
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        lsg_jax.load(tmp_path / "model")


def test_preparation_is_the_digest_of_all_but_weights_and_sinks(tiny_model, tmp_path):
    manifest = read_manifest(tiny_model)
    same = replace(manifest, config=replace(manifest.config, sinks=SINKS), source=None)
    other = [
        replace(manifest, hf={**manifest.hf, "tokenizer.json": "0" * 64}),
        replace(manifest, config=replace(manifest.config, image=replace(manifest.config.image, resample="nearest"))),
    ]
    assert same.preparation == manifest.preparation and manifest.preparation not in [each.preparation for each in other]
    write_manifest(tmp_path, same)
    assert read_manifest(tmp_path).preparation == manifest.preparation


def test_a_field_of_a_later_version_changes_no_digest_at_its_default(tiny_model):
    """`text.weights` came after the first runs, which did not state it."""
    manifest = read_manifest(tiny_model)
    stated = to_dict(manifest.config)
    of_earlier_version = {**stated, "text": {k: v for k, v in stated["text"].items() if k != "weights"}}
    assert from_dict(ModelConfig, of_earlier_version, where="config") == manifest.config
    for name in ("sinks", "sink_sources"):
        del of_earlier_version[name]
    assert manifest.preparation == json_sha256([of_earlier_version, manifest.text_files])
    rounded = replace(manifest, config=replace(manifest.config, text=replace(manifest.config.text, weights="int8")))
    assert rounded.preparation != manifest.preparation


@pytest.mark.parametrize("name", ["model_files", "backbone", "data", "total_steps"])
def test_a_run_that_depends_on_something_else_is_refused(tmp_path, name):
    config = RunConfig(model="m", output="o").as_dict()
    started = Computation(config, SinkConfig(), "b", "d", 9, model_files="f")
    run = RunFolder(tmp_path)
    record_start(run, started, mesh=make_mesh(MeshConfig()), step=0, dropped={})
    check_same(run, started)
    with pytest.raises(ConfigError, match=f"holds a run with another {name}; choose another output"):
        check_same(run, replace(started, **{name: 8 if name == "total_steps" else "other"}))


def test_a_run_of_an_earlier_version_takes_the_files_it_goes_on_with(tmp_path):
    config = RunConfig(model="m", output="o").as_dict()
    run, now = RunFolder(tmp_path), Computation(config, SinkConfig(), "b", "d", 9, model_files="f")
    record_start(run, replace(now, model_files=""), mesh=make_mesh(MeshConfig()), step=0, dropped={})
    check_same(run, now)
    record_start(run, now, mesh=make_mesh(MeshConfig()), step=3, dropped={})
    with pytest.raises(ConfigError, match="model_files"):
        check_same(run, replace(now, model_files="g"))


def test_records_are_known_by_their_content(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "scenes")
    source = tmp_path / "scenes"
    for number in range(2):
        prepare_llava(source / "llava.jsonl", source, tmp_path / f"records{number}")
    (tmp_path / "scenes" / "note").write_text("not part of any record")
    other_image(Case({}, CONFIG, source, {}))
    prepare_llava(source / "llava.jsonl", source, tmp_path / "records2")
    first, second, third = (open_records(tmp_path / f"records{number}").digest for number in range(3))
    assert first == second != third


def test_records_of_earlier_formats_keep_their_digest(records, tmp_path):
    """That of the manifest's bytes: their runs know them by it."""
    shutil.copytree(records, tmp_path / "records")
    file = tmp_path / "records" / LAYOUT.manifest
    file.write_text(json.dumps(read_sealed(file) | {"format": 3}))
    assert open_records(tmp_path / "records").digest == file_sha256(file)


def test_changed_rows_are_refused_when_they_are_opened(records, tmp_path):
    shutil.copytree(records, tmp_path / "records")
    file = next(LAYOUT.rows(tmp_path / "records").glob("*array_record*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="does not match its sha256; run `lsg prepare` again"):
        open_records(tmp_path / "records")


def test_a_gate_file_that_was_edited_is_refused(base, tmp_path):
    file = tmp_path / "gates.safetensors"
    write_gates(file, gates())
    file.write_bytes(file.read_bytes().replace(b'"vit_tau":"10.0"', b'"vit_tau":"20.0"'))
    with pytest.raises(InputError, match="does not fit its checksum"):
        with_gates(base, file)


@pytest.fixture
def run(base, tmp_path):
    """A run of 9 steps, stopped at 3, with gates at two layers."""
    made = gates()
    config = RunConfig(model="m", output="o").as_dict() | {"gate": to_dict(made.gate)}
    record = RunRecord(config, SINKS, base.digest, "d", 9, "m", versions={}, devices="1 cpu", starts=())
    run = RunFolder(tmp_path / "run")
    run.write_json(RUN, record.as_json())
    with run.lock():
        run.save(3, {"trained": made.parameters})
    return run


def test_gates_of_an_unfinished_run_say_so(base, run, caplog):
    with_gates(base, run.path)
    assert f"{run.path}: step 3 of 9 is used" in caplog.text
    with run.lock():
        run.save(9, {"trained": gates(seed=1).parameters})
    caplog.clear()
    with_gates(base, run.path)
    assert not caplog.text
    shutil.rmtree(run.checkpoints / "9")
    with_gates(base, run.path)
    assert f"{run.path}: step 3 of 9 is used" in caplog.text


def test_a_report_says_that_a_run_went_on_after_its_evaluation(case, run):
    case.models = {"base": case.models["base"], "lsg": with_gates(case.models["base"], run.path)}
    config = replace(case.config, benchmarks={"mine": str(case.folder / "questions.jsonl")})
    result = dataclasses.asdict(runner.evaluate(case.models, config, run.path / "eval"))
    notes = lambda: [part.text for part in eval_section(result, run.path / "eval", title="").parts if isinstance(part, Note)]
    assert OTHER_GATES not in notes()
    with run.lock():
        run.save(9, {"trained": gates(seed=1).parameters})
    assert notes()[0] == OTHER_GATES


def test_an_evaluation_leaves_no_figures_of_an_earlier_one(case, tmp_path, monkeypatch):
    (tmp_path / "run.toml").write_text(f'model = "{case.models["base"].folder}"\noutput = "{tmp_path / "none"}"\n')
    figures = lambda: sorted(path.stem for path in (tmp_path / "out").glob("*.csv"))
    monkeypatch.setattr("lsg_jax.eval.methods.open_methods", lambda *_: case.models)
    questions = f"mine={case.folder / 'questions.jsonl'}"
    command = ["eval", tmp_path / "run.toml", "--benchmark", questions, "--out", tmp_path / "out"]
    assert main(list(map(str, command))) == 0 and figures() == ["gains", "ratios"]
    del case.models["lsg"]
    assert main(list(map(str, command))) == 0 and figures() == []


def test_the_quickstart_keeps_sinks_of_its_model_only(base, tmp_path):
    file = tmp_path / "sinks.json"
    assert not quickstart._has_sinks(file, base)
    write_sealed(file, {"backbone": "another"})
    assert not quickstart._has_sinks(file, base)
    write_sealed(file, {"backbone": base.digest})
    assert quickstart._has_sinks(file, base)
    file.write_text(file.read_text().replace(base.digest[:8], "0" * 8))
    assert not quickstart._has_sinks(file, base)
