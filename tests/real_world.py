"""A unit whose lanes are real: demo models, numba kernels and sampler, driven by the virtual clock.

Time is the simulator's (constant costs), so that every run makes the same decisions; tokens are
computed. What the two worlds share is everything but the executor.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import torch

from muxrt.config.model import load_shape
from muxrt.config.placement import (
    Lanes,
    Memory,
    Mesh,
    ModelSpec,
    Scheduling,
    Slo,
    UnitModel,
    UnitSpec,
)
from muxrt.core import (
    Batch,
    Copy,
    Output,
    Prompt,
    Request,
    Result,
    SamplingParams,
    TokenLogprobs,
    Work,
)
from muxrt.engine.build import UnitPlan, build_unit, plan_unit
from muxrt.engine.executor import Done, Executor
from muxrt.kernels import Team
from muxrt.models.device_llama import DeviceLlama
from muxrt.models.llama import LinearDType, Llama
from muxrt.sim.executor import ConstantCost, SimExecutor
from muxrt.sim.loop import FINISH, EventLoop
from muxrt.sim.tokens import SimPrompt
from muxrt.worker.device_runner import DeviceCopier, DeviceResident, DeviceRunner
from muxrt.worker.device_storage import DeviceStorage
from muxrt.worker.device_streams import open_steps, plain_share
from muxrt.worker.kv_storage import Storage
from muxrt.worker.runner import Copier, Resident, Runner

DEMO = Path(__file__).parent.parent / "configs" / "demo_models"
MODELS = ("pydoc-s", "pydoc-m", "pydoc-l")

# One thread: models this small gain nothing from a second, and where other processes run beside
# the tests, OpenMP's threads spend their time waiting for each other.
torch.set_num_threads(1)


@cache
def demo_llama(model: str, weights: LinearDType = "float32") -> Llama:
    """A demo model in float32 but for its linear layers, loaded once per test run."""
    return Llama.load(DEMO / model, "float32", weights=weights)


def demo_plan(
    models: tuple[str, ...] = MODELS,
    num_groups: float = 8.0,
    swap_groups: float = 0.0,
    planes_per_block: int = 1,
    kv_dtype: str = "float32",
    lanes: int = 1,
    depth: int = 1,
    slo: Slo | None = None,
    tp: int = 1,
    **scheduling: object,
) -> UnitPlan:
    """One unit with demo models; `num_groups` sequences of maximum length per model fit."""
    shapes = {model: load_shape(DEMO / model) for model in models}
    specs = {
        m: ModelSpec(
            name=m,
            path=str(DEMO / m),
            dtype="float32",
            kv_dtype=kv_dtype,  # type: ignore[arg-type]
            slo=slo,
        )
        for m in models
    }

    def unit(kv_bytes: int, swap_bytes: int) -> UnitSpec:
        return UnitSpec(
            name="unit",
            models=tuple(UnitModel(name=model) for model in models),
            memory=Memory(
                kv_bytes=kv_bytes, swap_bytes=swap_bytes, planes_per_block=planes_per_block
            ),
            mesh=Mesh(gpus=tuple(range(tp))),
            lanes=Lanes(split=(1,) * lanes, depth=depth),
            scheduling=msgspec.convert(scheduling, Scheduling),
        )

    roomy = plan_unit(unit(1 << 34, 0), specs, shapes)
    floor = sum(m.floor_blocks for m in roomy.models.values()) * roomy.arena.block_bytes
    spec = unit(int(num_groups * floor), int(swap_groups * floor))
    return plan_unit(spec, specs, shapes)


class RunnerExecutor:
    """Computes works when they are launched, and reports them when the virtual lane is done."""

    def __init__(self, loop: EventLoop, plan: UnitPlan, compute: Callable[[Work], Result]) -> None:
        self._loop = loop
        self._cost = ConstantCost()
        self._compute = compute
        self._lane_free_s: dict[int, float] = {}

    def launch(self, work: Work, done: Done) -> None:
        elapsed_s = self._cost(work)
        start_s = max(self._loop.now_s, self._lane_free_s.get(work.lane, 0.0))
        self._lane_free_s[work.lane] = start_s + elapsed_s
        result = msgspec.structs.replace(self._compute(work), elapsed_s=elapsed_s)
        self._loop.at(start_s + elapsed_s, lambda: done(work, result), FINISH)


def on_cores(plan: UnitPlan, weights: LinearDType) -> Callable[[Work], Result]:
    """The CPU's engine."""
    storage = Storage(plan)
    llamas = {m: demo_llama(m, weights) for m in plan.models}
    residents = {m: Resident.of(llama, m, storage) for m, llama in llamas.items()}
    runner, copier = Runner(residents, Team()), Copier(storage, plan.arena.block_bytes)
    return lambda work: copier.run(work) if isinstance(work, Copy) else runner.run(work)


def on_device(plan: UnitPlan, device: torch.device) -> Callable[[Work], Result]:
    """A GPU's engine; on a CPU its code all the same, but for the graphs."""
    storage = DeviceStorage(plan, device)
    residents = {
        m: DeviceResident.of(DeviceLlama.load(DEMO / m, torch.float32, device), m, storage)
        for m in plan.models
    }
    share = plain_share("all", device, 0)
    runner = DeviceRunner(residents, open_steps(plan, device), lambda: share)
    copier = DeviceCopier(storage, plan.arena.block_bytes, share)
    launch = {Batch: runner.launch, Copy: copier.launch}
    return lambda work: launch[type(work)](work).wait()


def engine(
    plan: UnitPlan, weights: LinearDType, device: torch.device | None
) -> Callable[[Work], Result]:
    return on_cores(plan, weights) if device is None else on_device(plan, device)


class Recorder:
    """Notes every work on its way to an executor."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.works: list[Work] = []

    def launch(self, work: Work, done: Done) -> None:
        self.works.append(work)
        self.inner.launch(work, done)


class Served:
    """What one request got."""

    def __init__(self, model: str, prompt: list[int]) -> None:
        self.model = model
        self.prompt = prompt
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.finish: str | None = None
        self.cached_tokens = 0


class RealWorld:
    """Demo models in one unit under the virtual clock."""

    def __init__(
        self,
        models: tuple[str, ...] = MODELS,
        num_groups: float = 8.0,
        swap_groups: float = 0.0,
        planes_per_block: int = 1,
        simulate: dict[int, int] | None = None,
        kv_dtype: str = "float32",
        weights: LinearDType = "float32",
        lanes: int = 1,
        depth: int = 1,
        slo: Slo | None = None,
        device: torch.device | None = None,
        tp: int = 1,
        compute: Callable[[Work], Result] | None = None,
        **scheduling: object,
    ) -> None:
        """`num_groups`: sequences of maximum length per model that the arena holds.

        `simulate`: output tokens by request id; the executor is then the simulator's. `device`:
        the device's engine computes there, not the CPU's. `compute`: an engine of this plan.
        """
        self.plan = demo_plan(
            models,
            num_groups,
            swap_groups,
            planes_per_block,
            kv_dtype,
            lanes,
            depth,
            slo,
            tp,
            **scheduling,
        )
        self.loop = EventLoop()
        self.simulate = simulate
        inner: Executor = (
            RunnerExecutor(
                self.loop,
                self.plan,
                compute or engine(self.plan, weights, device),
            )
            if simulate is None
            else SimExecutor(self.loop, ConstantCost())
        )
        self.executor = Recorder(inner)
        self.served: dict[int, Served] = {}
        self.unit = build_unit(self.plan, self.executor, lambda: self.loop.now_s, self._emit)

    def _emit(self, outputs: tuple[Output, ...]) -> None:
        for output in outputs:
            served = self.served[output.request_id]
            assert output.refusal is None, output.refusal
            served.tokens.extend(output.tokens)
            served.logprobs.extend(output.logprobs or ())
            served.prompt_logprobs.extend(output.prompt_logprobs or ())
            served.cached_tokens = output.cached_tokens
            served.finish = output.finish.value if output.finish else None

    def submit(
        self,
        model: str,
        prompt: list[int],
        max_tokens: int,
        keys: tuple[bytes, ...] = (),
        **sampling: object,
    ) -> int:
        """Add a request now; greedy unless `sampling` says otherwise."""
        rid = len(self.served)
        self.served[rid] = Served(model, prompt)
        params = msgspec.convert({"temperature": 0.0, **sampling}, SamplingParams)
        payload: msgspec.Struct = Prompt(np.array(prompt, "<i4").tobytes(), params)
        if self.simulate is not None:
            payload = SimPrompt(self.simulate[rid])
        request = Request(
            rid, model, len(prompt), max_tokens, msgspec.msgpack.encode(payload), keys
        )
        self.unit.add(request)
        return rid

    def at(self, at_s: float, action: Callable[[], object]) -> None:
        self.loop.at(at_s, lambda: (action(), None)[1])

    def run(self) -> "RealWorld":
        """Until every request ended; nothing may be left behind."""
        while self.loop.has_events or not self.unit.is_idle:
            assert self.loop.step(), "stuck"
        assert self.unit.check()
        pool = self.unit.scheduler.memory.pool
        assert (pool.num_used, pool.num_available) == (0, pool.num_blocks)
        assert all(served.finish for served in self.served.values())
        return self

    def preempted(self) -> int:
        stats = self.unit.stats()
        return sum(m.preemptions_swap + m.preemptions_recompute for m in stats.models)


def prompts(model: str, count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of 1 to `longest` tokens of the model's own kind of text."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    random = Random(seed)
    tokenizer = Tokenizer.from_file(str(DEMO / model / "tokenizer.json"))
    text = [tokenizer.encode(topics[name]).ids for name in sorted(topics)]
    found = []
    while len(found) < count:
        tokens = random.choice(text)
        length = random.randint(1, longest)
        start = random.randrange(max(1, len(tokens) - length))
        found.append(tokens[start : start + length])
    return found
