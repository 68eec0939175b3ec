"""What the API knows of one unit, whose processes come and go, and how such a process starts."""

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

import msgspec

import muxrt
from muxrt.config.placement import ModelSpec, UnitSpec
from muxrt.engine.messages import Loading, ModelReady, Ready, Stats, UnitBoot

log = logging.getLogger(__name__)

FIRST_DELAY_S, MAX_DELAY_S = 0.5, 30.0
# A unit that served this long was healthy: its next death is a new story.
STABLE_S = 60.0
LOAD_GUESS_S = 5.0  # until a load was measured


class UnitState(Enum):
    """What a unit's process does."""

    LOADING = "loading"
    READY = "ready"
    DOWN = "down"  # dead, to be started again after a delay
    STOPPED = "stopped"


class Process(Protocol):
    """A running unit process."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> int:
        """Its exit code, once it has ended."""

    def kill(self) -> None:
        """End it at once; no error if it has ended."""


Spawn = Callable[[UnitBoot], Awaitable[Process]]


class _Child:
    """A subprocess; its stdin stays open as the sign that the API lives."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def wait(self) -> int:
        return await self._process.wait()

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()


async def spawn(boot: UnitBoot) -> Process:
    """Start a unit process that computes."""
    return await _spawn(boot, "muxrt.worker.process")


def spawn_null(step_s: float) -> Spawn:
    """Starts unit processes that make tokens up, a batch every `step_s` seconds."""

    async def spawn(boot: UnitBoot) -> Process:
        return await _spawn(boot, "muxrt.worker.null", str(step_s))

    return spawn


async def _spawn(boot: UnitBoot, module: str, *arguments: str) -> Process:
    """Start `python -m MODULE ARGUMENTS` with this interpreter."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        env=environment(os.environ),
        # Ctrl-C is for the API, which drains; a unit that died of it could not.
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(boot) + b"\n")
    return _Child(process)


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with this muxrt importable, wherever the process was started from."""
    home = str(Path(muxrt.__file__).parent.parent)
    paths = [home, environ["PYTHONPATH"]] if environ.get("PYTHONPATH") else [home]
    return {**environ, "PYTHONPATH": os.pathsep.join(paths)}


@dataclass(slots=True)
class Backoff:
    """How long to wait before the next start: not at all, then doubling up to a cap."""

    deaths: int = 0

    def after_death(self, served_s: float) -> float:
        """Seconds to wait, after a generation that was ready for `served_s` seconds."""
        self.deaths = 1 if served_s >= STABLE_S else self.deaths + 1
        if self.deaths == 1:
            return 0.0
        return min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** (self.deaths - 2))


@dataclass(slots=True, eq=False)
class UnitProcess:
    """What the API knows of one unit. Times are of the monotonic clock."""

    spec: UnitSpec
    model_specs: tuple[ModelSpec, ...] = ()  # what it is to serve, in the order of `spec`
    is_routed: bool = True  # new requests go to it
    is_leaving: bool = False  # it is not started again
    leaving: frozenset[str] = frozenset()  # models of it that get no new requests
    was_ready: asyncio.Event = field(default_factory=asyncio.Event)  # in whatever generation
    state: UnitState = UnitState.DOWN
    generation: int = 0  # counts starts; messages of earlier ones are not for us
    process: Process | None = None
    models: dict[str, ModelReady] = field(default_factory=dict)  # while ready
    loading: Loading | None = None  # the last progress
    stats: Stats | None = None  # the last report of this generation
    error: str | None = None  # why it is not ready
    started_s: float = 0.0
    ready_s: float = 0.0
    next_start_s: float = 0.0
    load_s: float = LOAD_GUESS_S  # how long the last load took
    has_failed: asyncio.Event = field(default_factory=asyncio.Event)  # it said why it ends
    backoff: Backoff = field(default_factory=Backoff)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def identity(self) -> bytes:
        """The routing id of the present generation."""
        return f"{self.name}#{self.generation}".encode()

    def takes(self, model: str) -> bool:
        """New requests for the model go to it, while it is ready."""
        return self.is_routed and model in self.models and model not in self.leaving

    def forget(self, name: str) -> None:
        """It goes on, and is started again, without a model."""
        parts = tuple(part for part in self.spec.models if part.name != name)
        self.spec = msgspec.structs.replace(self.spec, models=parts)
        self.model_specs = tuple(spec for spec in self.model_specs if spec.name != name)
        self.models.pop(name, None)
        self.leaving -= {name}

    @property
    def is_ready(self) -> bool:
        return self.state is UnitState.READY

    @property
    def num_restarts(self) -> int:
        return max(0, self.generation - 1)

    def begin(self, now: float) -> None:
        """A new generation is about to start."""
        self.generation += 1
        self.state = UnitState.LOADING
        self.loading, self.process = None, None
        self.started_s = now
        self.has_failed.clear()

    def on_ready(self, ready: Ready, now: float) -> None:
        """Every model of the unit answers from now on."""
        self.state, self.error = UnitState.READY, None
        parts = {part.name for part in self.spec.models}
        self.models = {model.name: model for model in ready.models if model.name in parts}
        self.ready_s, self.load_s = now, now - self.started_s
        self.was_ready.set()

    def on_exit(self, code: int, now: float) -> None:
        """The process ended without having been told to."""
        was_ready = self.is_ready
        delay_s = self.backoff.after_death(now - self.ready_s if was_ready else 0.0)
        if not self.has_failed.is_set():
            self.error = f"the process of unit {self.name} ended ({_exit_words(code)})"
        self.state, self.process, self.stats = UnitState.DOWN, None, None
        self.models = {}
        self.next_start_s = now + delay_s

    def retry_after_s(self, now: float) -> float:
        """When a client may find it ready, to the best of our knowledge; at least a second."""
        starts_s = self.next_start_s if self.state is UnitState.DOWN else self.started_s
        return max(1.0, starts_s + self.load_s - now)


def _exit_words(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
