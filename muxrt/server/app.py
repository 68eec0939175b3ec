"""The API process from its start to its end: `run` is `muxrt serve`."""

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import monotonic

import msgspec
import uvloop
from aiohttp import web

from muxrt.config.placement import ModelSpec
from muxrt.config.serve import ServeConfig
from muxrt.engine.reconcile import Deployment
from muxrt.errors import ConfigError, MuxrtError
from muxrt.server.admin import AdminRoutes
from muxrt.server.auth import load_keys
from muxrt.server.deploy import Deployer
from muxrt.server.dispatch import Dispatcher
from muxrt.server.journal import Journal
from muxrt.server.progress import LoadingView
from muxrt.server.prometheus import Metrics
from muxrt.server.replan import Replanner
from muxrt.server.routes import Routes
from muxrt.server.served_model import ServedModel
from muxrt.server.supervisor import Supervisor
from muxrt.server.traffic import TrafficLog
from muxrt.server.unit_process import Spawn, UnitProcess, spawn

log = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s level=%(levelname)s at=%(name)s %(message)s"
# For units that were told to stop at once to say so, and for aborts to reach them.
LAST_STOP_S = 1.0
# Objects: a few steps of 256 sequences are on their way at the same time.
COLLECT_AFTER = 20_000
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Server:
    """One endpoint and its units. `start`, then `stop` once; all on one event loop."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        spawn: Spawn = spawn,
        on_change: Callable[[UnitProcess], None] = lambda unit: None,
    ) -> None:
        self._journal, config = resume(config)
        self.config = config
        self.models: dict[str, ServedModel] = {}
        self.supervisor = Supervisor(
            config,
            on_step=lambda step: self.dispatcher.on_step(step),
            on_death=lambda unit: self.dispatcher.on_death(unit),
            on_change=on_change,
            spawn=spawn,
        )
        self.dispatcher = Dispatcher(config.models, self.supervisor, monotonic, config.routing)
        self.traffic = TrafficLog(config.traffic) if config.traffic is not None else None
        self.deployer: Deployer | None = None  # where changes are allowed
        self.replanner: Replanner | None = None  # where it makes them itself
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen, load every model, and return when all of them answer.

        Raises MuxrtError where that cannot be: a taken port, a model that does not load.
        """
        keys = load_keys(self.config.endpoint.api_keys, os.environ)
        units = self.supervisor.units
        metrics = Metrics(self.config.models, units, self.dispatcher)
        source = self.config.endpoint.api_keys
        isolate = source is not None and source.isolate
        if self.traffic is not None:
            self.traffic.start()
        routes = Routes(self.models, self.dispatcher, units, metrics, keys, isolate, self.traffic)
        extend = partial(self._add_admin, metrics) if self.config.admin else _nothing
        await self._listen(routes.application(self.config.endpoint.max_body_bytes, extend))
        self.supervisor.start()
        self.models.update(await _load_models(self.config.models))
        await self.supervisor.wait_ready()
        if self.replanner is not None:
            await self.replanner.start()

    def _add_admin(self, metrics: Metrics, app: web.Application) -> None:
        """Routes for who may change what is served. Raises ConfigError for keys that are none."""
        admin = self.config.admin
        assert admin is not None
        keys = load_keys(admin.keys, os.environ, "admin.keys")
        assert keys is not None, "a source was given"
        self.deployer = Deployer(
            Deployment(self.config.models, self.config.units),
            self.supervisor,
            self.dispatcher,
            self.models,
            journal=self._journal,
            drain_s=admin.drain_s,
            load_s=admin.load_s,
            limit_bytes=admin.max_extra_bytes,
        )
        self.deployer.on_switch = metrics.serve
        replan, traffic = self.config.replan, self.config.traffic
        if replan is not None:
            assert traffic is not None, "check_references wants it"
            sources = (admin.keys, self.config.endpoint.api_keys)
            hidden = frozenset(s.env for s in sources if s is not None and s.env is not None)
            self.replanner = Replanner(replan, Path(traffic.path), self.deployer, hidden=hidden)
            metrics.watch(self.replanner)
        AdminRoutes(keys, self.deployer, self.supervisor, self.dispatcher, self.replanner).add_to(
            app
        )

    async def _listen(self, app: web.Application) -> None:
        endpoint = self.config.endpoint
        # Cancelled handlers are how a client's leaving reaches its sequences at once.
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=LAST_STOP_S
        )
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, endpoint.host, endpoint.port).start()
        except OSError as error:
            raise MuxrtError(
                f"cannot listen on {endpoint.host}:{endpoint.port}: {error.strerror};"
                " choose another endpoint.port (0 = any free one)"
            ) from None
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def drain(self, timeout_s: float) -> bool:
        """Refuse what is new and let what runs finish; False if something had to be ended."""
        if self.replanner is not None:
            await self.replanner.stop()
        is_drained = await self.dispatcher.drained(timeout_s)
        if not is_drained:
            log.warning("event=drain_late live=%d", len(self.dispatcher.ledger))
        self.dispatcher.abandon()
        return is_drained

    async def stop(self) -> bool:
        """End the units, then stop listening; True if every unit ended well."""
        self.dispatcher.is_draining = True
        self.dispatcher.abandon()
        if self.replanner is not None:
            await self.replanner.stop()
        if self.deployer is not None:
            await self.deployer.stop()
        is_clean = await self.supervisor.stop(LAST_STOP_S)
        if self._runner is not None:
            await self._runner.cleanup()
        if self.traffic is not None:
            self.traffic.stop()
        return is_clean


def resume(config: ServeConfig) -> tuple[Journal | None, ServeConfig]:
    """The journal of a configuration, and what it came to: changes outlive the server.

    Raises ConfigError where the journal cannot be read or written.
    """
    if config.admin is None or config.admin.journal is None:
        return None, config
    journal = Journal(Path(config.admin.journal))
    base = Deployment(config.models, config.units)
    try:
        served = journal.open(base)
    except OSError as error:
        raise ConfigError(f"admin.journal: {error.filename}: {error.strerror}") from None
    if served != base:
        log.warning("event=resumed units=%s", ",".join(unit.name for unit in served.units))
    return journal, msgspec.structs.replace(config, models=served.models, units=served.units)


def _nothing(app: web.Application) -> None:
    """No routes but those that every endpoint has."""


async def _load_models(specs: Sequence[ModelSpec]) -> dict[str, ServedModel]:
    """The models' folders, read side by side. Raises ConfigError."""
    loads = [asyncio.to_thread(ServedModel.load, spec) for spec in specs]
    models = await asyncio.gather(*loads)
    return {spec.name: model for spec, model in zip(specs, models, strict=True)}


async def serve(config: ServeConfig, spawn: Spawn) -> None:
    """Serve until SIGTERM or SIGINT, drain, and return; a second signal ends it at once.

    Raises MuxrtError if it cannot start.
    """
    signals = _Signals()
    view = LoadingView(sys.stderr)
    server = Server(config, spawn=spawn, on_change=view.on_change)
    starting = asyncio.create_task(server.start())
    try:
        await signals.first_or(starting)
        if starting.done():
            starting.result()
            _settle_memory()
            log.info("event=ready url=%s models=%s", server.url, ",".join(server.models))
            await signals.wait(1)
        await _drain(server, signals, config.endpoint.drain_s)
    finally:
        starting.cancel()
        with suppress(asyncio.CancelledError, MuxrtError):
            await starting
        await server.stop()
        log.info("event=stopped")


def _settle_memory() -> None:
    """What is loaded stays, and a step's outputs die young: the collector need not look often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)


async def _drain(server: Server, signals: "_Signals", timeout_s: float) -> None:
    """Let what runs finish, until the deadline or the second signal."""
    log.info("event=drain live=%d deadline_s=%g", len(server.dispatcher.ledger), timeout_s)
    draining = asyncio.create_task(server.drain(timeout_s))
    again = asyncio.create_task(signals.wait(2))
    await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, again):
        task.cancel()


class _Signals:
    """Counts SIGTERM and SIGINT, which must come on this event loop."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = asyncio.Event()
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        self._count += 1
        self._changed.set()

    async def wait(self, count: int) -> None:
        """Return once `count` signals have come."""
        while self._count < count:
            self._changed.clear()
            await self._changed.wait()

    async def first_or(self, task: asyncio.Task[None]) -> None:
        """Return once a signal has come or `task` is done."""
        first = asyncio.create_task(self.wait(1))
        await asyncio.wait([first, task], return_when=asyncio.FIRST_COMPLETED)
        first.cancel()


def run(config: ServeConfig, *, log_level: str = "info", spawn: Spawn = spawn) -> None:
    """`serve` on a loop of its own, logging to stderr."""
    logging.basicConfig(format=LOG_FORMAT, level=log_level.upper(), stream=sys.stderr)
    uvloop.run(serve(config, spawn))
