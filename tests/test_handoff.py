"""Sequences that one unit prefills and another one decodes: the tokens of one that does both."""

from dataclasses import dataclass
from random import Random

import pytest
from handoff_world import SplitWorld, colocated, pick, split_plan
from real_world import MODELS, prompts

from muxrt.config.routing import Routing
from muxrt.engine.handoff import LEASE_S, MAX_SETBACKS, STEPS, Act, Event, Handoff, Stage

LENGTHS = (1, 5, 16, 17, 40, 96, 130)


def borrowing(batches: float, kv: float) -> Routing:
    """High marks so low that a few small prompts or answers pass them; low ones at a third."""
    return Routing(
        policy="splitwise",
        borrow_batches=batches,
        return_batches=batches / 3,
        borrow_kv=kv,
        return_kv=kv / 3,
    )


def cases(model: str, count: int, seed: int = 0) -> list[tuple[list[int], int]]:
    found = prompts(model, count, max(LENGTHS), seed)
    return [(p[:n] or [1], 1 + 5 * i) for i, (p, n) in enumerate(zip(found, LENGTHS, strict=False))]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("other", [{}, {"planes_per_block": 8}, {"plane_tokens": 32}])
def test_tokens_are_those_of_one_unit_whatever_the_layouts(model: str, other: dict) -> None:
    plans = [split_plan("p", "prefill", [model]), split_plan("d", "decode", [model], **other)]
    with SplitWorld(plans) as world:
        wanted = cases(model, len(LENGTHS))
        for prompt, max_tokens in wanted:
            world.ask(model, prompt, max_tokens)
        world.run()
        for asked, (prompt, max_tokens) in zip(world.asked, wanted, strict=True):
            assert asked.tokens == colocated(model, prompt, max_tokens)
        decoded = world.hosts["d"].unit.scheduler.counters[model]
        assert decoded.prompt_tokens == 0, "it computed a prompt again"
        assert decoded.output_tokens == sum(len(a.tokens) - 1 for a in world.asked)


def test_drawn_tokens_and_penalties_know_what_was_generated_elsewhere() -> None:
    model = MODELS[1]
    sampling = {"temperature": 0.9, "seed": 7, "frequency_penalty": 1.5, "min_tokens": 6}
    prompt = prompts(model, 1, 60, seed=3)[0]
    with SplitWorld([split_plan("p", "prefill", [model]), split_plan("d", "decode", [model])]) as w:
        asked = w.ask(model, prompt, 24, **sampling)
        w.run()
    assert asked.tokens == colocated(model, prompt, 24, **sampling)


@pytest.mark.parametrize("fault", ["lost", "damaged", "late"])
def test_a_transfer_that_fails_costs_no_token(fault: str) -> None:
    model = MODELS[0]
    prompt = prompts(model, 1, 80, seed=1)[0]
    plans = [split_plan("p", "prefill", [model]), split_plan("d", "decode", [model])]
    with SplitWorld(plans, [fault]) as world:
        asked = world.ask(model, prompt, 20)
        if fault == "late":  # the lease is over, and others have written over what was held
            for other in prompts(model, 12, 120, seed=2):
                world.at(40.0, lambda other=other: world.ask(model, other, 2))
        world.run()
        assert asked.tokens == colocated(model, prompt, 20)
        assert world.hosts["d"].unit.scheduler.counters[model].prompt_tokens > 0, "nothing failed"


@pytest.mark.parametrize("victim", ["p", "d"])
@pytest.mark.parametrize("at_s", [0.005, 0.012, 0.016, 0.021, 0.05, 0.11])
def test_either_side_may_die(victim: str, at_s: float) -> None:
    model = MODELS[0]
    prompt = prompts(model, 1, 60, seed=4)[0]
    with SplitWorld([split_plan("p", "prefill", [model]), split_plan("d", "decode", [model])]) as w:
        asked = w.ask(model, prompt, 20)
        w.at(at_s, lambda: w.kill(victim))
        w.run()
    assert asked.tokens == colocated(model, prompt, 20)


def test_who_leaves_frees_both_sides() -> None:
    model = MODELS[0]
    for at_s in (0.005, 0.012, 0.016, 0.021, 0.05):
        plans = [split_plan("p", "prefill", [model]), split_plan("d", "decode", [model])]
        with SplitWorld(plans) as world:
            asked = world.ask(model, [5] * 50, 400)

            def leave(world: SplitWorld = world, asked=asked) -> None:
                world.dispatcher.abort(asked.request_id)
                asked.output = asked.output or object()

            world.at(at_s, leave)
            world.run()
            assert world.loop.now_s < LEASE_S, "something was held until its lease ran out"


def test_a_prefill_unit_that_went_on_alone_may_die_too() -> None:
    # Found by scripts/handoff_faults.py: nobody held its blocks any more, and somebody asked who.
    model = MODELS[0]
    prompt = prompts(model, 1, 60, seed=4)[0]
    plans = [split_plan("p", "prefill", [model]), split_plan("d", "decode", [model])]
    with SplitWorld(plans) as world:
        asked = world.ask(model, prompt, 40)
        world.at(0.001, lambda: world.kill("d", 2.0))
        world.at(0.3, lambda: world.kill("p", 0.1))
        world.run()
    assert asked.output is not None
    if asked.output.refusal is None:
        assert asked.tokens == colocated(model, prompt, 40)
    else:
        assert asked.output.refusal.status == 503  # both were dead at that moment: it is told


def test_a_model_is_served_in_both_ways_at_once() -> None:
    model = MODELS[0]
    plans = [split_plan("p", "prefill", [model]), split_plan("d", "decode", [model])]
    with SplitWorld([*plans, split_plan("m", "mixed", [model])]) as world:
        for index, prompt in enumerate(prompts(model, 24, 60, seed=5)):
            world.at(0.04 * index, lambda p=prompt: world.ask(model, p, 20))
        world.run()
        check_tokens(world)
        did = {n: host.unit.scheduler.counters[model] for n, host in world.hosts.items()}
        assert did["d"].prompt_tokens == 0, "it computed a prompt"
        assert min(did["m"].output_tokens, did["d"].output_tokens) > 100


def test_a_request_of_one_token_stays_where_it_is() -> None:
    model = MODELS[0]
    with SplitWorld([split_plan("p", "prefill", [model]), split_plan("d", "decode", [model])]) as w:
        w.ask(model, [3, 4, 5], 1)
        w.run()
        assert w.hosts["d"].unit.scheduler.counters[model].output_tokens == 0


@pytest.mark.parametrize("first", [0, 4])
def test_random_faults_give_no_wrong_token_leak_or_stuck_request(first: int) -> None:
    played = play_faults(range(first, first + 4))
    assert played.faults > 15 and played.answered > 4 * played.refused


def test_random_faults_while_groups_of_torch_distributed_break() -> None:
    played = play_faults(range(30, 33), transfer="gloo")
    assert played.faults > 10 and played.answered > 4 * played.refused


def test_random_faults_while_units_borrow_from_each_other() -> None:
    played = play_faults(range(20, 26), borrows=True)
    assert played.faults > 15 and played.answered > 4 * played.refused
    assert played.switches > 10


@dataclass
class Played:
    """What worlds with random faults had of faults, and of requests."""

    faults: int = 0
    answered: int = 0
    refused: int = 0  # in the end; what they were given before was right
    switches: int = 0  # of roles


def play_faults(seeds: range, borrows: bool = False, transfer: str = "shared") -> Played:
    """Worlds with random faults, one of each seed; `borrows`: units help each other."""
    played = Played()
    known: dict[tuple[str, tuple[int, ...], int], list[int]] = {}
    for seed in seeds:
        random = Random(seed)
        models = list(MODELS[: random.choice((1, 2))])
        tight = random.choice((2.0, 8.0))
        other = random.choice(({}, {"planes_per_block": 8}, {"plane_tokens": 32}))
        streams = random.choice(
            ({}, {"stream_tokens": 1}, {"stream_tokens": 1, "prefill_tokens": 64})
        )
        plans = [split_plan("p", "prefill", models, tight, **streams)]
        plans += [split_plan(f"d{i}", "decode", models, tight, **other) for i in range(2)]
        chances = {"": 4.0, "lost": 1.0, "damaged": 1.0, "late": 0.3}
        faults = [pick(random, chances) for _ in range(24)]
        routing = None
        if borrows:
            marks = random.uniform(0.05, 0.4), random.uniform(0.02, 0.3)
            routing = borrowing(*marks)
            if random.random() < 0.3:
                plans.append(split_plan("m", "mixed", models, tight))
        with SplitWorld(plans, faults, routing, transfer) as world:
            for index in range(12):
                model = random.choice(models)
                prompt = prompts(model, 1, 200, seed=100 * seed + index)[0]
                max_tokens, at_s = random.randint(1, 30), random.uniform(0, 1)
                world.at(at_s, lambda a=(model, prompt, max_tokens): world.ask(*a))
            for _ in range(random.randint(0, 3)):
                victim, at_s = random.choice(list(world.plans)), random.uniform(0, 1)
                played.faults += 1
                world.at(at_s, lambda victim=victim: world.kill(victim))
            world.run()
            played.faults += sum(bool(f) for f in faults[: 24 - len(world.faults.coming)])
            played.switches += world.dispatcher.num_switches.total()
            for asked in world.asked:
                assert asked.output is not None
                key = (asked.model, tuple(asked.prompt), asked.max_tokens)
                known[key] = known.get(key) or colocated(key[0], list(key[1]), key[2])
                if asked.output.refusal is None:
                    played.answered += 1
                    assert asked.tokens == known[key], seed
                else:  # its units were dead, or it was set back too often: it is told
                    played.refused += 1
                    assert asked.output.refusal.status == 503
                    assert asked.tokens == known[key][: len(asked.tokens)], seed
    return played


def test_the_state_machine_lets_go_whatever_comes() -> None:
    for (stage, event), (after, acts) in STEPS.items():
        handoff = Handoff(stage)
        assert handoff.on(event) == acts
        if stage is Stage.FETCHING and event in (Event.FETCHED, Event.NOT_FETCHED):
            assert Act.RELEASE in acts, "the holder would hold until its lease runs out"
        if stage is Stage.STREAMING and event not in (Event.PIECE, Event.LAST, Event.NO_HEIR):
            assert Act.DROP in acts, "the heir would wait for pieces until it gives up"
        if after in (Stage.STREAMING, Stage.FETCHING) and stage is not after:
            assert {Act.STREAM, Act.FETCH, Act.EXTEND} & set(acts), "nobody would go on"
    poison = Handoff(Stage.FETCHING)
    for _ in range(MAX_SETBACKS):
        poison.on(Event.DIED)
        assert not poison.is_hopeless
    poison.on(Event.DIED)
    assert poison.is_hopeless, "it would kill one unit after the other, fetched or computed"
    late = Handoff(Stage.DECODING)
    assert late.on(Event.FETCHED) == () and late.stage is Stage.DECODING


def bursts(world: SplitWorld, model: str, sizes: dict[float, int], max_tokens: int) -> None:
    """So many prompts at those times, and one every 50 ms between them."""
    number = 0
    for at_s, size in sizes.items():
        for prompt in prompts(model, size, 100, seed=number):
            number += 1
            world.at(at_s, lambda p=prompt, n=number: world.ask(model, p[: 20 + n], max_tokens))
    for index, prompt in enumerate(prompts(model, 30, 40, seed=99)):
        world.at(0.05 * index, lambda p=prompt: world.ask(model, p, 8))


def check_tokens(world: SplitWorld) -> None:
    for asked in world.asked:
        assert asked.output is not None and asked.output.refusal is None
        assert asked.tokens == colocated(asked.model, asked.prompt, asked.max_tokens)


@pytest.mark.parametrize("mixed", [[], ["m"]], ids=["two pools", "three pools"])
def test_decode_units_help_with_bursts_of_prompts_and_go_home(
    mixed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = MODELS[0]
    plans = [split_plan("p", "prefill", [model])]
    plans += [split_plan(name, "decode", [model]) for name in ("d0", "d1")]
    plans += [split_plan(name, "mixed", [model]) for name in mixed]
    # 512 tokens are a batch: more than 200 tokens borrow a unit.
    with SplitWorld(plans, routing=borrowing(0.4, 0.9)) as world:
        bursts(world, model, {0.0: 8, 0.6: 12, 1.2: 10}, 12)
        world.run()
        check_tokens(world)
        switches = world.dispatcher.num_switches
        assert all(count % 2 == 0 for count in switches.values())
        if not mixed:
            assert switches[model, "d0"] + switches[model, "d1"] >= 6, "each burst borrows one"
            lines = [line for line in caplog.messages if "role_switch" in line]
            assert len(lines) == switches.total()
            assert f"event=role_switch unit=d0 model={model} from=decode to=mixed" in lines
            assert f"event=role_switch unit=d0 model={model} from=mixed to=decode" in lines
            helped = [world.hosts[name].unit.scheduler.counters[model] for name in ("d0", "d1")]
            assert sum(counters.prompt_tokens for counters in helped) > 200
        for name in mixed:
            assert world.hosts[name].unit.scheduler.counters[model].prompt_tokens > 0


def test_prefill_units_help_with_answers_and_go_home() -> None:
    model = MODELS[0]
    plans = [split_plan(name, "prefill", [model]) for name in ("p0", "p1")]
    plans += [split_plan("d", "decode", [model])]
    with SplitWorld(plans, routing=borrowing(50.0, 0.05)) as world:
        bursts(world, model, {0.0: 12, 1.0: 12}, 40)
        world.run()
        check_tokens(world)
        switches = world.dispatcher.num_switches
        assert switches[model, "p0"] + switches[model, "p1"] >= 4
        helped = [world.hosts[name].unit.scheduler.counters[model] for name in ("p0", "p1")]
        assert sum(c.output_tokens for c in helped) > len(world.asked) + 100


def test_a_borrowed_unit_may_die_with_what_it_was_lent_for() -> None:
    model = MODELS[0]
    for at_s in (0.005, 0.015, 0.03):
        plans = [split_plan("p", "prefill", [model])]
        plans += [split_plan(name, "decode", [model]) for name in ("d0", "d1")]
        with SplitWorld(plans, routing=borrowing(0.4, 0.9)) as world:
            bursts(world, model, {0.0: 12}, 20)

            def kill(world: SplitWorld = world) -> None:
                lent = [n for n in ("d0", "d1") if world.dispatcher.router.is_borrowed(model, n)]
                assert lent, "nobody was borrowed"
                world.kill(lent[0])

            world.at(at_s, kill)
            world.run()
            check_tokens(world)
