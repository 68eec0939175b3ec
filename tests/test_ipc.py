"""Pieces of device memory that other processes open, on a driver that counts what is open."""

import pytest

torch = pytest.importorskip("torch")

import msgspec  # noqa: E402

from muxrt.worker.driver import Driver, DriverError  # noqa: E402
from muxrt.worker.ipc import Imports, Piece, export  # noqa: E402
from tests.fake_driver import FakeDriver  # noqa: E402


def test_a_piece_is_found_again_inside_its_allocation() -> None:
    driver = Driver(FakeDriver())
    memory = torch.zeros(3 << 20, dtype=torch.uint8)
    inside = memory[5000:5100]
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(export(driver, inside)), type=Piece)
    assert 0 <= sent.offset < 1 << 20 and sent.num_bytes == 100
    assert Imports(driver).address(sent) == inside.data_ptr()


def test_a_handle_is_opened_once_and_closed_at_the_end() -> None:
    api = FakeDriver()
    for _ in range(50):
        imports = Imports(Driver(api))
        first = Piece((1 << 30).to_bytes(64, "little"), 64, 8)
        second = Piece(first.handle, 128, 8)
        assert imports.address(second) - imports.address(first) == 64
        assert len(api.opened) == 1
        imports.close()
    assert api.opened == []


def test_what_the_driver_refuses_is_said() -> None:
    api = FakeDriver()
    piece = Piece((1 << 30).to_bytes(64, "little"), 0, 8)
    Imports(Driver(api)).address(piece)
    with pytest.raises(DriverError, match="cuIpcOpenMemHandle: CUDA_ERROR_INVALID_VALUE"):
        Imports(Driver(api)).address(piece)
