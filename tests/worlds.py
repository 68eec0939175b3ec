"""Small worlds for the brain's tests: a unit under the simulator, its KV memory checked."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec

from muxrt.config.model import ModelShape
from muxrt.config.placement import Lanes, Memory, ModelSpec, Scheduling, Slo, UnitModel, UnitSpec
from muxrt.core import Batch, Copy, CopyKind, Output, Request, Result, Work, unpack_ids
from muxrt.engine.build import UnitPlan, build_unit, plan_unit
from muxrt.engine.executor import Done, Executor
from muxrt.sim.executor import ConstantCost, Cost, SimExecutor
from muxrt.sim.loop import ARRIVE, EventLoop
from muxrt.sim.tokens import SimPrompt

SMALL = ModelShape(
    family="llama",
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=128,
    vocab_size=256,
    max_positions=128,
    rms_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    tied_embeddings=False,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    dtype="float32",
    eos_token_ids=(0,),
    bos_token_id=None,
)
SHAPES = {
    "a": SMALL,
    "b": replace(SMALL, num_layers=3, num_kv_heads=1),
    "c": replace(SMALL, num_layers=5, head_dim=64),
}


def arena_bytes(num_blocks: int, planes_per_block: int, models: str = "abc") -> int:
    """kv_bytes of an arena of `num_blocks`: planes are 16 rows of the widest model's."""
    widest = max(SHAPES[name].head_dim for name in models)
    return num_blocks * planes_per_block * 16 * 2 * widest * 4


@dataclass
class Answer:
    """What came back for one request."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    status: int = 200
    first_token_s: float | None = None
    finished_s: float | None = None
    cached_tokens: int = 0
    retry_after_s: float | None = None


class CheckedMemory:
    """An executor around another: keeps what every block holds, and reads it as a kernel would.

    A token's K and V are stood for by (chain of the tokens up to it); a sequence that reads a
    position somebody else overwrote, or one never written, fails the test.
    """

    def __init__(self, inner: Executor, plan: UnitPlan, streams: dict[int, "Stream"]) -> None:
        self.inner = inner
        self.plan = plan
        self.streams = streams
        self.launched: list[Work] = []
        self._slots: dict[tuple[str, int], int] = {}  # -> request id
        self._tables: dict[tuple[str, int], list[int]] = {}
        self._arena: dict[int, list[object]] = {}
        self._host: dict[int, list[object]] = {}

    def launch(self, work: Work, done: Done) -> None:
        self.launched.append(msgspec.msgpack.decode(msgspec.msgpack.encode(work), type=Work))
        self.inner.launch(work, lambda w, result: self._done(w, result, done))

    def _done(self, work: Work, result: Result, done: Done) -> None:
        # Content moves when work ends: an id that is reused too early is overwritten before.
        if isinstance(work, Copy):
            self._copy(work)
        elif isinstance(work, Batch):
            self._run(work)
        done(work, result)

    def _run(self, batch: Batch) -> None:
        layout = self.plan.models[batch.model].layout
        for opened in batch.opened:
            payload = msgspec.msgpack.decode(opened.payload, type=MarkedPrompt)
            self._slots[batch.model, opened.slot] = payload.request_id
        for entry in batch.entries:
            key = batch.model, entry.slot
            table = self._tables.setdefault(key, [])
            first = entry.first_group * layout.blocks_per_group
            table[first:] = unpack_ids(entry.blocks).tolist() if entry.blocks else table[first:]
            stream = self.streams[self._slots[key]]
            for position in range(entry.start + entry.num_tokens):
                group, row = divmod(position, layout.block_tokens)
                ids = table[group * layout.blocks_per_group : (group + 1) * layout.blocks_per_group]
                assert len(ids) == layout.blocks_per_group, "a position has no blocks"
                for block in ids:
                    rows = self._arena.setdefault(block, [None] * layout.block_tokens)
                    if len(rows) < layout.block_tokens:
                        rows += [None] * (layout.block_tokens - len(rows))
                    if position >= entry.start:
                        rows[row] = stream.tag(position)
                    assert rows[row] == stream.tag(position), (
                        f"request {stream.request_id} reads foreign K and V at {position}"
                    )

    def _copy(self, work: Copy) -> None:
        arena, host = unpack_ids(work.blocks).tolist(), unpack_ids(work.host_blocks).tolist()
        assert len(arena) == len(host)
        for here, there in zip(arena, host, strict=True):
            if work.kind is CopyKind.SWAP_OUT:
                self._host[there] = list(self._arena.get(here, []))
            else:
                self._arena[here] = list(self._host[there])
        if work.kind is CopyKind.SWAP_IN:
            self._tables[work.model, work.slot] = arena


class MarkedPrompt(SimPrompt, frozen=True):
    """A simulated prompt that the checked memory can recognise."""

    request_id: int = 0


@dataclass
class Stream:
    """The tokens of one request, as far as their identity matters."""

    model: str
    request_id: int
    prompt_tokens: int
    family: int | None  # requests of one family share their prompt up to `shared`
    shared: int

    def tag(self, position: int) -> object:
        if self.family is not None and position < self.shared:
            return (self.model, "family", self.family, position)
        return (self.model, self.request_id, position)

    def keys(self, block_tokens: int) -> tuple[bytes, ...]:
        full = (self.prompt_tokens - 1) // block_tokens
        return tuple(
            hashlib.blake2b(
                repr([self.tag(p) for p in range((i + 1) * block_tokens)]).encode()
            ).digest()[:16]
            for i in range(full)
        )


class World:
    """A unit under the simulator. Submit, run, look at `answers`; every end is checked."""

    def __init__(
        self,
        models: str = "ab",
        policy: str = "adbs",
        depth: int = 1,
        lanes: int = 1,
        num_blocks: int = 200,
        planes_per_block: int = 1,
        swap_blocks: int = 0,
        preempt: str = "auto",
        prefill_tokens: int = 64,
        max_sequences: int = 8,
        quota_period_s: float = 2.0,
        borrow: bool = True,
        quotas: dict[str, float] | None = None,
        cost: Cost | None = None,
        wrap: Callable[[EventLoop, UnitPlan], Executor] | None = None,
        max_model_len: int | None = None,
        slo: Slo | None = None,
        weight_bytes: int | None = None,
        pin: str = "",
        **habits: float,
    ) -> None:
        """`habits`: when models sleep (`ModelSpec`); `pin`: models that never do."""

        def size(blocks: int) -> int:
            return arena_bytes(blocks, planes_per_block, models)

        spec = UnitSpec(
            name="unit",
            models=tuple(UnitModel(name=m, quota=(quotas or {}).get(m)) for m in models),
            memory=Memory(
                kv_bytes=size(num_blocks),
                swap_bytes=size(swap_blocks),
                weight_bytes=weight_bytes,
                planes_per_block=planes_per_block,
            ),
            lanes=Lanes(split=(1,) * lanes, depth=depth),
            scheduling=Scheduling(
                policy=policy,  # type: ignore[arg-type]
                prefill_tokens=prefill_tokens,
                max_sequences=max_sequences,
                quota_period_s=quota_period_s,
                borrow=borrow,
                preempt=preempt,  # type: ignore[arg-type]
            ),
        )
        habits = {"min_residency_s": 0.0, **habits}
        specs = {
            m: ModelSpec(
                name=m, path=m, max_model_len=max_model_len, slo=slo, pin=m in pin, **habits
            )
            for m in models
        }
        self.loop = EventLoop()
        self.plan = plan_unit(spec, specs, {m: SHAPES[m] for m in models})
        inner = (
            wrap(self.loop, self.plan) if wrap else SimExecutor(self.loop, cost or ConstantCost())
        )
        self.streams: dict[int, Stream] = {}
        self.memory = CheckedMemory(inner, self.plan, self.streams)
        self.answers: dict[int, Answer] = {}
        self.unit = build_unit(self.plan, self.memory, lambda: self.loop.now_s, self._emit)
        self.pool = self.unit.scheduler.memory.pool
        self.num_steps = 0

    def _emit(self, outputs: tuple[Output, ...]) -> None:
        for output in outputs:
            answer = self.answers[output.request_id]
            assert answer.finish is None, "an output after the end"
            if output.tokens and answer.first_token_s is None:
                answer.first_token_s = self.loop.now_s
                answer.cached_tokens = output.cached_tokens
            answer.tokens.extend(output.tokens)
            if output.refusal:
                answer.status = output.refusal.status
                answer.retry_after_s = output.refusal.retry_after_s
            if output.finish:
                answer.finish = output.finish.value
                answer.finished_s = self.loop.now_s

    def submit(
        self,
        model: str,
        prompt: int = 20,
        output: int = 5,
        max_tokens: int | None = None,
        family: int | None = None,
        shared: int = 0,
        deadline_s: float | None = None,
    ) -> int:
        """Add a request now; returns its id. It ends by itself after `output` tokens."""
        rid = len(self.answers)
        stream = self.streams[rid] = Stream(model, rid, prompt, family, min(shared, prompt))
        layout = self.plan.models[model].layout if model in self.plan.models else None
        self.answers[rid] = Answer()
        request = Request(
            id=rid,
            model=model,
            prompt_tokens=prompt,
            max_tokens=output if max_tokens is None else max_tokens,
            payload=msgspec.msgpack.encode(MarkedPrompt(output, 0, rid)),
            keys=stream.keys(layout.block_tokens) if layout and family is not None else (),
            arrived_s=self.loop.now_s,
            deadline_s=deadline_s,
        )
        self.unit.add(request)
        return rid

    def at(self, at_s: float, action: Callable[[], object]) -> None:
        """Do something at a point in time."""
        self.loop.at(at_s, lambda: (action(), None)[1], ARRIVE)

    def step(self) -> bool:
        """One event of the loop or of the unit's timer; False when nothing is left to happen."""
        timer = self.unit.next_timer()
        if timer is not None:
            wake = self.loop.at(timer, self.unit.tick)
        moved = self.loop.step()
        if timer is not None:
            wake.cancel()
        self.num_steps += moved
        return moved

    def run(self, max_steps: int = 100_000) -> "World":
        """Until nothing is left to do; fails if that takes too long or something is stuck."""
        while not (self.unit.is_idle and not self.loop.has_events) and self.step():
            assert self.num_steps < max_steps, "no progress"
        assert self.unit.is_idle, "a request is stuck"
        return self.check_empty()

    def check(self) -> "World":
        """The unit's accounts add up."""
        assert self.unit.check()
        return self

    def check_empty(self) -> "World":
        """After the last request nothing is held."""
        self.check()
        assert self.pool.num_used == 0
        assert self.pool.num_available == self.pool.num_blocks
        assert self.unit.scheduler.memory.host.num_free == self.plan.num_host_blocks
        assert all(answer.finish for answer in self.answers.values())
        return self

    def batches(self, model: str | None = None) -> list[Batch]:
        """Every batch launched so far (of `model`)."""
        works = self.memory.launched
        return [w for w in works if isinstance(w, Batch) and model in (None, w.model)]


class FailingExecutor(SimExecutor):
    """The simulator's executor, but one batch of one model raises."""

    def __init__(self, loop: EventLoop, fail_model: str, fail_batch: int) -> None:
        super().__init__(loop, ConstantCost())
        self._fail_model = fail_model
        self._fail_batch = fail_batch

    def _run(self, work: Work, elapsed_s: float) -> Result:
        result = super()._run(work, elapsed_s)
        if work.model == self._fail_model:
            self._fail_batch -= 1
            if self._fail_batch == 0:
                return Result(error="the kernel raised")
        return result
