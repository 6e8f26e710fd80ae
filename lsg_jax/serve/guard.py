"""Whom the server answers: those who have the token; without one, programs of this machine, and no web page."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lsg_jax.errors import ConfigError
from lsg_jax.serve.reply import error_body
from lsg_jax.serve.request import Refused

OPEN_TO_ALL = ("/health",)

_TOKEN = re.compile(r"[\x21-\x7e]+")


class Guard:
    """Refuses requests without the token (401).

    Without a token, the server listens on a loopback address. Then requests that a web page may have caused are refused (403):
    a browser names the page that asks in Origin or Sec-Fetch-Site, and in Host the name that it believes to talk to, which may
    be a foreign one that resolves to this machine (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, token: str | None):
        self.app, self._digest = app, None if token is None else _digest(token.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update({"cache-control": "no-store", "x-content-type-options": "nosniff"})
            await send(message)

        refused = None if scope["path"] in OPEN_TO_ALL else self._refusal(Headers(scope=scope))
        answer = self.app if refused is None else JSONResponse(error_body(refused), refused.status, refused.headers)
        await answer(scope, receive, send_guarded)

    def _refusal(self, headers: Headers) -> Refused | None:
        if self._digest is not None:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() == "bearer" and hmac.compare_digest(_digest(given.strip().encode()), self._digest):
                return None
            problem = "send the server's token: Authorization: Bearer TOKEN (api_key of the client)"
            return Refused(401, problem, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        if not is_loopback(_hostname(headers.get("host", ""))):
            return Refused(403, "without a token, this server answers to names of this machine only", code="foreign_host")
        if "origin" in headers or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return Refused(403, "without a token, this server answers to no web page", code="web_page")
        return None


def is_loopback(host: str) -> bool:
    """Whether a host is this machine for itself alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_token(token: str, where: str) -> str:
    """The token, without white space around it. ConfigError if no header can hold it."""
    token = token.strip()
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"{where}: a token is one line of letters, digits and other visible ASCII characters, without spaces")
    return token


def _hostname(host: str) -> str:
    """The name in a header Host, which may have a port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _digest(token: bytes) -> bytes:
    """Of one length for all tokens, so that comparing takes the same time."""
    return hashlib.sha256(token).digest()
