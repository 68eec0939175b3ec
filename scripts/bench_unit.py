"""A unit with real lanes inside this process: the served brain without HTTP."""

import select
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from muxrt.config.placement import ModelSpec, UnitSpec
from muxrt.core import Prompt, Request, SamplingParams
from muxrt.engine.build import build_unit
from muxrt.engine.messages import UnitBoot
from muxrt.engine.unit import Emit, Unit
from muxrt.worker.load import load_unit
from muxrt.worker.service import UnitExecutor


@dataclass(frozen=True, slots=True)
class OwnUnit:
    """A unit that is ready, and what runs its works."""

    unit: Unit
    executor: UnitExecutor

    def finish(self) -> None:
        """Serve until nothing is left to do."""
        while not self.unit.is_idle:
            self.turn(0.1)

    def turn(self, timeout_s: float) -> None:
        """Take in what is done; waits up to `timeout_s` for the first."""
        if select.select([self.executor.fileno()], [], [], timeout_s)[0]:
            self.executor.drain()
        timer_s = self.unit.next_timer()
        if timer_s is not None and timer_s <= time.monotonic():
            self.unit.tick()


@contextmanager
def own_unit(spec: UnitSpec, models: tuple[ModelSpec, ...], emit: Emit) -> Iterator[OwnUnit]:
    """The unit of `spec`, loaded and warm, inside the block."""
    boot = UnitBoot(unit=spec, models=models, endpoint="", identity=spec.name)
    opened = load_unit(boot, lambda _: None)
    with closing(opened.executor) as executor:
        yield OwnUnit(build_unit(opened.plan, executor, time.monotonic, emit), executor)


def model_spec(folder: Path, **options: object) -> ModelSpec:
    """The model in `folder`, under the folder's name."""
    return msgspec.convert({"name": folder.name, "path": str(folder), **options}, ModelSpec)


def greedy(rid: int, model: str, prompt: npt.ArrayLike, output_tokens: int) -> Request:
    """A request that runs to its full length."""
    tokens = np.asarray(prompt, dtype="<i4")
    asked = Prompt(tokens.tobytes(), SamplingParams(temperature=0.0, ignore_eos=True))
    return Request(rid, model, len(tokens), output_tokens, msgspec.msgpack.encode(asked))
