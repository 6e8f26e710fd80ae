"""Chat templates are foreign code: none goes on for ever or takes all memory."""

import random

import pytest
from hostile_templates import ENDLESS
from hypothesis import given, settings
from hypothesis import strategies as st

from lsg_jax.data.template_sandbox import compile_template, render_template

soak = lambda strategy, check: pytest.mark.soak(settings(settings.get_profile("soak"))(given(strategy)(check)))


@pytest.mark.soak
@pytest.mark.parametrize("what", sorted(ENDLESS))
def test_no_template_goes_on_for_ever_long(what):
    check_ends(what)


@pytest.mark.parametrize("what", sorted(ENDLESS))
def test_no_template_goes_on_for_ever(what, monkeypatch):
    monkeypatch.setattr("lsg_jax.data.template_sandbox.BUDGET", 30_000)
    check_ends(what)


def check_ends(what):
    try:
        text = render_template(compile_template(ENDLESS[what]), {"messages": [{"role": "user", "content": "hi"}]})
    except Exception as error:  # as `ChatTemplate` catches them
        assert str(error)
    else:
        assert what == "power" and len(text) < 100


PIECES = [
    "{{ messages }}", "{{ n.a }}", "{{ n.a|tojson }}", "{{ n.a|string|length }}", "{{ n.a == n.a[:] }}",
    "{{ '%s %s' % (n.a, n.a) }}", "{{ n.a|sort }}", "{{ n.a|first }}", *("{% set n.a = " + made + " %}" for made in (
        "n.a ~ n.a", "[n.a, n.a]", "n.a * 9", "n.a + n.a", "n.a|list", "n.a|join('xy')", "n.a|replace('a', 'aaaa')",
        "{'k': n.a, 'l': n.a}", "range(9000)|list", "n.a|map('string')|list", "n.a|upper")),
]  # fmt: skip
PROGRAM = st.recursive(
    st.lists(st.sampled_from(PIECES), max_size=4).map("".join),
    lambda inner: st.one_of(
        inner.map(lambda body: "{% for x in range(999) %}" + body + "{% endfor %}"),
        inner.map(lambda body: "{% set b %}" + body + "{% endset %}{% set n.a = b %}"),
        inner.map(lambda body: "{% filter trim %}" + body + "{% endfilter %}"),
        st.tuples(inner, inner).map("".join),
    ),
    max_leaves=5,
)


def check_program(program):
    before = random.getstate()
    try:
        text = render_template(compile_template("{% set n = namespace(a='ab') %}" + program), {"messages": [{"role": "user"}]})
    except Exception as error:
        assert not isinstance(error, MemoryError)
    else:
        assert len(text) < 2_000_000
    assert random.getstate() == before


@pytest.fixture
def small_budget(monkeypatch):
    monkeypatch.setattr("lsg_jax.data.template_sandbox.BUDGET", 30_000)


@pytest.mark.usefixtures("small_budget")
def test_any_template_ends():
    given(PROGRAM)(check_program)()


test_any_template_ends_long = soak(PROGRAM, check_program)
