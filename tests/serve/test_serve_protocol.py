"""What `lsg serve` takes and refuses. Answers are made up: only the tokenizer is a model's."""

import base64
import copy
import json
import random
import weakref

import httpx
import pytest
from made_server import COMPLETIONS, TOKEN, VALID, error_of
from serving import NAME, asked, scene, shown, written
from starlette.testclient import TestClient

from lsg_jax.serve.pictures import Pictures
from lsg_jax.serve.request import NEUTRAL
from lsg_jax.serve.server import make_app


def test_a_request(client, server):
    reply = client.post(COMPLETIONS, json=VALID).json()
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "made up", "refusal": None}
    assert reply["lsg"] == {"method": "base"} and reply["usage"]["completion_tokens"] == 2
    (question,) = server.engine.asked
    assert (question.max_tokens, question.temperature, question.top_p, question.seed) == (8, 0.5, 0.9, 3)
    assert question.stop == ("x", "y") and len(question.encoded.image_sizes) == 2
    for name, values in NEUTRAL.items():
        for value in (*values, None):
            assert client.post(COMPLETIONS, json=VALID | {name: value}).status_code == 200, (name, value)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"), ({"model": 3}, "model"), ({"messages": []}, "messages"), ({"messages": "Hi"}, "messages"),
        ({"n": 2}, "n"), ({"n": True}, "n"), ({"logprobs": True}, "logprobs"), ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"), ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{}]}, "tools"), ({"top_k": 5}, "top_k"), ({"made_up": 1}, "made_up"), ({"\ud800": 1}, "?"),
        ({"temperature": -0.1}, "temperature"), ({"temperature": 2.1}, "temperature"), ({"temperature": "0"}, "temperature"),
        ({"temperature": True}, "temperature"), ({"temperature": 10**400}, "temperature"), ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"), ({"seed": 1.5}, "seed"), ({"seed": 2**63}, "seed"), ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 8.0}, "max_tokens"), ({"max_completion_tokens": 9}, "max_tokens"), ({"stop": ""}, "stop"),
        ({"stop": list("abcde")}, "stop"), ({"stop": [1]}, "stop"), ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"), ({"lsg": {"method": "other"}}, None),
        ({"lsg": {"gates": True}}, "lsg"), ({"lsg": {"coefficients": [[1, 1]]}}, "lsg"), ({"lsg": []}, "lsg"),
    ],
)  # fmt: skip
def test_fields_that_are_refused(client, server, fields, param):
    answer = client.post(COMPLETIONS, content=json.dumps(VALID | fields))
    assert error_of(answer, 400)["param"] == param and not server.engine.asked


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user"}], [{"role": "user", "content": " "}], [{"role": "tool", "content": "a"}],
        [{"role": [], "content": "a"}], [{"role": "assistant", "content": "a"}],
        [*asked("a"), {"role": "assistant", "content": "b"}],
        asked("a") * 2,
        [*asked("a"), {"role": "system", "content": "b"}], [{"role": "system", "content": "b"}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        [{"role": "user", "content": [written(3)]}],
        [{"role": "system", "content": [shown(scene(0))]}, *asked("a")], asked("What is <image>?", scene(0)),
        [{"role": "user", "content": "a", "tool_calls": [1]}], asked("a", *[scene(0)] * 4), asked("a", scene(0, 150)),
        asked("a", b"GIF89a"), asked("a", b""), asked("\ud800"), asked("\ue000lsg:t0\ue001"),
    ],
)  # fmt: skip
def test_messages_that_are_refused(client, server, messages):
    answer = client.post(COMPLETIONS, content=json.dumps(VALID | {"messages": messages}))
    error_of(answer, 400)
    assert not server.engine.asked


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.png", "http://127.0.0.1/a.png", "file:///etc/passwd", "/etc/passwd", "", "data:,a",
        "data:text/html;base64,AAAA", "data:image/png;base64,%%%", "data:image/png,AAAA", "data:image/svg+xml;base64,PHN2Zy8+",
    ],
)  # fmt: skip
def test_addresses_are_not_fetched(client, server, url):
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, written("a")]}
    assert error_of(client.post(COMPLETIONS, json=VALID | {"messages": [message]}), 400)["param"] == "messages"


def test_images_are_held_one_at_a_time(client, monkeypatch):
    """A request of few bytes may have many large images."""
    held = []

    def to_rgb(image):
        held.append(weakref.ref(image))
        assert sum(seen() is not None for seen in held) == 1
        return image

    monkeypatch.setattr("lsg_jax.data.images.to_rgb", to_rgb)
    assert client.post(COMPLETIONS, json=VALID | {"messages": asked("a", *[scene(0), scene(1), scene(2)])}).status_code == 200
    assert len(held) == 3
    broken = VALID | {"messages": asked("a", scene(0), scene(1)[:-50])}
    assert error_of(client.post(COMPLETIONS, json=broken), 400)["message"].startswith("image 2: broken image file")


def test_images_of_allowed_hosts(client, server, monkeypatch):
    """Only by https, of these hosts, without a redirect to others, and of bounded size."""
    png, seen = scene(0), []

    def reply(request):
        seen.append(str(request.url))
        where = {"/moved.png": "/a.png", "/away.png": "https://other.org/a.png", "/down.png": "http://example.com/a.png"}
        if request.url.path in where:
            return httpx.Response(302, headers={"location": where[request.url.path]})
        if request.url.path == "/loop.png":
            return httpx.Response(302, headers={"location": "/loop.png"})
        if request.url.path == "/large.png":
            return httpx.Response(200, stream=httpx.ByteStream(b" " * 2000))
        return httpx.Response(404 if request.url.path == "/none.png" else 200, stream=httpx.ByteStream(png))

    server.pictures = Pictures(["Example.com"], max_pixels=10_000, transport=httpx.MockTransport(reply))

    def post(url):
        message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, written("a")]}
        return client.post(COMPLETIONS, json=VALID | {"messages": [message]})

    for url in ("https://example.com/a.png", "https://EXAMPLE.com:443/a.png", "https://example.com/moved.png"):
        assert post(url).status_code == 200
    assert set(seen) == {"https://example.com/a.png", "https://example.com/moved.png"}
    seen.clear()
    for url in (
        "http://example.com/a.png", "https://example.com:444/a.png", "https://example.com.evil.org/a.png", "https://[::1/a",
        "https://me@example.com/a.png", "https://127.0.0.1/a.png", "https://example.com:x/",
        "https://example.com" + "/a" * 4096,
    ):  # fmt: skip
        error_of(post(url), 400)
    assert not seen
    monkeypatch.setattr("lsg_jax.serve.pictures.MAX_FETCHED", 1000)
    for path in ("away", "down", "none", "loop", "large"):
        error_of(post(f"https://example.com/{path}.png"), 400)
    assert {url.partition("//")[2].partition("/")[0] for url in seen} == {"example.com"}


def test_bodies_that_are_too_large_or_no_json(client, server):
    broken = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b'{"n": 1, "n": 1}']
    for body in (*broken, b'{"seed": ' + b"9" * 5000 + b"}"):
        error_of(client.post(COMPLETIONS, content=body), 400)
    large = b" " * (server.limits.max_body + 1)
    assert error_of(client.post(COMPLETIONS, content=large), 413)["code"] == "request_too_large"
    assert error_of(client.post(COMPLETIONS, content=(large[i : i + 1000] for i in range(0, len(large), 1000))), 413)
    assert server.engine.idle


def test_names_of_any_length_are_refused_in_one_short_line(client):
    long = "a" * 100_000
    message = VALID["messages"][-1]
    for fields in ({long: 1}, {"messages": [message | {long: 1}]}, {"model": "\ue000" * 1000}, {"lsg": {"method": long}}):
        error = error_of(client.post(COMPLETIONS, json=VALID | fields), 404 if "model" in fields else 400)
        assert len(error["param"] or "") < 500


def test_the_other_endpoints(client):
    models = client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == [NAME] and models["data"][0]["lsg"]["methods"] == ["base"]
    assert client.get(f"/v1/models/{NAME}").json()["id"] == NAME
    error_of(client.get("/v1/models/other"), 404)
    assert error_of(client.post(COMPLETIONS, json=VALID | {"model": "other"}), 404)["code"] == "model_not_found"
    assert client.get("/health").json() == {"status": "ok"}
    error_of(client.get("/v1/completions"), 404)
    assert error_of(client.get(COMPLETIONS), 405)["code"] == "method_not_allowed"
    text = client.get("/metrics").text
    assert 'lsg_requests_total{status="404"} 1.0' in text and "lsg_waiting_requests 0.0" in text


def test_who_has_the_token_is_answered(server):
    client = TestClient(make_app(server, TOKEN), base_url="http://example.org")
    for given in (
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        "Bearer é".encode(),
    ):
        headers = {} if given is None else {"authorization": given}
        for path in ("/v1/models", "/metrics", "/other"):
            assert error_of(client.get(path, headers=headers), 401)["code"] == "invalid_api_key"
        answer = client.post(COMPLETIONS, json=VALID, headers=headers)
        error_of(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    assert not server.engine.asked and client.get("/health").status_code == 200
    assert client.post(COMPLETIONS, json=VALID, headers={"authorization": f"bearer {TOKEN}"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"host": "127.0.0.1.evil.example:80"}, {"host": ""}, {"host": "[::1"}, {"origin": "http://127.0.0.1"},
     {"origin": "null"}, {"sec-fetch-site": "cross-site"}],
)  # fmt: skip
def test_without_a_token_no_web_page_is_answered(client, server, headers):
    error_of(client.post(COMPLETIONS, json=VALID, headers=headers), 403)
    assert not server.engine.asked
    for host in ("localhost:9000", "127.0.0.1", "[::1]:80"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_a_thousand_broken_requests_are_the_clients_fault(client, server):
    """Bodies with random changes: wrong types, missing and unknown fields, cut and flipped bytes."""
    rng, statuses = random.Random(0), set()
    server.engine.max_waiting = 10_000
    for _ in range(1000):
        tree = json.loads(json.dumps(VALID))
        for _ in range(rng.randint(1, 3)):
            change(tree, rng)
        body = json.dumps(tree).encode()
        if rng.random() < 0.2:
            place = rng.randrange(len(body))
            body = body[:place] + rng.choice([b"", bytes([rng.randrange(256)]), body[:place]])
        answer = client.post(COMPLETIONS, content=body)
        statuses.add(answer.status_code)
        assert answer.status_code == 200 or error_of(answer, answer.status_code)
        assert answer.status_code < 500, (answer.text, body)
    assert {200, 400, 404} <= statuses
    assert client.post(COMPLETIONS, json=VALID).status_code == 200


ODD = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    1e308,
    "",
    "x",
    "\ud800",
    "<image>",
    "</s>",
    [],
    {},
    [[]],
    {"type": "text"},
    [None],
    "a" * 5000,
]


def change(tree, rng):
    """Changes one random place of a tree of JSON."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.75:
            tree = tree[key]
            continue
        kind = rng.random()
        if kind < 0.2 and isinstance(tree, dict):
            del tree[key]
        elif kind < 0.3 and isinstance(tree, dict):
            tree[rng.choice(["x", "\ud800", "tools", "stop", "content"])] = copy.deepcopy(rng.choice(ODD))
        elif kind < 0.4 and isinstance(tree[key], str) and tree[key].startswith("data:"):
            head, _, data = tree[key].partition(",")
            raw = bytearray(base64.b64decode(data))
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            tree[key] = head + "," + base64.b64encode(raw[: rng.choice([len(raw), rng.randrange(len(raw))])]).decode()
        else:
            tree[key] = copy.deepcopy(rng.choice(ODD))
        return
