"""What `muxrt serve --check` says of units on a GPU: refused in one line where one is missing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine
from model_folders import two_models

from muxrt.cli.check import check, summary
from muxrt.config.document import KeyedError
from muxrt.config.load import load
from muxrt.config.serve import ServeConfig
from muxrt.engine.build import UnitPlan
from muxrt.worker.boot import with_split
from muxrt.worker.driver import NO_DEVICE, NoGpu, count_gpus

FILE = """\
models:
  - {{name: small, path: small{model}}}
units:
  - name: main
    memory: {{kv_bytes: 24MiB}}
    mesh: {{device: {device}{mesh}}}
    lanes: {{kind: {kind}{lanes}}}
    models: [{{name: small{part}}}]
"""


def config(folder: Path, device: str = "gpu", kind: str = "green", **more: str) -> ServeConfig:
    two = {"model": "", "mesh": "", "lanes": "", "part": ""} | more
    path = folder / "serve.yaml"
    path.write_text(FILE.format(device=device, kind=kind, **two))
    return load(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    two_models(tmp_path)
    return tmp_path


def no_gpu() -> int:
    raise NoGpu("there is none")


def plan(found: ServeConfig, gpus: Callable[[], int] = lambda: 4) -> UnitPlan:
    """With NCCL."""
    return check(found, {0}, {}, gpus, lambda: None).plans[0]


def test_a_gpu_that_is_not_there_is_refused_by_its_key(folder: Path) -> None:
    with pytest.raises(KeyedError) as raised:
        plan(config(folder), no_gpu)
    assert raised.value.key == ("units", 0, "mesh", "device")
    assert raised.value.message.endswith("found gpu, expected cpu: there is none")


def test_serve_says_so_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where there is a GPU, it is not shown
    config(folder)
    answer = CommandLine(monkeypatch, capsys)("serve", folder / "serve.yaml")
    assert answer.code == 2 and answer.err.count("\n") == 1
    assert "serve.yaml:6: units[0].mesh.device: found gpu, expected cpu: " in answer.err


def test_a_cpu_unit_asks_for_no_gpu(folder: Path) -> None:
    assert plan(config(folder, "cpu", "cores"), no_gpu).num_lanes == 1


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({"kind": "cores"}, ("lanes", "kind"), "found cores, expected green or stream or mps"),
        ({"device": "cpu"}, ("lanes", "kind"), "found green, expected cores or processes"),
        ({"lanes": ", split: [1, 1]"}, ("lanes", "split"), "expected sm_pct on a GPU"),
        ({"lanes": ", sm_pct: [60, 50]"}, ("lanes", "sm_pct"), "found 110 % in all"),
        ({"mesh": ", gpus: [4]"}, ("mesh", "gpus"), "found GPU 4, expected 0 to 3"),
        ({"mesh": ", gpus: [1, 1]"}, ("mesh", "gpus"), r"found \[1, 1\], expected 1, 2, 4 or 8"),
        (
            {"mesh": ", gpus: [0, 1]", "kind": "mps"},
            ("lanes", "kind"),
            "found mps on a mesh of 2 GPUs, expected green or stream",
        ),
        ({"mesh": ", exchange: gloo"}, ("mesh", "exchange"), "GPUs exchange by NCCL"),
        (
            {"mesh": ", gpus: [0, 1, 2, 3]"},
            (),
            "small cannot be cut over 4 ranks: found 3 heads and 3 kv heads",
        ),
        ({"part": ", sm_pct: [60, 40]"}, ("models", 0, "sm_pct"), "found shares of its own"),
    ],
)
def test_what_a_gpu_unit_cannot_have(
    folder: Path, options: dict[str, Any], key: tuple[str | int, ...], message: str
) -> None:
    with pytest.raises(KeyedError, match=message) as raised:
        plan(config(folder, **options))
    assert raised.value.key == ("units", 0, *key)


@pytest.mark.parametrize("kind", ["green", "stream"])
def test_a_mesh_of_gpus_needs_as_many_here(folder: Path, kind: str) -> None:
    """Cores are not cut: ranks share them. small has three kv heads, room for two on each rank."""
    two = config(folder, kind=kind, mesh=", gpus: [0, 1]", lanes=", sm_pct: [60, 40]")
    found = plan(two)
    assert (found.spec.mesh.tp, found.num_lanes) == (2, 2)
    assert found.models["small"].layout.shape.num_kv_heads == 4
    with pytest.raises(KeyedError, match="found GPU 1, expected 0 to 0"):
        plan(two, lambda: 1)


def test_a_mesh_of_gpus_needs_nccl(folder: Path) -> None:
    """Which torch for CPUs has not."""
    torch = pytest.importorskip("torch")
    if torch.distributed.is_nccl_available():
        pytest.skip("this torch has NCCL")
    with pytest.raises(KeyedError, match="found 2 GPUs, expected one: torch .* without NCCL") as no:
        check(config(folder, mesh=", gpus: [0, 1]"), {0}, {}, lambda: 2)
    assert no.value.key == ("units", 0, "mesh", "gpus")


def test_int8_weights_are_for_cpus(folder: Path) -> None:
    with pytest.raises(KeyedError, match="found int8, expected auto") as raised:
        plan(config(folder, model=", weights: int8"))
    assert raised.value.key == ("models", 0, "weights")


def test_float8_kv_is_for_gpus(folder: Path) -> None:
    """There a block of the same bytes holds twice the tokens of bfloat16."""
    narrow = plan(config(folder, model=", dtype: bfloat16, kv_dtype: float8"))
    wide = plan(config(folder, model=", dtype: bfloat16"))
    assert narrow.arena.block_bytes * 2 == wide.arena.block_bytes
    with pytest.raises(KeyedError, match="found float8, expected auto") as raised:
        plan(config(folder, "cpu", "cores", model=", kv_dtype: float8"))
    assert raised.value.key == ("models", 0, "kv_dtype")


def test_shares_of_mps_are_limits_that_may_overlap(folder: Path) -> None:
    assert plan(config(folder, kind="mps", lanes=", sm_pct: [100, 50]")).num_lanes == 2


def test_float16_stays_float16_on_a_gpu(folder: Path) -> None:
    """No CPU computes in it; there it becomes float32."""
    text = (folder / "small" / "config.json").read_text()
    (folder / "small" / "config.json").write_text(text.replace('"float32"', '"float16"'))
    found = {}
    for device, kind in (("gpu", "green"), ("cpu", "cores")):
        checked = check(config(folder, device, kind), {0}, {}, lambda: 1)
        (model,) = summary(checked)["models"]
        plan = checked.plans[0]
        assert plan.kv_dtypes["small"] == model["dtype"]
        found[device] = (model["dtype"], model["weight_bytes"] / model["num_params"])
    assert found == {"gpu": ("float16", 2.0), "cpu": ("float32", 4.0)}


def test_lanes_of_a_gpu_are_not_split_by_cores(folder: Path) -> None:
    unit = config(folder, lanes=", sm_pct: [60, 40]").units[0]
    assert with_split(unit, 8) == unit


# -- counting GPUs -----------------------------------------------------------------------------


class Library:
    """libcuda, as far as it is asked."""

    def __init__(self, code: int = 0, count: int = 0) -> None:
        self._code, self._count = code, count

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._code

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self._count
        return 0


def missing(name: str) -> Any:
    raise OSError(name)


def test_gpus_are_counted_by_the_driver() -> None:
    assert count_gpus(lambda name: Library(count=3)) == 3


@pytest.mark.parametrize(
    ("open_library", "message"),
    [
        (missing, "has no NVIDIA driver"),
        (lambda name: Library(999), "does not start .cuInit: error 999"),
        (lambda name: Library(NO_DEVICE), "shows this process no GPU"),
        (lambda name: Library(0, 0), "shows this process no GPU"),
    ],
)
def test_why_there_is_no_gpu(open_library: Callable[[str], Any], message: str) -> None:
    with pytest.raises(NoGpu, match=message):
        count_gpus(open_library)
