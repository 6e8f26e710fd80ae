"""What the servers of `lsg` have in common: a socket, bodies of bounded size, and the loop that answers."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
import time
from collections.abc import Awaitable, Callable

import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from lsg_jax import stopping
from lsg_jax.errors import BusyError, ConfigError, InputError

ADDRESS = "127.0.0.1"

STALLED = 20.0
"""Seconds after which a body of which nothing comes is given up: others wait behind it."""


KEPT = 75
"""Seconds that an idle connection is kept: longer than clients do, which may ask again just as it is closed.

So long may the head of a request take, too.
"""


class TooLarge(InputError):
    """A body has more bytes than it may."""


class Stalled(InputError):
    """The rest of a body does not come."""


def bind(port: int, host: str = ADDRESS) -> socket.socket:
    """A socket that listens; port 0 takes any that is free. BusyError if the port is taken, ConfigError for no such host."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port {port}: give a number from 0, for any free port, to 65535")
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise ConfigError(
            f"--host {host}: there is no such host; give an address of this machine, or 0.0.0.0 for all"
        ) from None
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(where)
        found.listen(socket.SOMAXCONN)  # who asks before the model is open waits
    except OSError as error:
        found.close()
        hint = "choose another with --port, or any free one by --port 0"
        raise BusyError(f"port {port} of {host}: {error.strerror}; {hint}") from None
    return found


class _Connection(H11Protocol):
    """Closed if the head of a request does not come in time: uvicorn would wait without end, and hold a connection for each."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def _await_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # there is a request
            if self._late is not None:
                self._late.cancel()
            self._late = None
        elif self._late is None:
            self._late = self.loop.call_later(KEPT, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)


class _Server(uvicorn.Server):
    """It also stops at a signal that came just before it handles signals, which the command had left to it."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if threading.current_thread() is threading.main_thread():  # to which signals go
            self.should_exit = self.should_exit or stopping.was_stopped()


def web_server(app: ASGIApp, *, grace: int) -> uvicorn.Server:
    """The server of an application. Told to stop, it takes no more requests, and gives those it has `grace` seconds."""
    # its log would have a traceback for each error that the application has reported, and for each answer that is cut off
    return _Server(
        uvicorn.Config(
            app,
            http=_Connection,
            log_level="critical",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=KEPT,
            timeout_graceful_shutdown=grace,
            server_header=False,
        )
    )


def serve(app: ASGIApp, listening: socket.socket, *, grace: int = 1) -> None:
    """Answers until Ctrl-C or SIGTERM; see `web_server`."""
    with contextlib.suppress(KeyboardInterrupt):
        web_server(app, grace=grace).run(sockets=[listening])


async def bounded_body(
    request: Request,
    limit: int,
    *,
    seconds: float = math.inf,
    take: Callable[[int], Awaitable[None]] | None = None,
) -> bytes:
    """The body of a request.

    Args:
        seconds: that the client may take to send it.
        take: awaited with the size of each part, before the next one is read.

    Raises:
        TooLarge: it has more than `limit` bytes, of which not much more is read.
        Stalled: nothing comes any more, or the client is too slow.
    """
    too_large = TooLarge(f"more than {limit / (1 << 20):g} MiB: this is too large")
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or len(announced) > 18 or int(announced) > limit:
        raise too_large
    parts, size, stream = [], 0, request.stream()
    while True:
        began, patience = time.monotonic(), max(min(STALLED, seconds), 0.0)
        try:
            part = await asyncio.wait_for(anext(stream, None), patience)
        except TimeoutError:
            raise Stalled(f"nothing came for {patience:g} s: try again") from None
        seconds -= time.monotonic() - began
        if part is None:
            break
        size += len(part)
        if size > limit:
            raise too_large
        if take is not None:
            await take(len(part))
        parts.append(part)
    return b"".join(parts)
