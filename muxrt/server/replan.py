"""A server that replans itself: when that is due, one at a time, and what became of it.

The planner is a process of its own (server/planner_process.py); here is what is done with its
answer. Nothing changes unless it says that a change is worth it, and then by the road of
`POST /admin/placement`.
"""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, tzinfo
from enum import Enum
from pathlib import Path
from time import time
from typing import Any

import msgspec

from muxrt.config.replan import Replan
from muxrt.engine.reconcile import Deployment
from muxrt.errors import BadRequest, ConfigError, Conflict, MuxrtError
from muxrt.server.deploy import Deployer
from muxrt.server.planner_process import Planned, plan_anew
from muxrt.server.schedule import next_time

log = logging.getLogger(__name__)

# In the folder of the traffic log: what was decided last, and what was to come next.
STATE = "replan.json"
# The clock is looked at so often, as it may be set, and stands still for who sleeps with the lid.
LOOK_S = 30.0
LATE_S = 300.0  # what is due for longer was missed


class Outcome(Enum):
    """How a replan ended."""

    KEPT = "kept"  # no change is worth it
    APPLIED = "applied"
    REFUSED = "refused"  # the log says too little, or the change cannot be made here
    FAILED = "failed"  # the planner or the change broke; the old placement serves


class Decision(msgspec.Struct, frozen=True):
    """One replan. Times are seconds since 1970."""

    outcome: Outcome
    reason: str
    begun_s: float
    took_s: float
    is_asked: bool  # by an operator, not by the schedule
    goodput_rps: dict[str, float] = {}  # before, after, offered; empty: it did not come to that


class _State(msgspec.Struct, frozen=True):
    """What outlasts the server."""

    next_s: float
    last: Decision | None


class Replanner:
    """`start` once the units answer, `stop` once; all on the event loop."""

    def __init__(
        self,
        replan: Replan,
        traffic: Path,
        deployer: Deployer,
        clock: Callable[[], float] = time,
        hidden: frozenset[str] = frozenset(),
    ) -> None:
        """`traffic` is the folder of the log; `clock` is in seconds since 1970.

        `hidden` are variables of the environment that the planner must not see.
        """
        self.replan = replan
        self.next_s = next_time(replan, clock())
        self.last: Decision | None = None
        self.begun_s: float | None = None  # of the one that goes on
        self.counts: Counter[Outcome] = Counter()
        self.num_missed = 0
        self._traffic = traffic
        self._deployer = deployer
        self._clock = clock
        self._hidden = hidden
        self._tasks: list[asyncio.Task[None]] = []  # the schedule, and the one that goes on
        self._is_over = False

    async def start(self) -> None:
        """Keep the schedule from now on; says what was missed while nobody served."""
        known = await asyncio.to_thread(_read_state, self._traffic / STATE)
        if known is not None:
            self.last = known.last
            if known.next_s <= self._clock():
                self._miss(known.next_s, "the server was down")
        self.next_s = next_time(self.replan, self._clock())
        await self._write()
        log.info("event=replan_scheduled next=%s", self._words(self.next_s))
        self._tasks.append(asyncio.create_task(self._keep()))

    def ask(self) -> None:
        """Begin one now. Raises Conflict while one goes on."""
        if self.begun_s is not None:
            raise Conflict("a replan goes on: see GET /admin/replan")
        if self._is_over or not self._tasks:
            raise Conflict("the server is starting or stopping: there is nothing to replan")
        self._begin(is_asked=True)

    async def stop(self) -> None:
        """End what goes on; a change that was begun is the deployer's to end."""
        self._is_over = True
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def as_data(self) -> dict[str, Any]:
        """What GET /admin/replan says; times on the schedule's own clock."""
        replan, zone, last = self.replan, self.replan.zone, self.last
        return {
            "every": replan.every,
            "at": replan.at,
            "timezone": replan.timezone,
            "next": _point(self.next_s, zone),
            "missed": self.num_missed,
            "running_since": None if self.begun_s is None else _point(self.begun_s, zone),
            "last": last
            and {
                "outcome": last.outcome,
                "reason": last.reason,
                "begun": _point(last.begun_s, zone),
                "took_s": last.took_s,
                "asked_by": "operator" if last.is_asked else "schedule",
                "goodput_rps": last.goodput_rps or None,
            },
        }

    # -- the schedule ------------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            while (left_s := self.next_s - self._clock()) > 0:
                await asyncio.sleep(min(left_s, LOOK_S))
                # A clock that was set back: nobody waits for what it said before.
                self.next_s = min(self.next_s, next_time(self.replan, self._clock()))
            due_s, now_s = self.next_s, self._clock()
            self.next_s = next_time(self.replan, now_s)
            if self.begun_s is None and now_s - due_s <= LATE_S:
                self._begin(is_asked=False)
                continue
            goes_on = self.begun_s is not None
            why = "the one before goes on" if goes_on else "the clock was set, or stood still"
            self._miss(due_s, why)
            await self._write()

    def _miss(self, due_s: float, why: str) -> None:
        """Not caught up: traffic of the night is planned for at night."""
        self.num_missed += 1
        log.warning("event=replan_missed due=%s why=%r", self._words(due_s), why)

    # -- one replan --------------------------------------------------------------------------

    def _begin(self, *, is_asked: bool) -> None:
        self.begun_s = self._clock()
        log.info("event=replan_begun asked_by=%s", "operator" if is_asked else "schedule")
        self._tasks[1:] = [asyncio.create_task(self._run(self.begun_s, is_asked))]

    async def _run(self, begun_s: float, is_asked: bool) -> None:
        before, planned = self._deployer.deployment, None
        try:
            planned = await plan_anew(self.replan, self._traffic, before, self._hidden)
            outcome, reason = await self._carry_out(before, planned), planned.reason
        except (ConfigError, BadRequest, Conflict) as error:
            outcome, reason = Outcome.REFUSED, error.message
        except MuxrtError as error:
            outcome, reason = Outcome.FAILED, error.message
        except Exception as error:
            log.exception("event=bug")
            outcome, reason = Outcome.FAILED, f"{type(error).__name__}: {error}"
        finally:
            self.begun_s = None
        took_s = round(self._clock() - begun_s, 3)
        goodput_rps = {} if planned is None else planned.goodput_rps
        self.last = Decision(outcome, reason, begun_s, took_s, is_asked, goodput_rps)
        self.counts[outcome] += 1
        is_well = outcome in (Outcome.KEPT, Outcome.APPLIED)
        log.log(
            logging.INFO if is_well else logging.WARNING,
            "event=replan_done outcome=%s took_s=%.1f next=%s reason=%r",
            outcome.value,
            took_s,
            self._words(self.next_s),
            reason,
        )
        await self._write()

    async def _carry_out(self, before: Deployment, planned: Planned) -> Outcome:
        """Apply what was planned where that is worth it. Raises what `Deployer.apply` does."""
        if not planned.is_worth:
            return Outcome.KEPT
        if self._deployer.deployment is not before:
            raise Conflict("the placement was changed while another one was planned: it stays")
        await self._deployer.apply(Deployment(before.models, planned.placement))
        return Outcome.APPLIED

    # -- what outlasts the server --------------------------------------------------------------

    async def _write(self) -> None:
        state, path = _State(self.next_s, self.last), self._traffic / STATE
        try:
            await asyncio.to_thread(_write_state, path, state)
        except OSError as error:
            log.warning("event=replan_unwritten path=%s error=%r", path, str(error))

    def _words(self, at_s: float) -> str:
        return _point(at_s, self.replan.zone).isoformat(timespec="seconds")


def _point(at_s: float, zone: tzinfo = UTC) -> datetime:
    return datetime.fromtimestamp(round(at_s), zone)


def _read_state(path: Path) -> _State | None:
    """None where there is none that can be read: nothing was missed, as far as anybody knows."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_State)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("event=replan_unread path=%s error=%r", path, str(error))
        return None


def _write_state(path: Path, state: _State) -> None:
    """Whole or not at all."""
    new = path.with_suffix(".new")
    new.write_bytes(msgspec.json.encode(state))
    os.replace(new, path)
