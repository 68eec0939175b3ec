"""The lanes of one rank on a device; the other ranks have the same ones, on devices of their own.

What `worker/device_build.py` opens for a unit on one device, but that the ranks exchange in the
lanes' streams. A step is then an exchange: every rank must launch the same steps in the same order,
run or capture or replay them together, and drop the same graphs. So lanes keep their own part of
the device, whatever the others do, ranks agree on the sizes of graphs, and the works of all lanes
are launched in the order in which they were told: operations of two of NCCL's communicators that
two ranks launch in different orders may wait for each other (NCCL's user guide, "Using multiple
NCCL communicators concurrently").
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from threading import Condition, Event, Lock, Thread

import torch

from muxrt.core import Batch, Result, Work
from muxrt.engine.build import UnitPlan
from muxrt.errors import MuxrtError
from muxrt.models.device_llama import DeviceLlama
from muxrt.worker.collectives import MEET_S, GroupRanks, RankLost
from muxrt.worker.device_lanes import DeviceLane
from muxrt.worker.device_runner import DeviceCopier, DeviceResident, DeviceRunner
from muxrt.worker.device_storage import DeviceStorage
from muxrt.worker.device_streams import open_shares, open_steps, plain_share
from muxrt.worker.flight import Flight, Launch
from muxrt.worker.graphs import batch_bucket, context_bucket

log = logging.getLogger(__name__)

TICKS = 20  # in a timeout

Lose = Callable[[Exception], None]


def open_device_lanes(
    plan: UnitPlan,
    models: dict[str, DeviceLlama],
    lines: Sequence[GroupRanks],
    device: torch.device,
    lose: Lose,
    stack: ExitStack,
) -> list["TurnLane"]:
    """Reserve the rank's memory and start its lanes, the copy lane last; `models` is emptied.

    `plan` is the rank's; `lines` go to the other ranks, one for each lane; `lose` hears, on any
    thread, why the mesh is broken. Raises ConfigError where the device has too few SMs, MuxrtError
    where a lane cannot start.
    """
    storage = DeviceStorage(plan, device)
    stack.callback(storage.close)
    shares = open_shares(plan, device, stack)
    residents = {name: DeviceResident.of(models.pop(name), name, storage) for name in plan.models}
    timeout_s = plan.spec.mesh.timeout_s
    turns, overdue = Turns(), Overdue(timeout_s / TICKS, lose)
    stack.callback(overdue.close)

    def lane(number: int, name: str, make: Callable[[], Launch]) -> TurnLane:
        guard = Guard(number, lines[number], turns, overdue, timeout_s, lose)
        opened = TurnLane(name, lambda: guard.over(make()), device, turns, number)
        stack.callback(opened.close)
        return opened

    def runner(number: int) -> Callable[[], Launch]:
        def make() -> Launch:
            line, share = lines[number], shares.own(number)
            steps = open_steps(plan, device, line.most)
            return DeviceRunner(residents, steps, lambda: share, line).launch

        return make

    lanes = [lane(number, f"lane-{number}", runner(number)) for number in range(plan.num_lanes)]
    share = plain_share("copy", device, 0)
    copier = DeviceCopier(storage, plan.arena.block_bytes, share, lines[-1])
    lanes.append(lane(plan.num_lanes, "copy", lambda: copier.launch))
    for opened in lanes:
        opened.wait_started()
    return lanes


class Turns:
    """Lanes launch in the order in which their works were told, one at a time."""

    def __init__(self) -> None:
        self._told: deque[int] = deque()
        self._changed = Condition()

    def tell(self, lane: int) -> None:
        """A work of that lane comes behind all that were told before."""
        with self._changed:
            self._told.append(lane)

    @contextmanager
    def take(self, lane: int) -> Iterator[None]:
        """Wait for the turn of the lane's next work; it is over at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._told[0] == lane)
        try:
            yield
        finally:
            with self._changed:
                self._told.popleft()
                self._changed.notify_all()


class TurnLane(DeviceLane):
    """A lane whose works have turns among those of all lanes."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Launch],
        device: torch.device,
        turns: Turns,
        number: int,
    ) -> None:
        """What `make` makes takes the turns; see `DeviceLane`."""
        self._turns = turns
        super().__init__(name, make, device, number=number)

    def launch(self, work: Work) -> None:
        self._turns.tell(self._number)
        super().launch(work)


class Overdue:
    """Finds a lane whose work does not end: nobody times the exchanges that a graph replays.

    Its clock is counted by a thread, and stands still while the process does: who was stopped, or
    slept with the whole machine, judges nobody.
    """

    def __init__(self, tick_s: float, lose: Lose) -> None:
        self._tick_s = tick_s
        self._lose = lose
        self._left: dict[int, int] = {}  # ticks, by lane that waits for the end of a work
        self._num_new = 0  # works in flight that may compile
        self._lock = Lock()
        self._is_closed = Event()
        self._thread = Thread(target=self._live, name="overdue", daemon=True)
        self._thread.start()

    @contextmanager
    def within(self, lane: int, seconds: float) -> Iterator[None]:
        """What happens inside is lost if it takes longer."""
        with self._lock:
            self._left[lane] = math.ceil(seconds / self._tick_s)
        try:
            yield
        finally:
            with self._lock:
                del self._left[lane]

    @property
    def is_patient(self) -> bool:
        """A work is in flight for which ranks may take different times, and so all behind it."""
        with self._lock:
            return self._num_new > 0

    def new(self, change: int) -> None:
        """So many more such works are in flight."""
        with self._lock:
            self._num_new += change

    def close(self) -> None:
        """Look no more."""
        self._is_closed.set()
        self._thread.join()

    def _live(self) -> None:
        while not self._is_closed.wait(self._tick_s):
            with self._lock:
                self._left = {lane: left - 1 for lane, left in self._left.items()}
                late = [lane for lane, left in self._left.items() if left == 0]
            for lane in late:
                log.error("event=work_overdue lane=%d", lane)
                self._lose(RankLost(f"a work of lane {lane} does not end"))


class Guard:
    """How works of one lane are launched: in turn, with more patience for the first of a kind."""

    def __init__(
        self,
        number: int,
        line: GroupRanks,
        turns: Turns,
        overdue: Overdue,
        timeout_s: float,
        lose: Lose,
    ) -> None:
        self._number, self._line, self._turns = number, line, turns
        self._overdue, self._timeout_s, self._lose = overdue, timeout_s, lose
        self._known: set[tuple[str, int, int, int]] = set()

    def over(self, launch: Launch) -> Launch:
        """`launch`, whose failures break the mesh unless every rank has the same."""

        def in_turn(work: Work) -> Flight:
            is_new = self._is_new(work)
            patiently = self._line.patiently() if is_new else nullcontext()
            self._overdue.new(is_new)
            try:
                with self._turns.take(self._number), self._guarded(), patiently:
                    flight = launch(work)
            except BaseException:
                self.ended(is_new)
                raise
            seconds = MEET_S if self._overdue.is_patient else self._timeout_s
            return GuardedFlight(flight.span, flight.read, self, seconds, is_new)

        return in_turn

    def ended(self, is_new: bool) -> None:
        """A work is over."""
        self._overdue.new(-is_new)

    @contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        """For a work to end."""
        with self._overdue.within(self._number, seconds), self._guarded():
            yield

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except RankLost as error:
            self._lose(error)
            raise
        except MuxrtError:
            raise  # of the batch, found by the first rank after the last exchange
        except Exception as error:
            self._lose(error)
            raise

    def _is_new(self, work: Work) -> bool:
        """The first of its kind may compile kernels, for which ranks take different times."""
        kind = (work.model, 0, 0, 0)
        if isinstance(work, Batch):
            tokens = sum(entry.num_tokens for entry in work.entries)
            longest = max((e.start + e.num_tokens for e in work.entries), default=1)
            sizes = (batch_bucket(len(work.entries)), batch_bucket(tokens))
            kind = (work.model, *sizes, context_bucket(longest))
        is_new = kind not in self._known
        self._known.add(kind)
        return is_new


@dataclass(frozen=True, slots=True)
class GuardedFlight(Flight):
    """A work of a lane whose failures break the mesh."""

    guard: Guard
    patience_s: float
    is_new: bool

    def wait(self) -> Result:
        try:
            with self.guard.waiting(self.patience_s):
                return Flight.wait(self)
        finally:
            self.guard.ended(self.is_new)
