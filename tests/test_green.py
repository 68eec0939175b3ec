"""Green contexts on a driver that counts what it made: rounding, disjoint SMs, nothing left."""

import pytest

pytest.importorskip("torch")

from muxrt.errors import ConfigError
from muxrt.worker.driver import Driver, DriverError
from muxrt.worker.green import Granule, GreenSplit, share_out
from tests.fake_driver import FakeDriver

HOPPER, AMPERE, TURING = Granule(8, 8), Granule(4, 2), Granule(2, 2)


@pytest.mark.parametrize(
    ("capability", "granule"),
    [((9, 0), HOPPER), ((10, 0), HOPPER), ((12, 0), HOPPER), ((8, 0), AMPERE), ((7, 5), TURING)],
)
def test_granules_are_those_of_the_documentation(
    capability: tuple[int, int], granule: Granule
) -> None:
    assert Granule.of(capability) == granule


@pytest.mark.parametrize(
    ("total", "granule", "percents", "counts"),
    [
        (132, HOPPER, (60, 40), (80, 52)),  # H100, H200: the rest need be no multiple
        (132, HOPPER, (50, 50), (64, 68)),
        (132, HOPPER, (5, 95), (8, 124)),
        (132, HOPPER, (99, 1), (120, 12)),
        (132, HOPPER, (1, 1, 98), (8, 8, 116)),
        (132, HOPPER, (100,), (132,)),
        (148, HOPPER, (70, 30), (104, 44)),  # B200
        (108, AMPERE, (60, 40), (64, 44)),  # A100
        (58, AMPERE, (50, 50), (28, 30)),  # L4
        (80, TURING, (30, 30, 40), (24, 24, 32)),  # V100
        (30, TURING, (97, 3), (28, 2)),  # RTX 2060
        (20, HOPPER, (90, 10), (8, 12)),  # a slice of a large one
    ],
)
def test_shares_are_whole_granules_and_all_of_the_device(
    total: int, granule: Granule, percents: tuple[int, ...], counts: tuple[int, ...]
) -> None:
    assert share_out(total, granule, percents) == counts
    assert sum(counts) == total


def test_every_split_of_every_chip_is_one_that_the_driver_takes() -> None:
    for total in (20, 30, 58, 80, 108, 132, 148):
        for granule in (HOPPER, AMPERE, TURING):
            for first in range(1, 100):
                for second in range(1, 100 - first, 7):
                    percents = (first, second, 100 - first - second)
                    if total < 3 * granule.least:
                        continue
                    counts = share_out(total, granule, percents)
                    assert sum(counts) == total and min(counts) >= granule.least
                    assert not any(count % granule.step for count in counts[:-1])


def test_a_chip_that_is_too_small_is_refused_with_the_figures() -> None:
    with pytest.raises(ConfigError, match="found 3 lanes, expected at most 2: .* 20 SMs"):
        share_out(20, HOPPER, (40, 30, 30))


def split(api: FakeDriver, counts: tuple[int, ...], step: int = 8) -> GreenSplit:
    return GreenSplit(Driver(api), 0, counts, step, [0] + [-1] * (len(counts) - 1))


@pytest.mark.parametrize("counts", [(80, 52), (8, 16, 108), (132,)])
def test_lanes_have_disjoint_sms_from_one_split(counts: tuple[int, ...]) -> None:
    api = FakeDriver()
    with split(api, counts) as found:
        parts = [api.streams[stream][0].sms.ids for stream in found.streams]
        assert tuple(found.sm_counts) == counts == tuple(map(len, parts))
        assert len(frozenset().union(*parts)) == 132, "an SM is in two parts, or in none"
        assert [api.streams[stream][1] for stream in found.streams] == [0, -1, -1][: len(counts)]
    assert api.num_splits == (len(counts) > 1)
    assert not api.contexts and not api.streams


def test_fifty_splits_leave_nothing_behind() -> None:
    api = FakeDriver()
    for lanes in range(50):
        split(api, ((80, 52), (8, 16, 108))[lanes % 2]).close()
    assert (api.contexts, api.streams) == (set(), {})


@pytest.mark.parametrize("call", ["cuGreenCtxCreate", "cuGreenCtxStreamCreate"])
def test_a_failure_in_the_middle_leaves_nothing_behind(call: str) -> None:
    api = FakeDriver()
    api.fail[call] = 2
    with pytest.raises(DriverError, match=f"{call}: CUDA_ERROR_OUT_OF_MEMORY"):
        split(api, (80, 52))
    assert (api.contexts, api.streams) == (set(), {})


def test_a_driver_that_rounds_otherwise_is_refused() -> None:
    api = FakeDriver(granule=16)
    with pytest.raises(DriverError, match="found groups of"):
        split(api, (80, 52))
    assert not api.contexts


@pytest.mark.parametrize(("version", "scopes"), [(13000, []), (13010, [1])])
def test_work_queues_are_kept_apart_where_the_driver_can(version: int, scopes: list[int]) -> None:
    api = FakeDriver(version=version)
    with split(api, (80, 52)) as found:
        for stream in found.streams:
            queues = api.streams[stream][0].queues
            assert [queue.wqConfig.sharingScope for queue in queues] == scopes


def test_what_stands_in_takes_the_arguments_of_the_real_one() -> None:
    """By the first line of each function's documentation, as cuda-bindings writes it."""
    real = pytest.importorskip("cuda.bindings.driver")
    for name in dir(FakeDriver):
        if not name.startswith("cu"):
            continue
        line = (getattr(real, name).__doc__ or "").strip().splitlines()[0]
        inside = line[line.index("(") + 1 : line.rindex(")")]
        number = len([part for part in inside.split(",") if part.strip()])
        code = getattr(FakeDriver, name).__code__
        assert code.co_argcount - 1 == number, line
