"""The unit process as its supervisor sees it: boot, messages, signals, deaths."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from readable import is_readable

pytest.importorskip("torch")
pytest.importorskip("transformers")
import zmq

from muxrt.config.placement import Lanes, Memory, ModelSpec, UnitModel, UnitSpec
from muxrt.core import FinishReason, Output, Phase, Prompt, Request, SamplingParams
from muxrt.engine.messages import (
    Abort,
    Drain,
    Failed,
    FromUnit,
    Loading,
    Ready,
    Stats,
    Step,
    Stopped,
    Submit,
    UnitBoot,
)
from muxrt.worker.boot import with_split
from tests.worker_world import (
    CORES,
    GREEDY,
    SHAPES,
    VOCAB,
    Reference,
    make_plan,
    write_models,
)

WAIT_MS = 240_000  # a first run compiles the kernels
MESSAGES: msgspec.msgpack.Decoder[FromUnit] = msgspec.msgpack.Decoder(FromUnit)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


class Api:
    """The other end of a unit process."""

    def __init__(self, boot: UnitBoot, stack: ExitStack) -> None:
        context = zmq.Context()
        stack.callback(context.destroy, linger=0)
        self._socket = context.socket(zmq.ROUTER)
        self._socket.bind(boot.endpoint)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "muxrt.worker.process"],
            stdin=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        self.pid = self.process.pid
        self.stdin = self.process.stdin
        assert self.stdin is not None
        self.stdin.write(msgspec.json.encode(boot) + b"\n")
        self.stdin.flush()
        self._identity = boot.identity.encode()
        self.outputs: dict[int, list[Output]] = {}
        self.seen: list[FromUnit] = []

    def send(self, message: Any) -> None:
        self._socket.send_multipart([self._identity, msgspec.msgpack.encode(message)])

    def wait_for(self, kind: type, until: Callable[[Any], bool] = lambda _: True) -> Any:
        """Read messages up to the first of a kind that `until` accepts."""
        while True:
            assert self._socket.poll(WAIT_MS), f"no {kind.__name__} came"
            identity, data = self._socket.recv_multipart()
            assert identity == self._identity
            message = MESSAGES.decode(data)
            self.seen.append(message)
            if isinstance(message, Step):
                for output in message.outputs:
                    self.outputs.setdefault(output.request_id, []).append(output)
            if isinstance(message, kind) and until(message):
                return message

    def submit(
        self, rid: int, model: str, prompt: list[int], max_tokens: int, **params: Any
    ) -> None:
        sampling = SamplingParams(**params) if params else GREEDY
        prompt_bytes = np.array(prompt, dtype="<i4").tobytes()
        payload = msgspec.msgpack.encode(Prompt(prompt_bytes, sampling))
        self.send(Submit(Request(rid, model, len(prompt), max_tokens, payload)))

    def wait_finished(self, *rids: int) -> None:
        missing = {rid for rid in rids if not self.is_finished(rid)}
        while missing:
            self.wait_for(Step)
            missing = {rid for rid in missing if not self.is_finished(rid)}

    def is_finished(self, rid: int) -> bool:
        return any(output.finish for output in self.outputs.get(rid, ()))

    def tokens(self, rid: int) -> list[int]:
        return [token for output in self.outputs[rid] for token in output.tokens]

    def exit_status(self) -> int:
        return self.process.wait(timeout=30)


Start = Callable[..., Api]


@pytest.fixture
def start(home: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a unit; with `ready`, waits until it serves."""
    with ExitStack() as stack:

        def start(ready: bool = True, **options: Any) -> Api:
            api = Api(make_boot(home, tmp_path, **options), stack)
            if ready:
                api.wait_for(Ready)
            return api

        yield start


def make_boot(home: Path, folder: Path, **options: Any) -> UnitBoot:
    plan = make_plan(home, **options)
    models = tuple(ModelSpec(name=n, path=str(home / n), dtype="float32") for n in SHAPES)
    return UnitBoot(
        unit=plan.spec, models=models, endpoint=f"ipc://{folder}/api", identity="unit-1"
    )


def test_it_loads_serves_preempts_drains_and_exits(start: Start, home: Path) -> None:
    """More sequences than the arena holds, at depth 2; all answers are those of transformers."""
    api = start(kv_bytes=600 << 10, lanes=Lanes(depth=2), quota_period_s=0.2)
    assert isinstance(api.seen[0], Loading) and api.seen[0].stage == "weights"
    ready = api.seen[-1]
    assert isinstance(ready, Ready) and ready.pid == api.pid
    assert {model.name for model in ready.models} == set(SHAPES)
    rng = np.random.default_rng(0)
    prompts = {}
    for rid in range(24):
        model = ("wide", "narrow")[rid % 2]
        prompts[rid] = (model, rng.integers(3, VOCAB[model], 5 + rid).tolist())
        api.submit(rid, *prompts[rid], 40)
    api.wait_finished(*prompts)
    stats = api.wait_for(Stats, lambda stats: stats.blocks_free == stats.blocks_total)
    preempted = [m.preemptions_swap + m.preemptions_recompute for m in stats.models]
    assert sum(preempted) > 0, "the arena was to be too small"
    counted = {(b.model, b.phase): b for b in stats.batches}
    assert set(counted) == {(m, p) for m in SHAPES for p in (Phase.PREFILL, Phase.DECODE)}
    assert sum(b.tokens for b in stats.batches) >= sum(len(p) + 39 for _, p in prompts.values())
    assert all(b.seconds > 0 and 0 < b.batches <= b.tokens for b in stats.batches)
    api.send(Drain(10.0))
    api.wait_for(Stopped)
    assert api.exit_status() == 0
    reference = Reference(home)
    for rid, (model, prompt) in prompts.items():
        assert len(api.tokens(rid)) == 40
        reference.check_greedy(model, prompt, api.tokens(rid))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
@pytest.mark.parametrize("leaves_some", [True, False])
def test_the_loop_keeps_off_the_cores_of_lanes_where_it_can(
    start: Start, leaves_some: bool
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    api = start(lanes=Lanes(split=(1,) if leaves_some else (1, len(cores) - 1)))
    assert os.sched_getaffinity(api.pid) == set(cores[1:] if leaves_some else cores)
    api.submit(1, "wide", [5] * 10, 5)
    api.wait_finished(1)


def test_aborts_and_refusals(start: Start) -> None:
    api = start()
    api.submit(1, "wide", [5] * 10, 80)
    api.submit(2, "wide", [5] * 10, 2000)
    api.submit(3, "nobody", [5] * 10, 2)
    api.send(Abort(1))
    api.wait_finished(2, 3)
    statuses = [api.outputs[rid][0].refusal.status for rid in (2, 3)]  # type: ignore[union-attr]
    assert statuses == [400, 404]
    api.wait_for(Stats, lambda stats: stats.blocks_free == stats.blocks_total)
    assert not api.is_finished(1)


def test_a_batch_that_fails_fails_its_requests_only(start: Start) -> None:
    api = start()
    api.submit(1, "wide", [10_000], 4)  # beyond the vocabulary
    api.wait_finished(1)
    refusal = api.outputs[1][0].refusal
    assert refusal is not None and refusal.status == 500
    api.submit(2, "wide", [7], 4)
    api.wait_finished(2)
    assert api.outputs[2][-1].finish is FinishReason.LENGTH


def test_sigterm_lets_requests_finish_and_takes_no_more(start: Start) -> None:
    api = start()
    api.submit(1, "wide", [5] * 10, 80)
    api.wait_for(Step)
    os.kill(api.pid, signal.SIGTERM)
    api.wait_for(Stopped)
    assert api.exit_status() == 0
    assert len(api.tokens(1)) == 80


def test_a_drain_ends_at_its_deadline(start: Start) -> None:
    api = start()
    for rid in range(16):
        api.submit(rid, "wide", [5] * 10, 80)
    api.send(Drain(0.0))
    assert api.exit_status() == 1


@pytest.mark.parametrize("kind", ["cores", "processes"])
def test_it_ends_with_its_parent_and_so_do_its_lanes(start: Start, kind: Any) -> None:
    api = start(lanes=Lanes(kind=kind))
    lanes = children(api.pid)
    assert len(lanes) == (min(2, len(CORES)) if kind == "processes" else 0)
    assert api.stdin is not None
    api.stdin.close()  # as when the API is killed
    assert api.exit_status() == 1
    for lane in lanes:
        wait_gone(lane)


@pytest.mark.parametrize(
    ("num_cores", "split"), [(1, (1,)), (2, (1, 1)), (3, (2, 1)), (16, (8, 8))]
)
def test_two_lanes_halve_the_cores_unless_somebody_says_otherwise(
    num_cores: int, split: tuple[int, ...]
) -> None:
    memory, models = Memory(kv_bytes=1 << 20), (UnitModel(name="m"),)
    silent = UnitSpec(name="unit", models=models, memory=memory)
    assert with_split(silent, num_cores).lanes.split == split
    told = UnitSpec(name="unit", models=models, memory=memory, lanes=Lanes(split=(1,)))
    assert with_split(told, num_cores) == told


def test_a_killed_unit_takes_its_lanes_along(start: Start) -> None:
    api = start(lanes=Lanes(kind="processes"))
    lanes = children(api.pid)
    api.process.kill()
    for lane in lanes:
        wait_gone(lane)


def test_a_killed_lane_ends_the_unit_with_a_clear_error(start: Start) -> None:
    split = (1, 1) if len(CORES) > 1 else None
    api = start(lanes=Lanes(kind="processes", split=split))
    os.kill(children(api.pid)[-1], signal.SIGKILL)
    failed = api.wait_for(Failed)
    assert "of lane lane-" in failed.message and "ended by signal 9" in failed.message
    assert api.exit_status() == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lanes": Lanes(split=(len(CORES), 1))}, "lanes.split: found"),
        ({"lanes": Lanes(kind="processes", split=(999,))}, "lanes.split: found [999]"),
    ],
)
def test_what_cannot_be_served_is_said(start: Start, options: Any, expected: str) -> None:
    api = start(ready=False, **options)
    assert expected in api.wait_for(Failed).message
    assert api.exit_status() == 1


def children(pid: int) -> list[int]:
    """Processes that `pid` started, oldest first."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return sorted(found)


def wait_gone(pid: int) -> None:
    """Return when the process has ended; fails after a while."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert is_readable(descriptor, 30), f"process {pid} lives on"
    finally:
        os.close(descriptor)
