"""The server of `lsg explore`: whom it answers, what it refuses, and that it goes on; answers are made up, see explored.py."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import jax
import numpy as np
import pytest
from broken_images import file_of, odd_pictures, uploads
from explored import HEADS, HOSTILE, LAYERS, MadeAsker, made_look
from PIL import Image
from starlette.requests import Request
from starlette.testclient import TestClient

import lsg_jax
from lsg_jax.cli import main
from lsg_jax.config import SinkConfig
from lsg_jax.errors import InputError
from lsg_jax.look import server
from lsg_jax.look.asking import Asker
from lsg_jax.look.look import NEUTRAL_PROMPT
from lsg_jax.look.server import Explorer, make_app
from lsg_jax.methods.fixed import Fixed, FixedConfig
from lsg_jax.web import bind, bounded_body

URL, TOKEN = "http://127.0.0.1:8411", "secret"
OURS = {"origin": URL}
QUESTION = {"prompt": "What?", "sides": [{"method": "base"}]}


@pytest.fixture
def asker():
    return MadeAsker()


@pytest.fixture
def explorer(asker):
    return Explorer(asker, name="tiny")


@pytest.fixture
def client(explorer):
    client = TestClient(make_app(explorer, TOKEN), base_url=URL, headers=OURS, raise_server_exceptions=False)
    assert client.get("/", params={"token": TOKEN}).status_code == 200  # the cookie is kept
    return client


def upload(client, data=None):
    answer = client.post("/pictures", content=file_of("PNG") if data is None else data)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def ask(client, **fields):
    """The lines of an answer."""
    answer = client.post("/ask", json=QUESTION | {"pictures": fields.pop("pictures", None) or [upload(client)]} | fields)
    return [json.loads(line) for line in answer.text.splitlines()]


def one_line(text):
    """The error of an answer, of which nothing of this machine can be read."""
    line = json.loads(text)["error"]
    assert line and "\n" not in line and len(line) < 300
    assert not re.search(r"Traceback|\.py|/home|/tmp|/usr|site-packages| at 0x", line), line
    return line


def test_a_question(client, asker):
    *states, look = ask(client, prompt="  What <b>?  ", sides=[{"method": "coefficients", "coefficients": [[2, 1]] * LAYERS}])
    assert [line["state"] for line in states] == ["waiting", "compiling", "answering"]
    assert asker.asked == [("coefficients", [[2, 1]] * LAYERS, [(40, 30)], "What <b>?")]
    data = look["look"]
    assert (data["title"], data["answer"], data["layers"], data["heads"]) == ("Coefficients", HOSTILE, LAYERS, HEADS)
    head = client.get("/head", params={"look": look["id"], "token": 1, "layer": 2, "head": 3}).json()
    assert set(head) == {"raw", "no_sinks", "relative"}
    for wrong in ({"layer": LAYERS}, {"head": "x"}, {"token": -1}, {"look": "other"}):
        one_line(client.get("/head", params={"look": look["id"], "token": 1, "layer": 2, "head": 3} | wrong).text)


def test_two_methods_of_several_pictures(client):
    looks = [line for line in ask(client, pictures=[upload(client), upload(client)],
                                  sides=[{"method": "base"}, {"method": "coefficients", "coefficients": [[1, 1]] * LAYERS}])
             if "look" in line]  # fmt: skip
    assert [line["side"] for line in looks] == [0, 1] and set(looks[0]["look"]["image"]) == {0, 1}
    page = client.post("/save", json={"looks": [line["id"] for line in looks], "titles": ["<i>", "B"], "state": {"layer": 2}})
    assert page.headers["content-disposition"].startswith("attachment") and "<i>" not in page.text
    assert page.text.count("data:image/") == 2 and HOSTILE not in page.text and '"layer":2' in page.text


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:8411"}, {"host": "127.0.0.1:80"}, {"host": "127.0.0.1"}, {"host": "0.0.0.0:8411"}, {"host": ""},
        {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:9000"}, {"origin": "https://127.0.0.1:8411"},
        {"origin": ""}, {"origin": "http://localhost:8411"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"},
    ],
)  # fmt: skip
def test_other_sites_are_refused(client, asker, headers):
    for path in ("/pictures", "/ask", "/save"):
        answer = client.post(path, content=file_of("PNG"), headers=headers)
        assert answer.status_code == 403 and "\n" not in answer.text
    if "origin" not in headers:
        for path in ("/explore.js", "/examples/0.png", "/head"):
            assert client.get(path, headers=headers).status_code == 403
    assert not asker.asked


def test_only_who_has_the_printed_address_is_answered(explorer, asker):
    """Any user of the machine can reach the port."""
    stranger = TestClient(make_app(explorer, TOKEN), base_url=URL, headers=OURS)
    for cookie in (None, "", TOKEN[:-1], "é", 'x="', f"{TOKEN}; Path=/"):
        headers = {} if cookie is None else {"cookie": f"lsg_explore_8411={cookie}".encode()}
        expected = 200 if cookie == f"{TOKEN}; Path=/" else 403
        for path in ("/", "/?token=", "/?token=secre", "/explore.js", "/head", "/examples/0.png"):
            answer = stranger.get(path, headers=headers)
            assert answer.status_code in (expected, 400 if path == "/head" and expected == 200 else expected)
            assert answer.status_code != 403 or ("printed" in answer.text and TOKEN not in answer.text)
    assert stranger.post("/pictures", content=file_of("PNG")).status_code == 403 and not asker.asked
    moved = stranger.get("/", params={"token": TOKEN}, follow_redirects=False)
    assert moved.headers["location"] == "/" and {"HttpOnly", "SameSite=lax"} <= set(moved.headers["set-cookie"].split("; "))


def test_the_page_may_be_linked_to_and_loads_nothing_from_elsewhere(client):
    linked = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    page = client.get("/", headers=linked)
    assert page.status_code == 200 and client.get("/", headers=linked | {"sec-fetch-mode": "no-cors"}).status_code == 403
    assert client.get("/", headers={"host": "localhost:8411"}).status_code == 200
    policy = page.headers["content-security-policy"]
    assert (
        "default-src 'none'" in policy
        and "frame-ancestors 'none'" in policy
        and "http" not in policy
        and "unsafe" not in policy
    )
    files = [client.get(path) for path in ("/", "/explore.js", "/explore.css")]
    assert not any(re.search(r"https?://|//cdn|@import", file.text) for file in files)
    assert all(file.headers["x-content-type-options"] == "nosniff" for file in files)
    assert sum(len(file.content) for file in files) < 300_000
    assert client.get("/examples/0.png").headers["content-type"] == "image/png"
    for path in ("/examples/99.png", f"/examples/{'9' * 5000}.png", "/../pyproject.toml"):
        assert client.get(path).status_code == 404


def test_broken_uploads_give_a_line_and_the_page_goes_on(client, explorer):
    refused, cases = 0, list(uploads())
    for name, data in cases:
        answer = client.post("/pictures", content=data)
        assert answer.status_code in (200, 400), (name, answer.text)
        if answer.status_code == 400:
            assert one_line(answer.text), name
            refused += 1
    assert len(cases) >= 200 and refused > 0.8 * len(cases)  # a damaged file may still hold a picture
    assert len(explorer.pictures) <= server.KEPT_PICTURES
    assert "look" in ask(client)[-1]


def test_odd_modes_are_read(client):
    for name, data in odd_pictures():
        assert "look" in ask(client, pictures=[upload(client, data)])[-1], name


def test_bodies_are_bounded(client, monkeypatch):
    monkeypatch.setattr(server, "MAX_BODY_BYTES", 1000)
    monkeypatch.setattr(server, "MAX_JSON_BYTES", 1000)
    for path in ("/pictures", "/ask", "/save"):
        for content in (b"x" * 1001, iter([b"x" * 500] * 100)):  # the second does not say how long it is
            assert "too large" in one_line(client.post(path, content=content).text)
        for length in ("-1", "1e9", "9" * 30):
            assert client.post(path, content=b"x", headers={"content-length": length}).status_code == 400


def test_a_body_that_stalls_is_given_up(monkeypatch):
    """Before, it held up all other uploads."""
    monkeypatch.setattr("lsg_jax.web.STALLED", 0.1)
    request = Request({"type": "http", "headers": []}, lambda: asyncio.sleep(60))
    with pytest.raises(InputError, match=r"nothing came for 0\.1 s"):
        asyncio.run(asyncio.wait_for(bounded_body(request, 100), 5))


@pytest.mark.parametrize(
    "told, fields",
    [
        ("no picture", [{"pictures": []}, {"pictures": "x"}]),
        ("add it again", [{"pictures": ["x"]}, {"pictures": [[]]}, {"pictures": [{}] * 3}]),
        ("there are 9 pictures: 8 is the most", [{"pictures": ["x"] * 9}]),
        ("no question", [{"prompt": ""}, {"prompt": " \n"}, {"prompt": None}, {"prompt": ["a"]}]),
        ("20,001 characters: 20,000 is the most", [{"prompt": "a" * 20_001}]),
        ("1 to 2 methods", [{"sides": s} for s in ([], None, [1], [{"method": "base"}] * 3, "base")]),
    ],
)
def test_questions_that_do_not_fit(client, asker, told, fields):
    for each in fields:
        answer = client.post("/ask", json=QUESTION | {"pictures": [upload(client)]} | each)
        assert answer.status_code == 400 and told in one_line(answer.text) and not asker.asked


def test_bodies_that_are_no_questions(client):
    for body in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"pictures": NaN}', b"1" * 5000):
        for path in ("/ask", "/save"):
            assert client.post(path, content=body).status_code == 400


def test_failures_are_told_and_the_page_goes_on(client, asker, caplog):
    asker.fails = InputError("the prompt is too long\nfor this model")
    assert ask(client)[-1] == {"error": "the prompt is too long for this model"}
    asker.fails = RuntimeError("RESOURCE_EXHAUSTED in /home/someone/model.py")
    assert ask(client)[-1] == {"error": "the model failed (RuntimeError): the terminal says why"}
    assert "RESOURCE_EXHAUSTED" in caplog.text
    asker.fails = None
    assert "look" in ask(client)[-1]


def test_only_so_much_is_kept(client, explorer, monkeypatch):
    monkeypatch.setattr(explorer.pictures, "budget", 3000.0)
    first, second, third = (upload(client) for _ in range(3))  # of 1,200 pixels each
    assert list(explorer.pictures) == [second, third]
    assert "no longer held: add it again" in one_line(client.post("/ask", json=QUESTION | {"pictures": [first]}).text)
    size = server.look_bytes(made_look([Image.new("RGB", (40, 30))]))
    monkeypatch.setattr(explorer.looks, "budget", 3.5 * size)
    shown = ask(client, pictures=[third])[-1]["id"]
    names = [ask(client, pictures=[third], shown=[shown, "other", 1])[-1]["id"] for _ in range(6)]
    assert list(explorer.looks) == [names[-2], shown, names[-1]]  # a page keeps what it shows
    assert "no longer held: ask again" in one_line(client.post("/save", json={"looks": names[:1]}).text)
    last = ask(client, pictures=[third], shown=[shown], gone=[*names, "other", {}])[-1]["id"]
    assert list(explorer.looks) == [shown, last]


def test_what_nobody_waits_for_is_not_kept(client, asker, explorer):
    answers = explorer._answers([Image.new("RGB", (40, 30))], "What?", [{"method": "base"}] * 2)

    async def leave():
        asker.waits = threading.Event()
        await anext(answers)  # waiting
        await anext(answers)  # compiling
        await answers.aclose()
        asker.waits.set()

    asyncio.run(leave())
    until = time.monotonic() + 10
    while explorer.worker.busy and time.monotonic() < until:
        time.sleep(0.01)
    assert not explorer.worker.busy and not explorer.looks and len(asker.asked) == 1  # the second side has not begun


def test_one_question_at_a_time_and_few_wait(client, asker, explorer):
    asker.waits = threading.Event()
    picture, results = upload(client), []
    threads = [
        threading.Thread(target=lambda: results.append(ask(client, pictures=[picture])[-1])) for _ in range(server.WAITING + 4)
    ]
    until = time.monotonic() + 60
    for thread in threads:
        thread.start()
        while not asker.asked and time.monotonic() < until:  # the first is answered, so many wait, the others are told
            time.sleep(0.01)
    while len(results) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert all("too many" in line["error"] for line in results) and len(asker.asked) == 1
    asker.waits.set()
    for thread in threads:
        thread.join()
    assert sum("look" in line for line in results) == server.WAITING + 1


# With a model.


def test_one_program_answers_under_all_coefficients(tiny_model, scenes):
    vlm = lsg_jax.load(tiny_model, sinks=SinkConfig(criterion="norm", vit_tau=10.0))
    asker, states = Asker(vlm, max_new_tokens=2), []
    assert asker.titles == {"base": "Base", "coefficients": "Coefficients"}
    picture, layers = Image.open(scenes / "images" / "0.png"), vlm.config.text.num_layers
    run = lambda method, values: asker.look(method, values, [picture], NEUTRAL_PROMPT, states.append)
    base = run("base", None)
    assert states[0] == "compiling" and states[-1] == "answering"
    states.clear()
    scaled = run("coefficients", [[0.25, 1.5]] * layers)
    assert states == ["answering"]
    assert np.abs(scaled.maps["raw"] - base.maps["raw"]).max() > 1e-3
    for wrong in (
        [[1, 1]],
        [[1]] * layers,
        [["x", 1]] * layers,
        [[float("nan"), 1]] * layers,
        [[1e9, 1]] * layers,
        {},
        10**400,
    ):
        with pytest.raises(InputError, match="coefficients: give"):
            run("coefficients", wrong)
    for method in ("gates", "", None, []):
        with pytest.raises(InputError, match="there is no method"):
            run(method, None)
    fixed = Asker(vlm.with_method(Fixed(FixedConfig((1,), (1.0, 1.0)))), max_new_tokens=4)
    assert fixed.titles == {"base": "Base", "gates": "fixed", "coefficients": "Coefficients"}
    assert list(Asker(lsg_jax.load(tiny_model), max_new_tokens=4).titles) == ["base"]  # V-sinks are not known


def test_a_question_longer_than_the_model_is_refused(tiny_model, monkeypatch):
    """Before, 20,000 characters took all memory of the machine, and the page ended."""
    asker = Asker(lsg_jax.load(tiny_model), max_new_tokens=2)
    monkeypatch.setattr("lsg_jax.look.compute.with_answer", None)
    with pytest.raises(InputError, match=r"the question has [\d,]+ tokens: [\d,]+ is the most"):
        asker.look("base", None, [Image.new("RGB", (28, 28))], "x " * 9_999)


def test_the_command(tiny_model):
    command = [sys.executable, "-m", "lsg_jax", "explore", str(tiny_model), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{22}", url), process.stderr.read()
        opener, address = urllib.request.build_opener(urllib.request.HTTPCookieProcessor()), url.partition("?")[0]
        with opener.open(url, timeout=30) as page:
            assert str(tiny_model.name) in (text := page.read().decode()) and str(tiny_model.parent) not in text
        post = lambda path, data: opener.open(
            urllib.request.Request(address + path, data, {"Origin": address[:-1]}), timeout=30
        )
        picture = json.load(post("pictures", file_of("PNG")))["id"]
        with post("ask", json.dumps(QUESTION | {"pictures": [picture]}).encode()) as answer:
            assert "compiling" in next(line for line in answer if b"waiting" not in line).decode()
            process.send_signal(signal.SIGINT)  # in the midst of work, in which XLA may be
            out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and out == "" and not re.search("Traceback|terminate|FATAL", error), error


def test_ports(tiny_model, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["explore", str(tiny_model), "--port", str(port)]) == 1
    assert re.fullmatch(rf"lsg explore: port {port} of 127\.0\.0\.1: .*--port.*\n", capsys.readouterr().err)
    assert main(["explore", str(tiny_model), "--port", "65536"]) == 65
    assert main(["explore", str(tiny_model), "--max-new-tokens", "0"]) == 65
    with bind(0) as free:
        assert free.getsockname()[0] == "127.0.0.1"
    assert jax.default_backend() == "cpu"
