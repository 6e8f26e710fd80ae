"""`lsg completion`: scripts of shtab for shells. bash runs its script; zsh and fish are read if they are installed."""

import platform
import shutil
import subprocess
from importlib.metadata import version

import pytest

import lsg_jax
from lsg_jax.cli import main

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_lsg lsg "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}" 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script of a shell, as a file."""

    def write(shell):
        path = tmp_path_factory.mktemp("completion") / f"lsg.{shell}"
        with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
            patch.setattr("sys.stdout", file)
            assert main(["completion", shell]) == 0
        return path

    return write


def test_bash_completes_commands_options_choices_and_files(script, tmp_path):
    file = script("bash")
    subprocess.run(["bash", "-n", file], check=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "run.toml").touch()

    def completed(*words):
        done = subprocess.run(["bash", "-c", ASK, "bash", file, *words], capture_output=True, text=True, cwd=tmp_path)
        return set(done.stdout.split())

    assert completed("lsg", "ge") == {"generate"}
    assert completed("lsg", "gates", "") == {"export", "combine", "import", "push"}
    assert completed("lsg", "gates", "push", "--pri") == {"--private"}
    assert completed("lsg", "convert", "--dtype", "") == {"bfloat16", "float32", "int8"}
    assert completed("lsg", "train", "ru") == {"runs", "run.toml"}
    assert completed("lsg", "generate", "m", "--gates", "ru") == {"runs", "run.toml"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_too(shell, script):
    file = script(shell)
    text = file.read_text()
    assert all(name in text for name in ("quickstart", "gates", "combine", "max-new-tokens"))
    if shutil.which(shell):
        subprocess.run([shell, "-n", file], check=True)


def test_version_says_what_runs(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    expected = f"lsg_jax {lsg_jax.__version__}, JAX {version('jax')}, Python {platform.python_version()}\n"
    assert capsys.readouterr().out == expected
