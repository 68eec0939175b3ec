"""Which models of a unit are awake: their states, and who sleeps so that another may wake.

The weights of models that are awake share a budget of bytes, and each is entitled to the blocks of
one sequence of maximum length at least. A model that is wanted wakes as soon as both are there for
it. Until then the least recently used of those that are not pinned and have been awake for their
minimum residency make room; who runs sequences finishes them first. Wishes come true in the order
in which they came, so a large model is not passed by small ones for ever.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import inf


class State(Enum):
    """What a unit does with a model."""

    AWAKE = "awake"
    DRAINING = "draining"  # what runs finishes, then it falls asleep; nothing starts
    ASLEEP = "asleep"
    WAKING = "waking"  # its memory is reserved, its weights come


class Event(Enum):
    """What changes that."""

    EVICTED = "evicted"  # it was idle for too long, was told to, or another one needs its memory
    SLEPT = "slept"  # its memory is free
    RESERVED = "reserved"  # it is wanted, and there is memory for it
    LOADED = "loaded"
    FAILED = "failed"  # its weights did not come


NEXT = {
    (State.AWAKE, Event.EVICTED): State.DRAINING,
    (State.DRAINING, Event.SLEPT): State.ASLEEP,
    (State.ASLEEP, Event.RESERVED): State.WAKING,
    (State.WAKING, Event.LOADED): State.AWAKE,
    (State.WAKING, Event.FAILED): State.ASLEEP,
}


@dataclass(frozen=True, slots=True)
class Habits:
    """When a model may sleep, and for how long it is waited for."""

    num_bytes: int  # of its weights
    floor_blocks: int  # of one sequence of maximum length
    pin: bool = False  # always awake
    idle_timeout_s: float | None = None  # None = it sleeps only for others' sake
    min_residency_s: float = 0.0
    wake_timeout_s: float = inf


@dataclass(slots=True, eq=False)
class Resident:
    """A model of the unit and where it is. Times are of the unit's clock."""

    name: str
    habits: Habits
    state: State = State.ASLEEP
    since_s: float = -inf  # in that state; who was awake from the start has been so long enough
    used_s: float = 0.0  # a request of it came, or got something
    wanted_s: float | None = None  # since when it is to wake; while it sleeps

    def on(self, event: Event, now: float) -> None:
        """Go on to the next state. KeyError for what cannot happen."""
        self.state = NEXT[self.state, event]
        self.since_s = now
        if event in (Event.RESERVED, Event.FAILED):
            self.wanted_s = None

    def leave(self) -> None:
        """It falls asleep whenever it is idle, pinned or not."""
        self.habits = replace(self.habits, pin=False, idle_timeout_s=0.0, min_residency_s=0.0)

    @property
    def may_leave_s(self) -> float:
        """When it may be put to sleep for another one's sake; never if pinned or not awake."""
        if self.habits.pin or self.state is not State.AWAKE:
            return inf
        return self.since_s + self.habits.min_residency_s

    def sleeps_s(self) -> float:
        """When it has been idle for too long, if nothing comes."""
        timeout_s = self.habits.idle_timeout_s
        return inf if timeout_s is None else max(self.may_leave_s, self.used_s + timeout_s)


@dataclass(frozen=True, slots=True)
class Room:
    """What models hold, or may hold together."""

    num_bytes: int
    blocks: int

    @classmethod
    def of(cls, residents: Iterable[Resident]) -> "Room":
        """What these hold."""
        habits = [resident.habits for resident in residents]
        return cls(sum(h.num_bytes for h in habits), sum(h.floor_blocks for h in habits))

    def has(self, other: "Room") -> bool:
        """That much fits into it."""
        return other.num_bytes <= self.num_bytes and other.blocks <= self.blocks


class Residency:
    """The models of a unit by name, and what is to become of them. It moves nothing itself."""

    def __init__(self, residents: Sequence[Resident], room: Room) -> None:
        """`room`: bytes of weights, and blocks to be entitled to."""
        self.models = {resident.name: resident for resident in residents}
        self._room = room

    @property
    def holding(self) -> list[Resident]:
        """Those that have memory, or are getting it."""
        return [one for one in self.models.values() if one.state is not State.ASLEEP]

    @property
    def free_bytes(self) -> int:
        """Of the budget for weights."""
        return self._room.num_bytes - Room.of(self.holding).num_bytes

    @property
    def wanted(self) -> list[Resident]:
        """Those that are to wake and have no memory yet, the first wish first."""
        wanted = [one for one in self.models.values() if one.wanted_s is not None]
        return sorted(wanted, key=lambda one: (one.wanted_s, one.name))

    def want(self, name: str, now: float) -> None:
        """It is to wake as soon as it can. Of one that is draining: when it has slept."""
        resident = self.models[name]
        if resident.state in (State.ASLEEP, State.DRAINING) and resident.wanted_s is None:
            resident.wanted_s = now

    def decide(self, now: float, is_busy: Callable[[str], bool]) -> Iterator[Resident]:
        """Change states as far as it is time; those that did. `is_busy`: it has sequences."""
        for resident in self.models.values():
            if resident.sleeps_s() <= now and not is_busy(resident.name):
                resident.on(Event.EVICTED, now)
                yield resident
        waiting: list[Resident] = []  # for memory, the first wish first
        for resident in self.wanted:
            if resident.state is not State.ASLEEP:
                continue  # it has to fall asleep first
            if not waiting and self._room.has(Room.of([*self.holding, resident])):
                resident.on(Event.RESERVED, now)
                yield resident
                continue
            waiting.append(resident)
            # Room for all of them at once: who makes it may have to finish something first.
            yield from self._make_room(waiting, now, is_busy)

    def _make_room(
        self, waiting: Sequence[Resident], now: float, is_busy: Callable[[str], bool]
    ) -> Iterator[Resident]:
        """Evict as many as these take; nobody if that is not enough yet."""
        staying = [one for one in self.holding if one.state is not State.DRAINING]
        leaving = [one for one in staying if one.may_leave_s <= now]
        leaving.sort(key=lambda one: (is_busy(one.name), one.used_s, one.name))
        victims: list[Resident] = []
        while not self._room.has(Room.of([*staying, *waiting])):
            if not leaving:
                return
            victims.append(leaving.pop(0))
            staying.remove(victims[-1])
        for victim in victims:
            victim.on(Event.EVICTED, now)
            yield victim

    def next_s(self, now: float, is_busy: Callable[[str], bool]) -> float:
        """When `decide` may change something though nothing else happens; inf: never."""
        models = self.models.values()
        times = [one.sleeps_s() for one in models if not is_busy(one.name)]
        if self.wanted:
            times += [one.may_leave_s for one in models if one.may_leave_s > now]
        return min(times, default=inf)

    def check(self) -> bool:
        """Nobody holds more than there is. Costs time: for tests."""
        assert self._room.has(Room.of(self.holding)), "more is awake than fits"
        assert all(one.state is State.AWAKE for one in self.models.values() if one.habits.pin)
        return True
