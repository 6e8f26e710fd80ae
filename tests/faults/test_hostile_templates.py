"""Chat templates are foreign code: none goes on for ever, takes all memory or reaches the process that asks."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hostile_templates import ENDLESS
from hypothesis import given, settings
from hypothesis import strategies as st

from lsg_jax.data.template_process import TemplateError, TemplateProcess

MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}
SMALL = {"seconds": 1, "memory": 256 << 20}
FEW = ("classes", "double by ~", "extends", "loops", "nested, in json", "power", "repeat", "width")


@pytest.fixture(scope="module")
def process():
    made = TemplateProcess(**SMALL)
    yield made
    made.close()


def check_ends(process, what):
    try:
        text = process.render(ENDLESS[what], MESSAGES)
    except TemplateError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert len(text) < 64 << 20
    assert process.render("{{ messages[0].content }}", MESSAGES) == "hi"


@pytest.mark.parametrize("what", FEW)
def test_no_template_goes_on_for_ever(process, what):
    check_ends(process, what)


@pytest.mark.soak
@pytest.mark.parametrize("what", sorted(ENDLESS))
def test_no_template_goes_on_for_ever_long(process, what):
    check_ends(process, what)


def test_threads_get_their_own_texts(process):
    found = {}
    ask = lambda i: found.update({i: process.render("{{ x }}" * 500, {"x": i})})
    threads = [threading.Thread(target=ask, args=[i]) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: str(i) * 500 for i in range(16)}


def test_the_child_ends_with_its_parent_and_ignores_ctrl_c(process):
    """Ctrl-C reaches all processes of a terminal; a parent that is killed can close nothing."""
    assert process.render("{{ '\ud800 \\u2028' }}", {}) == "\ud800 \u2028"
    os.kill(process._child.pid, signal.SIGINT)
    assert process.render("a", {}) == "a"
    code = (
        "import os, signal; from lsg_jax.data.template_process import RENDERER; RENDERER.render('a', {});"
        "print(RENDERER._child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60)
    gone = threading.Event()
    for _ in range(100):
        try:
            os.kill(int(done.stdout), 0)
            zombie = " Z " in Path(f"/proc/{int(done.stdout)}/stat").read_text()
        except OSError:
            break
        if zombie:
            break
        gone.wait(0.1)
    else:
        raise AssertionError("the child lives on")


TEXTS = st.text(alphabet=st.sampled_from("{}%#-ab '\"[]()|~+*0123\n.:if for in set endfor else"), max_size=60)


SHARED = TemplateProcess(**SMALL)


def check_any(source):
    try:
        assert isinstance(SHARED.render(source, MESSAGES), str)
    except TemplateError as error:
        assert str(error)


test_any_source_gives_a_text_or_an_error = given(TEXTS)(check_any)
test_any_source_gives_a_text_or_an_error_long = pytest.mark.soak(
    settings(settings.get_profile("soak"))(given(TEXTS)(check_any))
)
