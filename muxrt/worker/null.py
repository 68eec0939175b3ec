"""A unit process whose tokens come from no model: `python -m muxrt.worker.null STEP_S`.

Brain, messages and endpoint are the served ones and each batch takes STEP_S seconds in which
nothing is computed, so what is left to measure is the control path. Tokens are words of the
model's own vocabulary in a fixed order. Neither weights nor torch are loaded, and the arena is
counted but never reserved.
"""

import logging
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from time import monotonic, sleep

import msgspec

from muxrt.core import Batch, Prompt, Result, Work
from muxrt.engine.executor import Done
from muxrt.engine.messages import UnitBoot
from muxrt.errors import ConfigError
from muxrt.worker.boot import load_shapes, plan_boot, take_cores
from muxrt.worker.service import Opened, run

log = logging.getLogger(__name__)

WORD_MARKS = "\u0120\u2581"  # how byte-level and sentencepiece vocabularies write a space
NO_PROBABILITIES = "logprobs: the null executor has no probabilities"


class _Vocabulary(msgspec.Struct):
    vocab: dict[str, int]


class _TokenizerFile(msgspec.Struct):
    """What is needed of tokenizer.json."""

    model: _Vocabulary


def load_words(folder: Path) -> list[int]:
    """Tokens that are whole ASCII words or parts of them, so that each is text by itself.

    Raises ConfigError where the vocabulary has none or cannot be read.
    """
    path = folder / "tokenizer.json"
    try:
        vocab = msgspec.json.decode(path.read_bytes(), type=_TokenizerFile).model.vocab
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: the null executor needs model.vocab: {error}") from None
    words = sorted(token for piece, token in vocab.items() if _is_word(piece))
    if not words:
        raise ConfigError(f"{path}: the null executor found no ASCII words in model.vocab")
    return words


def _is_word(piece: str) -> bool:
    bare = piece.lstrip(WORD_MARKS)
    return bare.isascii() and bare.isalpha()


class NullExecutor:
    """Answers each batch `step_s` after the one before it; position p of a sequence is word p."""

    def __init__(self, words: Mapping[str, Sequence[int]], step_s: float = 0.0) -> None:
        """`words` are the tokens of each model."""
        self._words = words
        self._step_s = step_s
        self._launched: SimpleQueue[tuple[float, float] | None] = SimpleQueue()
        self._flights: deque[tuple[Work, Done]] = deque()
        self._over = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        self._clock = Thread(target=self._pass_time, name="null", daemon=True)
        self._clock.start()

    def launch(self, work: Work, done: Done) -> None:
        """Queue `work`; `done` is called by a later `drain`."""
        self._flights.append((work, done))
        share = work.share if isinstance(work, Batch) else 1.0
        self._launched.put((monotonic(), share))

    def fileno(self) -> int:
        """Readable while `drain` has something to do."""
        return self._over

    def drain(self) -> None:
        """Call `done` for the oldest work, which is over."""
        os.eventfd_read(self._over)
        work, done = self._flights.popleft()
        done(work, self._run(work))

    def close(self) -> None:
        """End the clock and forget what was launched."""
        self._launched.put(None)
        self._clock.join()
        os.close(self._over)

    def _pass_time(self) -> None:
        """Say of one work after the other that it is over."""
        free_s = 0.0
        while (launched := self._launched.get()) is not None:
            launched_s, share = launched
            # From when it could start, not from when we look: so the rate holds on a busy core.
            free_s = max(free_s, launched_s) + self._step_s * share
            sleep(max(0.0, free_s - monotonic()))
            os.eventfd_write(self._over, 1)

    def _run(self, work: Work) -> Result:
        if not isinstance(work, Batch):
            return Result()
        if any(_is_scored(opened.payload) for opened in work.opened):
            return Result(error=NO_PROBABILITIES)
        words = self._words[work.model]
        count = len(words)
        tokens = tuple(
            words[(entry.start + entry.num_tokens) % count] if entry.samples else None
            for entry in work.entries
        )
        return Result(tokens, (False,) * len(tokens))


def _is_scored(payload: bytes) -> bool:
    sampling = msgspec.msgpack.decode(payload, type=Prompt).sampling
    return sampling.logprobs is not None or sampling.prompt_logprobs is not None


def open_null(boot: UnitBoot, step_s: float) -> Opened:
    """The unit's plan and a `NullExecutor`. Raises ConfigError."""
    plan = plan_boot(boot, len(take_cores(boot.unit)), load_shapes(boot))
    words = {spec.name: load_words(spec.folder) for spec in boot.models}
    log.warning("event=null_executor tokens are MADE UP: no model is loaded, nothing is computed")
    return Opened(plan, NullExecutor(words, step_s), is_made_up=True)


if __name__ == "__main__":
    run(lambda boot, tell: open_null(boot, float(sys.argv[1])))
