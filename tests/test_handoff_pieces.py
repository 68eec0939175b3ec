"""Sequences whose K and V move while they are computed: the tokens of one unit, whatever comes."""

from collections import Counter
from functools import cache
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from handoff_world import SplitWorld, colocated, split_plan
from real_world import MODELS, demo_llama, demo_plan, prompts

from muxrt.core import (
    Batch,
    BatchEntry,
    Layers,
    Output,
    Phase,
    Piece,
    Prompt,
    Refusal,
    SamplingParams,
    SequenceState,
    SlotOpen,
    Source,
    Transfer,
    TransferKind,
)
from muxrt.engine.build import UnitPlan
from muxrt.engine.handoff import LEASE_S, Event, Handoff, Stage
from muxrt.engine.relay import Relay
from muxrt.engine.requests import Ledger
from muxrt.errors import MuxrtError, TransferFailed
from muxrt.kernels import Team
from muxrt.worker.kv_storage import Storage
from muxrt.worker.runner import Resident, Runner

MODEL = MODELS[2]  # four layers
OTHERS = [{}, {"planes_per_block": 2}, {"plane_tokens": 32}, {"plane_tokens": 8}]
# In chunks of 64 tokens, the last batch in parts; or all of it in one batch, in parts.
CHUNKS, WHOLE = {"stream_tokens": 1, "prefill_tokens": 64}, {"stream_tokens": 1}
# A prompt of 200 tokens is told of from 15 to 45 ms in chunks, from 10 to 20 ms in parts.
TIMES_S = (0.005, 0.012, 0.0155, 0.0185, 0.022, 0.0235, 0.026, 0.029, 0.035, 0.047, 0.06)


def pair(model: str = MODEL, room: float = 8.0, **streams: object) -> list[UnitPlan]:
    plans = [split_plan("p", "prefill", [model], **(streams or CHUNKS))]
    return [*plans, split_plan("d", "decode", [model], room)]


@cache
def text(model: str) -> list[int]:
    return max(prompts(model, 60, 400, seed=9), key=len)


def prompt_of(num_tokens: int, model: str = MODEL) -> list[int]:
    found = text(model)[num_tokens % 7 :][:num_tokens]
    assert len(found) == num_tokens
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("streams", [CHUNKS, WHOLE], ids=["chunks", "whole"])
@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_tokens_are_those_of_one_unit(model: str, streams: dict, other: dict) -> None:
    plans = [split_plan("p", "prefill", [model], **streams)]
    plans += [split_plan("d", "decode", [model], **other)]
    with SplitWorld(plans) as world:
        for index, length in enumerate((1, 16, 70, 160, 200)):
            world.at(0.013 * index, lambda n=length: world.ask(model, prompt_of(n, model), 12))
        world.run()
        for asked in world.asked:
            assert asked.tokens == colocated(model, asked.prompt, 12)
        assert world.num_extends >= 2, "nothing was told of early"
        assert world.hosts["d"].unit.scheduler.counters[model].prompt_tokens == 0


@pytest.mark.parametrize("streams", [CHUNKS, WHOLE], ids=["chunks", "whole"])
def test_pieces_are_every_layer_of_every_group_once(streams: dict) -> None:
    with SplitWorld(pair(**streams)) as world:
        for length in (33, 64, 100, 230, 128, 47, 200):
            world.ask(MODEL, prompt_of(length), 3)
        layout = world.plans["p"].models[MODEL].layout
        world.run()
        several = 0
        for asked in world.asked:
            pieces = [o.held for o in world.said if o.held and o.request_id == asked.request_id]
            assert [piece.number for piece in pieces] == list(range(len(pieces)))
            assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
            assert pieces[-1].num_tokens == len(asked.prompt)
            found = Counter[tuple[int, int]]()
            for piece in pieces:
                groups = len(piece.blocks) // 4 // layout.blocks_per_group
                end = piece.first_group + groups
                assert layout.num_groups(piece.num_tokens) == end
                found.update(
                    (group, layer)
                    for group in range(piece.first_group, end)
                    for layer in range(piece.first_layer, piece.end_layer)
                )
            assert set(found.values()) == {1}
            groups = layout.num_groups(len(asked.prompt))
            assert len(found) == groups * layout.shape.num_layers
            several += len(pieces) > 1
        assert several >= 3


def test_a_short_prompt_goes_in_one_piece() -> None:
    with SplitWorld(pair(stream_tokens=100, prefill_tokens=64)) as world:
        world.ask(MODEL, prompt_of(99), 5)
        world.ask(MODEL, prompt_of(100), 5)
        world.run()
        numbers = [(o.request_id, o.held.number) for o in world.said if o.held]
        assert Counter(rid for rid, _ in numbers)[1] == 1 < Counter(rid for rid, _ in numbers)[2]


@pytest.mark.parametrize("victim", ["p", "d"])
@pytest.mark.parametrize("streams", [CHUNKS, WHOLE], ids=["chunks", "whole"])
def test_either_side_may_die_at_any_time(victim: str, streams: dict) -> None:
    prompt = prompt_of(200)
    wanted = colocated(MODEL, prompt, 10)
    stages = set()
    for at_s in TIMES_S:
        with SplitWorld(pair(**streams)) as world:
            asked = world.ask(MODEL, prompt, 10)

            def kill(world: SplitWorld = world) -> None:
                stages.update(w.handoff.stage for w in world.dispatcher._waiters.values())
                world.kill(victim)

            world.at(at_s, kill)
            world.run()
        assert asked.tokens == wanted, at_s
    assert set(Stage) <= stages, "a stage was missed"


@pytest.mark.parametrize("streams", [CHUNKS, WHOLE], ids=["chunks", "whole"])
def test_who_leaves_at_any_time_frees_both_sides(streams: dict) -> None:
    for at_s in TIMES_S:
        with SplitWorld(pair(**streams)) as world:
            asked = world.ask(MODEL, prompt_of(200), 400)

            def leave(world: SplitWorld = world, asked=asked) -> None:
                world.dispatcher.abort(asked.request_id)
                asked.output = asked.output or object()

            world.at(at_s, leave)
            world.run()
            assert world.loop.now_s < LEASE_S, "something was held until its lease ran out"


@pytest.mark.parametrize("fault", ["lost", "damaged", "late"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_piece_that_fails_costs_no_token(fault: str, place: int) -> None:
    with SplitWorld(pair(), [""] * place + [fault]) as world:
        asked = world.ask(MODEL, prompt_of(120), 10)
        world.run()
        assert asked.tokens == colocated(MODEL, asked.prompt, 10)
        recomputed = world.hosts["d"].unit.scheduler.counters[MODEL].prompt_tokens
        # Of an early one that fails, all is fetched once more; a late one is still there.
        assert recomputed == (len(asked.prompt) if place and fault != "late" else 0)


@pytest.mark.parametrize("place", [0, 1])
def test_a_piece_that_is_sealed_late_is_not_waited_for(place: int) -> None:
    with SplitWorld(pair(), [""] * place + ["late"]) as world:
        world.faults.befall = TransferKind.SEAL
        asked = world.ask(MODEL, prompt_of(120), 10)
        other = [world.ask(MODEL, prompt_of(40), 30) for _ in range(3)]
        world.at(60.0, lambda: other.append(world.ask(MODEL, prompt_of(30), 30)))
        world.run()
        for one in [asked, *other]:
            assert one.tokens == colocated(MODEL, one.prompt, one.max_tokens)
        gave_up = [o for o in world.said if o.attempt and o.refusal is not None]
        assert len(gave_up) == place, "the decode unit kept its blocks for what did not come"


@pytest.mark.parametrize("place", [0, 1])
def test_what_cannot_be_sealed_is_computed_by_the_decode_unit(place: int) -> None:
    with SplitWorld(pair(), [""] * place + ["lost"]) as world:
        world.faults.befall = TransferKind.SEAL
        asked = world.ask(MODEL, prompt_of(120), 10)
        world.run()
        assert asked.tokens == colocated(MODEL, asked.prompt, 10)
        assert world.loop.now_s < LEASE_S


@pytest.mark.parametrize("preempt", ["recompute", "swap"])
def test_a_sequence_may_lose_its_blocks_while_it_is_told_of(preempt: str) -> None:
    with SplitWorld(pair(**CHUNKS, preempt=preempt, depth=1)) as world:
        asked = world.ask(MODEL, prompt_of(130), 10)
        scheduler = world.hosts["p"].unit.scheduler

        def take_off() -> None:
            (sequence,) = scheduler.queues[MODEL].running
            assert sequence.outgoing is not None and sequence.outgoing.num_pieces
            scheduler.memory.preempt(sequence)
            assert sequence.preempt or sequence.state is not SequenceState.RUNNING

        world.at(0.0155, take_off)
        world.run()
        assert scheduler.queues[MODEL].is_empty
        assert asked.tokens == colocated(MODEL, asked.prompt, 10)
        assert sum(o.held.number == 0 for o in world.said if o.held) == 2, "it began anew"


def test_a_sequence_may_lose_its_blocks_when_its_piece_was_sealed() -> None:
    anew = {**CHUNKS, "preempt": "recompute"}
    other = MODELS[1]
    plans = [
        split_plan(name, role, [MODEL, other], depth=1, **streams)
        for name, role, streams in (("p", "prefill", anew), ("d", "decode", {}))
    ]
    with SplitWorld(plans) as world:
        asked = [world.ask(model, prompt_of(130, model), 10) for model in (MODEL, other)]
        scheduler = world.hosts["p"].unit.scheduler

        def take_off() -> None:
            (sequence,) = scheduler.queues[MODEL].running
            flights = [f.work for f in scheduler.flights.values() if sequence in f.sequences]
            assert [type(work) for work in flights] == [Transfer]
            scheduler.memory.preempt(sequence)
            assert sequence.preempt

        world.at(0.012, take_off)
        world.run()
        for one in asked:
            assert one.tokens == colocated(one.model, one.prompt, 10)
        numbers = [o.held.number for o in world.said if o.held and o.request_id == 1]
        assert numbers == [0, 1, 2], "what it left was told of"


def test_pieces_hold_up_no_chunk_of_the_prompt() -> None:
    times = []
    for streams in (CHUNKS, {"prefill_tokens": 64}):
        with SplitWorld(pair(**streams, depth=1)) as world:
            asked = world.ask(MODEL, prompt_of(250), 3)
            world.run()
            times.append(asked.times_s)
    pieces, whole = times
    assert pieces[0] == pytest.approx(whole[0])


def test_a_decode_unit_without_room_fetches_when_it_has_some() -> None:
    with SplitWorld(pair(room=1.0)) as world:
        for index in range(12):
            world.at(0.01 * index, lambda: world.ask(MODEL, prompt_of(130), 40))
        world.run()
        for asked in world.asked:
            assert asked.tokens == colocated(MODEL, asked.prompt, 40)
        assert world.num_extends == 24


# -- what the endpoint does ------------------------------------------------------------------


class Told:
    """A reach that only notes what is said to whom."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.decoder: str | None = "d"

    def choose_decoder(self, model: str) -> str | None:
        return self.decoder

    def identity(self, unit: str) -> str:
        return f"{unit}#1"

    def address(self, model: str, holder: str) -> bytes | None:
        return b""

    def resume(self, request_id: int, unit: str, source: Source | None) -> None:
        self.said.append(("resume" if source else "recompute", unit))

    def extend(self, request_id: int, unit: str, piece: Piece) -> None:
        self.said.append(("extend", unit))

    def release(self, request_id: int, unit: str) -> None:
        self.said.append(("release", unit))

    def give_up(self, request_id: int) -> None:
        self.said.append(("give up", ""))


def told_of(number: int, is_last: bool = False) -> Output:
    piece = Piece(number=number, blocks=b"", end_layer=1, num_tokens=1, is_last=is_last)
    return Output(1, held=piece)


def on_the_way() -> tuple[Relay, Handoff, Told, Ledger]:
    from test_router import make

    ledger, told = Ledger(), Told()
    ledger.open(make(1), "p")
    return Relay(ledger, told), Handoff(), told, ledger


def test_what_a_dropped_attempt_still_says_is_not_taken_for_the_next_one() -> None:
    relay, handoff, told, ledger = on_the_way()
    relay.hear(handoff, told_of(0))
    first = handoff.attempt
    assert ledger.load("a", "d").promised_tokens == 10
    relay.hear(handoff, told_of(0))  # it was preempted, and begins anew
    relay.hear(handoff, told_of(1, is_last=True))
    failed = Output(1, refusal=Refusal(500, TransferFailed.kind, "damaged"), attempt=first)
    assert relay.hear(handoff, failed) and handoff.stage is Stage.FETCHING
    assert told.said == [("resume", "d"), ("release", "d"), ("resume", "d"), ("extend", "d")]
    relay.hear(handoff, msgspec.structs.replace(failed, attempt=handoff.attempt))
    assert told.said[4:] == [("release", "p"), ("recompute", "d")]
    assert ledger.check() and ledger.load("a", "p").tokens == 0


def test_without_an_heir_the_pieces_are_kept_for_the_end() -> None:
    relay, handoff, told, ledger = on_the_way()
    told.decoder = None
    relay.hear(handoff, told_of(0))
    assert handoff.stage is Stage.PREFILLING and ledger.check()
    relay.hear(handoff, told_of(1))
    told.decoder = "d"
    relay.hear(handoff, told_of(2, is_last=True))
    assert told.said == [("resume", "d")] and len(handoff.pieces) == 3


def test_an_heir_that_dies_is_replaced_at_the_end() -> None:
    relay, handoff, told, ledger = on_the_way()
    relay.hear(handoff, told_of(0))
    relay.on(1, handoff, Event.HEIR_DIED)
    assert handoff.heir is None and ledger.promised_to("d") == []
    told.decoder = "e"
    relay.hear(handoff, told_of(1, is_last=True))
    assert told.said == [("resume", "d"), ("release", "d"), ("resume", "e")]


# -- what the worker does --------------------------------------------------------------------


def prefill_batch(tokens: list[int], plan: UnitPlan) -> Batch:
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=0)
    payload = msgspec.msgpack.encode(Prompt(np.array(tokens, "<i4").tobytes(), sampling))
    blocks = np.arange(plan.models[MODEL].layout.num_blocks(len(tokens)), dtype=np.int32)
    entry = BatchEntry(0, 0, len(tokens), True, 0, blocks.tobytes())
    return Batch(0, 0, MODEL, Phase.PREFILL, (entry,), (SlotOpen(0, payload),))


def parts_of(batch: Batch, cuts: tuple[int, ...]) -> list[Batch]:
    (entry,) = batch.entries
    silent, bare = (
        msgspec.structs.replace(entry, samples=False),
        msgspec.structs.replace(entry, blocks=b""),
    )
    found = []
    for number, (begin, end) in enumerate(pairwise(cuts)):
        change = {"layers": Layers(begin, end, cuts[-1]), "id": number}
        entries = (bare if end == cuts[-1] else silent,)
        opened = batch.opened if begin == 0 else ()
        found.append(msgspec.structs.replace(batch, entries=entries, opened=opened, **change))
    return found


@pytest.mark.parametrize("cuts", [(0, 1, 2, 3, 4), (0, 3, 4)])
def test_a_pass_in_parts_is_a_whole_one_to_the_last_bit(cuts: tuple[int, ...]) -> None:
    plan, tokens = demo_plan((MODEL,)), prompt_of(100)
    results, arenas = [], []
    for works in ([prefill_batch(tokens, plan)], parts_of(prefill_batch(tokens, plan), cuts)):
        storage = Storage(plan)
        runner = Runner({MODEL: Resident.of(demo_llama(MODEL), MODEL, storage)}, Team())
        found = [runner.run(work) for work in works]
        results.append(msgspec.structs.replace(found[-1], elapsed_s=0.0))
        arenas.append(storage.arena.tensor().numpy().copy())
        assert all(result.tokens == () for result in found[:-1])
        storage.close()
    assert results[0] == results[1] and results[0].tokens[0] is not None
    assert np.array_equal(*arenas) and arenas[0].any()


def test_the_layers_behind_those_that_failed_fail_too() -> None:
    plan = demo_plan((MODEL,))
    storage = Storage(plan)
    runner = Runner({MODEL: Resident.of(demo_llama(MODEL), MODEL, storage)}, Team())
    first, second, last = parts_of(prefill_batch(prompt_of(100), plan), (0, 1, 2, 4))
    runner.run(first)
    with pytest.raises(MuxrtError, match="layers 2 to 4: those before them failed"):
        runner.run(last)
    runner.run(second)
    assert runner.run(last).tokens[0] is not None
    storage.close()
