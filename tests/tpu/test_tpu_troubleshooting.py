"""The messages of lsg that tpu/TROUBLESHOOTING.md quotes exist in the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOLE = "\0"


def templates_of_python(path):
    """The strings of a module; f-strings with a placeholder for each value, adjacent literals joined."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def templates_of_bash(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        yield re.sub(r"\$\w+|\$\{[^}]*\}|\$\([^)]*\)", HOLE, line)


@pytest.fixture(scope="module")
def templates():
    found = [t for path in (ROOT / "lsg_jax").rglob("*.py") for t in templates_of_python(path)]
    return found + [t for path in (ROOT / "tpu").glob("*.sh") for t in templates_of_bash(path)]


def quoted(section):
    """The messages that the headings of a section quote."""
    text = (ROOT / "tpu/TROUBLESHOOTING.md").read_text(encoding="utf-8")
    part = re.search(rf"^## {section}$(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE).group(1)
    headings = re.findall(r"^### (.*)$", part, re.MULTILINE)
    assert len(headings) > 5
    return [message.replace("<...>", HOLE) for heading in headings for message in re.findall(r"`([^`]+)`", heading)]


def test_our_messages_exist(templates):
    gone = [message for message in quoted("lsg and the scripts") if not any(message in template for template in templates)]
    assert not gone


def test_a_changed_message_would_be_missed(templates):
    for message in ("in use by someone; wait", f"mesh: {HOLE} fits {HOLE} devices"):
        assert not any(message in template for template in templates)
