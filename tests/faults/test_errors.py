"""Paths and files that are not what they should be: every command ends with one line that names them, and with 65 or 2.

The suite runs as root, whom permissions do not stop: a folder that cannot be written is one below a file, or on `/proc`.
"""

import errno
import json
import os
import shutil
import signal

import pytest

from lsg_jax.cli import _exit_code, main
from lsg_jax.cli.causes import cause_of

HANGS = 60.0  # seconds

# command -> arguments in which OUT, MODEL, CONFIG, IMAGE and the like are replaced
COMMANDS = {
    "quickstart": ["quickstart", "--out", "OUT"],
    "convert": ["convert", "HF", "OUT"],
    "export": ["export", "MODEL", "OUT"],
    "inspect": ["inspect", "MODEL"],
    "verify": ["verify", "MODEL"],
    "generate": ["generate", "MODEL", "--prompt", "?", "--image", "IMAGE"],
    "look": ["look", "MODEL", "--prompt", "?", "--image", "IMAGE", "--out", "OUT"],
    "explore": ["explore", "MODEL", "--port", "0"],
    "sinks": ["sinks", "MODEL", "--images", "IMAGE", "--out", "OUT"],
    "calibrate": ["calibrate", "MODEL", "--images", "IMAGES", "--out", "OUT"],
    "prepare": ["prepare", "LLAVA", "OUT"],
    "train": ["train", "CONFIG", "--set", "output=OUT"],
    "eval": ["eval", "CONFIG", "--out", "OUT"],
    "eval output": ["eval", "CONFIG", "--set", "output=OUT"],
    "sweep": ["sweep", "CONFIG", "--out", "OUT"],
    "sweep output": ["sweep", "CONFIG", "--set", "output=OUT"],
    "stack": ["stack", "CONFIG", "--gates", "GATES", "--out", "OUT"],
    "ablate": ["ablate", "CONFIG", "--out", "OUT"],
    "probe": ["probe", "MODEL", "--data", "DATA", "--out", "OUT"],
    "pointing": ["pointing", "MODEL", "--out", "OUT"],
    "plant": ["plant", "MODEL", "OUT", "--layers", "1"],
    "plan": ["plan", "CONFIG", "--topology", "v5e:2x2"],
    "report": ["report", "RUN", "--out", "OUT"],
    "gates export": ["gates", "export", "RUN", "OUT"],
    "gates combine": ["gates", "combine", "GATES", "--out", "OUT"],
    "gates import": ["gates", "import", "GATES", "OUT"],
}
FILES = {"calibrate", "report", "gates export", "gates combine", "gates import"}  # whose output is a file
WRITERS = [name for name, arguments in COMMANDS.items() if any("OUT" in each for each in arguments)]
READ = [
    (name, what)
    for name, arguments in COMMANDS.items()
    for what in ("HF", "MODEL", "CONFIG", "IMAGE", "IMAGES", "LLAVA", "GATES", "DATA", "RUN")
    if what in arguments
]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A path of each wrong kind."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").write_bytes(b"")
    (folder / "binary").write_bytes(bytes(range(256)) * 40)
    (folder / "text.json").write_text("[1, 2")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "huge.toml").write_text("x" * (17 << 20))
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "fifo")
    (folder / "below").write_text("a file")
    return folder


@pytest.fixture(scope="module")
def good(bad, tiny_model, tiny_hf_folder, scenes):
    folder = bad.parent / "good"
    folder.mkdir(exist_ok=True)
    text = f'model = "{tiny_model}"\noutput = "{folder}/run"\n[eval]\nbenchmarks.mine = "{scenes}/questions.jsonl"\n'
    (folder / "c.toml").write_text(text)
    gates = "lsg_jax/embedded/gates.safetensors"
    image = scenes / "images" / "0.png"
    found = {
        "HF": tiny_hf_folder,
        "MODEL": tiny_model,
        "CONFIG": folder / "c.toml",
        "IMAGE": image,
        "IMAGES": scenes / "images",
    }
    return found | {"LLAVA": scenes / "llava.jsonl", "GATES": gates, "DATA": "scenes", "RUN": folder, "OUT": folder / "out"}


@pytest.fixture(autouse=True)
def timed_out():
    """What waits for a pipe or reads a device for ever fails instead."""

    def fail(*_):
        raise AssertionError("it does not end")

    before = signal.signal(signal.SIGALRM, fail)
    yield
    signal.signal(signal.SIGALRM, before)


def run(name, paths, capsys):
    """The last line of a command; asserts that it is the only one of an error, and its code."""
    arguments = [
        next((each.replace(key, str(paths[key])) for key in paths if each in (key, f"output={key}")), each)
        for each in COMMANDS[name]
    ]
    try:
        signal.setitimer(signal.ITIMER_REAL, HANGS)
        code = main(arguments)
    except SystemExit as usage:
        code = usage.code
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    error = capsys.readouterr().err
    assert code in (2, 65), (arguments, code, error)
    assert "Error:" not in error and "fault of lsg" not in error and len(error) < 2000, (arguments, error)
    assert error.count("\n") == 1, (arguments, error)
    return error


def fail_if_reached(*_, **__):
    raise AssertionError("a model was loaded before the output was checked")


@pytest.mark.parametrize("name", WRITERS)
def test_outputs_that_cannot_be_written(name, bad, good, capsys, monkeypatch):
    for module, function in (("lsg_jax.opening", "load_base"), ("converters.convert", "convert")):
        monkeypatch.setattr(f"{module}.{function}", fail_if_reached)
    for out in (bad / "below" / "x", bad / "below" / "x" / "y", "/proc/x", "/proc/x/y", bad / ("n" * 300)):
        assert "cannot be written" in run(name, good | {"OUT": out}, capsys)
    for out in [bad / "folder"] if name in FILES else [bad / "below", bad / "fifo"]:
        assert str(out) in run(name, good | {"OUT": out}, capsys)
    assert not any(each.name.startswith((".lsg", "n" * 9)) for each in bad.iterdir())


@pytest.mark.parametrize("name, what", READ)
def test_inputs_of_another_kind(name, what, bad, good, capsys):
    kinds = ["none", "empty", "binary", "text.json", "deep.json", "folder", "loop", "dangling", "fifo", "below/x", "n" * 300]
    for kind in kinds + ["huge.toml"] * (what == "CONFIG"):
        if (what, kind) in (("RUN", "folder"), ("IMAGES", "folder"), ("IMAGE", "fifo")):
            continue  # no images and no runs are below; images are read by tests/faults of pictures
        run(name, good | {what: bad / kind}, capsys)
    assert not (bad.parent / "good" / "out").exists()


VALUES = [None, True, -1, 1.5, 10**30, "x", "\ud800", [], [[]], {}, {"a": [None]}]


def test_wrong_types_in_the_manifest_of_a_model(tiny_model, tmp_path, capsys):
    folder, file = shutil.copytree(tiny_model, tmp_path / "model", copy_function=os.link), "lsg_manifest.json"
    whole = json.loads((folder / file).read_text())
    for key in [None, *whole]:
        for value in VALUES:
            (folder / file).unlink()
            (folder / file).write_text(json.dumps(value if key is None else {**whole, key: value}))
            code = main(["inspect", str(folder)])
            _, error = capsys.readouterr()
            assert code in (0, 65) and "fault of lsg" not in error and error.count("\n") == (code != 0), (key, value, error)


def test_causes_of_errors():
    full = OSError(errno.ENOSPC, "No space left on device", "/out/x")
    said = "/out/x: cannot be written: No space left on device; free space on the disk, or choose another output"
    assert cause_of(full) == said
    assert cause_of(OSError(errno.ENOSPC, "No space left on device")).startswith("cannot be written: No space")
    assert cause_of(OSError("odd")) == "odd"
    assert "no memory is left" in cause_of(MemoryError("x"))
    for error in (TypeError("a\nb"), RecursionError("deep"), UnicodeError("u"), KeyError("k")):
        assert "this is a fault of lsg, not yours" in cause_of(error) and "\n" not in cause_of(error)
    codes = {full: 1, MemoryError(): 1, KeyError(): 1, FileNotFoundError(2, "no", "x"): 65, PermissionError(13, "no", "x"): 65}
    assert [_exit_code(error) for error in codes] == list(codes.values())
