"""Counts what an executor computed: batches, tokens and seconds, by model and phase."""

from functools import partial

from muxrt.core import Batch, Phase, Result, Work
from muxrt.engine.executor import Done, Executor
from muxrt.engine.messages import BatchStats


class Metered:
    """An `Executor` that passes all on to another one; batches that failed do not count."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._stats: dict[tuple[str, Phase], BatchStats] = {}

    def launch(self, work: Work, done: Done) -> None:
        """Start `work`; see `Executor`."""
        self._executor.launch(work, partial(self._done, done))

    def _done(self, done: Done, work: Work, result: Result) -> None:
        if isinstance(work, Batch) and result.error is None:
            key = (work.model, work.phase)
            old = self._stats.get(key) or BatchStats(*key)
            is_over = work.ends_pass  # or a part of it: its time counts, the rest comes at the end
            self._stats[key] = BatchStats(
                *key,
                old.batches + is_over,
                old.tokens + work.num_tokens * is_over,
                old.seconds + result.elapsed_s,
            )
        done(work, result)

    def stats(self) -> tuple[BatchStats, ...]:
        """Counts since the start, in order of model and phase."""
        ordered = sorted(self._stats, key=lambda key: (key[0], key[1].value))
        return tuple(self._stats[key] for key in ordered)
