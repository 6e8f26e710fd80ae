"""`lsg config`: every key of `--set`, from the dataclasses alone."""

import argparse
import ast
import dataclasses
import json
import tomllib
from pathlib import Path

import pytest

from lsg_jax.cli import main, parser
from lsg_jax.cli.config import READS, keys
from lsg_jax.config.describe import attributes_of, keys_of
from lsg_jax.config.ranges import Table
from lsg_jax.errors import ConfigError
from lsg_jax.methods.registry import METHODS
from lsg_jax.run_config import RunConfig, load_run_config, method_tables, run_config, schema

KEYS = {key.name: key for key in keys()}
TABLES = [
    schema(),
    *(type(getattr(RunConfig("m", "o"), name)) for name in ("data", "train", "eval", "mesh")),
    *method_tables().values(),
]


def leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict) and value and prefix + name != "eval.benchmarks":
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_key_has_a_type_a_default_and_a_meaning():
    for key in KEYS.values():
        assert key.type and key.default and key.meaning.endswith((".", "...")) and len(key.meaning) > 12, key
        assert key.values or key.type in ("text", "bool", "table", "table of text"), key


def test_every_field_has_one_line_in_its_docstring_and_no_other_has():
    for table in TABLES:
        fields = {field.name for field in dataclasses.fields(table)}
        assert attributes_of(table).keys() | method_tables().keys() == fields | method_tables().keys(), table


def test_these_are_the_keys_of_a_whole_configuration():
    tree = run_config({"model": "m", "output": "o", "sinks": {}, "eval": {"mesh": {}}}, where="x").as_dict()
    assert set(leaves(tree)) == KEYS.keys() - {"sinks", "eval.mesh"}


@pytest.mark.parametrize(
    "key", [key for key in KEYS.values() if key.default not in ("required", "unset")], ids=lambda key: key.name
)
def test_each_default_is_what_is_used_and_can_be_set(key, tmp_path):
    assert tomllib.loads(f"x = {key.default}")
    file = tmp_path / "c.toml"
    file.write_text('model = "m"\noutput = "o"\n')
    assert load_run_config(file, [f"{key.name}={key.default}"]) is not None
    value = load_run_config(file, ["sinks.massive_ratio=1000.0", "eval.mesh.data=1"]).as_dict()
    for name in key.name.split("."):
        value = value[name]
    assert value == tomllib.loads(f"x = {key.default}")["x"]


def test_texts_to_choose_from_are_all_taken(tmp_path):
    file = tmp_path / "c.toml"
    # a method that takes whole conversations, and a routing that can be trained
    file.write_text('model = "m"\noutput = "o"\nmethod = "full"\ndiysink.routing = "mlp"\n')
    for key in KEYS.values():
        if key.type == "text" and key.values:
            for choice in key.values.split(", "):
                load_run_config(file, [f"{key.name}={choice}"])
            with pytest.raises(ConfigError):
                load_run_config(file, [f"{key.name}=nothing"])


def commands():
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices


def test_each_command_with_set_says_what_it_reads():
    assert set(READS) == {name for name, sub in commands().items() if any(a.dest == "overrides" for a in sub._actions)}
    known = {name.partition(".")[0] for name in KEYS} | {"TRAINED", "UNTRAINED"}
    assert all(set(names) <= known for names in READS.values())
    assert {"train.epochs", "gate.layers", "lora.rank"} <= {key.name for key in keys("train")}
    assert not {"train.epochs", "data.records", "gate.layers"} & {key.name for key in keys("sweep")}
    assert {"pai.alpha", "fixed.layers"} <= {key.name for key in keys("eval")} and "lora.rank" not in {
        key.name for key in keys("eval")
    }
    assert next(key for key in keys("eval") if key.name == "method").values == ", ".join(METHODS)


def test_the_table_and_json_hold_the_same(capsys):
    assert main(["config", "eval"]) == 0
    table = capsys.readouterr().out
    assert main(["config", "eval", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [key.name for key in keys("eval")]
    first = [line.split()[0] for line in table.splitlines() if not line.startswith(" ")]
    assert first == ["key", *(row["name"] for row in rows)]
    assert "[1, 1e6] or auto" in table and "\x1b" not in table and not any(line.endswith(" ") for line in table.splitlines())


def test_a_table_in_another_and_lines_over_several_lines():
    @dataclasses.dataclass(frozen=True)
    class Inner(Table):
        """Inner.

        Attributes:
            a: the first,
                and more: of it.
            b: the second.

        Later text: not a field.
        """

        a: int = 1
        b: tuple[float, ...] = (1.5,)

    found = {key.name: (key.type, key.default, key.meaning) for key in keys_of(Inner, "x.")}
    assert found == {"x.a": ("int", "1", "the first, and more: of it."), "x.b": ("list of float", "[1.5]", "the second.")}


def test_comments_beside_fields_are_no_second_copy():
    """What a key means stands in the docstring."""
    root = Path(__file__).parent.parent / "lsg_jax"
    for path in [root / "config" / "run.py", root / "config" / "gates.py", *sorted((root / "methods").glob("*.py"))]:
        text = path.read_text().splitlines()
        for node in ast.walk(ast.parse("\n".join(text))):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Table" for base in node.bases):
                fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
                assert not any("  # " in text[each.end_lineno - 1] for each in fields), path
