"""What `lsg explore` answers at all: requests of its own page, of bounded size."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lsg_jax.errors import InputError

HOSTS = ("127.0.0.1", "localhost")
MAX_JSON_BYTES = 1 << 20

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class OwnPageOnly:
    """Refuses requests that another site's page may have caused, and sets the headers of every answer.

    A browser names the site that it believes to talk to in Host: a foreign name that resolves to 127.0.0.1 (DNS rebinding) is
    refused. It names the page that asks in Origin, with every POST, and in Sec-Fetch-Site.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        problem = refusal(scope)
        answer = self.app if problem is None else PlainTextResponse(problem, 403)
        await answer(scope, receive, send_guarded)


def refusal(scope: Scope) -> str | None:
    """Why a request is not answered, as one line; None if it is."""
    headers, port = Headers(scope=scope), (scope.get("server") or ("", None))[1]
    host = headers.get("host", "")
    if host not in {name if port == 80 else f"{name}:{port}" for name in HOSTS}:
        return "this server answers to 127.0.0.1 and localhost only"
    by_hand = scope["method"] == "GET" and scope["path"] == "/" and headers.get("sec-fetch-mode", "navigate") == "navigate"
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") and not by_hand:
        return "this server answers to its own page only"
    if scope["method"] not in ("GET", "HEAD") and headers.get("origin") != f"http://{host}":
        return "this server takes requests of its own page only"
    return None


async def bounded_body(request: Request, limit: int) -> bytes:
    """The body of a request. InputError beyond `limit` bytes, of which not much more is read."""
    too_large = InputError(f"more than {limit / (1 << 20):g} MiB: this is too large")
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)
