"""Messages over a pipe: four bytes of length, then msgpack."""

import os
import struct
from collections.abc import Iterator

_LENGTH = struct.Struct("<I")
CHUNK_BYTES = 1 << 20


def write_frame(descriptor: int, payload: bytes) -> None:
    """Write one frame; waits while the pipe is full. Raises BrokenPipeError."""
    rest = memoryview(_LENGTH.pack(len(payload)) + payload)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


class FrameReader:
    """Takes the frames out of a descriptor's bytes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = bytearray()
        self.is_at_end = False  # the other side has closed, or is dead

    def read(self) -> Iterator[bytes]:
        """Frames that are complete after one read, which waits if the descriptor does."""
        try:
            data = os.read(self._descriptor, CHUNK_BYTES)
        except BlockingIOError:
            return
        self.is_at_end = not data
        self._buffer += data
        while (frame := self._take()) is not None:
            yield frame

    def _take(self) -> bytes | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        end = _LENGTH.size + int(_LENGTH.unpack_from(self._buffer)[0])
        if len(self._buffer) < end:
            return None
        frame = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return frame
