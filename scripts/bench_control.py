"""What does the brain cost? Microseconds of its operations, without an engine behind it.

    python scripts/bench_control.py --out docs/benchmarks

16 models with 256 sequences each, all decoding. A lane answers when it is told to, with made-up
tokens, so what is timed is the code that serves and nothing else. Every figure is the best and the
median of many calls.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Annotated, Any

import msgspec
import typer
from bench_lanes import provenance
from rich.console import Console
from rich.table import Table

from muxrt.config.model import ModelShape
from muxrt.config.placement import Lanes, Memory, ModelSpec, Scheduling, Slo, UnitModel, UnitSpec
from muxrt.core import Batch, Output, Request, Result, Work
from muxrt.cost.latency import BatchShape
from muxrt.engine.build import build_unit, plan_unit
from muxrt.engine.executor import Done
from muxrt.engine.messages import FromUnit, Step
from muxrt.kvcache.block_pool import BlockPool

NUM_MODELS = 16
NUM_SEQUENCES = 256  # per model
PROMPT_TOKENS, MAX_TOKENS = 100, 10_000
BLOCK_TOKENS = 16
LONG_PROMPT_TOKENS = 2_000
SHAPE = ModelShape(  # the `27m` of the other benchmarks
    family="llama",
    hidden_size=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    intermediate_size=1_376,
    vocab_size=2_048,
    max_positions=PROMPT_TOKENS + MAX_TOKENS,
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
GROUP_BYTES = 8 * 8 * 2 * BLOCK_TOKENS * 64 * 4  # layers x heads x (K, V) x tokens x head x f32
KV_BYTES = 100 * NUM_MODELS * NUM_SEQUENCES * GROUP_BYTES  # only counted: nothing is short


@dataclass
class Timing:
    """Calls of one operation."""

    name: str
    target_us: float | None = None
    calls_us: list[float] = field(default_factory=list)

    @contextmanager
    def call(self) -> Iterator[None]:
        begun_ns = perf_counter_ns()
        yield
        self.calls_us.append((perf_counter_ns() - begun_ns) / 1e3)

    def repeat(self, operation: Callable[[], object], calls: int = 10, rounds: int = 500) -> None:
        """Rounds of a few calls each, so that the clock's own cost does not count."""
        for _ in range(rounds):
            begun_s = perf_counter()
            for _ in range(calls):
                operation()
            self.calls_us.append((perf_counter() - begun_s) * 1e6 / calls)

    def row(self) -> dict[str, Any]:
        return {
            "operation": self.name,
            "best_us": round(min(self.calls_us), 2),
            "median_us": round(statistics.median(self.calls_us), 2),
            "target_us": self.target_us,
        }


class HeldLanes:
    """An executor that only notes what was launched."""

    def __init__(self) -> None:
        self.works: list[Work] = []

    def launch(self, work: Work, done: Done) -> None:
        self.works.append(work)


def result_of(work: Work) -> Result:
    assert isinstance(work, Batch)
    tokens = tuple(7 if entry.samples else None for entry in work.entries)
    return Result(tokens, (False,) * len(tokens), elapsed_s=1e-4 * work.num_tokens)


class Crowd:
    """A unit with every sequence decoding."""

    def __init__(self, lanes: int, slo: Slo | None = None) -> None:
        names = [f"model-{index}" for index in range(NUM_MODELS)]
        spec = UnitSpec(
            name="bench",
            models=tuple(UnitModel(name=name) for name in names),
            memory=Memory(kv_bytes=KV_BYTES),
            lanes=Lanes(split=(1,) * lanes, depth=1),
            scheduling=Scheduling(
                quota_period_s=0.0,
                prefill_tokens=PROMPT_TOKENS * NUM_SEQUENCES,
                max_sequences=NUM_SEQUENCES + 1,
            ),
        )
        specs = {name: ModelSpec(name=name, path=name, slo=slo) for name in names}
        plan = plan_unit(spec, specs, dict.fromkeys(names, SHAPE))
        self.lanes = HeldLanes()
        self.unit = build_unit(plan, self.lanes, perf_counter, ignore)
        self.scheduler = self.unit.scheduler
        for index in range(NUM_MODELS * NUM_SEQUENCES):
            name = names[index % NUM_MODELS]
            self.scheduler.add(Request(index, name, PROMPT_TOKENS, MAX_TOKENS, b""))
        self.unit.pump()
        while any(not s.is_prefilled for q in self.scheduler.queues.values() for s in q):
            self.step()
        self.step()  # from here on every batch is a whole one

    def step(self) -> list[Output]:
        """End all works, and only then launch what follows; what they gave."""
        works, self.lanes.works = self.lanes.works, []
        outputs = [
            output
            for work in works
            for output in self.scheduler.commit(work, result_of(work), perf_counter())
        ]
        self.unit.pump()
        return outputs


def ignore(outputs: tuple[Output, ...]) -> None:
    pass


def bench_pool() -> list[Timing]:
    """A group is 4 blocks of 16 planes, as `27m` has them."""
    pool = BlockPool({"a": 4})
    pool.grow(range(100_000))

    def turn_over(num_groups: int) -> None:
        groups = pool.take("a", num_groups)
        assert groups is not None
        pool.release(groups)

    one, bulk = Timing("allocate + free 1 group", 4), Timing("allocate + free 64 groups", 10)
    one.repeat(lambda: turn_over(1), calls=100)
    bulk.repeat(lambda: turn_over(64), calls=20)
    return [one, bulk, *bench_prefix_lookup(pool)]


def bench_prefix_lookup(pool: BlockPool) -> list[Timing]:
    """All full groups of a long prompt are known."""
    keys = [blake2b(bytes([i])).digest()[:16] for i in range(LONG_PROMPT_TOKENS // BLOCK_TOKENS)]
    groups = pool.take("a", len(keys))
    assert groups is not None
    for group, key in zip(groups, keys, strict=True):
        pool.prefixes.publish(group, key)
    timing = Timing(f"prefix lookup of {LONG_PROMPT_TOKENS:,} tokens")
    timing.repeat(lambda: pool.prefixes.match(keys))
    return [timing]


def bench_decisions(rounds: int) -> list[Timing]:
    """One decode step of one model at a time: every decision forms a batch of 256."""
    crowd = Crowd(lanes=1)
    make, whole = Timing("  of this: make the batch of 256"), Timing("decision + batch of 256")
    choose = Timing("scheduling decision, a batch is due", 100)
    busy = Timing("scheduling decision, all lanes busy", 100)
    commit = Timing("commit of 256 sequences", 300)
    decode = crowd.scheduler.decode

    def timed(model: str, lane: int) -> Batch | None:
        with make.call():
            return decode(model, lane)

    crowd.scheduler.decode = timed  # type: ignore[method-assign]
    [work] = crowd.lanes.works
    for _ in range(rounds):
        busy.repeat(lambda: crowd.scheduler.schedule(perf_counter()), rounds=1)
        result = result_of(work)
        with commit.call():
            crowd.scheduler.commit(work, result, perf_counter())
        with whole.call():
            formed = crowd.scheduler.schedule(perf_counter())
        assert isinstance(formed, Batch) and len(formed.entries) == NUM_SEQUENCES
        choose.calls_us.append(whole.calls_us[-1] - make.calls_us[-1])
        work = formed
    return [busy, choose, whole, make, commit]


def bench_nothing_runnable(rounds: int) -> list[Timing]:
    """A lane is idle, but every sequence of every model is in flight on another."""
    crowd = Crowd(lanes=NUM_MODELS + 1)
    assert crowd.scheduler.num_in_flight == NUM_MODELS
    timing = Timing("scheduling decision, nothing runnable", 100)
    decide_after_changes(crowd, timing, rounds)
    return [timing]


def bench_held_back(rounds: int) -> list[Timing]:
    """The same, and prompts of every model wait, which would cost the others their TPOT."""
    crowd = Crowd(lanes=NUM_MODELS + 1, slo=Slo(1.0, 0.02))
    for name in crowd.scheduler.queues:  # a decode step takes 26 ms: more than the target
        for num_tokens in (1, 16, 256) * 100:
            shape = BatchShape(num_tokens, num_tokens * PROMPT_TOKENS)
            crowd.scheduler.latency.observe(name, shape, num_tokens * 1e-4)
    crowd.step()
    for number, name in enumerate(crowd.scheduler.queues):
        request = Request(-1 - number, name, PROMPT_TOKENS, MAX_TOKENS, b"")
        crowd.scheduler.add(request)
    timing = Timing("scheduling decision, prompts held back", 100)
    decide_after_changes(crowd, timing, rounds)
    return [timing]


def decide_after_changes(crowd: Crowd, timing: Timing, rounds: int) -> None:
    """Before each decision one model changes, as it does when a batch of it ends."""
    queues = list(crowd.scheduler.queues.values())
    crowd.scheduler.schedule(perf_counter())
    for number in range(rounds):
        queues[number % NUM_MODELS].changed()
        with timing.call():
            work = crowd.scheduler.schedule(perf_counter())
        assert work is None


def bench_messages() -> list[Timing]:
    """What crosses a process border for one step of 256 sequences."""
    crowd = Crowd(lanes=1)
    [batch] = crowd.lanes.works
    outputs = tuple(crowd.step())
    messages: dict[str, tuple[Any, Any]] = {
        "Batch": (batch, Work),
        "Result": (result_of(batch), Result),
        "Step": (Step(outputs), FromUnit),
    }
    timings = []
    for name, (message, wire_type) in messages.items():
        encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(wire_type)
        data = encoder.encode(message)
        encode, decode = Timing(f"encode {name} of 256"), Timing(f"decode {name} of 256")
        encode.repeat(lambda e=encoder, m=message: e.encode(m))
        decode.repeat(lambda d=decoder, b=data: d.decode(b))
        timings += [encode, decode]
    return timings


def main(
    rounds: Annotated[int, typer.Option(help="Steps per figure of the scheduler.")] = 300,
    out: Annotated[Path | None, typer.Option(help="Folder for control.json.")] = None,
) -> None:
    """Time the control path."""
    timings = [*bench_pool(), *bench_decisions(rounds), *bench_nothing_runnable(rounds)]
    timings += bench_held_back(rounds)
    rows = [timing.row() for timing in [*timings, *bench_messages()]]
    table = Table("operation", "best us", "median us", "target us")
    for row in rows:
        target = row["target_us"] and f"< {row['target_us']:g}"
        table.add_row(row["operation"], f"{row['best_us']}", f"{row['median_us']}", target)
    Console().print(table)
    if out:
        shape = {"models": NUM_MODELS, "sequences_per_model": NUM_SEQUENCES, "policy": "adbs"}
        out.mkdir(parents=True, exist_ok=True)
        report = {**provenance(), **shape, "timings": rows}
        (out / "control.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
