"""Runner and lanes against `transformers`: chunks, mixed batches, swaps, recomputation, lanes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from muxrt.config.placement import Lanes  # noqa: E402
from muxrt.core import Copy, SamplingParams, Work  # noqa: E402
from muxrt.kernels import Team  # noqa: E402
from muxrt.worker.build import open_executor  # noqa: E402
from muxrt.worker.executor import LaneExecutor  # noqa: E402
from muxrt.worker.kv_storage import Storage  # noqa: E402
from muxrt.worker.runner import Copier, Resident, Runner  # noqa: E402
from tests.worker_world import (  # noqa: E402
    CORES,
    GREEDY,
    MAX_LEN,
    Desk,
    Reference,
    Seat,
    load_models,
    make_plan,
    write_models,
)

Do = Callable[[Work], None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def reference(home: Path) -> Reference:
    return Reference(home)


class Direct:
    """Runs works at once on the test's own thread."""

    def __init__(self, home: Path, desk: Desk, dtype: Any = "float32") -> None:
        self.storage = Storage(desk.plan)
        residents = {
            name: Resident.of(model, name, self.storage)
            for name, model in load_models(home, dtype).items()
        }
        self.desk = desk
        self._runner = Runner(residents, Team())
        self._copier = Copier(self.storage, desk.plan.arena.block_bytes)

    def __call__(self, work: Work) -> None:
        run = self._copier.run if isinstance(work, Copy) else self._runner.run
        self.desk.note(work, run(work))


@contextmanager
def world(home: Path, **options: Any) -> Iterator[tuple[Desk, Direct]]:
    desk = Desk(make_plan(home, **options))
    direct = Direct(home, desk, options.get("dtype", "float32"))
    yield desk, direct
    direct.storage.close()


def live_through_everything(desk: Desk, do: Do) -> list[Seat]:
    """Whole and chunked prompts, mixed batches, a swap and a recomputation in the middle."""
    seats = []
    for model in ("wide", "narrow"):
        first, second, third = (desk.seat(model, tokens) for tokens in (5, 29, 12))
        do(desk.batch(0, [(first, 5)]))
        do(desk.batch(0, [(first, 1), (second, 10), (third, 12)]))
        do(desk.batch(0, [(third, 1), (first, 1), (second, 19)]))
        for _ in range(3):
            do(desk.decode(0, second, first, third))
        do(desk.swap_out(second))
        desk.recompute(third)
        do(desk.decode(0, first))
        do(desk.batch(0, [(third, 7), (first, 1)]))
        do(desk.swap_in(second))
        do(desk.batch(0, [(third, third.pending), (second, 1), (first, 1)]))
        while first.pending + first.scheduled < 60:
            do(desk.decode(0, first, second, third))
        seats += [first, second, third]
    return seats


@pytest.mark.parametrize("planes", [1, 8])
def test_tokens_are_those_of_transformers(home: Path, reference: Reference, planes: int) -> None:
    with world(home, planes_per_block=planes) as (desk, do):
        seats = live_through_everything(desk, do)
    for seat in seats:
        assert len(seat.outputs) == seat.outputs_scheduled > 10
        reference.check_greedy(seat.model, seat.prompt, seat.outputs)
        assert len(set(seat.outputs)) > 5, "a model that repeats itself proves little"


def test_a_sequence_may_reach_the_maximum_length(home: Path, reference: Reference) -> None:
    with world(home, planes_per_block=8) as (desk, do):
        seat = desk.seat("narrow", MAX_LEN - 3)
        do(desk.batch(0, [(seat, seat.pending)]))
        do(desk.decode(0, seat))
        do(desk.decode(0, seat))
    assert len(seat.prompt) + len(seat.outputs) == MAX_LEN
    reference.check_greedy("narrow", seat.prompt, seat.outputs)


def test_bfloat16_weights_and_cache_run(home: Path, reference: Reference) -> None:
    """Rounding may choose other words, but not far from the best ones."""
    with world(home, planes_per_block=8, dtype="bfloat16") as (desk, do):
        seat = desk.seat("wide", 20, SamplingParams(temperature=0, ignore_eos=True, logprobs=0))
        do(desk.batch(0, [(seat, 20)]))
        for _ in range(8):
            do(desk.decode(0, seat))
    logits = reference.logits("wide", seat.prompt + seat.outputs)[19:-1]
    behind = logits.amax(-1) - logits[torch.arange(9), torch.tensor(seat.outputs)]
    assert float(behind.max()) < 0.1 * float(logits.max())


def test_a_slot_that_is_opened_again_starts_afresh(home: Path, reference: Reference) -> None:
    with world(home) as (desk, do):
        old = desk.seat("wide", 40, SamplingParams(temperature=0, presence_penalty=2.0))
        do(desk.batch(0, [(old, 40)]))
        do(desk.decode(0, old))
        desk.leave(old)
        new = desk.seat("wide", 6)
        assert new.slot == old.slot
        do(desk.batch(0, [(new, 6)]))
        do(desk.decode(0, new))
    reference.check_greedy("wide", new.prompt, new.outputs)


# -- stopping and logprobs ---------------------------------------------------------------------


def test_eos_and_stop_tokens_stop_unless_told_otherwise(home: Path) -> None:
    with world(home) as (desk, do):

        def first(**params: Any) -> tuple[int, bool]:
            seat = desk.seat("wide", 9, SamplingParams(temperature=0, **params))
            do(desk.batch(0, [(seat, 9)]))
            desk.leave(seat)
            return seat.outputs[0], seat.stopped[0]

        force_eos = {2: 1000.0}
        assert first(logit_bias=force_eos) == (2, True)
        assert first(logit_bias=force_eos, ignore_eos=True) == (2, False)
        assert first(logit_bias={77: 1000.0}, stop_token_ids=(77,)) == (77, True)
        assert first(logit_bias={77: 1000.0}) == (77, False)
        token, stopped = first(logit_bias={2: 1000.0, 1: 900.0, 50: 800.0}, min_tokens=1)
        assert (token, stopped) == (50, False)


def test_logprobs_are_those_of_transformers(home: Path, reference: Reference) -> None:
    asked = SamplingParams(temperature=0.8, seed=11, logprobs=3, ignore_eos=True)
    with world(home) as (desk, do):
        seat, quiet = desk.seat("wide", 7, asked), desk.seat("wide", 3)
        do(desk.batch(0, [(quiet, 3), (seat, 7)]))
        do(desk.decode(0, seat, quiet))
    expected = reference.logits("wide", seat.prompt + seat.outputs).log_softmax(-1)
    assert quiet.logprobs == [None, None]
    for index, (token, found) in enumerate(zip(seat.outputs, seat.logprobs, strict=True)):
        row = expected[6 + index]
        assert found.token == token
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert found.top_tokens == tuple(row.topk(3).indices.tolist())
        assert found.top_logprobs == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


def test_prompt_logprobs_come_once_chunk_by_chunk(home: Path, reference: Reference) -> None:
    asked = SamplingParams(temperature=0, prompt_logprobs=2, ignore_eos=True)
    with world(home) as (desk, do):
        seat, quiet = desk.seat("narrow", 21, asked), desk.seat("narrow", 4)
        do(desk.batch(0, [(quiet, 4), (seat, 8)]))
        desk.recompute(seat)  # in the middle of its prompt
        do(desk.batch(0, [(seat, 5)]))
        do(desk.batch(0, [(seat, 16), (quiet, 1)]))
        desk.recompute(seat)
        do(desk.batch(0, [(seat, seat.pending)]))
    assert quiet.prompt_logprobs == []
    assert [scored.token for scored in seat.prompt_logprobs] == seat.prompt[1:]
    expected = reference.logits("narrow", seat.prompt).log_softmax(-1)
    for index, scored in enumerate(seat.prompt_logprobs):
        row = expected[index]
        assert scored.logprob == pytest.approx(float(row[seat.prompt[index + 1]]), abs=1e-3)
        assert scored.top_logprobs == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)
    reference.check_greedy("narrow", seat.prompt, seat.outputs)


def test_a_prompt_may_be_scored_without_drawing(home: Path) -> None:
    asked = SamplingParams(temperature=0, prompt_logprobs=0)
    with world(home) as (desk, do):
        seat = desk.seat("wide", 8, asked)
        batch = desk.batch(0, [(seat, 8)])
        entry = type(batch.entries[0])(seat.slot, 0, 8, False, 0, batch.entries[0].blocks)
        seat.outputs_scheduled = 0
        do(type(batch)(batch.id, 0, "wide", batch.phase, (entry,), batch.opened))
    assert seat.outputs == []
    assert [scored.token for scored in seat.prompt_logprobs] == seat.prompt[1:]


# -- lanes -------------------------------------------------------------------------------------


def run_ahead(desk: Desk, executor: LaneExecutor, seats: list[Seat], steps: int) -> None:
    """Two works in flight per lane: a step is launched before the one before it is read."""
    num_lanes = desk.copy_lane
    flying = [0] * num_lanes
    left = dict.fromkeys(seats, steps)
    share = [seats[lane::num_lanes] for lane in range(num_lanes)]

    def launch(lane: int) -> None:
        for model in ("wide", "narrow"):
            parts = [
                (seat, min(seat.pending, 9))
                for seat in share[lane]
                if seat.model == model and left[seat]
            ]
            if parts and flying[lane] < 2:
                for seat, tokens in parts:
                    left[seat] -= tokens == seat.pending
                flying[lane] += 1
                executor.launch(desk.batch(lane, parts), done)
        share[lane].reverse()  # the models take turns

    def done(work: Work, result: Any) -> None:
        desk.note(work, result)
        flying[work.lane] -= 1
        launch(work.lane)

    for lane in range(num_lanes):
        launch(lane)
    while any(flying):
        executor.drain(60.0)


@pytest.mark.parametrize(
    ("kind", "split", "planes"),
    [
        ("cores", None, 8),
        ("cores", (1, 1), 1),
        ("processes", None, 1),
        ("processes", (1, 1), 8),
    ],
)
def test_lanes_give_the_tokens_of_transformers(
    home: Path, reference: Reference, kind: Any, split: Any, planes: int
) -> None:
    if split and len(CORES) < len(split):
        pytest.skip("fewer cores than lanes")
    desk = Desk(make_plan(home, planes, Lanes(kind=kind, split=split, depth=2)))
    with open_executor(desk.plan, load_models(home), CORES) as executor:
        seats = [desk.seat(m, n) for m in ("wide", "narrow") for n in (4, 31, 13, 7)]
        run_ahead(desk, executor, seats, steps=6)
        # Out, in again elsewhere, and on another lane.
        executor.run([desk.swap_out(seat) for seat in seats])
        executor.run([desk.swap_in(seat) for seat in seats])
        seats.reverse()
        run_ahead(desk, executor, seats, steps=6)
    for seat in seats:
        assert len(seat.outputs) == 12
        reference.check_greedy(seat.model, seat.prompt, seat.outputs)


def test_a_batch_that_fails_is_a_result_and_the_lane_goes_on(
    home: Path, reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(make_plan(home))
    with open_executor(desk.plan, load_models(home), CORES) as executor:
        bad, good = desk.seat("wide", 5), desk.seat("wide", 5, GREEDY)
        bad.prompt[2] = 10_000  # beyond the vocabulary
        failed, fine = executor.run([desk.batch(0, [(bad, 5)]), desk.batch(0, [(good, 5)])])
    assert failed.error is not None and failed.error.startswith("UnknownToken")
    assert "event=work_failed" in caplog.text
    assert fine.error is None and fine.tokens[0] is not None
    reference.check_greedy("wide", good.prompt, [fine.tokens[0]])
