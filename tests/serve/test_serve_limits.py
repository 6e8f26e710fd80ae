"""What clients of `lsg serve` that are slow, many or gone may take from others. Answers are made up."""

import asyncio
import contextlib
import json
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
from made_server import COMPLETIONS, VALID, error_of
from serving import running

from lsg_jax.serve import server as server_module
from lsg_jax.serve.request import parse
from lsg_jax.serve.room import Room


def test_bodies_that_do_not_come(server, monkeypatch):
    """Of a client that goes away in the midst of its body nothing is kept; one that sends no more is not waited for."""
    monkeypatch.setattr("lsg_jax.web.STALLED", 0.2)
    start = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{"
    with running(server) as url:
        where = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(where) as leaving:
            leaving.sendall(start)
        with socket.create_connection(where) as silent:
            silent.sendall(start)
            assert silent.recv(1000).startswith(b"HTTP/1.1 408 ")
        until = time.monotonic() + 20
        while not server.engine.idle and time.monotonic() < until:
            time.sleep(0.01)
    assert server.engine.idle and not server.engine.asked
    text = server.metrics.text().decode()
    assert 'lsg_requests_total{status="499"} 1.0' in text and 'lsg_requests_total{status="408"} 1.0' in text


def test_bodies_that_come_slowly_keep_nobody_waiting(server):
    body = json.dumps(VALID).encode()
    server.engine.max_waiting = 100
    with running(server) as url, contextlib.ExitStack() as opened:
        for _ in range(50):
            slow = opened.enter_context(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))))
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
        assert httpx.post(url + COMPLETIONS, content=body, timeout=120).status_code == 200
        assert 'status="408"' not in server.metrics.text().decode()  # they are still waited for


def test_a_head_that_does_not_come_is_given_up(server, monkeypatch):
    """Else connections of slow clients would add up, until no more can be opened. An answer may take longer."""
    monkeypatch.setattr("lsg_jax.web.KEPT", 1.0)
    server.engine.held, whole = threading.Event(), b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"

    def replies(start):
        """What comes until the connection is closed, while the client goes on to send a byte now and then."""
        with socket.create_connection(where, timeout=20) as slow, contextlib.suppress(ConnectionError):
            slow.sendall(start)
            parts = []
            for _ in range(200):
                if select.select([slow], [], [], 0.1)[0]:
                    parts.append(slow.recv(1000))
                    if not parts[-1]:
                        break
                elif start:
                    slow.sendall(b"a")
            else:
                raise AssertionError("it is still open")
        return b"".join(parts)

    with running(server) as url, ThreadPoolExecutor() as pool:
        where = ("127.0.0.1", int(url.rpartition(":")[2]))
        answer = pool.submit(httpx.post, url + COMPLETIONS, json=VALID, timeout=60)
        given_up = list(pool.map(replies, (b"", whole[:20], whole + whole[:20])))
        assert [reply.count(b" 200 OK") for reply in given_up] == [0, 0, 1]
        server.engine.held.set()
        assert answer.result().status_code == 200


def test_bodies_take_bounded_memory():
    """Beyond it the oldest request is read on, so that all are in the end."""

    async def steps():
        room, reading, tasks, ends = Room(10), [], {}, {}

        async def one(name, count):
            async with room.of_one() as take:
                await take(count)
                reading.append(name)
                await ends[name].wait()

        async def begin(name, count):
            ends[name] = asyncio.Event()
            tasks[name] = asyncio.ensure_future(one(name, count))
            await settled()

        async def settled():
            for _ in range(10):
                await asyncio.sleep(0)

        for name, count in (("a", 50), ("b", 6), ("c", 1), ("d", 3)):
            await begin(name, count)
        assert reading == ["a"]
        tasks["b"].cancel()
        await settled()
        assert reading == ["a"]
        ends["a"].set()
        await settled()
        assert reading == ["a", "c", "d"]
        await begin("e", 7)
        assert reading == ["a", "c", "d"]
        ends["d"].set()
        await settled()
        assert reading == ["a", "c", "d", "e"]

    asyncio.run(steps())


def test_small_bodies_are_parsed_together_and_large_ones_one_by_one(client, monkeypatch):
    """Together, so that their questions share a batch; but JSON may take many times the memory of its text."""
    inside, most, both = set(), [], threading.Barrier(2)

    def counted(body, **limits):
        inside.add(threading.get_ident())
        most.append(len(inside))
        if server_module.LARGE:
            both.wait(60)
        else:
            time.sleep(0.05)
        inside.remove(threading.get_ident())
        return parse(body, **limits)

    monkeypatch.setattr(server_module, "parse", counted)
    for large, expected in ((1 << 20, 2), (0, 1)):
        monkeypatch.setattr(server_module, "LARGE", large)
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda _: client.post(COMPLETIONS, json=VALID), range(2)))
        assert [answer.status_code for answer in answers] == [200, 200] and max(most) == expected
        most.clear()


def test_a_full_queue_is_429(client, server):
    server.engine.held = threading.Event()
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(client.post(COMPLETIONS, json=VALID))) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(server.engine.asked) < 4:
        pass
    full = client.post(COMPLETIONS, json=VALID)
    assert error_of(full, 429)["type"] == "rate_limit_error" and int(full.headers["retry-after"]) >= 1
    server.engine.held.set()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 4
    assert client.post(COMPLETIONS, json=VALID).status_code == 200
    assert 'lsg_requests_total{status="429"} 1.0' in client.get("/metrics").text


def test_what_is_not_done_when_the_server_ends_is_503(server):
    server.engine.held, replies = threading.Event(), []
    with running(server, grace=0) as url:
        asking = threading.Thread(target=lambda: replies.append(httpx.post(url + COMPLETIONS, json=VALID)))
        asking.start()
        while not server.engine.asked:
            time.sleep(0.001)
    asking.join()
    server.engine.held.set()
    assert error_of(replies[0], 503)["code"] == "stopping"
    assert 'lsg_requests_total{status="503"} 1.0' in server.metrics.text().decode()
