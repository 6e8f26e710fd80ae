"""What commands say of the programs that they compile, and that they say nothing of devices and packages they do not use."""

import ast
import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax._src.monitoring import get_event_duration_listeners, get_event_listeners, get_scalar_listeners

from lsg_jax import distributed
from lsg_jax.cli import compiling, main
from lsg_jax.cli.compiling import compilations_told
from lsg_jax.progress import tracing

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "lsg_jax"
STAGES = [f"/jax/core/compile/{name}_duration" for name in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")]


@pytest.fixture(autouse=True)
def compilations_are_told(monkeypatch, no_lines_of_slow_machines):
    monkeypatch.setattr(compiling, "SLOW", 2.0)


def listeners():
    return [*get_event_listeners(), *get_scalar_listeners(), *get_event_duration_listeners()]


def report(function, what, *seconds, saved=0.0):
    """What JAX tells its listeners while it traces, lowers and compiles a function, or reads it from the cache."""
    for event, name, spent in zip(STAGES, (function, f"jit({function})", f"jit({function})"), seconds, strict=True):
        monitoring.record_scalar(event, 0.0, fun_name=name)
        if event == STAGES[0] and what:
            tracing(what, jnp.zeros((16, 1024)))
        if event == STAGES[2] and saved:
            monitoring.record_event_duration_secs("/jax/compilation_cache/compile_time_saved_sec", saved)
        monitoring.record_event_duration_secs(event, spent, fun_name=name)


def test_slow_programs_are_named_and_quick_ones_are_not(capsys):
    before = listeners()
    with compilations_told():
        report("step", "the training step", 3.0, 2.0, 20.4)
        report("step", "the training step", 0.5, 0.2, 0.6, saved=24.0)
        report("step", "the training step", 0.5, 0.2, 0.6)
        report("move", None, 0.1, 0.1, 5.0)
        report("move", None, 0.1, 0.1, 0.1, saved=9.0)
    assert listeners() == before
    report("step", "the training step", 1.0, 2.0, 30.0)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "compiling the training step for 16 x 1024 tokens ... 25 s",
        "compiling the training step for 16 x 1024 tokens ... found in the cache of compiled programs, 1.3 s",
        "compiling move ... 5.2 s",
    ]


def test_other_processes_than_the_first_are_silent(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    with compilations_told():
        report("step", "the training step", 3.0, 2.0, 20.4)
    assert capsys.readouterr() == ("", "")


class Stream(io.StringIO):
    """Tells when something is written."""

    def __init__(self):
        super().__init__()
        self.written = threading.Event()

    def write(self, text):
        self.written.set()
        return super().write(text)


def test_a_line_begins_while_the_program_compiles(monkeypatch):
    """On stderr it goes on where it began; a bar that has taken the place of stderr shows whole lines."""
    for bar in (False, True):
        stream = Stream()
        monkeypatch.setattr(sys, "stderr", stream)
        with compilations_told():
            if bar:
                monkeypatch.setattr(sys, "stderr", stream := Stream())
            monitoring.record_scalar(STAGES[0], 0.0, fun_name="f")
            monitoring.record_event_duration_secs(STAGES[0], 9.0, fun_name="f")
            monitoring.record_scalar(STAGES[2], 0.0, fun_name="jit(f)")
            assert stream.written.wait(60)
            monitoring.record_event_duration_secs(STAGES[2], 5.0, fun_name="jit(f)")
        assert stream.getvalue() == ("compiling f ...\ncompiling f ... 14 s\n" if bar else "compiling f ... 14 s\n")


def test_a_line_that_has_begun_is_ended(monkeypatch):
    """JAX measures less than SLOW seconds where its clock starts after the timer, or is set back meanwhile."""
    monkeypatch.setattr(sys, "stderr", stream := Stream())
    monkeypatch.setattr(compiling, "SLOW", 0.01)
    with compilations_told():
        monitoring.record_scalar(STAGES[2], 0.0, fun_name="jit(f)")
        assert stream.written.wait(60)
        monitoring.record_event_duration_secs(STAGES[2], 0.009, fun_name="jit(f)")
    assert stream.getvalue() == "compiling f ... 0.0 s\n"


def test_each_shape_is_named_when_jax_compiles_it(monkeypatch, capsys):
    @jax.jit
    def program(tokens):
        tracing("a program", tokens)
        return jnp.sin(tokens) + jax.jit(lambda x: x)(tokens)

    monkeypatch.setattr(compiling, "SLOW", 0.0)
    shapes = [jnp.zeros((2, 3)), jnp.zeros((2, 5, 7)), jnp.ones((2, 3))]
    with compilations_told():
        for tokens in shapes:
            program(tokens)
        program.lower(jnp.zeros((4, 3))).compile()
    found = re.findall(r"^compiling a program for (\d x \d) tokens \.\.\. .*\d s$", capsys.readouterr().err, re.MULTILINE)
    assert found == ["2 x 3", "2 x 5", "4 x 3"]


def jitted(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and any("jax.jit" in ast.unparse(one) for one in node.decorator_list):
            yield node


def test_every_program_over_a_batch_has_a_name():
    programs = [node for path in PACKAGE.rglob("*.py") if path.name != "vlm.py" for node in jitted(path)]
    over_batches = [node for node in programs if {"batch", "shared"} & {argument.arg for argument in node.args.args}]
    assert len(over_batches) > 12
    assert [node.name for node in over_batches if "tracing(" not in ast.unparse(node)] == []


CONFIG = """
model = "{model}"
output = "run"
[gate]
layers = [1]
[sinks]
criterion = "norm"
vit_tau = 1.0
[data]
records = "{records}"
max_length = 347
[train]
batch_size = 4
max_steps = 1
[eval]
max_new_tokens = 3
"""


def test_commands_say_what_they_compile(monkeypatch, tmp_path, tiny_model, records, scenes, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiling, "SLOW", 0.0)
    Path("c.toml").write_text(CONFIG.format(model=tiny_model, records=records))
    image = str(scenes / "images" / "0.png")
    asked = ["--method", "base", "--set", "eval.limit=1", "--benchmark", f"own={scenes / 'questions.jsonl'}"]
    for arguments, programs in (
        (["train", "c.toml"], ["the training step for 4 x 347 tokens"]),
        (["eval", "c.toml", *asked], ["the prompt pass", "decoding 3 tokens"]),
        (["look", str(tiny_model), "--image", image, "--prompt", "q", "--max-new-tokens", "5"], ["the pass that looks"]),
    ):
        assert main(arguments) == 0
        out, err = capfd.readouterr()
        assert "compiling" not in out
        for program in programs:
            assert re.search(rf"^compiling {program}.* \.\.\. .*\d s$", err, re.MULTILINE), err


def test_neither_libtpu_nor_transformers_speaks_of_what_is_not_there(tiny_model):
    command = ["-m", "lsg_jax", "generate", str(tiny_model), "--prompt", "x", "--max-new-tokens", "2"]
    script = f"import lsg_jax; print(lsg_jax.load({str(tiny_model)!r}).generate([None], ['x'], 2))"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS / "without_torch"), os.environ.get("PYTHONPATH", "")])
    cpu = environment | {"JAX_PLATFORMS": "cpu"}  # in Python it is for the user to say that no TPU is sought
    for arguments, env in ((command, environment), (["-c", script], cpu)):
        done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("compiling ")]
        assert (done.returncode, lines) == (0, []) and done.stdout
