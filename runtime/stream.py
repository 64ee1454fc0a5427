"""What one thread makes and others take, item by item: with `for` in a thread, with `async for` in an event loop."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from threading import Condition
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")


class Stream(Generic[T]):
    """Items in order, then the end: StopIteration, or the error that it ended with. One consumer gets each item."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._changed = Condition()
        self._sleepers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._ended = False
        self._error: BaseException | None = None

    def put(self, item: T) -> None:
        with self._changed:
            self._items.append(item)
            self._wake()

    def end(self, error: BaseException | None = None) -> None:
        """No more items."""
        with self._changed:
            self._ended, self._error = True, error
            self._wake()

    @property
    def ended(self) -> bool:
        """Whether nothing more will come; what came may still be there to take."""
        return self._ended

    @property
    def error(self) -> BaseException | None:
        """What it ended with; None before the end, and after a good one."""
        return self._error

    def wait(self, timeout: float | None = None) -> bool:
        """Until the end, at most so many seconds; whether it has come."""
        with self._changed:
            return self._changed.wait_for(lambda: self._ended, timeout)

    async def wait_async(self) -> None:
        """Until the end; the event loop goes on meanwhile."""
        while not self._ended:
            await self._sleep(for_items=False)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ended)
            if self._items:
                return self._items.popleft()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        while True:
            with self._changed:
                if self._items:
                    return self._items.popleft()
                if self._ended:
                    break
            await self._sleep(for_items=True)
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    async def _sleep(self, for_items: bool) -> None:
        """Until something changes, unless it already has."""
        import asyncio  # who gets here has it loaded; nobody else should wait for that

        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()
        with self._changed:
            if self._ended or (for_items and self._items):
                return
            self._sleepers.append((loop, woken))
        await woken

    def _wake(self) -> None:
        self._changed.notify_all()
        for loop, woken in self._sleepers:
            with suppress(RuntimeError):  # the loop is closed, and with it whoever slept there
                loop.call_soon_threadsafe(_set, woken)
        self._sleepers.clear()


def _set(woken: asyncio.Future[None]) -> None:
    if not woken.done():  # it may have been cancelled meanwhile
        woken.set_result(None)
