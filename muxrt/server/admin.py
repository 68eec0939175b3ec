"""/admin: what is where, and changes of it, for who has a key of its own.

The routes are there only if the configuration has `admin`. Bodies are JSON; answers, too.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from muxrt.config.document import Document
from muxrt.config.placement import ModelSpec, Name, Role, UnitSpec
from muxrt.config.schema import convert
from muxrt.engine.messages import ModelStats, SetAwake
from muxrt.engine.reconcile import Deployment
from muxrt.errors import BadRequest, ConfigError, Conflict, UnknownModel
from muxrt.server.auth import KeyRing
from muxrt.server.deploy import Deployer
from muxrt.server.dispatch import Dispatcher
from muxrt.server.replan import Replanner
from muxrt.server.supervisor import Supervisor
from muxrt.server.unit_process import UnitProcess

STREAMS = ("finish", "move")  # what becomes of those that run in units that end

Handler = Callable[[web.Request], Awaitable[web.Response]]
T = TypeVar("T", bound=msgspec.Struct)


class ModelState(msgspec.Struct, frozen=True):
    """A model in a unit."""

    name: str
    state: str  # awake, draining, asleep, waking; "loading" until the unit has said
    may_sleep: bool
    waiting: int = 0
    running: int = 0
    blocks_used: int = 0
    blocks_quota: int = 0


class UnitInfo(msgspec.Struct, frozen=True):
    """A unit and its models."""

    name: str
    state: str
    is_routed: bool  # new requests go to it
    pid: int | None
    restarts: int
    blocks: int
    blocks_free: int
    error: str | None
    models: tuple[ModelState, ...]


class PlacementBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /admin/placement: the units to be; models, where others are to be served, too."""

    units: tuple[UnitSpec, ...]
    models: tuple[ModelSpec, ...] | None = None  # None = those that are served


class ModelBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /admin/models: a model, and the unit that it gets."""

    model: ModelSpec
    unit: UnitSpec


class RoleBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /admin/models/{name}/role: what one of its units does for it from now on."""

    unit: Name
    role: Role


class AdminRoutes:
    """What administrators can see and do."""

    def __init__(
        self,
        keys: KeyRing,
        deployer: Deployer,
        supervisor: Supervisor,
        dispatcher: Dispatcher,
        replanner: Replanner | None = None,
    ) -> None:
        self._keys = keys
        self._replanner = replanner
        self._deployer = deployer
        self._supervisor = supervisor
        self._dispatcher = dispatcher

    def add_to(self, app: web.Application) -> None:
        """Put the routes into the endpoint's application, whose errors they share."""
        router = app.router
        router.add_get("/admin/units", self._guarded(self.list_units))
        router.add_get("/admin/models", self._guarded(self.list_models))
        router.add_post("/admin/models", self._guarded(self.add_model))
        router.add_delete("/admin/models/{name}", self._guarded(self.remove_model))
        router.add_post("/admin/models/{name}/sleep", self._guarded(self.sleep))
        router.add_post("/admin/models/{name}/wake", self._guarded(self.wake))
        router.add_post("/admin/models/{name}/role", self._guarded(self.switch_role))
        router.add_get("/admin/placement", self._guarded(self.show_placement))
        router.add_post("/admin/placement", self._guarded(self.apply))
        router.add_get("/admin/replan", self._guarded(self.show_replan))
        router.add_post("/admin/replan", self._guarded(self.replan))

    def _guarded(self, handler: Handler) -> Handler:
        """`handler` for who has an admin key; what cannot be served is the asker's error."""

        async def guarded(http: web.Request) -> web.Response:
            self._keys.check(http.headers.get("Authorization"))
            try:
                return await handler(http)
            except ConfigError as error:
                raise BadRequest(error.message) from None

        return guarded

    # -- what there is -----------------------------------------------------------------------

    async def list_units(self, http: web.Request) -> web.Response:
        """GET /admin/units."""
        return _json({"units": [_info(unit) for unit in self._supervisor.units.values()]})

    async def list_models(self, http: web.Request) -> web.Response:
        """GET /admin/models: each with its state in each unit."""
        ledger, units = self._dispatcher.ledger, list(self._supervisor.units.values())
        return _json(
            {
                "models": [
                    {
                        "name": spec.name,
                        "path": spec.path,
                        "pin": spec.pin,
                        "queued": ledger.queued(spec.name),
                        "running": ledger.running(spec.name),
                        "units": {
                            unit.name: state.state
                            for unit in units
                            for state in _info(unit).models
                            if state.name == spec.name
                        },
                    }
                    for spec in self._dispatcher.models.values()
                ]
            }
        )

    async def show_placement(self, http: web.Request) -> web.Response:
        """GET /admin/placement: what is served, and how far the last change is."""
        deployer = self._deployer
        return _json(
            {
                "models": deployer.deployment.models,
                "units": deployer.deployment.units,
                "change": deployer.progress,
            }
        )

    # -- models ------------------------------------------------------------------------------

    async def sleep(self, http: web.Request) -> web.Response:
        """POST /admin/models/{name}/sleep: in all its units, or in `?unit=`."""
        return self._set_awake(http, is_awake=False)

    async def wake(self, http: web.Request) -> web.Response:
        """POST /admin/models/{name}/wake: likewise."""
        return self._set_awake(http, is_awake=True)

    def _set_awake(self, http: web.Request, is_awake: bool) -> web.Response:
        spec, unit_name = self._spec(http.match_info["name"]), http.query.get("unit")
        units = [
            unit
            for unit in self._supervisor.units.values()
            if unit.is_ready and spec.name in unit.models and unit_name in (None, unit.name)
        ]
        if not units:
            raise Conflict(f"no unit that is ready serves {spec.name}" + _at(unit_name))
        if spec.pin and not is_awake:
            raise Conflict(f"{spec.name} is pinned: it is always awake")
        for unit in units:
            if not unit.models[spec.name].may_sleep:
                raise Conflict(
                    f"the models of unit {unit.name} are always awake: give it memory.weight_bytes"
                )
        for unit in units:
            self._supervisor.send(unit.name, SetAwake(spec.name, is_awake))
        return _json({"model": spec.name, "units": [unit.name for unit in units]}, 202)

    async def switch_role(self, http: web.Request) -> web.Response:
        """POST /admin/models/{name}/role: {"unit": ..., "role": prefill, decode or mixed}."""
        name, body = self._spec(http.match_info["name"]).name, await _read(http, RoleBody)
        self._dispatcher.switch_role(name, body.unit, body.role)
        return _json({"model": name, "unit": body.unit, "role": body.role})

    def _spec(self, name: str) -> ModelSpec:
        spec = self._dispatcher.models.get(name)
        if spec is None:
            raise UnknownModel(f"the model {name!r} is not served here")
        return spec

    async def add_model(self, http: web.Request) -> web.Response:
        """POST /admin/models: serve one more model, in a unit of its own."""
        body = await _read(http, ModelBody)
        now = self._deployer.deployment
        if any(spec.name == body.model.name for spec in now.models):
            raise Conflict(f"{body.model.name} is served already")
        models, units = (*now.models, body.model), (*now.units, body.unit)
        return await self._change(http, Deployment(models, units))

    async def remove_model(self, http: web.Request) -> web.Response:
        """DELETE /admin/models/{name}: units that have others, too, start anew without it."""
        name, now = self._spec(http.match_info["name"]).name, self._deployer.deployment
        units = []
        for unit in now.units:
            rest = tuple(part for part in unit.models if part.name != name)
            if rest:
                units.append(msgspec.structs.replace(unit, models=rest))
        models = tuple(spec for spec in now.models if spec.name != name)
        return await self._change(http, Deployment(models, tuple(units)))

    # -- the placement -----------------------------------------------------------------------

    async def apply(self, http: web.Request) -> web.Response:
        """POST /admin/placement: serve these units instead; answers when new requests go there."""
        body = await _read(http, PlacementBody)
        models = self._deployer.deployment.models if body.models is None else body.models
        return await self._change(http, Deployment(models, body.units))

    async def _change(self, http: web.Request, wanted: Deployment) -> web.Response:
        """With `?streams=move` what runs in units that end goes on in others."""
        streams = http.query.get("streams", "finish")
        if streams not in STREAMS:
            raise BadRequest(f"streams: found {streams!r}, expected one of {', '.join(STREAMS)}")
        for spec in wanted.models:
            if spec.path is not None and not Path(spec.path).is_absolute():
                # Relative to what? The journal, and a replan's file, are read from elsewhere.
                raise BadRequest(f"{spec.name}: found path {spec.path}, expected an absolute one")
        return _json(await self._deployer.apply(wanted, streams == "move"))

    # -- planned anew ------------------------------------------------------------------------

    async def show_replan(self, http: web.Request) -> web.Response:
        """GET /admin/replan: what was decided last, whether one goes on, and when the next is."""
        return _json(self._replan().as_data())

    async def replan(self, http: web.Request) -> web.Response:
        """POST /admin/replan: one now; answers at once, and 409 while one goes on."""
        self._replan().ask()
        return _json(self._replan().as_data(), 202)

    def _replan(self) -> Replanner:
        if self._replanner is None:
            raise BadRequest("the served file has no replan, expected replan: {plan: FILE} in it")
        return self._replanner


def _info(unit: UnitProcess) -> UnitInfo:
    stats = {m.model: m for m in unit.stats.models} if unit.stats is not None else {}
    return UnitInfo(
        name=unit.name,
        state=unit.state.value,
        is_routed=unit.is_routed,
        pid=unit.process.pid if unit.process is not None else None,
        restarts=unit.num_restarts,
        blocks=unit.stats.blocks_total if unit.stats is not None else 0,
        blocks_free=unit.stats.blocks_free if unit.stats is not None else 0,
        error=unit.error,
        models=tuple(
            _model_state(unit, part.name, stats.get(part.name)) for part in unit.spec.models
        ),
    )


def _model_state(unit: UnitProcess, name: str, stats: ModelStats | None) -> ModelState:
    ready = unit.models.get(name)
    may_sleep = ready is not None and ready.may_sleep
    if stats is None:
        return ModelState(name, "loading", may_sleep)
    return ModelState(
        name,
        stats.state,
        may_sleep,
        stats.waiting,
        stats.running,
        stats.blocks_used,
        stats.blocks_quota,
    )


def _at(unit: str | None) -> str:
    return "" if unit is None else f" under the name {unit}"


async def _read(http: web.Request, target: type[T]) -> T:
    """The body as a `target`, by the rules of configuration files. Raises BadRequest."""
    try:
        value: Any = msgspec.json.decode(await http.read())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    try:
        return convert(Document("body", value), target)
    except ConfigError as error:
        raise BadRequest(error.message) from None


def _json(value: Any, status: int = 200) -> web.Response:
    data = msgspec.json.encode(value)
    return web.Response(body=data, status=status, content_type="application/json")
