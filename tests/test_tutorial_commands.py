"""The script that runs the tutorial notices what is no longer true. The tutorial itself is run by `.ci/run`."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "docs" / "run_commands.py"
spec = importlib.util.spec_from_file_location("run_commands", PATH)
assert spec and spec.loader
run_commands = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_commands)

TEXT = """a

```sh
echo one > file
```

b

```sh
cat file; echo 20.0
```

```text
{}
```

<!-- not run: it fails -->
```sh
exit 1
```
"""


@pytest.mark.parametrize(
    ("said", "right"), [("one\n20.0", True), ("one\n20.9", True), ("one\n29", False), ("two\n20.0", False), ("one", False)]
)
def test_what_differs_is_found_and_mended(said, right, tmp_path):
    text, wrong = run_commands.run(TEXT.format(said), tmp_path)
    assert bool(wrong) != right and text == TEXT.format("one\n20.0")
    assert run_commands.run(text, tmp_path) == (text, [])


def test_a_command_that_fails_ends_it(tmp_path):
    with pytest.raises(SystemExit, match="exit code 3"):
        run_commands.run("```sh\nexit 3\n```\n", tmp_path)


def test_the_folder_is_not_in_what_is_shown(tmp_path):
    text, _ = run_commands.run("```sh\npwd\nrealpath x\n```\n\n```text\n```\n", tmp_path)
    assert text.endswith("x\n```\n")
