"""A response of server-sent events, with a quick way for the events that need not wait."""

import asyncio

from aiohttp import web

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies must not wait for the end of a stream
}
# What a slow client may leave unsent before its events wait: as much as aiohttp's own writer.
MAX_UNSENT_BYTES = 1 << 16


class EventStream:
    """Headers go out with the first event, so that errors before it have a status of their own."""

    def __init__(self, http: web.Request) -> None:
        self.response = web.StreamResponse(headers=HEADERS)
        self._http = http
        self._transport: asyncio.Transport | None = None  # once events may be written at once

    @property
    def has_begun(self) -> bool:
        """The status is out."""
        return self.response.prepared

    async def write(self, data: bytes) -> None:
        """Send `data`; waits while the client is slow."""
        if not self.response.prepared:
            await self.response.prepare(self._http)
            # Below we frame chunks ourselves; HTTP/1.0 has none.
            if self.response.headers.get("Transfer-Encoding") == "chunked":
                self._transport = self._http.transport
        await self.response.write(data)

    @property
    def has_room(self) -> bool:
        """`write_now` may be called: the client keeps up, as far as we know."""
        transport = self._transport
        return (
            transport is not None
            and transport.get_write_buffer_size() <= MAX_UNSENT_BYTES
            and not transport.is_closing()
        )

    def write_now(self, data: bytes) -> None:
        """Send `data` after everything written before, without waiting. Needs room."""
        assert self._transport is not None
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
