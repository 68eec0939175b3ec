"""`muxrt replan` in a process of its own, of the lowest priority, asked by the server."""

import asyncio
import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec

from muxrt.config.load import dump
from muxrt.config.placement import UnitSpec
from muxrt.config.replan import Replan
from muxrt.config.schema import seconds_of
from muxrt.config.serve import ServeConfig
from muxrt.engine.reconcile import Deployment
from muxrt.errors import ConfigError, MuxrtError
from muxrt.server.unit_process import environment

LOWEST = 19  # niceness: what serves goes first wherever both want a core
HOUR_S = 3600.0
# As `muxrt` ends what it refuses, and says why.
REFUSED, ERROR = (1, 2), "error: "
ADMIN_KEY = "MUXRT_ADMIN_KEY"  # that the command line reads


class Planned(msgspec.Struct, frozen=True):
    """What `muxrt replan --json` says, as far as it is needed here."""

    is_worth: bool
    reason: str
    goodput_rps: dict[str, float]  # before, after, offered: of the window, by the simulator
    placement: tuple[UnitSpec, ...]


class PlannerFailed(MuxrtError):
    """The planner crashed, took too long, or said what nobody understands."""


async def plan_anew(
    replan: Replan, log: Path, served: Deployment, hidden: frozenset[str] = frozenset()
) -> Planned:
    """Where what is served should live, by the traffic in `log`.

    The planner sees the environment without `hidden`, the variables that hold keys. Raises
    ConfigError with why the planner refuses, PlannerFailed where it came to no answer; when this
    returns or raises, the process and all that it started are gone.
    """
    with tempfile.TemporaryDirectory(prefix="muxrt-replan-") as folder:
        file = Path(folder) / "served.yaml"
        text = dump(ServeConfig(models=served.models, units=served.units))
        await asyncio.to_thread(file.write_text, text, encoding="utf-8")
        command, timeout_s = words(replan, log, file), seconds_of(replan.timeout)
        return _read(*await _run(command, timeout_s, _without(hidden)))


def words(replan: Replan, log: Path, file: Path) -> list[str]:
    """The command line."""
    options: dict[str, object] = {
        "traffic": log,
        "plan": replan.plan,
        "strategy": replan.strategy,
        "window": seconds_of(replan.window) / HOUR_S,
        "quantile": replan.quantile,
        "margin": replan.margin,
        "least-gain": replan.least_gain,
        "least-history": seconds_of(replan.least_history) / HOUR_S,
        "most-age": seconds_of(replan.most_age) / HOUR_S,
        "scenarios": replan.scenarios,
        "timezone": replan.timezone,
    }
    if replan.slo is not None:
        options |= {"ttft": replan.slo.ttft_s, "tpot": replan.slo.tpot_s}
    said = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "muxrt.cli.tied", "replan", str(file), *said, "--json"]


async def _run(
    command: list[str], timeout_s: float, environ: dict[str, str]
) -> tuple[int, bytes, bytes]:
    """Exit code, stdout and stderr. Raises PlannerFailed where it takes longer."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,  # open as long as the server lives
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environ,
            start_new_session=True,  # so that all that it starts can be ended with it
        )
    except OSError as error:
        raise PlannerFailed(f"no process for the planner: {error}") from None
    try:
        # It has hardly begun, and its threads and children get what it has.
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, process.pid, LOWEST)
        assert process.stdout is not None and process.stderr is not None
        async with asyncio.timeout(timeout_s):
            # Not `communicate`, which closes stdin.
            out, err = await asyncio.gather(process.stdout.read(), process.stderr.read())
            code = await process.wait()
    except TimeoutError:
        raise PlannerFailed(f"the planner took longer than {timeout_s:g} s") from None
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    return code, out, err


def _without(hidden: frozenset[str]) -> dict[str, str]:
    """The environment without keys: the planner changes nothing, and asks nobody."""
    environ = environment(os.environ)
    return {name: value for name, value in environ.items() if name not in hidden | {ADMIN_KEY}}


def _read(code: int, out: bytes, err: bytes) -> Planned:
    if code == 0:
        try:
            return msgspec.json.decode(out, type=Planned)
        except msgspec.MsgspecError as error:
            raise PlannerFailed(f"the planner's answer is none: {error}") from None
    lines = err.decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else ""
    if code in REFUSED and last.startswith(ERROR):
        raise ConfigError(last.removeprefix(ERROR))
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    raise PlannerFailed(f"the planner ended ({how}){': ' if last else ''}{last}")
