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
# As many events at most wait for the end of the loop's turn: some 64 KiB, too.
MAX_UNSENT_EVENTS = 256


class Outbox:
    """Streams whose events go out when the event loop has handled what it is at.

    After a step that is one event of each; when steps pile up, one write carries several of them.
    """

    def __init__(self) -> None:
        self._streams: list[EventStream] = []

    def add(self, stream: "EventStream") -> None:
        """`stream` has something to send. Must run on the event loop."""
        if not self._streams:
            asyncio.get_running_loop().call_soon(self._send)
        self._streams.append(stream)

    def _send(self) -> None:
        streams, self._streams = self._streams, []
        for stream in streams:
            stream.flush()


class EventStream:
    """Headers go out with the first event, so that errors before it have a status of their own."""

    def __init__(self, http: web.Request, outbox: Outbox) -> None:
        self._response = web.StreamResponse(headers=HEADERS)
        self._http = http
        self._outbox = outbox
        self._transport: asyncio.Transport | None = None  # once events need not wait
        self._unsent: list[bytes] = []

    @property
    def has_begun(self) -> bool:
        """The status is out."""
        return self._response.prepared

    async def write(self, data: bytes) -> None:
        """Send `data`; waits while the client is slow."""
        if not self._response.prepared:
            await self._response.prepare(self._http)
            # Below we frame chunks ourselves; HTTP/1.0 has none.
            if self._response.headers.get("Transfer-Encoding") == "chunked":
                self._transport = self._http.transport
        self.flush()
        await self._response.write(data)

    @property
    def has_room(self) -> bool:
        """`write_soon` may be called: the client keeps up, as far as we know."""
        transport = self._transport
        return (
            transport is not None
            and len(self._unsent) < MAX_UNSENT_EVENTS
            and transport.get_write_buffer_size() <= MAX_UNSENT_BYTES
            and not transport.is_closing()
        )

    def write_soon(self, data: bytes) -> None:
        """Send `data` after everything written before, without waiting. Needs room."""
        if not self._unsent:
            self._outbox.add(self)
        self._unsent.append(data)

    def flush(self) -> None:
        """Hand what `write_soon` got to the transport, as one chunk; nothing if the client left."""
        if self._unsent and self._transport is not None and not self._transport.is_closing():
            data = b"".join(self._unsent)
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        self._unsent.clear()

    async def end(self) -> web.StreamResponse:
        """Nothing comes after what was written."""
        self.flush()
        await self._response.write_eof()
        return self._response
