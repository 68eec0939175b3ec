"""What an executor computed is counted by model and phase."""

import msgspec

from muxrt.core import Batch, BatchEntry, Copy, CopyKind, Layers, Phase, Result, Work
from muxrt.engine.executor import Done
from muxrt.engine.messages import BatchStats
from muxrt.engine.metered import Metered


class _Instant:
    """Ends each work when told."""

    def __init__(self) -> None:
        self.flights: list[tuple[Work, Done]] = []

    def launch(self, work: Work, done: Done) -> None:
        self.flights.append((work, done))

    def land(self, result: Result) -> None:
        work, done = self.flights.pop(0)
        done(work, result)


def _batch(model: str, phase: Phase, *tokens: int) -> Batch:
    entries = tuple(BatchEntry(slot, 0, n, True) for slot, n in enumerate(tokens))
    return Batch(0, 0, model, phase, entries)


def test_batches_are_counted_when_they_are_done() -> None:
    inner, told = _Instant(), list[Work]()
    metered = Metered(inner)
    works: list[tuple[Work, Result]] = [
        (_batch("a", Phase.PREFILL, 7, 9), Result(elapsed_s=0.5)),
        (_batch("b", Phase.DECODE, 1), Result(elapsed_s=0.25)),
        (_batch("a", Phase.PREFILL, 4), Result(elapsed_s=0.125)),
        (_batch("a", Phase.DECODE, 1, 1), Result(error="it broke", elapsed_s=9.0)),
        (Copy(4, 1, "a", CopyKind.SWAP_OUT, 0, b"", b""), Result(elapsed_s=3.0)),
    ]
    for work, _ in works:
        metered.launch(work, lambda work, result: told.append(work))
    assert metered.stats() == ()
    for _, result in works:
        inner.land(result)
    assert told == [work for work, _ in works]
    assert metered.stats() == (
        BatchStats("a", Phase.PREFILL, 2, 20, 0.625),
        BatchStats("b", Phase.DECODE, 1, 1, 0.25),
    )


def test_the_parts_of_a_pass_are_one_batch() -> None:
    inner = _Instant()
    metered = Metered(inner)
    whole = _batch("a", Phase.PREFILL, 7, 9)
    for begin, end in ((0, 1), (1, 4)):
        part = msgspec.structs.replace(whole, layers=Layers(begin, end, 4))
        metered.launch(part, lambda work, result: None)
    inner.land(Result(elapsed_s=0.25))
    assert metered.stats() == (BatchStats("a", Phase.PREFILL, 0, 0, 0.25),)
    inner.land(Result(elapsed_s=0.5))
    assert metered.stats() == (BatchStats("a", Phase.PREFILL, 1, 16, 0.75),)
