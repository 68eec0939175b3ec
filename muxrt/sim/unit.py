"""A unit of the brain on a virtual clock: its timer, its lanes, its deaths."""

from collections.abc import Sequence
from typing import Protocol

from muxrt.config.placement import ModelSpec, UnitSpec
from muxrt.core import Output, Piece, Request
from muxrt.engine.build import build_unit, plan_unit
from muxrt.engine.messages import Extend
from muxrt.engine.unit import Unit
from muxrt.sim.copies import CopyLane
from muxrt.sim.executor import MeshExecutor
from muxrt.sim.folding import FoldingExecutor
from muxrt.sim.links import Link, Links
from muxrt.sim.loop import Event, EventLoop
from muxrt.sim.mesh import MeshCost
from muxrt.sim.setting import Setting
from muxrt.sim.use import Gauge, ModelUse, UnitUse


class Surroundings(Protocol):
    """What a unit is in: clock and links, and who is told of tokens."""

    loop: EventLoop
    links: Links

    def path(self, source: str, unit: str) -> tuple[Link, ...]:
        """The links from `source` (name and life) to `unit`; none where it is gone."""

    def num_bytes(self, source: str, model: str, pieces: Sequence[Piece]) -> int:
        """Of these pieces of a sequence, as they lie in `source`."""

    def advance(
        self, model: str, unit: str, request_ids: Sequence[int], num_tokens: int, last_s: float
    ) -> None:
        """Requests got `num_tokens` more each, the last of them at `last_s`; they go on."""

    def weigh(self, model: str, unit: str, num_tokens: int) -> None:
        """Requests of `model` in `unit` got so many tokens more in all; `advance` says which."""

    def emit(self, outputs: tuple[Output, ...]) -> None:
        """Tokens and ends of one step."""

    def horizon(self) -> float:
        """When units are looked at or given something next."""


class SimUnit:
    """A unit of the brain with its timer and its lanes; each of its lives begins with nothing."""

    def __init__(
        self,
        spec: UnitSpec,
        models: Sequence[ModelSpec],
        setting: Setting,
        around: Surroundings,
    ) -> None:
        """Raises ConfigError where the unit cannot be laid out or costed."""
        self.plan = plan_unit(spec, {m.name: m for m in models}, setting.shapes)
        self._loop, self._around = around.loop, around
        self._cost = MeshCost(spec, setting)
        # What another unit hands over comes at no time that a run could know of before, nor does
        # a model that wakes.
        comes_alone = not spec.has_roles and self.plan.habits is None
        self._folds = setting.fold and self._cost.can_fold and comes_alone
        self._lives: list[tuple[Unit, MeshExecutor]] = []
        self._deaths, self._down_s, self._down_since_s = 0, 0.0, 0.0
        self.start()
        self._num_lanes = self.unit.scheduler.limits.num_lanes
        self._gauge = Gauge(tuple(self.plan.models), self._num_lanes)

    @property
    def identity(self) -> str:
        """Its name and life."""
        return f"{self.plan.spec.name}#{self._deaths}"

    @property
    def is_up(self) -> bool:
        """It takes requests."""
        return len(self._lives) > self._deaths

    def start(self) -> None:
        """It is loaded, and new."""
        if self._deaths:
            self._down_s += self._loop.now_s - self._down_since_s
        around, spec = self._around, self.plan.spec
        block_bytes = self.plan.arena.block_bytes
        copies = CopyLane(self._loop, around.links, spec, block_bytes, around)
        self._folding = None
        if self._folds:
            self._folding = FoldingExecutor(
                self._loop, self._cost, copies, around.advance, around.weigh, self._horizon
            )
        executor = self._folding or MeshExecutor(self._loop, self._cost, copies)
        self.unit = build_unit(self.plan, executor, self._now, around.emit)
        if self._folding is not None:
            self._folding.attach(self.unit)
        self._lives.append((self.unit, executor))
        self._timer: Event | None = None
        self._timer_s: float | None = None

    def die(self) -> None:
        """All that it holds and computes is lost, as when its process ends."""
        self.settle()
        self._lives[-1][1].stop()
        if self._timer is not None:
            self._timer.cancel()
        self._deaths += 1
        self._down_since_s = self._loop.now_s

    def _now(self) -> float:
        return self._loop.now_s

    def _horizon(self) -> float:
        """The next request or sample of the group, or the unit's own timer."""
        around_s = self._around.horizon()
        return around_s if self._timer_s is None else min(around_s, self._timer_s)

    def add(self, request: Request) -> None:
        """A request arrives; its deadline may be the next thing to look at."""
        self.settle()
        self.unit.add(request)
        self._arm()

    def extend(self, more: Extend) -> None:
        """More of what it fetches is there."""
        self.settle()
        self.unit.extend(more)
        self._arm()

    def abort(self, request_id: int) -> None:
        """It need not be held or served any more."""
        self.settle()
        self.unit.abort(request_id)
        self._arm()

    def settle(self) -> None:
        """All that happened so far is written down."""
        if self._folding is not None:
            self._folding.settle()

    def publish(self) -> None:
        """The router may count the tokens that were generated so far."""
        if self._folding is not None and self.is_up:
            self._folding.publish()

    def _arm(self) -> None:
        next_s = self.unit.next_timer()
        if next_s is None or (self._timer_s is not None and self._timer_s <= next_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_s = self._loop.at(next_s, self._wake), next_s

    def _wake(self) -> None:
        self._timer = self._timer_s = None
        next_s = self.unit.next_timer()
        is_due = next_s is not None and next_s <= self._loop.now_s
        if is_due and not (self._folding is not None and self._folding.tick()):
            self.unit.tick()
        self._arm()

    def sample(self) -> None:
        """Look at how full the arena is, and how busy the lanes were."""
        if self._folding is not None:
            self._folding.take_blocks()
        pool = self.unit.scheduler.memory.pool
        kv = [pool.accounts[m].used / pool.num_blocks * self.is_up for m in self.plan.models]
        self._gauge.add(kv, [self._busy_s(lane) for lane in range(self._num_lanes)])

    def _busy_s(self, lane: int) -> float:
        return sum(executor.busy_until_now_s(lane) for _, executor in self._lives)

    def use(self, wall_s: float) -> UnitUse:
        """How busy it was in `wall_s` seconds."""
        self.settle()
        gauge, down_s = self._gauge, self._down_s
        if not self.is_up:
            down_s += max(0.0, wall_s - self._down_since_s)
        lives = [unit.stats() for unit, _ in self._lives]
        by_model = zip(*(stats.models for stats in lives), strict=True)
        return UnitUse(
            unit=self.unit.name,
            num_blocks=lives[-1].blocks_total,
            kv_mean=gauge.total / gauge.num_samples if gauge.num_samples else 0.0,
            kv_peak=gauge.peak,
            lanes_busy=tuple(
                self._busy_s(lane) / wall_s if wall_s else 0.0 for lane in range(self._num_lanes)
            ),
            num_batches=sum(executor.lanes.num_batches for _, executor in self._lives),
            deaths=self._deaths,
            down_s=down_s,
            models=tuple(
                ModelUse(
                    own[-1].model,
                    sum(life.preemptions_swap for life in own),
                    sum(life.preemptions_recompute for life in own),
                    own[-1].blocks_quota,
                )
                for own in by_model
            ),
            over_time=gauge.over_time(),
        )
