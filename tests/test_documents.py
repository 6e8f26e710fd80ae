"""What the pages say about commands stays true: each block is run or says why not, and every `lsg` line is one."""

import argparse
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml

import lsg_jax
from lsg_jax.cli import parser
from lsg_jax.run_config import load_run_config

ROOT = Path(__file__).parent.parent
CARD = ROOT / "lsg_jax" / "embedded" / "checkpoint" / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("tpu/*.md")), CARD]
FENCE = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
KINDS = {"sh", "text", "json", "python", "toml", "diff"}

spec = importlib.util.spec_from_file_location("run_commands", ROOT / "docs" / "run_commands.py")
assert spec and spec.loader
run_commands = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_commands)


def faults(text, run):
    """What is wrong with the blocks of a page; `run`: whether the script runs those that have no mark."""
    blocks = list(run_commands.BLOCK.finditer(text))
    reasons = [block["reason"] for block in blocks if block["reason"]]
    fences = list(FENCE.finditer(text))
    found = [f"a block of kind {fence['kind']!r}" for fence in fences if fence["kind"] not in KINDS]
    if len(blocks) != sum(fence["kind"] == "sh" for fence in fences):
        found.append("a block of commands that is not at the start of a line")
    if len(reasons) != len(re.findall(r"<!-- *not[ -]run", text)):
        found.append("a mark without a reason, or without a block of commands right below it")
    if not run:
        found += [f"neither run nor marked: {block['commands']}" for block in blocks if not block["reason"]]
    return found


def run_by_ci():
    """The pages whose commands `.ci/run` runs."""
    (line,) = re.findall(r"docs/run_commands\.py (.*)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    return {ROOT / name for name in line.split()}


def test_every_block_of_commands_is_run_or_says_why_not():
    ran = run_by_ci()
    assert ran >= {ROOT / "README.md", ROOT / "docs" / "tutorial.md"} and ran <= set(PAGES)
    assert {page.name: found for page in PAGES if (found := faults(page.read_text(encoding="utf-8"), page in ran))} == {}


@pytest.mark.parametrize(
    ("text", "run", "right"),
    [
        ("```sh\nlsg\n```\n", True, True),
        ("```sh\nlsg\n```\n", False, False),
        ("<!-- not run: no network -->\n```sh\nlsg\n```\n", False, True),
        ("<!-- not run: no network -->\n\n```sh\nlsg\n```\n", True, False),
        ("<!-- not run: -->\n```sh\nlsg\n```\n", True, False),
        ("<!-- not run -->\n```sh\nlsg\n```\n", True, False),
        ("<!-- not run: no network -->\n```text\nlsg\n```\n", True, False),
        ("```bash\nlsg\n```\n", True, False),
        ("```sh not-run\nlsg\n```\n", True, False),
    ],
)
def test_a_block_without_a_reason_is_found(text, run, right):
    assert (not faults(text, run)) == right


@cache
def commands():
    """Name -> parser of each command; of actions of a command, as `gates export`, too."""
    found, pending = {}, [parser()]
    while pending:
        one = pending.pop()
        found[one.prog.removeprefix("lsg").strip()] = one
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                pending += action.choices.values()
    return found


def lsg_lines(text):
    """Arguments of each `lsg` command in the lines of a text, run or not; outputs that begin with the word are none.

    What scripts of tpu/ run on the hosts of a slice, behind ` -- `, is a command too.
    """
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s&&\s+|(?:;|\bdo)\s+(?=lsg )", line.strip().lstrip("#!$ ")):
            if (words := part.split())[:1] == ["lsg"] and words[1:2] and words[1] in commands():
                yield shlex.split(re.split(r" 2?> ", part)[0], comments=True)[1:]
        if on_hosts := re.search(r"\btpu/\w+\.sh .* -- (.*)", line):
            yield shlex.split(on_hosts[1], comments=True)


def documented():
    """(file, arguments) of each `lsg` command in a block of a page, or in a configuration's comments."""
    for page in PAGES:
        for fence in FENCE.finditer(page.read_text(encoding="utf-8")):
            yield from ((page.name, arguments) for arguments in lsg_lines(fence["text"]))
    for config in sorted(ROOT.glob("configs/*.toml")):
        comments = re.findall(r"^#.*\n", config.read_text(encoding="utf-8"), re.MULTILINE)
        yield from ((config.name, arguments) for arguments in lsg_lines("".join(comments)))


def test_commands_of_the_pages_are_commands():
    found = list(documented())
    assert len(found) > 60 and {name for name, _ in found} >= {"README.md", "tutorial.md", "scaling.md", "smolvlm2_500m.toml"}
    for name, arguments in found:
        parsed = parser().parse_args(arguments)
        for argument in arguments:
            assert not argument.startswith(("configs/", "docs/")) or (ROOT / argument).exists(), f"{name}: {argument}"
        config = getattr(parsed, "config", None)
        if config is not None and (ROOT / config).exists():
            overrides = [re.sub(r"\$\w+", "1", text) for text in getattr(parsed, "overrides", ())]
            load_run_config(ROOT / config, overrides)  # an unknown or impossible setting is an error


def test_a_stale_command_is_noticed():
    text = (
        "for x in 1; do lsg look M --image a \\\n --prompt 'do; b' > f\ndone\nlsg against base: 1 better\n$ lsg look M --dim a"
    )
    first, second = lsg_lines(text)
    assert parser().parse_args(first).prompt == "do; b"
    with pytest.raises(SystemExit):
        parser().parse_args(second)


def test_options_in_sentences_exist():
    """`lsg convert --max-pixels` in a sentence is no whole command, but the command and its options exist."""
    count = 0
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for span in re.findall(r"`lsg ([a-z][^`]*)`", text):
            words = span.replace("\n", " ").split()
            name = " ".join(words[:2]) if " ".join(words[:2]) in commands() else words[0]
            assert name in commands(), f"{page.name}: lsg {span}"
            known = commands()[name]._option_string_actions
            for word in words:
                assert not word.startswith("--") or word.partition("=")[0] in known, f"{page.name}: lsg {span}"
            count += 1
    assert count > 60


def test_scripts_of_the_pages_exist():
    for page in PAGES:
        for name in re.findall(r"\bpython ((?:benchmarks|docs|tests|recipes)/[\w/]+\.py)", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_links_of_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", FENCE.sub("", page.read_text(encoding="utf-8"))):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    for work in (cited, *cited["references"]):  # every author once, says the schema: two Kims need first names
        names = [str(author) for author in work["authors"]]
        assert len(set(names)) == len(names)
    assert cited["version"] == lsg_jax.__version__ and cited["license"] == "Apache-2.0"


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
