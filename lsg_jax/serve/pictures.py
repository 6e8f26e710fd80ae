"""The images of a request: those that it holds as data, and, of hosts that the server's owner names, those that are fetched."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from lsg_jax.data.grids import ImageSize
from lsg_jax.data.images import image_size
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.serve.request import Refused

MAX_FETCHED = 32 << 20  # bytes
FETCH_SECONDS, MAX_REDIRECTS = 15.0, 3
MAX_ADDRESS = 4_096  # characters of an address that is fetched

_DATA = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)


class Picture(NamedTuple):
    """An image file, and its width and height in pixels as its header states them."""

    file: bytes
    size: ImageSize


class Pictures:
    """Reads images.

    Args:
        hosts: from which images are fetched, by https; none for data URLs alone.
        transport: in place of the network.
    """

    def __init__(self, hosts: Collection[str] = (), *, max_pixels: int, transport: httpx.AsyncBaseTransport | None = None):
        self.hosts = frozenset(host.lower() for host in hosts)
        self.max_pixels = max_pixels
        self._transport = transport

    async def fetched(self, addresses: Sequence[str]) -> list[bytes | str]:
        """The files at addresses, each fetched; data URLs stay as they are. Raises Refused."""
        return [await self._file(address, f"image {number}") for number, address in enumerate(addresses, 1)]

    def checked(self, files: Sequence[bytes | str]) -> list[Picture]:
        """The images in files and data URLs, none of them decoded. Raises Refused."""
        found = []
        for number, file in enumerate(files, 1):
            data = _decoded(file, f"image {number}") if isinstance(file, str) else file
            try:
                width, height = image_size(data)
                if width * height > self.max_pixels:
                    raise InputError(f"{width} x {height} pixels: {self.max_pixels:,} pixels is the most, shrink it")
            except InputError as error:
                raise refused_image(number, error) from None
            found.append(Picture(data, (width, height)))
        return found

    async def _file(self, address: str, name: str) -> bytes | str:
        if address[:5].lower() == "data:":
            return address
        if not self.hosts:
            raise _refused(f"{name}: this server fetches no images: send it as a data URL, data:image/png;base64,...")
        try:
            return await asyncio.wait_for(self._fetch(address, name), FETCH_SECONDS)
        except TimeoutError:
            raise _refused(f"{name}: its host took more than {FETCH_SECONDS:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _refused(f"{name}: cannot be fetched ({type(error).__name__})") from None

    async def _fetch(self, address: str, name: str) -> bytes:
        """The file at an address of an allowed host; it may redirect to its own."""
        host = self._host(address, name)
        settings: dict[str, Any] = {"timeout": FETCH_SECONDS, "follow_redirects": False, "trust_env": False}
        settings["headers"] = {"accept-encoding": "identity"}  # what is counted is what is kept
        async with httpx.AsyncClient(transport=self._transport, **settings) as client:
            for _ in range(MAX_REDIRECTS + 1):
                async with client.stream("GET", address) as reply:
                    if reply.next_request is not None:
                        address = str(reply.next_request.url)
                        if self._host(address, name) != host:
                            raise _refused(f"{name}: its host redirects to another")
                        continue
                    if reply.status_code != 200:
                        raise _refused(f"{name}: its host replies with status {reply.status_code}")
                    return await _body(reply, name)
        raise _refused(f"{name}: its host redirects more than {MAX_REDIRECTS} times")

    def _host(self, address: str, name: str) -> str:
        """The host of an address that may be fetched."""
        try:
            parts = urlsplit(address)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise _refused(f"{name}: this is no address") from None
        if parts.scheme.lower() != "https" or port not in (None, 443) or "@" in parts.netloc or len(address) > MAX_ADDRESS:
            raise _refused(f"{name}: images are fetched by https from the usual port, without a user name")
        if host not in self.hosts:
            raise _refused(f"{name}: this server fetches images of some hosts only, and not of this one")
        return host


def check_hosts(hosts: Collection[str]) -> None:
    """ConfigError for what is no name of a host, since no address would have it."""
    for host in hosts:
        try:
            named = urlsplit(f"https://{host}").hostname
        except ValueError:
            named = None
        if named != host.lower():
            raise ConfigError(f"--allow-hosts {host}: name a host alone, such as images.example.org")


def _decoded(address: str, name: str) -> bytes:
    """The file in a data URL."""
    start = _DATA.match(address)
    if start is None:
        raise _refused(f"{name}: write data URLs as data:image/png;base64,...")
    try:
        return base64.b64decode(address[start.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise _refused(f"{name}: what follows `base64,` is not base64") from None


async def _body(reply: httpx.Response, name: str) -> bytes:
    parts, size = [], 0
    async for part in reply.aiter_raw():
        size += len(part)
        if size > MAX_FETCHED:
            raise _refused(f"{name}: larger than {MAX_FETCHED >> 20} MiB")
        parts.append(part)
    return b"".join(parts)


def refused_image(number: int, error: InputError) -> Refused:
    """What is said of an image, number `number` of its request, that cannot be read."""
    return Refused(400, f"image {number}: {str(error).removeprefix('image: ')}", param="messages", code="invalid_image")


def _refused(problem: str) -> Refused:
    return Refused(400, problem, param="messages", code="invalid_image_url")
