"""`muxrt profile --gpu` as far as a machine without a GPU can tell."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from muxrt.cli.profile_target import cpu_target, parse_lanes, sm_lanes  # noqa: E402
from muxrt.config.model import load_shape  # noqa: E402
from muxrt.config.placement import ModelSpec  # noqa: E402
from muxrt.core import Phase  # noqa: E402
from muxrt.cost.grid import Pass  # noqa: E402
from muxrt.errors import ConfigError  # noqa: E402
from muxrt.worker.device_probe import OnGpu  # noqa: E402
from muxrt.worker.flight import Share  # noqa: E402
from muxrt.worker.green import Granule  # noqa: E402
from muxrt.worker.probe import Probe  # noqa: E402
from tests.command_line import CommandLine  # noqa: E402
from tests.device_world import CPU, device_llamas  # noqa: E402
from tests.worker_world import write_models  # noqa: E402


class Unsplit(OnGpu):
    """`OnGpu` on the CPU, which has streams but no SMs to split."""

    splits: list[tuple[int, ...]]

    def _share(self, sm_count: int, stack: ExitStack) -> Share:
        self.splits.append((sm_count,))
        return Share(f"{sm_count}", torch.cpu.Stream(), sm_count)

    def _split(self, counts: Sequence[int], stack: ExitStack) -> list[Share]:
        return [self._share(count, stack) for count in counts]


def test_a_probe_times_the_device_s_own_lanes(tmp_path: Path) -> None:
    """Passes of both phases on each share, then a prefill beside decodes on the halves."""
    write_models(tmp_path)
    spec = ModelSpec(name="wide", path=str(tmp_path / "wide"))
    shapes = {"wide": load_shape(tmp_path / "wide")}
    place = Unsplit(device_llamas(tmp_path), CPU, (16, 132), (64, 68))
    place.splits = []
    decode, prefill = Pass(Phase.DECODE, 3, 40), Pass(Phase.PREFILL, 2, 30)
    with Probe((spec,), shapes, place, {"wide": [decode, prefill]}) as probe:
        assert place.splits == [(16,), (132,), (64,), (68,)]
        assert probe.plan.spec.mesh.device == "gpu" and probe.plan.num_lanes == 4
        for lane in (0, 1):
            assert probe.burst(lane, "wide", decode) > 0
            assert probe.burst(lane, "wide", prefill) > 0
        beside = probe.beside((2, "wide", prefill), (3, "wide", decode), 0.01)
    assert min(beside) > 0


def test_lanes_to_measure_are_what_the_driver_hands_out() -> None:
    assert sm_lanes(132, Granule(8, 8)) == (32, 64, 96, 132)
    assert sm_lanes(108, Granule(4, 2)) == (28, 54, 80, 108)


def test_lanes_that_cannot_be_split_off_are_refused() -> None:
    target = replace(
        cpu_target([0]), parts=132, word="SMs", lanes=(32, 132), check_lane=lambda n: n % 8 == 0
    )
    assert parse_lanes("64,8,64", target) == (8, 64)
    assert parse_lanes(None, target) == (32, 132)
    with pytest.raises(
        ConfigError, match=r"found '20', expected numbers of SMs such as 32,132: there are 132"
    ):
        parse_lanes("20", target)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_machine_without_a_gpu_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    muxrt = CommandLine(monkeypatch, capsys)
    answer = muxrt("profile", tmp_path, "--gpu", 0)
    assert answer.code == 1 and "found gpu, but torch" in answer.err
    assert answer.err.count("\n") == 1
