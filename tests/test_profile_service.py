"""Ratios of steps in service: what a server of known ratios gives is found again."""

from pathlib import Path

import pytest

from muxrt.cli.profile_service import (
    Served,
    config_of,
    find_interference,
    find_ratios,
    simulated,
    with_ratios,
    workload,
)
from muxrt.cli.profile_source import Subject
from muxrt.config.placement import ModelSpec
from muxrt.config.profile import ServiceRatio
from muxrt.core import Phase
from muxrt.cost.model import CostModel
from muxrt.cost.profile import Profile, load_profile
from muxrt.workload.arrivals import arrivals

PUBLISHED = Path(__file__).parent.parent / "docs/benchmarks/validation_server_profile.yaml"
TRUE = (
    ServiceRatio(model="27m", prefill=1.2, decode=0.9),
    ServiceRatio(model="27m-gqa", prefill=1.05, decode=1.15),
)


@pytest.fixture(scope="module")
def profile() -> Profile:
    """The published one, as if nothing were known of service."""
    return with_ratios(load_profile(PUBLISHED), ())


def served(profile: Profile, split: tuple[int, ...], ratios: tuple[ServiceRatio, ...]) -> Served:
    """What a server answers whose steps take so much more than the table's."""
    names = [ratio.model for ratio in TRUE]
    specs = tuple(ModelSpec(name=name, path=name, dtype="float32") for name in names)
    shapes = {name: profile.shapes[name] for name in names}
    config = config_of(Subject(PUBLISHED, specs, shapes, {}), profile, split)
    asked = (tuple(arrivals(workload(config, 6.0 * len(split), 8.0))),)
    empty = Served(config, asked, {}, 0.0)
    slower = {Phase.PREFILL: 0.3, Phase.DECODE: 0.1}
    return Served(config, asked, simulated(with_ratios(profile, ratios), empty, slower), 0.0)


def test_ratios_of_one_lane_are_found_again(profile: Profile) -> None:
    found = {one.model: one for one in find_ratios(profile, served(profile, (1,), TRUE))}
    for true in TRUE:
        assert found[true.model].prefill == pytest.approx(true.prefill, rel=0.02)
        assert found[true.model].decode == pytest.approx(true.decode, rel=0.02)


def test_interference_of_two_lanes_is_found_again(profile: Profile) -> None:
    known = with_ratios(profile, TRUE)
    prefill, decode = find_interference(known, served(profile, (1, 1), TRUE))
    assert prefill == pytest.approx(0.3, abs=0.05)
    assert decode == pytest.approx(0.1, abs=0.05)


def test_step_times_are_those_in_service(profile: Profile) -> None:
    assert profile.file is not None and profile.file.kind is not None
    shape, kind = profile.shapes["27m"], profile.file.kind
    plain, scaled = (
        CostModel([one]).steps(shape, 1, kind).at(0.5)
        for one in (profile, with_ratios(profile, TRUE))
    )
    assert scaled.prefill_s(100, 10_000) == pytest.approx(
        1.2 * plain.prefill_s(100, 10_000), rel=1e-3
    )
    assert scaled.decode_s(4, 400) == pytest.approx(0.9 * plain.decode_s(4, 400), rel=1e-3)
