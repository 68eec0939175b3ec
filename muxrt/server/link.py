"""The API's end of the sockets to the unit processes."""

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import msgspec
import zmq

from muxrt.engine.messages import FromUnit, ToUnit
from muxrt.errors import MuxrtError

log = logging.getLogger(__name__)

# Messages are handled for so long before the event loop gets to do something else.
BURST_S = 0.005
# Bytes of a Unix socket's path (sun_path), less the final zero.
MAX_PATH_BYTES = 107

Receive = Callable[[bytes, FromUnit], None]
Garbage = Callable[[bytes], None]


class Link:
    """A ZeroMQ ROUTER in a folder that only this user can enter.

    `receive` gets each message with the identity of its sender; `garbage` the identity of who sent
    something that is no message. Both run on the event loop.
    """

    def __init__(self, receive: Receive, garbage: Garbage) -> None:
        self._receive = receive
        self._garbage = garbage
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder[FromUnit](FromUnit).decode
        self._folder = Path(tempfile.mkdtemp(prefix="muxrt-"))  # mode 0700
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._loop: asyncio.AbstractEventLoop | None = None  # while open
        self._is_scheduled = False

    @property
    def endpoint(self) -> str:
        """The address to connect to."""
        return f"ipc://{self._folder / 'api'}"

    def open(self) -> None:
        """Listen. Must run on the event loop. Raises MuxrtError where that is impossible."""
        if len(self.endpoint.removeprefix("ipc://").encode()) > MAX_PATH_BYTES:
            raise MuxrtError(f"{self._folder} is too long for a socket: set TMPDIR to a short path")
        # No limit on what is queued: a full socket would stop the loop for everyone. What the
        # endpoint admits is bounded by its own queues.
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # say so when a peer is gone
        self._socket.bind(self.endpoint)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._drain)
        self._schedule()

    def close(self) -> None:
        """Forget every peer and every message; closing twice does nothing."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket.FD)
            self._loop = None
        self._socket.close()
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    def send(self, identity: bytes, message: ToUnit) -> bool:
        """Send without waiting; False if there is no such peer (any more)."""
        try:
            self._socket.send_multipart((identity, self._encode(message)), zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        finally:
            # Sending may swallow the edge that told of arrivals: look for them afterwards.
            self._schedule()
        return True

    def _schedule(self) -> None:
        if self._loop is not None and not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """Handle what has arrived. ZeroMQ's descriptor tells of changes only, so: until empty."""
        self._is_scheduled = False
        until_s = monotonic() + BURST_S
        while monotonic() < until_s:
            if self._loop is None:
                return
            try:
                identity, data = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._schedule()  # there may be more, even if this one raises
            self._handle(identity, data)

    def _handle(self, identity: bytes, data: bytes) -> None:
        try:
            message = self._decode(data)
        except msgspec.DecodeError as error:
            log.error("event=garbage from=%s error=%s", identity.decode(), error)
            self._garbage(identity)
            return
        self._receive(identity, message)
