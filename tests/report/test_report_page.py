"""The report in headless Chromium: what it loads, on a phone, by keyboard, without scripts, in print."""

import os
import shutil
import subprocess

import chromium
import pytest
from pages import write_work

from lsg_jax.cli import main

NEEDS = {"chromium": chromium.find, "poppler-utils": lambda: shutil.which("pdftotext")}
PHONE = {"width": 390, "height": 800}
COMPLAINTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page with one result of each kind."""
    folder = tmp_path_factory.mktemp("report")
    assert main(["report", str(write_work(folder / "work")), "--out", str(folder / "report.html")]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium, started once. Without Chromium these tests fail unless LSG_NO_BROWSER=1 says to skip them."""
    if os.environ.get("LSG_NO_BROWSER") == "1":
        pytest.skip("LSG_NO_BROWSER=1: the report is not tested in a browser")
    missing = " ".join(package for package, find in NEEDS.items() if not find())
    assert not missing, f"apt-get install {missing}; or set LSG_NO_BROWSER=1 to leave out the tests in a browser"
    page = chromium.Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


def requests_and_complaints(browser):
    """(requested addresses, complaints) since the page was opened."""
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    return asked, [event["params"] for event in browser.events if event["method"] in COMPLAINTS]


def test_nothing_is_fetched_and_nothing_is_complained_about(browser, report):
    for view in ({}, {**PHONE, "dark": True}, {"script": False}):
        browser.open(report, **view)
        assert browser.probe("imagesAreThere")
        asked, complaints = requests_and_complaints(browser)
        assert asked[0] == report.as_uri() and all(url.startswith("data:") for url in asked[1:])
        assert len(asked) > 10 and not complaints


def test_what_got_into_the_page_does_not_run(browser, report, tmp_path):
    """The page's policy holds even if escaping fails. This also shows that the test above can fail."""
    evil = '<script>window.ran = 1</script><img src="x" onerror="window.ran = 2"><img src="https://example.com/x.png">'
    (tmp_path / "evil.html").write_text(report.read_text().replace("<h1>", evil + "<h1>"))
    browser.open(tmp_path / "evil.html")
    assert browser.evaluate("window.ran ?? null") is None
    assert browser.probe("filtersSeen") == 2 + 1  # the slider is one; the page's own script does run
    _, complaints = requests_and_complaints(browser)
    assert sum("Content Security Policy" in str(complaint) for complaint in complaints) >= 3


def test_a_phone_scrolls_down_only(browser, report):
    for script in (True, False):
        browser.open(report, **PHONE, script=script)
        browser.probe("unfold")
        assert browser.probe("width") == [390, 390] and browser.probe("tooWide") == []
    assert browser.probe("scrolled") > 3 and browser.probe("smallestLabel") > 6  # figures stay readable
    browser.probe("widen")
    assert browser.probe("width")[1] > 390 and browser.probe("tooWide")


def test_sinks_and_maps_come_first(browser, report):
    for view, highest in (({}, 1000), (PHONE, 1500)):
        browser.open(report, **view)
        tops = [
            browser.evaluate(f"probe.top('{selector}')") for selector in ("nav", ".maps", "#scores", "#settings", "#glossary")
        ]
        assert tops == sorted(tops) and tops[1] < highest, tops


def test_a_slider_moves_all_maps_to_a_layer(browser, report):
    browser.open(report, **PHONE)
    assert browser.probe("layersShown") == pytest.approx([1, 1], abs=0.02)  # layer 1 gets most attention
    assert [words[:8] for words in browser.probe("wordsShown")] == ["Layer 1:"]
    browser.evaluate("document.querySelector('.layers input').focus()")
    browser.press("ArrowLeft")
    assert browser.probe("layersShown") == pytest.approx([0, 0], abs=0.02)
    assert [words[:8] for words in browser.probe("wordsShown")] == ["Layer 0:"]
    assert browser.evaluate("document.querySelector('.layers output').value") == "0"
    assert browser.evaluate("document.querySelector('.peak').textContent") == "1.3"  # 0.1 of 0.3, on a quarter of the image
    browser.open(report, script=False)
    assert browser.probe("layersShown") == pytest.approx([1, 1], abs=0.02) and len(browser.probe("wordsShown")) == 1


def test_words_are_explained_where_they_stand(browser, report):
    """By keyboard and by touch, without scripts."""
    browser.open(report, **PHONE, script=False)
    assert browser.probe("popoversShown") == []
    for term in ("tau", "criterion", "v_sink_rest", "key_scale", "gate ratio", "remat"):
        browser.evaluate(f"[...document.querySelectorAll('.term')].find((b) => b.textContent === '{term}').focus()")
        browser.press("Enter")
        (shown,) = browser.probe("popoversShown")
        assert shown.startswith(f"{term}: ") and len(shown) > 60
        browser.press("Escape")
        assert browser.probe("popoversShown") == []
    browser.evaluate("document.querySelector('.term').scrollIntoView({block: 'center'})")
    x, y = browser.evaluate("(({x, y}) => [x + 4, y + 4])(document.querySelector('.term').getBoundingClientRect())")
    browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.evaluate("new Promise(requestAnimationFrame)")
    (shown,) = browser.probe("popoversShown")
    box = browser.evaluate(
        "(({left, right}) => [left, right])(document.querySelector(':popover-open').getBoundingClientRect())"
    )
    assert shown.startswith("V-sink: ") and 0 <= box[0] < box[1] <= 390


def test_contrast(browser, report):
    for dark in (False, True):
        browser.open(report, dark=dark)
        browser.probe("unfold")
        worst = browser.probe("faintest")
        assert worst[0][0] >= 4.5, worst
        drawn = browser.probe("faintestInFigures")
        assert drawn[0][0] >= 3, drawn
        paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") != dark


def test_everything_is_reached_by_keyboard(browser, report):
    browser.open(report)
    stops = []
    for _ in range(browser.probe("stops")):
        browser.press("Tab")
        stops.append(browser.probe("focus"))
    assert "Skip to the results" in stops[0]["what"] and len(stops) > 40
    assert [stop for stop in stops if not (stop["outlined"] and stop["seen"])] == []
    browser.press("Tab")
    assert browser.probe("focus")["what"].startswith("BODY")  # past the last stop
    browser.press("Tab")
    browser.press("Enter")
    assert browser.evaluate("location.hash") == "#main"


@pytest.mark.parametrize("view", [{}, PHONE], ids=["wide", "phone"])
def test_rows_are_chosen_by_keyboard(browser, report, view):
    browser.open(report, **view)
    assert [len(rows) for rows in browser.probe("rows")] == [8, 6]
    browser.evaluate("document.querySelector('.filter input').focus()")
    for key, outcome in zip(["ArrowRight"] * 4, ["gained", "lost", "both right", "both wrong"], strict=True):
        browser.press(key)
        assert browser.probe("focus")["value"] == outcome
        rows, others = browser.probe("rows")
        assert [seen for seen, _, _ in rows] == [outcomes[0] == outcome for _, outcomes, _ in rows]
        assert all(seen for seen, _, _ in others)  # the other table is unaffected
        assert browser.probe("status") == "2 of 8 rows shown"
    browser.press("Tab")
    browser.press("ArrowDown")
    assert browser.probe("focus")["what"].startswith("SELECT  method")
    browser.press("Tab")
    browser.press("End")
    category = browser.probe("focus")["value"]
    rows, _ = browser.probe("rows")
    expected = [outcomes[1] == "both wrong" and own == category for _, outcomes, own in rows]
    assert [seen for seen, _, _ in rows] == expected and category


def test_without_scripts_all_is_listed(browser, report):
    browser.open(report, script=False)
    assert all(seen for rows in browser.probe("rows") for seen, _, _ in rows) and browser.probe("filtersSeen") == 0
    browser.evaluate("document.querySelector('details:not([open]) summary').focus()")
    browser.press("Enter")
    assert browser.evaluate("document.activeElement.parentElement.open")


def test_it_prints(browser, report, tmp_path):
    browser.open(report, width=680, media="print")  # as wide as A4 between its margins
    figures, headings = browser.probe("figures"), browser.probe("headings")
    (tmp_path / "report.pdf").write_bytes(browser.pdf())
    subprocess.run(["pdftotext", "report.pdf", "report.txt"], cwd=tmp_path, check=True, timeout=60)
    pages = (tmp_path / "report.txt").read_text().split("\f")
    assert pages.pop() == "" and 4 < len(pages) < 30 and all(len(page.split()) > 5 for page in pages)
    words = {word for page in pages for word in page.split()}
    assert {word for heading in headings for word in heading.split()} <= words
    whole = " ".join(" ".join(pages).split())
    assert '"seed": 5' in whole and "every patch is flagged" in whole  # what is folded on the screen
    assert "numbers (CSV)" not in whole and "rows shown" not in whole and "Skip to" not in whole
    drawn = [figure for figure in figures if figure["words"]]
    for figure in drawn:  # each on one page
        number = figure["caption"].split(". ")[0] + "."
        assert any(set(figure["words"]) <= set(page.split()) for page in pages if number in page), number
    assert len(drawn) == 9 and max(figure["height"] for figure in figures) < 1000  # of 1008 pixels
