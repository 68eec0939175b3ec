"""Changes what is served while it is served: carries out the steps of `engine.reconcile`.

One change at a time. Until the switch anything that goes wrong undoes it and the old placement goes
on; from the switch on the new one serves, and what is left is to let the old units finish. Requests
stay where they are: those of an old unit end there.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from enum import Enum

import msgspec

from muxrt.config.document import KeyedError, dotted
from muxrt.config.model import ModelShape, load_shape
from muxrt.config.placement import ModelSpec, UnitSpec
from muxrt.config.serve import ServeConfig, check_references, stage_problems
from muxrt.engine.build import may_sleep, plan_unit, weight_bytes
from muxrt.engine.reconcile import Change, Deployment, Kind, Step, check_room, diff
from muxrt.errors import BadRequest, Conflict, MuxrtError
from muxrt.server.dispatch import Dispatcher
from muxrt.server.journal import Journal
from muxrt.server.served_model import ServedModel
from muxrt.server.supervisor import Supervisor

log = logging.getLogger(__name__)


class Phase(Enum):
    """Where the last change is."""

    NONE = "none"
    LOADING = "loading"  # the old placement serves
    DRAINING = "draining"  # the new one serves; old units finish
    DONE = "done"
    UNDONE = "undone"  # the old placement serves


class Progress(msgspec.Struct, frozen=True):
    """What became of the last change."""

    phase: Phase = Phase.NONE
    steps: tuple[Step, ...] = ()
    done: int = 0  # of those steps
    extra_bytes: int = 0  # what new units take beside the old ones, by their budgets
    why: str = ""  # it was undone


class Deployer:
    """Knows what is served, and makes it something else."""

    def __init__(
        self,
        deployment: Deployment,
        supervisor: Supervisor,
        dispatcher: Dispatcher,
        models: dict[str, ServedModel],
        *,
        journal: Journal | None = None,
        drain_s: float = 600.0,
        load_s: float = 3600.0,
        limit_bytes: int | None = None,
    ) -> None:
        """`models` is what the edge knows.

        `load_s` is how long each new unit may load, `drain_s` how long old ones may finish.
        """
        self.deployment = deployment
        self.progress = Progress()
        self.on_switch: Callable[[Sequence[ModelSpec]], None] = lambda models: None
        self._supervisor = supervisor
        self._dispatcher = dispatcher
        self._models = models
        self._journal = journal
        self._drain_s = drain_s
        self._load_s = load_s
        self._limit_bytes = limit_bytes
        self._task: asyncio.Task[None] | None = None
        self._switched: asyncio.Future[None] | None = None

    async def apply(self, wanted: Deployment, moves_streams: bool = False) -> Progress:
        """Serve `wanted`; returns when it does, with old units perhaps still finishing.

        `moves_streams`: what runs in them goes on in the new ones, instead of ending where it is.
        Who asks may leave: the change goes on. Raises ConfigError or BadRequest for what cannot be
        served, Conflict while another change goes on, MuxrtError with why it was undone.
        """
        if self._task is not None and not self._task.done():
            raise Conflict("another change of the placement goes on: see GET /admin/placement")
        change = diff(self.deployment, wanted)
        if not change.steps:
            self.progress = Progress(Phase.DONE)
            return self.progress
        self._switched = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(change, moves_streams))
        await asyncio.shield(self._switched)
        return self.progress

    async def wait(self) -> None:
        """Until nothing of the last change is left to do."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def stop(self) -> None:
        """The server goes: what is under way ends with it."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    # -- one change --------------------------------------------------------------------------

    async def _run(self, change: Change, moves_streams: bool) -> None:
        assert self._switched is not None
        try:
            served = await self._prepare(change)
            for step in change.steps:
                if step.kind is Kind.LOAD:
                    await self._take(step, self._load(change, step.unit))
            self._refuse_dead(change)
            self._switch(change, served)
        except BaseException as error:
            await self._undo(change, error)
            if not self._switched.done():
                self._switched.set_exception(_as_known(error))
                self._switched.exception()  # somebody may have left who would have looked
            if not isinstance(error, Exception):
                raise
            return
        self._switched.set_result(None)
        if moves_streams:
            self._move_streams(change)
        await self._finish(change)

    async def _finish(self, change: Change) -> None:
        """Let the old units end. A journal that fails now changes nothing: the switch is in it."""
        for step in change.steps:
            if step.kind is Kind.DRAIN:
                await self._take(step, self._drain(step.unit))
            elif step.kind is Kind.FORGET:
                await self._take(step, self._forget(step.unit, step.model))
            elif step.kind is Kind.FREE:
                await self._take(step, self._supervisor.remove(step.unit))
        if self._journal is not None:
            with suppress(OSError):
                self._journal.done()
        self.progress = msgspec.structs.replace(self.progress, phase=Phase.DONE)
        log.info("event=change_done units=%s", ",".join(self._supervisor.units))

    async def _prepare(self, change: Change) -> dict[str, ServedModel]:
        """Check all that can be known before; what the edge needs of models that are new to it."""
        sizes = await asyncio.to_thread(_check, change)
        extra_bytes = check_room(change, sizes, self._limit_bytes)
        known = {spec.name: spec for spec in change.before.models}
        new = [spec for spec in change.after.models if not _is_same(spec, known.get(spec.name))]
        loads = [asyncio.to_thread(ServedModel.load, spec) for spec in new]
        models = dict(zip([spec.name for spec in new], await asyncio.gather(*loads), strict=True))
        for spec in change.after.models:
            if spec.name not in models:
                models[spec.name] = self._models[spec.name].with_spec(spec)
        self.progress = Progress(Phase.LOADING, change.steps, 0, extra_bytes)
        if self._journal is not None:
            self._journal.begin(change)
        log.info("event=change_begun steps=%d extra_bytes=%d", len(change.steps), extra_bytes)
        return models

    async def _take(self, step: Step, work: Awaitable[None]) -> None:
        """Do what a step says, written down before."""
        if self._journal is not None:
            try:
                self._journal.step(step)
            except OSError as error:
                log.error("event=journal_failed error=%r", str(error))
                if step.kind is Kind.LOAD:
                    raise
        log.info("event=change_step kind=%s unit=%s", step.kind.value, step.unit)
        await work
        self.progress = msgspec.structs.replace(self.progress, done=self.progress.done + 1)

    async def _load(self, change: Change, name: str) -> None:
        spec = next(unit for unit in change.after.units if unit.name == name)
        try:
            async with asyncio.timeout(self._load_s):
                await self._supervisor.add(spec, change.after.specs_of(spec))
        except TimeoutError:
            raise MuxrtError(
                f"unit {name} was not ready after {self._load_s:g} s (admin.load_s)"
            ) from None

    def _refuse_dead(self, change: Change) -> None:
        """Raises MuxrtError if a unit that was ready has died while others loaded."""
        for name in change.loaded:
            if not self._supervisor.units[name].is_ready:
                raise MuxrtError(f"unit {name} died before the switch")

    def _switch(self, change: Change, served: dict[str, ServedModel]) -> None:
        """New requests go to the new placement. Once it is written down nothing here can fail."""
        if self._journal is not None:
            self._journal.switched()
        self._supervisor.route({unit.name: unit for unit in change.after.units})
        self._dispatcher.serve(change.after.models)
        for name in self._models.keys() - served.keys():
            del self._models[name]
        self._models.update(served)
        self.on_switch(change.after.models)
        self.deployment = change.after
        done = self.progress.done + 1
        self.progress = msgspec.structs.replace(self.progress, phase=Phase.DRAINING, done=done)
        log.info("event=switched models=%s", ",".join(self._models))

    def _move_streams(self, change: Change) -> None:
        """What runs in old units goes on in new ones, where it can."""
        for name in change.freed:
            moved, left = self._dispatcher.move(name), len(self._dispatcher.ledger.of_unit(name))
            log.info("event=streams_moved unit=%s moved=%d left=%d", name, moved, left)

    async def _forget(self, name: str, model: str) -> None:
        await self._drain(name, model)
        self._supervisor.forget(name, model)

    async def _drain(self, name: str, model: str | None = None) -> None:
        """Wait for the last request in an old unit, or for so long as it may take.

        Of one model, where the unit goes on without that.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                await self._dispatcher.quiet(name, model)
                return
        log.warning("event=drain_late unit=%s", name)

    async def _undo(self, change: Change, error: BaseException) -> None:
        """End the new units that were started; the old ones never noticed."""
        why = getattr(error, "message", "") or f"{type(error).__name__}: {error}"
        log.error("event=change_undone error=%r", why)
        for name in change.loaded:
            await self._supervisor.remove(name)
        if self._journal is not None and self.progress.phase is Phase.LOADING:
            with suppress(OSError):  # without a switch in it, it says the same
                self._journal.undone(why)
        self.progress = msgspec.structs.replace(self.progress, phase=Phase.UNDONE, why=why)


def _as_known(error: BaseException) -> MuxrtError:
    if isinstance(error, MuxrtError):
        return error
    return MuxrtError(f"the change was undone: {type(error).__name__}: {error}")


def _is_same(spec: ModelSpec, known: ModelSpec | None) -> bool:
    """The same folder, so the same tokenizer and template."""
    return known is not None and spec.path == known.path


def _check(change: Change) -> dict[str, int]:
    """Bytes of every new unit, by its budgets. Raises ConfigError for what cannot be served.

    Reads the folders of its models.
    """
    config = ServeConfig(models=change.after.models, units=change.after.units)
    try:
        check_references(config)
        for problem in stage_problems(config.units, "`muxrt serve`"):
            raise problem
    except KeyedError as problem:
        raise BadRequest(str(problem), param=dotted(problem.key)) from None
    shapes = {model.name: load_shape(model.folder) for model in config.models}
    sizes = {}
    for unit in config.units:
        specs = {spec.name: spec for spec in change.after.specs_of(unit)}
        plan = plan_unit(unit, specs, shapes)
        weights = plan.weight_bytes if may_sleep(unit, specs) else _all_weights(specs, shapes, unit)
        sizes[unit.name] = weights + unit.memory.kv_bytes + unit.memory.swap_bytes
    return sizes


def _all_weights(
    specs: Mapping[str, ModelSpec], shapes: Mapping[str, ModelShape], unit: UnitSpec
) -> int:
    device = unit.mesh.device
    return sum(weight_bytes(spec, shapes[name], device) for name, spec in specs.items())
