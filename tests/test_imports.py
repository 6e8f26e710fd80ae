"""Who may import whom (see the table), and that importing the package does nothing else."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lsg_jax"

# module or package below lsg_jax -> what it may import from lsg_jax, besides itself
FOUNDATION = {"errors", "types", "config", "activations", "stopping", "progress", "digest", "files", "json_files", "installed"}
FOUNDATION |= {"memory"}
BELOW_VLM = FOUNDATION | {"sinks", "gating", "sharding", "model", "methods", "data", "checkpoint"}
OPENED = BELOW_VLM | {"answer_programs", "vlm", "run_config", "hub", "opening"}
MAY_IMPORT = {
    "errors": set(),
    "types": set(),
    "activations": set(),
    "stopping": {"errors"},
    "progress": set(),
    "digest": set(),
    "files": {"errors"},
    "json_files": {"errors", "digest", "files"},
    "installed": {"errors"},
    "config": {"errors"},
    "memory": {"errors"},
    "sinks": FOUNDATION,
    "gating": FOUNDATION | {"sinks"},
    "sharding": FOUNDATION,
    "model": FOUNDATION | {"sinks", "gating", "sharding"},
    "methods": FOUNDATION | {"sinks", "gating", "sharding", "model"},
    "run_config": FOUNDATION | {"methods"},
    "data": FOUNDATION,
    "checkpoint": FOUNDATION,
    "hub": FOUNDATION | {"checkpoint"},
    "model_inputs": BELOW_VLM,
    "answer_programs": FOUNDATION | {"methods", "model"},
    "vlm": BELOW_VLM | {"answer_programs", "model_inputs", "look"},  # `vlm.look` imports it when it is called
    "web": {"errors", "stopping"},
    "look": BELOW_VLM | {"vlm", "report", "web"},
    "opening": BELOW_VLM | {"vlm", "run_config", "hub"},
    "train": OPENED,
    "eval": OPENED,
    "analysis": OPENED | {"train", "eval", "look"},
    "serve": OPENED | {"eval", "web"},
    "plan": OPENED | {"train", "eval", "analysis", "look"},
    "report": FOUNDATION | {"gating", "checkpoint", "data", "eval"},  # see test_report_reads_files_and_runs_no_model
    "inspection": FOUNDATION | {"gating", "checkpoint", "data", "hub"},
    "sharing": OPENED | {"eval"},
    "api": FOUNDATION | {"vlm", "opening"},
    "distributed": {"errors"},
}
ANYTHING = {"cli", "quickstart", "__init__", "__main__"}


def imported(path):
    """Names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name):
    """`lsg_jax.model.layers.Linear` -> `model`; None outside the package."""
    parts = name.split(".")
    return parts[1] if parts[0] == "lsg_jax" and len(parts) > 1 else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = set(imported(path))
    tops = {n.split(".")[0] for n in names}
    assert not tops & {"torch", "recipes"}
    if own != "cli":
        assert "converters" not in tops
    if own not in ANYTHING:
        assert {room(n) for n in names} - {None, own} <= MAY_IMPORT[own]
    if own != "checkpoint":
        assert not {n for n in names if n.split(".")[0] in ("orbax", "tensorstore")}


@pytest.mark.parametrize("path", sorted((ROOT / "converters").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_converters_need_nothing_outside_the_wheel(path):
    assert not {n.split(".")[0] for n in imported(path)} & {"recipes", "tests", "benchmarks"}


def test_the_wheel_holds_no_training_recipe():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = setuptools.find_namespace_packages(str(ROOT), **settings)
    assert {"lsg_jax", "lsg_jax.embedded.checkpoint", "converters"} <= set(packages)
    assert {name.split(".")[0] for name in packages} == {"lsg_jax", "converters"}
    code = [path.name for path in (PACKAGE / "embedded").rglob("*.py")]
    assert not code, "lsg_jax/embedded holds the checkpoint and gates alone"


def modules_behind(name):
    """All modules of lsg_jax that importing the package `lsg_jax.<name>` leads to, itself included."""
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in PACKAGE.rglob("*.py")}
    found, left = set(), {module for module in files if f"{module}.".startswith(f"lsg_jax.{name}.")}
    while left:
        module = left.pop()
        found.add(module)
        names = [name.split(".") for name in imported(files[module])]
        around = {".".join(parts[:end]) for parts in names for end in range(2, len(parts) + 1)}  # packages run as well
        left |= around & files.keys() - found
    return found


def test_report_reads_files_and_runs_no_model():
    """Of `gating` it needs the tables of groups, of `eval` the benchmarks: neither leads to a model."""
    behind = modules_behind("report")
    assert {"lsg_jax.eval.registry", "lsg_jax.gating.keys"} <= behind
    assert not {room(module) for module in behind} & {"model", "vlm", "methods", "baselines", "opening", "train", "analysis"}
    assert "model" in {room(module) for module in modules_behind("analysis")}


def test_import_is_quick_to_finish_and_changes_nothing():
    code = """
import logging, os, sys, signal
import jax  # which sets variables of its own
before = (dict(os.environ), logging.getLogger().level, signal.getsignal(signal.SIGTERM))
import lsg_jax, lsg_jax.cli, converters.convert
assert before == (dict(os.environ), logging.getLogger().level, signal.getsignal(signal.SIGTERM))
for heavy in ("torch", "transformers", "tensorflow", "orbax", "tensorstore", "tensorflow_datasets", "grain", "matplotlib"):
    assert heavy not in sys.modules, heavy
assert not jax._src.xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
