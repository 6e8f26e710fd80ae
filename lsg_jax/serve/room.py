"""A bound on the memory of bodies that are being read, which may come slowly."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable


class Room:
    """Bytes that requests hold together. Where there are more than `most`, the oldest request goes on, and the others wait."""

    def __init__(self, most: int):
        self._most, self._total = most, 0
        self._held: dict[object, int] = {}  # of each request, the oldest first
        self._freed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def of_one(self) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
        """Yields a function for one request, which takes so many more bytes. The block's end gives them back."""
        mine = object()
        self._held[mine] = 0

        async def take(count: int) -> None:
            self._held[mine] += count
            self._total += count
            while self._total > self._most and next(iter(self._held)) is not mine:
                await self._freed.wait()

        try:
            yield take
        finally:
            self._total -= self._held.pop(mine)
            self._freed.set()
            self._freed = asyncio.Event()
