"""Numbers: every one has a range, and one outside it is refused by name before anything is loaded."""

import argparse
import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsg_jax.cli import main, parser
from lsg_jax.errors import ConfigError
from lsg_jax.run_config import RunConfig, run_config, schema

BAD = ("nan", "inf", "-inf", "1e30", "-1e30", str(10**30), str(-(10**30)), "9" * 5000, "x", "", "1,5", "0x10")


def commands(top, name=()):
    """Every command's parser, by its words."""
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield (*name, word), below
                yield from commands(below, (*name, word))


NUMBERS = [
    pytest.param([*words, action.option_strings[0]], id=" ".join((*words, action.option_strings[0])))
    for words, sub in commands(parser())
    for action in sub._actions
    if getattr(action.type, "__qualname__", "").startswith("number_option")
]


def test_every_number_of_the_command_line_has_a_range():
    assert len(NUMBERS) >= 35
    for words, sub in commands(parser()):
        for action in sub._actions:
            assert action.type not in (int, float), f"{words} {action.option_strings}: give it a range by number_option"


@pytest.mark.parametrize("option", NUMBERS)
def test_a_number_outside_its_range_is_refused_by_name(option, capsys):
    *words, name = option
    for value in BAD:
        try:
            code = main([*words, f"{name}={value}"])
        except SystemExit as usage:
            code = usage.code
            assert f"argument {name}: expected " in capsys.readouterr().err
        else:
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and error.startswith(f"lsg {' '.join(words)}: {name} is "), error
            assert len(error) < 200
        assert code in (2, 65), value


def fields(cls, name=""):
    """The dotted name of every field of the configuration."""
    from lsg_jax.config.ranges import field_types, without_none

    for field, hint in field_types(cls).items():
        yield name + field
        inner = without_none(hint)
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from fields(inner, f"{name}{field}.")


FIELDS = sorted(fields(schema()))

NUMBER = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, -1, 0, 1, 1e30, 10**30, -(10**30), 10**400, 2**31, 2**63, -0.0, 5e-324]),
    st.integers(),
    st.floats(),
    st.integers(min_value=5000, max_value=6000).map(lambda digits: 16**digits),  # which has no decimal form in Python
)
LEAF = st.one_of(NUMBER, st.booleans(), st.none(), st.text(max_size=8), st.just("a\0b"), st.just("\ud800"), st.dates())
VALUE = st.recursive(LEAF, lambda of: st.one_of(st.lists(of, max_size=3), st.dictionaries(st.text(max_size=4), of, max_size=3)))


def check(field, value):
    """A value in a field gives a configuration that can be written and read again, or an error that names the field."""
    tree = {"model": "m", "output": "o"}
    *tables, leaf = field.split(".")
    place = tree
    for table in tables:
        place = place.setdefault(table, {})
    place[leaf] = value
    try:
        made = run_config(tree, where="c.toml")
    except ConfigError as error:
        text = str(error)
        assert text.startswith("c.toml: ") and len(text) < 1000
        assert leaf in text or field in text or tables[-1:] == ["sinks"], text
        return
    assert isinstance(made, RunConfig)
    assert run_config(made.as_dict(), where="again") == made


test_any_value_in_any_field = given(st.sampled_from(FIELDS), VALUE)(check)
test_any_value_in_any_field_long = pytest.mark.soak(
    settings(settings.get_profile("soak"))(given(st.sampled_from(FIELDS), VALUE)(check))
)


@pytest.mark.parametrize("field", FIELDS)
def test_numbers_that_fit_no_field(field):
    for value in (math.nan, math.inf, -math.inf, 10**30, 16**5000, [[[[math.nan]]]], {"a": {"b": 10**30}}):
        check(field, value)


@pytest.mark.parametrize("text", ["seed = 0x" + "f" * 5000, "seed = " + "9" * 5000, "seed = " + "[" * 5000, "seed = nan"])
def test_toml_that_python_cannot_hold(text, tmp_path, capsys):
    path = tmp_path / "c.toml"
    path.write_text(f'model = "m"\noutput = "o"\n{text}\n')
    for arguments in ([str(path)], [str(path), "--set", text]):
        assert main(["train", *arguments]) == 65
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and len(error) < 300 and ("seed" in error or "TOML" in error), error
