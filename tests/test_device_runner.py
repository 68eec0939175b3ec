"""The device's engine on the CPU against transformers and against the CPU's own engine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from muxrt.core import SamplingParams  # noqa: E402
from muxrt.worker.graphs import Steps  # noqa: E402
from muxrt.worker.sampler import BadLogits  # noqa: E402
from tests.device_world import OnDevice, Repeated, Share, steps  # noqa: E402
from tests.test_worker_runner import Direct, live_through_everything  # noqa: E402
from tests.worker_world import Desk, Reference, Seat, make_plan, write_models  # noqa: E402


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def reference(home: Path) -> Reference:
    return Reference(home)


@contextmanager
def world(home: Path, **options: Any) -> Iterator[tuple[Desk, OnDevice]]:
    planes = options.pop("planes_per_block", 2)
    desk = Desk(make_plan(home, planes_per_block=planes))
    on_device = OnDevice(home, desk, **options)
    yield desk, on_device
    on_device.storage.close()


def test_tokens_are_those_of_transformers(home: Path, reference: Reference) -> None:
    """Chunks, mixed batches, swaps and recomputation, with graphs of decode steps in between."""
    before = Repeated.made
    with world(home) as (desk, do):
        seats = live_through_everything(desk, do)
    for seat in seats:
        assert len(seat.outputs) == seat.outputs_scheduled > 10
        reference.check_greedy(seat.model, seat.prompt, seat.outputs)
    assert Repeated.made > before, "no decode step was captured"


def same_requests(do: Callable[..., None], desk: Desk, asked: list[SamplingParams]) -> list[Seat]:
    """Prompts of several lengths, prefilled together, and some steps of all of them."""
    seats = [desk.seat("wide", 5 + 3 * index, params) for index, params in enumerate(asked)]
    do(desk.batch(0, [(seat, len(seat.prompt)) for seat in seats]))
    for _ in range(6):
        do(desk.decode(0, *seats))
    return seats


ASKED = {
    "greedy": SamplingParams(temperature=0, ignore_eos=True),
    "sampled": SamplingParams(temperature=0.9, seed=5, top_k=20, top_p=0.9, min_p=0.01),
    "penalties": SamplingParams(
        temperature=0.7,
        seed=9,
        repetition_penalty=1.3,
        frequency_penalty=0.4,
        presence_penalty=0.2,
        logit_bias={7: 2.5, 11: -1.0},
        min_tokens=4,
        stop_token_ids=(3, 4),
    ),
    "logprobs": SamplingParams(temperature=0.8, seed=2, logprobs=3),
    "prompt_logprobs": SamplingParams(temperature=0, prompt_logprobs=2, logprobs=0),
}


@pytest.mark.parametrize("together", [[name] for name in ASKED] + [list(ASKED)])
def test_every_way_of_sampling_gives_what_the_cpu_engine_gives(
    home: Path, together: list[str]
) -> None:
    asked = [ASKED[name] for name in together]
    found = []
    for make in (Direct, OnDevice):
        desk = Desk(make_plan(home, planes_per_block=2))
        do = make(home, desk)
        found.append(same_requests(do, desk, asked))
        do.storage.close()
    for cpu, device in zip(*found, strict=True):
        assert device.outputs == cpu.outputs
        assert device.stopped == cpu.stopped
        for mine, theirs in zip(
            device.logprobs + device.prompt_logprobs,
            cpu.logprobs + cpu.prompt_logprobs,
            strict=True,
        ):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert (mine.token, mine.top_tokens) == (theirs.token, theirs.top_tokens)
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
                assert mine.top_logprobs == pytest.approx(theirs.top_logprobs, abs=1e-4)


def test_a_step_is_launched_before_the_one_before_it_is_read(
    home: Path, reference: Reference
) -> None:
    """Its input is on the device; the host reads one step late."""
    with world(home) as (desk, do):
        seat = desk.seat("wide", 6)
        flights = []
        for _ in range(5):
            work = desk.batch(0, [(seat, seat.pending)])
            flights.append((work, do.runner.launch(work)))
        assert seat.outputs == []
        for work, flight in flights:
            desk.note(work, flight.wait())
    assert len(seat.outputs) == 5
    reference.check_greedy("wide", seat.prompt, seat.outputs)


def test_padding_changes_nothing(home: Path) -> None:
    """Five sequences in a bucket of eight, after eight others left their numbers in it."""
    found = []
    for crowd in (0, 3):
        with world(home) as (desk, do):
            seats = [desk.seat("narrow", 4 + index) for index in range(5)]
            others = [desk.seat("narrow", 9) for _ in range(crowd)]
            do(desk.batch(0, [(seat, len(seat.prompt)) for seat in seats + others]))
            do(desk.decode(0, *others, *seats))
            for _ in range(4):
                do(desk.decode(0, *seats))
            table = do.storage.slots["narrow"].tokens
            for seat in seats:
                known = seat.prompt + seat.outputs
                assert table[seat.slot, : len(known)].tolist() == known
            unused = set(range(16)) - {seat.slot for seat in seats + others}
            assert not table[sorted(unused)].any()
        found.append([seat.outputs for seat in seats])
    assert found[0] == found[1]


def test_logits_that_are_not_finite_fail_the_batch_alone(home: Path) -> None:
    with world(home) as (desk, do):
        seat = desk.seat("wide", 5)
        do(desk.batch(0, [(seat, 5)]))
        norm = do.residents["wide"].llama.norm
        kept = norm.clone()
        norm.fill_(torch.nan)
        with pytest.raises(BadLogits):
            do.runner.launch(desk.decode(0, seat)).wait()
        norm.copy_(kept)
        other = desk.seat("wide", 4)
        do(desk.batch(0, [(other, 4)]))
        assert len(other.outputs) == 1


def test_lanes_may_change_their_share_between_steps(
    home: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs are per share; a work waits for the one before it on another stream."""
    waits: list[object] = []
    monkeypatch.setattr(torch.cpu.Event, "wait", lambda self: waits.append(self))
    shares = [Share(name, torch.cpu.Stream(), 4) for name in ("all", "part")]
    turns = iter([shares[index % 3 > 0] for index in range(40)])
    before = Repeated.made
    with world(home, choose=lambda: next(turns)) as (desk, do):
        seat = desk.seat("wide", 7)
        do(desk.batch(0, [(seat, 7)]))
        for _ in range(20):
            do(desk.decode(0, seat))
    reference.check_greedy("wide", seat.prompt, seat.outputs)
    assert Repeated.made == before + 2
    assert len(waits) == 13  # all, part, part, all, ...: two changes in three of 21 works


def test_a_budget_of_nothing_means_no_graphs(home: Path, reference: Reference) -> None:
    before = Repeated.made
    kept: Steps = steps(0)
    with world(home, kept=kept) as (desk, do):
        seat = desk.seat("wide", 7)
        do(desk.batch(0, [(seat, 7)]))
        for _ in range(5):
            do(desk.decode(0, seat))
    assert Repeated.made == before
    reference.check_greedy("wide", seat.prompt, seat.outputs)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "off"), [("bfloat16", "auto", 0.1), ("float32", "float8", 0.3)]
)
def test_narrow_dtypes_and_caches_run(
    home: Path, reference: Reference, dtype: str, kv_dtype: str, off: float
) -> None:
    """Rounding may choose other words, but not far from the best ones."""
    desk = Desk(make_plan(home, planes_per_block=2, dtype=dtype, kv_dtype=kv_dtype))
    do = OnDevice(home, desk, dtype=getattr(torch, dtype))
    seat = desk.seat("wide", 20)
    do(desk.batch(0, [(seat, 20)]))
    for _ in range(6):
        do(desk.decode(0, seat))
    logits = reference.logits("wide", seat.prompt + seat.outputs)[19:-1]
    behind = logits.amax(-1) - logits[torch.arange(7), torch.tensor(seat.outputs)]
    assert float(behind.max()) < off * float(logits.max())
    do.storage.close()
