"""The page of `lsg explore` in Chromium, by Playwright, and the page that it saves; answers are made up, see explored.py."""

import base64
import io
import os
import re
import threading
import time

import numpy as np
import pytest
import uvicorn
from broken_images import file_of
from explored import HEADS, HOSTILE, LAYERS, TELLING, MadeAsker, made_look
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from report import chromium

from lsg_jax.errors import InputError
from lsg_jax.look.page import notebook_html, page_html
from lsg_jax.look.server import Explorer, make_app
from lsg_jax.web import bind

PICTURE = Image.effect_noise((60, 45), 60).convert("RGB")


@pytest.fixture(scope="module")
def browser():
    if os.environ.get("LSG_NO_BROWSER") == "1":
        pytest.skip("LSG_NO_BROWSER=1: the page is not tested in a browser")
    found = chromium.find()
    assert found, "apt-get install chromium; or set LSG_NO_BROWSER=1 to leave out the tests in a browser"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def served():
    """The address of a running server, and the stand-in that answers."""
    asker, listening = MadeAsker(), bind(0)
    app = make_app(Explorer(asker, name="tiny <model>"), "secret")
    running = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/?token=secret", asker
    running.should_exit = True
    thread.join()


@pytest.fixture
def page(browser):
    """A tab; whatever it complains about, or asks of another host, fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    tab, problems = context.new_page(), []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("dialog", lambda dialog: (problems.append("a dialog"), dialog.dismiss()))
    tab.on("request", lambda request: None if re.match(r"http://127\.0\.0\.1:|data:|file:|blob:", request.url)
           else problems.append(request.url))  # fmt: skip
    tab.problems = problems
    tab.set_default_timeout(10_000)
    yield tab
    assert not problems
    context.close()


def ask(page, url):
    """Opens the page and asks about the first example."""
    page.goto(url)
    page.locator(".examples button").first.click()
    expect(page.locator(".pane")).to_have_count(1)
    idle(page)


def idle(page):
    expect(page.locator(".status")).to_be_empty()


def save(page):
    """The saved page, as a download."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    expect(page.locator(".error")).to_be_empty()
    return download.value


def pixels(page):
    """The picture as it is drawn, uint8 [height, width, 4]."""
    page.wait_for_timeout(50)
    url = page.locator(".pictures canvas").nth(0).evaluate("canvas => canvas.toDataURL()")
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_ask_and_choose(page, served):
    url, asker = served
    asker.asked.clear()
    ask(page, url)
    assert asker.asked[0][0] == "base" and len(asker.asked) == 1
    expect(page.locator(".answer")).to_have_text(HOSTILE)  # as text
    expect(page.locator(".warnings")).to_have_text("a warning, with <b>markup</b>")
    tokens = page.locator(".tokens button")
    expect(tokens).to_have_text(["␣", "a", " <b>cat</b>"])
    expect(tokens.nth(1)).to_have_attribute("aria-pressed", "true")  # the first that has a text
    before = pixels(page)
    tokens.nth(2).click()
    expect(tokens.nth(2)).to_have_attribute("aria-pressed", "true")
    assert (pixels(page) != before).any()
    page.get_by_label("Without sinks").check()
    expect(page.locator(".over-neutral")).to_be_hidden()
    page.get_by_label("Over neutral").check()
    expect(page.locator(".over-neutral")).to_be_visible()


def test_by_keyboard(page, served):
    ask(page, served[0])
    page.locator("h1").click()
    layer, head = page.locator("[name=layer] + output"), page.locator("[name=head] + output")
    expect(layer).to_have_text(f"{TELLING} of {LAYERS - 1}")
    for _ in range(LAYERS):
        page.keyboard.press(".")
    expect(layer).to_have_text(f"{LAYERS - 1} of {LAYERS - 1}")
    page.keyboard.press(",")
    page.keyboard.press("]")
    expect(layer).to_have_text(f"{LAYERS - 2} of {LAYERS - 1}")
    expect(head).to_have_text(f"0 of {HEADS - 1}")
    page.keyboard.press("m")
    expect(page.locator("[value=no_sinks]")).to_be_checked()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".tokens button").first).to_have_attribute("aria-pressed", "true")
    page.locator("[name=layer]").focus()
    page.keyboard.press("Home")
    expect(layer).to_have_text(f"0 of {LAYERS - 1}")
    page.locator(".pictures canvas").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".readout")).to_contain_text("Visual token 0, a V-sink")
    page.set_viewport_size({"width": 1280, "height": 300})
    page.locator(".tokens button").first.focus()
    before = page.evaluate("scrollY")
    page.keyboard.press("ArrowDown")  # scrolls
    page.wait_for_function("before => scrollY > before", arg=before)
    expect(layer).to_have_text(f"0 of {LAYERS - 1}")
    page.locator("textarea").fill("vml[].,")  # a question is no command
    expect(page.locator("[value=no_sinks]")).to_be_checked()


def test_marks_and_numbers(page, served):
    ask(page, served[0])
    marked = pixels(page)
    page.get_by_text("V-sinks: 1").click()
    without_v = pixels(page)
    changed = np.argwhere((marked != without_v).any(-1))
    height, width = marked.shape[:2]
    assert len(changed) and changed.max(0)[0] < height / 4 and changed.max(0)[1] < width / 4  # token 0, and nothing else
    page.get_by_text("L-sinks here: 1").click()
    changed = np.argwhere((without_v != pixels(page)).any(-1))
    assert width / 4 <= changed.min(0)[1] and changed.max(0)[1] < width / 2  # token 1
    page.locator("[name=layer]").focus()
    page.keyboard.press("Home")
    expect(page.locator(".l-count")).to_have_text("L-sinks here: 0")
    box = page.locator(".pictures canvas").bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    readout = page.locator(".readout")
    expect(readout).to_have_text(
        "Visual token 0, a V-sink · attention 40 % · dim_abs 60.5 (V-sink from 33) · norm 7.5 (L-sink from 100)"
    )
    page.mouse.move(box["x"] + box["width"] - 5, box["y"] + box["height"] - 5)
    expect(readout).to_contain_text("Visual token 15, no sink")


def test_chart(page, served):
    ask(page, served[0])
    chart = page.locator(".chart canvas")
    chart.click(position={"x": 38 + 24 * 2 + 10, "y": 14 + 24 * 1 + 10})
    expect(page.locator("[name=layer] + output")).to_have_text(f"1 of {LAYERS - 1}")
    expect(page.locator("[name=head] + output")).to_have_text(f"2 of {HEADS - 1}")
    expect(page.locator(".chart-text")).to_contain_text("layer 1, head 2:")
    page.get_by_label("its sinks").check()
    expect(page.locator(".chart-text")).to_have_text(re.compile(r"layer 1, head 2: 40 % on sinks"))
    chart.click(position={"x": 38 + 24 * 2 + 10, "y": 14 + 24 * 1 + 10})  # again: all heads
    expect(page.locator("[name=head] + output")).to_have_text("all")


def test_sliders_answer_again_beside_the_base_model(page, served):
    url, asker = served
    ask(page, url)
    asker.asked.clear()
    page.get_by_text("Scale keys by layer").click()
    page.get_by_label("All layers, V-sinks").focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    expect(page.locator(".pane")).to_have_count(2)
    idle(page)
    assert [entry[:2] for entry in asker.asked] == [("coefficients", [[0.85, 1]] * LAYERS)]  # once, after the last move
    expect(page.locator("h2")).to_have_text(["Base", "Coefficients"])
    for pane, factor in enumerate((1, 0.85)):
        drawn = (look := made_look([PICTURE], factor=factor)).on_picture(look.values("raw", 1, TELLING))
        text = page.locator(".most").nth(pane).text_content()
        times = float(re.fullmatch(r"brightest place: ([\d.]+) . an even spread", text)[1])
        assert times == pytest.approx(drawn.max() / drawn.mean(), rel=0.01)
    page.get_by_label("Layer 2, other visual tokens").focus()
    page.keyboard.press("End")
    page.wait_for_timeout(400)
    idle(page)
    assert asker.asked[-1][1][2] == [0.85, 2] and len(asker.asked) == 2
    with page.expect_request(re.compile("/ask")) as request:
        for position in ("Home", "End", "Home", "End", "Home"):
            page.keyboard.press(position)
            page.wait_for_timeout(300)
            idle(page)
    assert len(request.value.post_data_json["gone"]) == 1 and len(request.value.post_data_json["shown"]) == 2
    save(page)  # what is shown is held, however many answers it replaced
    page.locator("[name=right]").select_option("Nothing")
    expect(page.locator(".pane")).to_have_count(1)
    save(page)
    assert len(asker.asked) == 7  # closing a side asks nothing


def test_what_is_chosen_while_a_question_compiles_is_done_after_it(page, served):
    url, asker = served
    page.goto(url)
    asker.waits, asker.asked[:] = threading.Event(), []
    try:
        page.locator(".examples button").first.click()
        expect(page.locator(".status")).to_contain_text("Compiling a program")
        page.get_by_text("Scale keys by layer").click()
        page.get_by_label("All layers, V-sinks").press("ArrowLeft")
        page.wait_for_timeout(300)
        page.locator("[name=left]").select_option("Coefficients")
        page.locator("[name=left]").select_option("Base")
    finally:
        asker.waits.set()
    expect(page.locator("h2")).to_have_text(["Base", "Coefficients"])
    idle(page)
    assert [entry[0] for entry in asker.asked] == ["base", "coefficients"]
    asker.waits = None


def test_the_old_answer_lives_on_after_a_failed_question(page, served):
    url, asker = served
    ask(page, url)
    question = page.locator(".asked").text_content()
    asker.fails = InputError("the prompt is too long; see `lsg`")
    page.locator("textarea").fill("Another?")
    page.keyboard.press("Enter")
    expect(page.locator(".error")).to_have_text("the prompt is too long; see lsg")
    asker.fails = None
    expect(page.locator(".asked")).to_have_text(question)
    save(page)
    page.locator("[name=right]").select_option("Coefficients")
    expect(page.locator(".pane")).to_have_count(2)
    assert asker.asked[-1][3] == question
    expect(page.locator(".asked")).to_have_text(question)
    page.locator("textarea").press("Enter")
    expect(page.locator(".asked")).to_have_text("Another?")
    idle(page)


def test_saved_page_needs_no_server(page, served, tmp_path):
    ask(page, served[0])
    page.get_by_label("Without sinks").check()
    page.locator("[name=layer]").focus()
    page.keyboard.press("End")
    drawn = pixels(page)
    download = save(page)
    path = tmp_path / download.suggested_filename
    download.save_as(path)
    page.goto(path.as_uri())
    expect(page.locator(".answer")).to_have_text(HOSTILE)
    expect(page.locator("[value=no_sinks]")).to_be_checked()
    expect(page.locator("[name=layer] + output")).to_have_text(f"{LAYERS - 1} of {LAYERS - 1}")
    assert (pixels(page) == drawn).mean() > 0.999
    page.keyboard.press("]")
    expect(page.locator("[name=head] + output")).to_have_text(f"0 of {HEADS - 1}")
    assert path.stat().st_size < 300_000


def test_maps_are_those_of_on_picture(page, tmp_path):
    look = made_look([PICTURE])
    rng = np.random.default_rng(0)
    corner = rng.uniform(-0.2, 0.8, look.box[:, :2].shape)
    boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.5, corner.shape)], 1).astype(np.float32)  # overlapping
    object.__setattr__(look, "box", boxes)
    (tmp_path / "look.html").write_text(page_html(look))
    page.goto((tmp_path / "look.html").as_uri())
    drawn = page.evaluate("""() => {
        const look = new Look(JSON.parse(payload.textContent).looks[0]);
        const values = look.row(look.maps.raw, 1 * look.layers + 2);
        return [Array.from(values), Array.from(onPicture(values, look.box, look.image, 0, 60, 45))];
    }""")
    values = look.values("raw", 1, 2)
    np.testing.assert_allclose(drawn[0], values, atol=values.max() / 500)
    want = look.on_picture(np.array(drawn[0], np.float32), side=60)
    np.testing.assert_allclose(np.reshape(drawn[1], (45, 60)), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heads", [True, False])
def test_single_heads_are_in_the_page_or_not(page, tmp_path, monkeypatch, heads):
    if not heads:
        monkeypatch.setattr("lsg_jax.look.page.HEAD_BYTES", 100)
    (tmp_path / "look.html").write_text(page_html(made_look([PICTURE, PICTURE]), made_look([PICTURE, PICTURE], seed=1)))
    page.goto((tmp_path / "look.html").as_uri())
    expect(page.locator(".pane")).to_have_count(2)
    expect(page.locator(".pictures canvas")).to_have_count(4)
    expect(page.locator(".most").first).to_have_text(re.compile("own scale.*in picture 1, .* in picture 2 "))
    page.keyboard.press("]")
    expect(page.locator("[name=head] + output")).to_have_text(f"0 of {HEADS - 1}" if heads else "all")
    expect(page.get_by_text("means over heads only")).to_have_count(0 if heads else 1)


def test_single_heads_come_from_the_server(page, served, monkeypatch):
    monkeypatch.setattr("lsg_jax.look.page_data.HEAD_BYTES", 100)
    ask(page, served[0])
    before = pixels(page)
    with page.expect_request(re.compile("/head")):
        page.locator("[name=head]").press("ArrowRight")
    page.wait_for_timeout(200)
    assert (pixels(page) != before).any()


def test_empty_answer_and_notebook(page, tmp_path):
    looks = notebook_html(made_look([PICTURE], answer="")), notebook_html(made_look([PICTURE]))
    (tmp_path / "notebook.html").write_text("<!doctype html><title>notebook</title>" + "".join(looks))
    page.goto((tmp_path / "notebook.html").as_uri())
    frames = [page.frame_locator("iframe").nth(index) for index in (0, 1)]
    expect(frames[0].locator(".answer")).to_have_text("The answer is empty: the model ended at once.")
    expect(frames[0].locator(".scale, .numbers").filter(visible=True)).to_have_count(0)
    expect(frames[1].locator(".answer")).to_have_text(HOSTILE)
    expect(frames[1].locator(".pictures canvas")).to_have_count(1)


def test_refused_images_and_failures(page, served):
    url, asker = served
    page.goto(url)
    page.locator(".primary").click()
    expect(error := page.locator(".error")).to_have_text("Add an image first.")
    page.locator("#file").set_input_files([{"name": "a.png", "mimeType": "image/png", "buffer": b"<!doctype html>"}])
    expect(error).to_have_text("a.png: an HTML page, not an image; the download failed")
    assert len(page.problems) == 1 and "400" in page.problems.pop()  # the browser's own line
    broken = [{"name": name, "mimeType": "image/png", "buffer": b"<!doctype html>"} for name in ("a.png", "b.png")]
    page.locator("#file").set_input_files(broken)
    expect(error).to_have_text(re.compile("^a.png: an HTML page.*\nb.png: an HTML page"))
    del page.problems[:2]
    pictures = [{"name": f"{n}.bmp", "mimeType": "image/bmp", "buffer": file_of("BMP")} for n in range(9)]
    page.locator("#file").set_input_files(pictures)
    expect(error).to_have_text("8.bmp: 8 pictures are the most: remove one first")
    for _ in range(8):
        page.get_by_label("Remove picture 1").click()
    page.locator("#file").set_input_files(pictures[0])
    expect(page.locator(".chosen img")).to_have_count(1)
    expect(error).to_be_empty()
    page.locator("textarea").fill("a" * 20_001)
    page.keyboard.press("Enter")
    expect(error).to_have_text("The question has 20,001 characters: 20,000 is the most.")
    page.locator("textarea").fill("What?")
    asker.fails = RuntimeError("x")
    page.keyboard.press("Enter")
    expect(error).to_have_text("the model failed (RuntimeError): the terminal says why")
    asker.fails = None
    page.keyboard.press("Enter")
    expect(page.locator(".pane")).to_have_count(1)
    expect(error).to_be_empty()


def test_progress_and_a_later_question(page, served):
    url, asker = served
    ask(page, url)
    asker.waits, asker.asked[:] = threading.Event(), []
    try:
        page.locator("textarea").fill("first")
        page.keyboard.press("Enter")
        expect(page.locator(".status")).to_contain_text("Compiling a program")
        for text in ("second", "third"):  # only the last that waits is asked
            page.locator("textarea").fill(text)
            page.keyboard.press("Enter")
            expect(page.locator(".status")).to_contain_text("Waiting for the question before")
        page.wait_for_timeout(200)
    finally:
        asker.waits.set()
    idle(page)
    until = time.monotonic() + 10
    while len(asker.asked) < 2 and time.monotonic() < until:
        page.wait_for_timeout(20)
    assert [entry[3] for entry in asker.asked] == ["first", "third"]
    asker.waits = None


def test_phone_and_dark(page, served):
    for dark in (False, True):
        page.emulate_media(color_scheme="dark" if dark else "light")
        page.set_viewport_size({"width": 390, "height": 844})
        ask(page, served[0])
        page.get_by_text("Scale keys by layer").click()
        page.locator("[name=right]").select_option("Coefficients")
        expect(page.locator(".pane")).to_have_count(2)
        assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [390, 390]
        assert page.evaluate("""() => [...document.querySelectorAll("button, select, .question > *, .view label")]
            .every((each) => !each.offsetParent || each.getBoundingClientRect().right <= innerWidth)""")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(21, 23, 26)" if dark else "rgb(255, 255, 255)")
