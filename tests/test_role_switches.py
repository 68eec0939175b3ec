"""Units whose roles an operator switches while requests flow: the tokens of one unit, no leak."""

from random import Random

import pytest
from handoff_world import SplitWorld, colocated, pick, split_plan
from real_world import MODELS, prompts
from test_handoff import borrowing, check_tokens

from muxrt.config.placement import Role
from muxrt.config.routing import Routing
from muxrt.engine.handoff import LEASE_S
from muxrt.errors import BadRequest

MODEL = MODELS[0]
ROUTINGS = (Routing(), Routing(policy="splitwise", borrow=False), borrowing(0.4, 0.3))


def flow(world: SplitWorld, num: int = 24, over_s: float = 1.2, seed: int = 0) -> None:
    """Requests all the time."""
    for index, prompt in enumerate(prompts(MODEL, num, 160, seed)):
        tokens = 5 + 7 * index % 30
        world.at(index * over_s / num, lambda p=prompt, n=tokens: world.ask(MODEL, p, n))


def switch(world: SplitWorld, at_s: float, unit: str, role: Role) -> None:
    world.at(at_s, lambda: world.dispatcher.switch_role(MODEL, unit, role))


def plans(room: float = 8.0, **streams: object) -> list:
    found = [split_plan("p", "prefill", [MODEL], room, **streams)]
    return [*found, split_plan("d", "decode", [MODEL], room, planes_per_block=2, **streams)]


@pytest.mark.parametrize("routing", ROUTINGS, ids=["distserve", "splitwise", "borrowing"])
@pytest.mark.parametrize("streams", [{}, {"stream_tokens": 1, "prefill_tokens": 64}], ids=str)
def test_units_change_places_and_go_on_together(routing: Routing, streams: dict) -> None:
    with SplitWorld(plans(**streams), routing=routing) as world:
        flow(world)
        did: list[tuple[int, ...]] = []

        def look() -> None:
            counters = [host.unit.scheduler.counters[MODEL] for host in world.hosts.values()]
            did.append(tuple(c.prompt_tokens for c in counters))

        for at_s, p, d in ((0.3, "decode", "prefill"), (0.7, "mixed", "mixed")):
            world.at(at_s, look)
            switch(world, at_s, "p", p)
            switch(world, at_s, "d", d)
        world.at(1.2, look)
        world.run()
        check_tokens(world)
        assert world.loop.now_s < LEASE_S, "somebody waited until a lease was over"
    first, second, third = did
    assert second[1] > first[1] + 100, "d computes prompts now"
    assert third[0] > second[0] + 100 and third[1] > second[1], "both do"
    if routing.policy == "distserve":
        assert first[1] == 0, "d computed prompts before"


def test_a_switch_is_logged_counted_and_outlives_the_process(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    with SplitWorld(plans()) as world:
        switch(world, 0.0, "d", "mixed")
        world.at(0.01, lambda: world.kill("d", 0.1))
        switch(world, 0.3, "d", "mixed")  # it is: nothing to say
        world.run()
        assert world.dispatcher.role_now(MODEL, "d") == "mixed"
        assert world.dispatcher.num_switches[MODEL, "d"] == 1
    lines = [line for line in caplog.messages if "role_switch" in line]
    assert lines == [f"event=role_switch unit=d model={MODEL} from=decode to=mixed"]


def test_two_full_units_that_change_places_wait_for_each_other_no_longer_than_a_lease() -> None:
    """Each holds prompts that the other one has no room for."""
    for at_s in (0.03, 0.06, 0.1):
        with SplitWorld(plans(room=1.5)) as world:
            for index, prompt in enumerate(prompts(MODEL, 16, 160, seed=3)):
                world.at(0.005 * index, lambda p=prompt: world.ask(MODEL, p, 30))
            switch(world, at_s, "p", "decode")
            switch(world, at_s, "d", "prefill")
            world.run()
            check_tokens(world)
            assert max(max(asked.times_s) for asked in world.asked) < LEASE_S + 5


def test_what_cannot_be_switched_is_refused() -> None:
    with SplitWorld(plans()) as world:
        with pytest.raises(
            BadRequest, match=r"found no 'other' in unit 'p', expected one of: none"
        ):
            world.dispatcher.switch_role("other", "p", "decode")
        with pytest.raises(BadRequest, match=rf"found no '{MODEL}' in unit 'x', .* p, d"):
            world.dispatcher.switch_role(MODEL, "x", "decode")
        world.units["d"].spec = split_plan("d", "mixed", [MODEL]).spec  # nobody has a role there
        with pytest.raises(BadRequest, match="d exchanges no K and V"):
            world.dispatcher.switch_role(MODEL, "d", "prefill")


@pytest.mark.parametrize("seed", range(6))
def test_random_switches_and_faults(seed: int) -> None:
    random = Random(seed)
    roles: tuple[Role, ...] = ("prefill", "decode", "mixed")
    streams = random.choice(({}, {"stream_tokens": 1}, {"stream_tokens": 1, "prefill_tokens": 64}))
    room = random.choice((1.5, 8.0))
    units = [*plans(room, **streams), split_plan("m", "mixed", [MODEL], room)]
    faults = [pick(random, {"": 6.0, "lost": 1.0, "damaged": 1.0}) for _ in range(16)]
    with SplitWorld(units, faults, random.choice(ROUTINGS)) as world:
        flow(world, seed=seed)
        for _ in range(10):
            switch(world, random.uniform(0, 1.2), random.choice("pdm"), random.choice(roles))
        if random.random() < 0.5:
            victim = random.choice("pdm")
            world.at(random.uniform(0, 1.2), lambda: world.kill(victim))
        world.run()
        for asked in world.asked:
            assert asked.output is not None
            wanted = colocated(MODEL, asked.prompt, asked.max_tokens)
            assert asked.tokens == wanted[: len(asked.tokens)]
            assert asked.output.refusal is not None or asked.tokens == wanted
