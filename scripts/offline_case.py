"""One offline case, and how an engine's process is told to run it: JSON lines on stdin and stdout.

Standard library only: `offline_vllm.py` imports this in vLLM's environment.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

FIRST_TOKEN, LAST_TOKEN = 10, 2_000  # ids that every tokenizer with 2,048 entries has


@dataclass(frozen=True, slots=True)
class Case:
    """Prompts of random tokens that come in at once, and answers of a fixed length."""

    num_prompts: int
    prompt_tokens: int
    output_tokens: int
    seed: int

    def prompts(self) -> list[list[int]]:
        """Token ids; the same seed gives both engines the same prompts."""
        random = Random(self.seed)
        return [
            [random.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(self.prompt_tokens)]
            for _ in range(self.num_prompts)
        ]


@dataclass(frozen=True, slots=True)
class Timing:
    """What a case took. Decoding is timed while all sequences decode, and only then."""

    prefill_s: float  # until every prompt has its first token
    decode_s: float  # from then on until the first answer is complete
    decode_tokens: int  # that came in this time


class TokenClock:
    """Notes when tokens come."""

    def __init__(self) -> None:
        self._begun_s = time.perf_counter()
        self._notes: list[tuple[float, str, int]] = []

    def note(self, request: str, num_tokens: int, now_s: float | None = None) -> None:
        """`num_tokens` more of `request` are here."""
        now_s = time.perf_counter() if now_s is None else now_s
        self._notes.append((now_s - self._begun_s, request, num_tokens))

    def timing(self) -> Timing:
        """The figures of a case whose requests are all complete."""
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        for at_s, request, num_tokens in self._notes:
            if num_tokens:
                first.setdefault(request, at_s)
                last[request] = at_s
        begin_s, end_s = max(first.values()), min(last.values())
        tokens = sum(n for at_s, _, n in self._notes if begin_s < at_s <= end_s)
        return Timing(begin_s, max(0.0, end_s - begin_s), tokens)


class Channel:
    """Stdout for answers alone: what libraries print goes to stderr from now on."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def answer(self, run: Callable[[Case], Timing], facts: dict[str, Any]) -> None:
        """Say `facts`, then run each case that comes in, until stdin ends."""
        self._say(facts)
        for line in sys.stdin:
            self._say(asdict(run(Case(**json.loads(line)))))

    def _say(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()
