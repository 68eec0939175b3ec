"""Starts the unit processes, watches them, and starts a dead one again."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import monotonic

import msgspec

from muxrt.config.placement import ModelSpec, UnitSpec, exchanging
from muxrt.config.serve import ServeConfig
from muxrt.engine.messages import (
    Drain,
    Failed,
    Forget,
    FromUnit,
    Loading,
    Ready,
    Stats,
    Step,
    Stopped,
    ToUnit,
    UnitBoot,
)
from muxrt.errors import MuxrtError
from muxrt.server.link import Link
from muxrt.server.unit_process import Process, Spawn, UnitProcess, UnitState, spawn

log = logging.getLogger(__name__)

# How long a dying process's last words may take from its socket to ours.
LAST_WORDS_S = 0.2
# Beyond its own deadline, for a drained process to tidy up and exit.
EXIT_GRACE_S = 2.0
# For a unit that nobody needs any more to say so.
LAST_STOP_S = 1.0

Listener = Callable[[UnitProcess], None]


class StartFailed(MuxrtError):
    """A unit could not load at the first start: what is wrong will not pass by itself."""


class Supervisor:
    """Owns the processes of all units. `on_step` gets what they generate.

    `on_death` is told of each ready unit that ended, `on_change` of every change of a unit's state
    and of progress while it loads. All of it happens on one event loop.
    """

    def __init__(
        self,
        config: ServeConfig,
        on_step: Callable[[Step], None],
        on_death: Listener,
        on_change: Listener = lambda unit: None,
        spawn: Spawn = spawn,
    ) -> None:
        models = {model.name: model for model in config.models}
        self.units = {
            spec.name: UnitProcess(spec, _models_of(spec, models))
            for spec in exchanging(config.units)
        }
        self._on_step = on_step
        self._on_death = on_death
        self._on_change = on_change
        self._spawn = spawn
        self._link = Link(self._receive, self._on_garbage)
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by unit
        self._all_ready = asyncio.Event()
        self._is_stopping = False

    # -- life --------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load every unit. Must run on the event loop."""
        self._link.open()
        for unit in self.units.values():
            self._tasks[unit.name] = asyncio.create_task(self._keep(unit))

    async def wait_ready(self) -> None:
        """Return once every unit was ready. Raises StartFailed if one cannot load."""
        ready = asyncio.create_task(self._all_ready.wait())
        try:
            tasks = list(self._tasks.values())
            await asyncio.wait([ready, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.result()
        finally:
            ready.cancel()

    async def stop(self, deadline_s: float) -> bool:
        """Let the units finish for `deadline_s` seconds, then end them; True if all finished."""
        self._is_stopping = True
        running = [unit for unit in self.units.values() if unit.process is not None]
        for unit in running:
            if not (unit.is_ready and self.send(unit.name, Drain(deadline_s))):
                self._kill(unit)
        exits = [asyncio.create_task(_wait(unit.process)) for unit in running if unit.process]
        late = await self._wait_exits(exits, deadline_s + EXIT_GRACE_S)
        self.kill()
        for task in self._tasks.values():
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*exits, *self._tasks.values(), return_exceptions=True)
        for unit in self.units.values():
            unit.state = UnitState.STOPPED
        self._link.close()
        return not late and all(future.result() == 0 for future in exits)

    async def _wait_exits(
        self, exits: list[asyncio.Task[int]], timeout_s: float
    ) -> set[asyncio.Task[int]]:
        """Wait for all of `exits`; those that are late."""
        if not exits:
            return set()
        _, late = await asyncio.wait(exits, timeout=timeout_s)
        return late

    def kill(self) -> None:
        """End every process at once."""
        for unit in self.units.values():
            self._kill(unit)

    def _kill(self, unit: UnitProcess) -> None:
        if unit.process is not None:
            unit.process.kill()

    # -- units that come and go --------------------------------------------------------------

    async def add(self, spec: UnitSpec, models: tuple[ModelSpec, ...]) -> None:
        """Start one more unit and return when it is ready; nothing is routed to it yet.

        Raises StartFailed if it cannot load; it is forgotten then.
        """
        unit = UnitProcess(spec, models, is_routed=False)
        self.units[unit.name] = unit
        task = self._tasks[unit.name] = asyncio.create_task(self._keep(unit))
        ready = asyncio.create_task(unit.was_ready.wait())
        try:
            await asyncio.wait([ready, task], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if task.done():
            del self.units[unit.name], self._tasks[unit.name]
            task.result()

    def route(self, specs: Mapping[str, UnitSpec]) -> None:
        """New requests go to these units, as they are described here; the others only finish."""
        for unit in self.units.values():
            unit.is_routed = unit.name in specs
            unit.is_leaving = not unit.is_routed
            if unit.is_routed:
                _describe(unit, specs[unit.name])

    def forget(self, name: str, model: str) -> None:
        """A unit goes on without a model that nobody asks it for any more. None: done already."""
        if name in self.units:
            self.send(name, Forget(model))
            self.units[name].forget(model)

    async def remove(self, name: str, deadline_s: float = LAST_STOP_S) -> None:
        """End a unit, and forget it; nothing that is live should be in it. None: done already."""
        unit = self.units.get(name)
        if unit is None:
            return
        unit.is_leaving, unit.is_routed, task = True, False, self._tasks[name]
        if unit.process is None:
            task.cancel()
        elif not (unit.is_ready and self.send(name, Drain(deadline_s))):
            self._kill(unit)
        await asyncio.wait([task], timeout=deadline_s + EXIT_GRACE_S)
        self._kill(unit)
        await asyncio.wait([task])
        await asyncio.sleep(LAST_WORDS_S)  # what it said last is read before it is forgotten
        self._on_death(unit)
        del self.units[name], self._tasks[name]
        self._on_change(unit)

    async def _keep(self, unit: UnitProcess) -> None:
        """Start the unit, and again whenever it ends. Raises StartFailed at the first load."""
        while True:
            code = await self._run_once(unit)
            if self._is_stopping or (unit.is_leaving and code == 0):
                return
            if not unit.is_ready:
                await _hear_out(unit)
            self._bury(unit, code)
            if unit.is_leaving:
                return
            is_first = not self._all_ready.is_set() or not unit.is_routed
            if is_first and not unit.ready_s:
                raise StartFailed(unit.error or f"unit {unit.name} cannot start")
            await asyncio.sleep(max(0.0, unit.next_start_s - monotonic()))

    async def _run_once(self, unit: UnitProcess) -> int:
        """One generation, from its start to its end; its exit code."""
        unit.begin(monotonic())
        try:
            process = await self._spawn(self._boot(unit))
        except OSError as error:
            unit.error = f"no process for unit {unit.name}: {error}"
            unit.has_failed.set()
            return 1
        unit.process = process
        log.info("event=unit_started unit=%s pid=%d", unit.name, process.pid)
        self._on_change(unit)
        return await _wait(process)

    def _bury(self, unit: UnitProcess, code: int) -> None:
        was_ready = unit.is_ready
        unit.on_exit(code, monotonic())
        delay_s = max(0.0, unit.next_start_s - monotonic())
        log.error(
            "event=unit_died unit=%s code=%d restart_in_s=%.1f error=%r",
            unit.name,
            code,
            delay_s,
            unit.error,
        )
        if was_ready:
            self._on_death(unit)
        self._on_change(unit)

    def _boot(self, unit: UnitProcess) -> UnitBoot:
        return UnitBoot(
            unit=unit.spec,
            models=unit.model_specs,
            endpoint=self._link.endpoint,
            identity=unit.identity.decode(),
        )

    # -- messages ----------------------------------------------------------------------------

    def send(self, name: str, message: ToUnit) -> bool:
        """Send to the unit's present process; False if there is none that listens."""
        unit = self.units.get(name)
        return unit is not None and self._link.send(unit.identity, message)

    def _sender(self, identity: bytes) -> UnitProcess | None:
        """The unit whose present process has this identity; the dead are not listened to."""
        unit = self.units.get(identity.decode().rpartition("#")[0])
        if unit is None or unit.identity != identity or unit.state is UnitState.DOWN:
            return None
        return unit

    def _receive(self, identity: bytes, message: FromUnit) -> None:
        unit = self._sender(identity)
        if unit is None:
            return
        match message:
            case Step():
                self._on_step(message)
            case Stats():
                unit.stats = message
            case Ready():
                self._on_ready(unit, message)
            case Loading():
                unit.loading = message
                self._on_change(unit)
            case Failed():
                unit.error = message.message
                unit.has_failed.set()
            case Stopped():
                log.info("event=unit_drained unit=%s", unit.name)

    def _on_ready(self, unit: UnitProcess, ready: Ready) -> None:
        unit.on_ready(ready, monotonic())
        log.info("event=unit_ready unit=%s load_s=%.2f", unit.name, unit.load_s)
        for model in ready.models:
            if model.name not in unit.models:  # forgotten while the unit loaded
                self.send(unit.name, Forget(model.name))
        if all(each.is_ready for each in self.units.values()):
            self._all_ready.set()
        self._on_change(unit)

    def _on_garbage(self, identity: bytes) -> None:
        """A process that does not speak our language may have lost a step: it has to go."""
        unit = self._sender(identity)
        if unit is not None:
            self._kill(unit)


async def _hear_out(unit: UnitProcess) -> None:
    """Wait for why a process could not load, if it still says so."""
    with suppress(TimeoutError):
        await asyncio.wait_for(unit.has_failed.wait(), LAST_WORDS_S)


async def _wait(process: Process) -> int:
    """Its exit code; if we are not waited for any more, it has nothing to live for."""
    try:
        return await process.wait()
    except asyncio.CancelledError:
        process.kill()
        raise


def _describe(unit: UnitProcess, spec: UnitSpec) -> None:
    """The unit is as in `spec`, and keeps other models that it has for those that ask already."""
    names = {part.name for part in spec.models}
    leaving = tuple(part for part in unit.spec.models if part.name not in names)
    unit.leaving = frozenset(part.name for part in leaving)
    unit.spec = msgspec.structs.replace(spec, models=spec.models + leaving)


def _models_of(unit: UnitSpec, models: Mapping[str, ModelSpec]) -> tuple[ModelSpec, ...]:
    return tuple(models[part.name] for part in unit.models)
