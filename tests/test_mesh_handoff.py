"""Sequences handed over between a unit of two ranks and a unit of one, in both directions."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mesh_world import mesh  # noqa: E402

from muxrt.config.placement import Lanes  # noqa: E402
from muxrt.core import Piece, Source, Transfer, TransferKind, Work  # noqa: E402
from muxrt.worker.build import open_executor  # noqa: E402
from muxrt.worker.executor import LaneExecutor  # noqa: E402
from tests.worker_world import (  # noqa: E402
    CORES,
    LAYERS,
    Desk,
    Reference,
    Seat,
    load_models,
    make_plan,
    write_models,
)

PROMPT_TOKENS, OUTPUT = 21, 6


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@contextmanager
def unit(home: Path, name: str, tp: int, seed: int) -> Iterator[tuple[LaneExecutor, Desk]]:
    plan = make_plan(home, 4, Lanes(split=(1,)), tp=tp, exchanges=True)
    with ExitStack() as stack:
        if tp > 1:
            folders = {model: home / model for model in plan.models}
            executor = stack.enter_context(mesh(plan, folders, f"{name}#1"))
        else:
            opened = open_executor(plan, load_models(home), CORES[:1], f"{name}#1")
            executor = stack.enter_context(opened)
        yield executor, Desk(plan, seed)


def run(executor: LaneExecutor, desk: Desk, work: Work) -> None:
    (result,) = executor.run([work])
    desk.note(work, result)


def sealed(executor: LaneExecutor, desk: Desk, seat: Seat) -> Piece:
    layout = desk.plan.models[seat.model].layout
    blocks = seat.blocks[: layout.num_blocks(seat.scheduled)]
    piece = Piece(
        number=0,
        blocks=torch.tensor(blocks, dtype=torch.int32).numpy().tobytes(),
        first_layer=0,
        end_layer=LAYERS[seat.model],
        num_tokens=seat.scheduled,
    )
    work = Transfer(7, desk.copy_lane, seat.model, TransferKind.SEAL, seat.slot, (piece,))
    (result,) = executor.run([work])
    assert result.error is None
    return msgspec.structs.replace(piece, checksums=result.checksums)


@pytest.mark.parametrize(("senders", "receivers"), [(2, 1), (1, 2)])
def test_each_rank_gets_its_heads(home: Path, senders: int, receivers: int) -> None:
    """`wide` has a kv head for each of two ranks, `narrow` one that both hold."""
    reference = Reference(home)
    with (
        unit(home, "p", senders, 0) as (prefill, theirs),
        unit(home, "d", receivers, 1) as (decode, desk),
    ):
        for model in ("wide", "narrow"):
            seat = theirs.seat(model, PROMPT_TOKENS)
            run(prefill, theirs, theirs.batch(0, [(seat, PROMPT_TOKENS)]))
            piece = sealed(prefill, theirs, seat)
            assert prefill.exchange is not None
            address = prefill.exchange.address(model)
            source = Source(unit="p#1", address=address, num_tokens=PROMPT_TOKENS, pieces=(piece,))
            follower = fetched(desk, seat)
            run(decode, desk, fetch_of(desk, follower, source))
            for _ in range(OUTPUT):
                run(decode, desk, desk.decode(0, follower))
            reference.check_greedy(model, seat.prompt, seat.outputs + follower.outputs)
            damaged = msgspec.structs.replace(
                piece, checksums=(*piece.checksums[:-1], piece.checksums[-1] ^ 1)
            )
            bad = msgspec.structs.replace(source, pieces=(damaged,))
            (result,) = decode.run([fetch_of(desk, fetched(desk, seat), bad)])
            # Of heads that both ranks hold, the first one's are taken.
            is_taken = model == "wide" or senders == 1
            assert (result.error is not None) == is_taken


def fetched(desk: Desk, seat: Seat) -> Seat:
    """Its place in the other unit: the prompt, the first token, blocks for both."""
    found = Seat(seat.model, desk.seat(seat.model, 1).slot, seat.prompt + seat.outputs)
    layout = desk.plan.models[seat.model].layout
    found.blocks = [desk.free.pop() for _ in range(layout.num_blocks(PROMPT_TOKENS))]
    found.scheduled, found.groups_sent = PROMPT_TOKENS, layout.num_groups(PROMPT_TOKENS)
    return found


def fetch_of(desk: Desk, seat: Seat, source: Source) -> Transfer:
    return Transfer(
        desk._id([(seat, 0)]),
        desk.copy_lane,
        seat.model,
        TransferKind.FETCH,
        seat.slot,
        source.pieces,
        torch.tensor(seat.blocks, dtype=torch.int32).numpy().tobytes(),
        source,
        (desk._open(seat),),
    )
