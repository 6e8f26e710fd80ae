"""What `lsg explore` answers at all: requests of its own page, by whoever has its address, of bounded size."""

from __future__ import annotations

import hmac
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
    """Refuses requests of other users and those that another site's page may have caused; sets the headers of every answer.

    Every user of the machine can reach the port. So the address that `lsg explore` prints has a random token, as Jupyter's; the
    first request turns it into a cookie, which the others must send.

    A browser names the site that it believes to talk to in Host: a foreign name that resolves to 127.0.0.1 (DNS rebinding) is
    refused. It names the page that asks in Origin, with every POST, and in Sec-Fetch-Site.
    """

    def __init__(self, app: ASGIApp, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        problem = refusal(scope)
        answer = self._admitted(scope) if problem is None else PlainTextResponse(problem, 403)
        await answer(scope, receive, send_guarded)

    def _admitted(self, scope: Scope) -> ASGIApp | Response:
        """The page for who has the token, else a refusal."""
        name = f"lsg_explore_{(scope.get('server') or ('', 0))[1]}"  # cookies do not tell ports apart
        given = QueryParams(scope["query_string"]).get("token", "")
        if scope["method"] == "GET" and scope["path"] == "/" and hmac.compare_digest(given.encode(), self.token.encode()):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(name, self.token, httponly=True, samesite="lax")
            return answer
        if hmac.compare_digest(_cookie(scope, name).encode(), self.token.encode()):
            return self.app
        return PlainTextResponse("open the address that `lsg explore` has printed, with its token", 403)


def _cookie(scope: Scope, name: str) -> str:
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(Headers(scope=scope).get("cookie", ""))
    except CookieError:
        return ""
    return cookies[name].value if name in cookies else ""


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
