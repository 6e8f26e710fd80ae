"""`lsg serve` as a process: it ends what it has begun, starts again after a kill, and listens to others only with a token."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serving import asked, scene

import lsg_jax
from lsg_jax.cli import main

QUESTION = "What is it?"


@contextlib.contextmanager
def process(model, *options, **environment):
    """A server, and its address once it answers."""
    command = [sys.executable, "-m", "lsg_jax", "serve", str(model), "--port", "0", "--name", "tiny", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as started:
        try:
            yield started, started.stdout.readline().strip()
        finally:
            started.kill()


def client_of(url, token="none"):
    return openai.OpenAI(base_url=url, api_key=token, max_retries=0, timeout=60)


def ask(client, prompt=QUESTION, **fields):
    return client.chat.completions.create(model="tiny", messages=asked(prompt, scene(0)), **{"max_tokens": 500, **fields})


def first_text(stream):
    return next(part.choices[0].delta.content for part in stream if part.choices[0].delta.content)


def test_told_to_stop_it_finishes_what_runs(tiny_model):
    with process(tiny_model) as (server, url):
        prompts = [QUESTION, "Who? " * 20, "Where is it? " * 30]  # of different lengths: one is answered after the other
        whole = [ask(client_of(url), prompt).choices[0].message.content for prompt in prompts]
        with ThreadPoolExecutor() as pool:
            streams = [iter(ask(client_of(url), prompt, stream=True)) for prompt in prompts]
            texts = list(pool.map(first_text, streams[:1]))
            server.send_signal(signal.SIGTERM)
            left = list(pool.map(lambda stream: "".join(part.choices[0].delta.content or "" for part in stream), streams))
        assert [texts[0] + left[0], *left[1:]] == whole
        assert server.wait(30) == 0
        with pytest.raises(openai.APIConnectionError):
            ask(client_of(url), max_tokens=4)
        errors = server.stderr.read()
    assert not [line for line in errors.splitlines() if not line.startswith("compiling ")], errors


def test_told_to_stop_as_soon_as_it_says_its_address_it_stops(tiny_model, monkeypatch):
    again = threading.Timer(60, os.kill, (os.getpid(), signal.SIGTERM))

    def say(*_, **__):
        again.start()
        signal.raise_signal(signal.SIGTERM)  # before the server hears of signals

    monkeypatch.setattr("lsg_jax.cli.serve.print", say, raising=False)
    assert main(["serve", str(tiny_model), "--port", "0"]) == 0
    assert not again.finished.is_set()
    again.cancel()


def test_killed_in_the_midst_it_starts_again(tiny_model):
    for killed in (True, False):
        with process(tiny_model) as (server, url):
            stream = iter(ask(client_of(url), stream=True))
            first_text(stream)
            if killed:
                server.kill()
                with pytest.raises((httpx.HTTPError, openai.APIError)):
                    list(stream)
            else:
                server.send_signal(signal.SIGINT)
                assert list(stream)[-1].choices[0].finish_reason and server.wait(30) == 0


def test_others_are_answered_with_a_token_only(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LSG_API_KEY", raising=False)
    assert main(["serve", str(tiny_model), "--host", "0.0.0.0", "--port", "0"]) == 65
    assert "--token-file" in capsys.readouterr().err
    token = tmp_path / "token"
    for text in ("", "two words", "é"):
        token.write_text(text)
        assert main(["serve", str(tiny_model), "--port", "0", "--token-file", str(token)]) == 65
        assert "a token is one line" in capsys.readouterr().err
    token.write_text("secret\n")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    with process(tiny_model, "--host", "0.0.0.0", "--token-file", str(token), XLA_FLAGS=flags) as (_, url):
        url = url.replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(openai.AuthenticationError):
            client_of(url, "guess").models.list()
        client = client_of(url, "secret")
        assert client.models.list().data[0].id == "tiny"
        answer = lsg_jax.load(tiny_model).generate([scene(0)], [QUESTION], 16)[0]  # on one device, the server on two
        assert ask(client, max_tokens=16).choices[0].message.content == answer
        assert httpx.get(url.replace("/v1", "/health")).json() == {"status": "ok"}


def test_options_that_cannot_be(tiny_model, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options, part in (
            (["--port", port], "choose another with --port"),
            (["--host", "nowhere.invalid", "--token-file", __file__], "a token is one line"),
            (["--port", "0", "--max-length", "4096"], "2048 positions"),
            (["--port", "0", "--batch-size", "0"], "--batch-size"),
            (["--port", "0", "--name", "a\nb"], "--name"),
            (["--port", "0", "--name", "\udcff"], "--name"),
            (["--port", "0", "--allow-hosts", "a.org", "https://b.org"], "https://b.org: name a host alone"),
            (["--port", "0", "--allow-hosts", "b.org:443"], "b.org:443: name a host alone"),
            (["--port", "0", "--allow-hosts", "b.org/path"], "b.org/path: name a host alone"),
            (["--port", "0", "--allow-hosts", "[::1"], "[::1: name a host alone"),
        ):
            assert main(["serve", str(tiny_model), *options]) in (1, 65)
            assert part in capsys.readouterr().err
    assert main(["serve", "nowhere", "--port", "0"]) == 65
    assert json.dumps(capsys.readouterr().err).count("\\n") == 1
