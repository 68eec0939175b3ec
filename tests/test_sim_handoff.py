"""Prefill and decode on different units, simulated: what can be said exactly."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sim_world import GB, burst, config, setting, steps, unit

from muxrt.cli.simulate_input import Facts, load_known
from muxrt.config.placement import Role, Scheduling, UnitModel, UnitSpec
from muxrt.core import FinishReason
from muxrt.engine.build import plan_unit
from muxrt.sim.links import Links, LinkTransfer
from muxrt.sim.setting import Failure
from muxrt.sim.simulate import simulate

NVLINK = 300e9  # of an A100, one direction
PROMPT = 1600
CONFIGS = Path(__file__).parent.parent / "configs"


def side(
    role: Role,
    name: str,
    gpu: int,
    node: int = 0,
    kv_bytes: int = 40 * GB,
    stream_tokens: int = 10**6,
) -> UnitSpec:
    """K and V move at once, after the prompt, unless `stream_tokens` says otherwise."""
    scheduling = Scheduling(prefill_tokens=2048, stream_tokens=stream_tokens)
    parts = [UnitModel(name="a", role=role)]
    spec = unit(name=name, gpus=(gpu,), parts=parts, kv_bytes=kv_bytes, scheduling=scheduling)
    return msgspec.structs.replace(spec, mesh=msgspec.structs.replace(spec.mesh, node=node))


def held_bytes(spec: UnitSpec, tokens: int) -> int:
    """What so many tokens of a sequence hold in a unit, in whole groups."""
    placed = config(spec, side("decode", "other", 7))
    plan = plan_unit(spec, {m.name: m for m in placed.models}, setting("a").shapes)
    return plan.models["a"].layout.num_blocks(tokens) * plan.arena.block_bytes


@pytest.mark.parametrize(("node", "rate"), [(0, NVLINK), (1, 25e9)])
def test_a_request_alone_takes_its_prefill_a_transfer_and_its_steps(node: int, rate: float) -> None:
    prompts, answers = side("prefill", "p", 0), side("decode", "d", 1, node)
    run = simulate(config(prompts, answers), setting("a"), burst("a", 1, prompt=PROMPT))
    (one,) = run.served
    prefill_s = steps().prefill_s(PROMPT, PROMPT**2)
    transfer_s = held_bytes(prompts, PROMPT) / rate
    decode_s = sum(steps().decode_s(1, PROMPT + 1 + i) for i in range(9))
    assert one.first_s == pytest.approx(prefill_s)
    assert one.last_s == pytest.approx(prefill_s + transfer_s + decode_s, rel=1e-3)
    assert (one.output_tokens, one.finish, one.unit) == (10, FinishReason.STOP, "d")
    assert transfer_s > 2e-3


@pytest.mark.parametrize("prefill_tokens", [2048, 800])
def test_all_but_the_last_layers_of_a_long_prompt_move_while_it_is_computed(
    prefill_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, send = list[float](), Links.send

    def noted(links: Links, path: Any, num_bytes: float, done: Any) -> LinkTransfer:
        sent.append(num_bytes)
        return send(links, path, num_bytes, done)

    monkeypatch.setattr(Links, "send", noted)
    runs = []
    for stream_tokens in (10**6, 256):
        prompts = side("prefill", "p", 0, stream_tokens=stream_tokens)
        scheduling = msgspec.structs.replace(prompts.scheduling, prefill_tokens=prefill_tokens)
        prompts = msgspec.structs.replace(prompts, scheduling=scheduling)
        sent.clear()
        placed = config(prompts, side("decode", "d", 1, node=1))
        run = simulate(placed, setting("a"), burst("a", 1, prompt=PROMPT))
        assert sum(sent) == held_bytes(prompts, PROMPT), "other bytes were moved"
        runs.append((run.served[0], list(sent)))
    (whole, _), (pieces, sizes) = runs
    assert pieces.first_s == pytest.approx(whole.first_s), "a part is its share of the layers"
    assert whole.last_s is not None and pieces.last_s is not None
    hidden_s = (sum(sizes) - sizes[-1]) / 25e9
    assert pieces.last_s == pytest.approx(whole.last_s - hidden_s, abs=1e-4)
    assert sizes[-1] < sum(sizes) / 10 and pieces.output_tokens == 10


def test_transfers_that_share_a_network_share_it() -> None:
    units = [side("prefill", "p0", 0), side("prefill", "p1", 1)]
    units += [side("decode", "d0", 0, 1), side("decode", "d1", 1, 1)]
    alone = simulate(config(*units), setting("a"), burst("a", 1, prompt=PROMPT)).served[0]
    two = simulate(config(*units), setting("a"), burst("a", 2, prompt=PROMPT)).served
    transfer_s = held_bytes(units[0], PROMPT) / 25e9
    assert {one.unit for one in two} == {"d0", "d1"}
    assert alone.last_s is not None
    for one in two:
        assert one.last_s == pytest.approx(alone.last_s + transfer_s, rel=1e-3)


def test_a_network_can_be_stated() -> None:
    units = [side("prefill", "p", 0), side("decode", "d", 0, 1)]
    slow, fast = (
        simulate(config(*units), replace(setting("a"), network_bytes_per_s=rate), burst("a", 1))
        for rate in (1e9, 1e12)
    )
    assert slow.served[0].last_s > fast.served[0].last_s + 0.05  # type: ignore[operator]


def test_a_full_decode_unit_fetches_when_it_has_room() -> None:
    few = side("decode", "d", 1, kv_bytes=3 * GB)
    units = [side("prefill", "p", 0), few]
    run = simulate(config(*units), setting("a"), burst("a", 12, prompt=PROMPT, output=40))
    assert all(one.is_answered and one.output_tokens == 40 for one in run.served)
    gaps = sorted((one.last_s or 0.0) - (one.first_s or 0.0) for one in run.served)
    assert gaps[-1] > 1.5 * gaps[0], "nobody waited"


def test_blocks_are_held_until_they_are_fetched() -> None:
    few = side("prefill", "p", 0, kv_bytes=3 * GB)
    run = simulate(
        config(few, side("decode", "d", 0, 1)),
        replace(setting("a"), network_bytes_per_s=1e8),
        burst("a", 4, prompt=PROMPT),
    )
    firsts = sorted(one.first_s or 0.0 for one in run.served)
    transfer_s = held_bytes(few, PROMPT) / 1e8
    assert firsts[-1] > transfer_s, "the prefill unit had more room than it has"


@pytest.mark.parametrize("dies", ["p", "d"])
@pytest.mark.parametrize("stream_tokens", [32, 10**6])
def test_either_side_may_die_and_nobody_loses_a_token(dies: str, stream_tokens: int) -> None:
    units = [
        side("prefill", name, gpu, stream_tokens=stream_tokens) for gpu, name in enumerate("pq")
    ]
    units += [side("decode", "d", 2), side("decode", "e", 3)]
    world = replace(setting("a"), failures=(Failure(dies, 1.0, 5.0),))
    asked = [a for at in range(20) for a in burst("a", 2, at_s=at / 10, output=60)]
    run = simulate(config(*units), world, asked)
    assert all(one.is_answered and one.output_tokens == 60 for one in run.served)
    assert next(use for use in run.units if use.unit == dies).deaths == 1


def test_a_model_without_a_living_decode_unit_is_served_where_it_was_prefilled() -> None:
    units = [side("prefill", "p", 0), side("decode", "d", 1)]
    world = replace(setting("a"), failures=(Failure("d", 0.0),))
    run = simulate(config(*units), world, burst("a", 3, at_s=1.0))
    assert {(one.unit, one.output_tokens) for one in run.served} == {("p", 10)}


def test_the_network_of_a_plan_counts(tmp_path: Path) -> None:
    plan = (CONFIGS / "plans" / "opt.yaml").read_text(encoding="utf-8")
    plan = plan.replace("../", f"{CONFIGS}/")
    for rate in ("3.125e9", "1.0e9"):
        (tmp_path / "plan.yaml").write_text(plan.replace("3.125e9", rate), encoding="utf-8")
        known = load_known(Facts((), tmp_path / "plan.yaml", None, None))
        assert known.network_bytes_per_s == float(rate)
