"""What one HTTP request waits for: its sequences, from their start to their last news."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from muxrt.core import FinishReason, Output, Refusal
from muxrt.errors import MuxrtError
from muxrt.server.dispatch import Dispatcher, Draft

# Outputs handled at once; those of a slow client wait as outputs, not as unsent bytes.
MAX_NEWS = 256

# Takes an output of a choice at once, if it can.
Quick = Callable[[int, Output], bool]


class Call:
    """The sequences that one HTTP request waits for. Leaving the block aborts what still runs."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._ids: dict[int, int] = {}  # choice -> request, while it is live
        self._followers: dict[int, list[tuple[int, Draft]]] = {}
        self._news: list[tuple[int, Output]] = []
        self._reader: asyncio.Future[None] | None = None  # of whoever waits, or last waited
        self.quick: Quick | None = None
        self.unit: str | None = None  # where one of them was last known to be

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._followers.clear()
        self.quick = None  # it knows who knows us: a cycle would wait for the collector
        for index in list(self._ids):
            self.abort(index)

    def start(self, first: int, drafts: Sequence[Draft]) -> None:
        """Generate choices `first`, `first` + 1, ... of one prompt. Raises Unavailable.

        All but the first start with its first token: by then its prompt's blocks can be shared.
        """
        self._submit(first, drafts[0])
        if len(drafts) > 1:
            self._followers[first] = list(enumerate(drafts[1:], first + 1))

    def abort(self, index: int) -> None:
        """Choice `index` has all it needs."""
        request_id = self._ids.pop(index, None)
        if request_id is not None:
            self._look(request_id)
            self._dispatcher.abort(request_id)

    async def news(self) -> list[tuple[int, Output]]:
        """The outputs that came since the last call, at least one, with their choices.

        While this waits, `quick` may take outputs instead; they are all older than the next news.
        """
        if not self._news:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        news, self._news = self._news[:MAX_NEWS], self._news[MAX_NEWS:]
        return news

    def _submit(self, index: int, draft: Draft, unit: str | None = None) -> None:
        self._ids[index] = self._dispatcher.submit(draft, partial(self._take, index), unit)
        self._look(self._ids[index])

    def _look(self, request_id: int) -> None:
        self.unit = self._dispatcher.unit_of(request_id) or self.unit

    def _take(self, index: int, output: Output) -> None:
        if self._followers and output.refusal is None and (output.tokens or output.finish):
            self._start_followers(index)
        if output.finish is not None:
            ended = self._ids.pop(index, None)
            if ended is not None:
                self._look(ended)
        reader = self._reader
        if reader is None or reader.done():
            self._news.append((index, output))
        elif self.quick is None or not self.quick(index, output):
            self._news.append((index, output))
            reader.set_result(None)

    def _start_followers(self, leader: int) -> None:
        followers = self._followers.pop(leader, None)
        if followers is None:
            return
        unit = self._dispatcher.unit_of(self._ids[leader])
        for index, draft in followers:
            try:
                self._submit(index, draft, unit)
            except MuxrtError as error:
                refusal = Refusal(error.status, error.kind, error.message, error.retry_after_s)
                self._take(index, Output(0, finish=FinishReason.ERROR, refusal=refusal))
