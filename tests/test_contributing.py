"""The additions of CONTRIBUTING.md, applied to a copy of the code, are known and work."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
TRIED = """
from converters.families import FAMILIES
from lsg_jax.eval.registry import find_benchmark
from lsg_jax.eval.benchmark import Item
from lsg_jax.methods.registry import METHODS
assert FAMILIES["my_vlm"].canonical_name("llm.lm_head.weight") == "language_model.lm_head.weight"
assert METHODS["shift"].trains and METHODS["shift"]().settings.size == 1.0
benchmark = find_benchmark("my_bench", "x.parquet")
assert benchmark.match(Item("1", "?", ("yes",)), "Yes, it is.", "paper").score == 1.0
"""


def test_the_additions_apply_and_work(tmp_path):
    for folder in ("lsg_jax", "converters", "tests/sinks"):
        files = lambda folder, names: {n for n in names if "." in n and not n.endswith(".py")} | {"__pycache__"}
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=files)
    diffs = re.findall(r"^```diff\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(diffs) == 4
    for diff in diffs:
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    criterion = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/sinks/test_criteria.py", "-k", "relative_norm"]
    for arguments in (["-c", TRIED], criterion):
        subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, check=True)


def test_hooks_are_the_checks_of_ci():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    checks = (ROOT / ".ci" / "run").read_text().splitlines()
    for hook in local["hooks"]:
        assert hook["language"] == "system" and any(line.startswith(hook["name"]) for line in checks)


def test_ci_is_one_script_that_shellcheck_passes():
    binary = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    subprocess.run([binary, ROOT / ".ci" / "run"], check=True)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["ci"]["steps"][-1] == {"run": ".ci/run"} and os.access(ROOT / ".ci" / "run", os.X_OK)


def test_issue_forms_are_whole():
    for name in ("bug", "feature"):
        form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
        ids = [field["id"] for field in form["body"]]
        assert form["name"] and form["description"] and len(set(ids)) == len(ids)
        assert all(field["attributes"]["label"] for field in form["body"])
