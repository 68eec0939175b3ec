"""The innermost loop of a folded run, compiled: decode steps of a few cohorts on a few lanes.

What `MeshLanes`, the scheduler and a policy whose models take turns do with sequences, batches and
events is done here with integers, in the same order and with the same sums, so that every time
comes out the same to the last bit. What cannot be decided here ends the run: the brain does it.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from muxrt.cost.compiled import compiled_bare, inlined

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MOST_COHORTS = 62  # the bits of a mask
LOG_STEPS = 4096  # batches until the observations must be taken away

# Why `advance` returns.
HORIZON, BRAIN, LOG_IS_FULL, NO_PRICES, NO_PRICE = range(5)

# Columns of State.cohorts: the model, the lane of what is in flight, how many works that is,
# sequences, tokens that they have scheduled together, launches and commits since the run began,
# and the commit that ends the first of them.
MODEL, LANE, IN_FLIGHT, SIZE, CONTEXT, LAUNCHES, COMMITS, ENDS_AFTER, COHORT_COLUMNS = range(9)
# Columns of State.jobs: the model, the cohorts as bits, sequences and tokens of them all.
JOB_MODEL, JOB_COHORTS, JOB_SIZE, JOB_CONTEXT, JOB_COLUMNS = range(5)
# Columns of State.lanes: jobs on it, and the number of the event that ends the first.
LOAD, EVENT, LANE_COLUMNS = range(3)
# Columns of State.times, as `Job` has them, and how long the lane was busy.
STARTED_S, SINCE_S, LEFT, WHOLE_S, END_S, BUSY_S, TIME_COLUMNS = range(7)
# Columns of State.models.
GROUP_BLOCKS, BLOCK_TOKENS, USED, QUOTA, PEAK, KEPT_WHOLE, MOST_GROWTH, TOKENS, MODEL_COLUMNS = (
    range(9)
)
# Places in State.unit.
NUM_COHORTS, NUM_MODELS, NUM_RUNNING, AVAILABLE, MAY_BORROW, HAS_GROWN, MOST_LAUNCHES = range(7)
NUM_ASKED, FIRST_ASKED, TURNS, EVENTS, BATCHES, NUM_LOGGED, WANTED, WANTED_SIZE = range(7, 15)
UNIT_PLACES = 15
# Columns of State.log: what was committed, for the latency estimates.
LOG_MODEL, LOG_SIZE, LOG_CONTEXT, LOG_COLUMNS = range(4)
# Columns of Prices.factors.
SLOWER, CONTROL_STEP_S, CONTROL_S, SLOPE, FACTOR_COLUMNS = range(5)

# Places in State.clock.
NOW_S, NEXT_END_S = range(2)

UNKNOWN_END_S = -1.0


class State(NamedTuple):
    """A run between two calls of `advance`."""

    cohorts: Ints  # [MOST_COHORTS, COHORT_COLUMNS]
    growing: Ints  # [MOST_COHORTS, block_tokens + 1]: sequences, by room when the run began
    last_s: Floats  # [MOST_COHORTS]: of the last commit
    jobs: Ints  # [lanes, depth, JOB_COLUMNS], what runs before what waits
    lanes: Ints  # [lanes, LANE_COLUMNS]
    times: Floats  # [lanes, TIME_COLUMNS]
    running: Ints  # [lanes]: lanes with a job, in order of its start
    models: Ints  # [models, MODEL_COLUMNS]
    asked: Ints  # [models]: those with cohorts, in the order in which they are asked
    unit: Ints  # [UNIT_PLACES]
    log: Ints  # [LOG_STEPS, LOG_COLUMNS]
    log_s: Floats  # [LOG_STEPS]: how long each took
    clock: Floats  # [2]: now, and when the next batch ends


class Prices(NamedTuple):
    """What steps cost, as far as it was asked: see `sim/prices.py`."""

    beside: Ints  # [keys, lanes]: rows of prices by the models that run, -1 = not known yet
    by_size: Floats  # [prices, sequences + 1], NaN = not known yet
    factors: Floats  # [prices, FACTOR_COLUMNS]
    curves: Ints  # [prices, 2]: where the curve over the context begins and ends
    knots: Floats  # [points] of all curves
    values: Floats  # likewise


@compiled_bare
def advance(state: State, prices: Prices, until_s: float) -> int:
    """Do what happens before `until_s`; the reason why there is no more of it.

    HORIZON: the next step ends then or later. BRAIN: the next step to end is not for here. The
    others ask for something and to be called again.
    """
    while True:
        asked = _deal(state, prices)
        if asked >= 0:
            return asked
        lane = _next_lane(state)
        now = state.times[lane, END_S]
        if now >= until_s:
            state.clock[NEXT_END_S] = now
            return HORIZON
        if _is_last(state, lane) or not _has_room(state):
            return BRAIN
        if state.unit[NUM_LOGGED] == len(state.log):
            return LOG_IS_FULL
        state.clock[NOW_S] = now
        _commit(state, lane, now)
        _pump(state, now)


@inlined
def _next_lane(state: State) -> int:
    """Whose batch ends first; of several the one that was known first."""
    found = int(state.running[0])
    for position in range(1, state.unit[NUM_RUNNING]):
        lane = state.running[position]
        end_s, first_s = state.times[lane, END_S], state.times[found, END_S]
        if end_s < first_s or (
            end_s == first_s and state.lanes[lane, EVENT] < state.lanes[found, EVENT]
        ):
            found = int(lane)
    return found


@inlined
def _is_last(state: State, lane: int) -> bool:
    """The next commit on the lane ends a sequence."""
    mask = state.jobs[lane, 0, JOB_COHORTS]
    for index in range(state.unit[NUM_COHORTS]):
        commits = state.cohorts[index, COMMITS] + 1
        if mask >> index & 1 and commits >= state.cohorts[index, ENDS_AFTER]:
            return True
    return False


@inlined
def _has_room(state: State) -> bool:
    """Whatever is launched after the next commit gets its blocks, and is within the limits.

    Each cohort is launched `depth` times at most, as all of its works are on one lane.
    """
    unit, depth = state.unit, state.jobs.shape[1]
    for index in range(unit[NUM_COHORTS]):
        if state.cohorts[index, LAUNCHES] + depth > unit[MOST_LAUNCHES]:
            return False
    needed = 0
    for index in range(unit[NUM_MODELS]):
        most = depth * state.models[index, MOST_GROWTH]
        needed += most
        if not unit[MAY_BORROW] and state.models[index, USED] + most > state.models[index, QUOTA]:
            return False
    return bool(needed <= unit[AVAILABLE])


@inlined
def _commit(state: State, lane: int, now: float) -> None:
    """The batch that runs on the lane ends; the next one begins."""
    unit, times = state.unit, state.times
    model, cohorts = state.jobs[lane, 0, JOB_MODEL], state.jobs[lane, 0, JOB_COHORTS]
    size = state.jobs[lane, 0, JOB_SIZE]
    elapsed_s = now - times[lane, STARTED_S]
    times[lane, BUSY_S] += elapsed_s
    unit[BATCHES] += 1
    line = unit[NUM_LOGGED]
    unit[NUM_LOGGED] = line + 1
    state.log[line, LOG_MODEL] = model
    state.log[line, LOG_SIZE] = size
    state.log[line, LOG_CONTEXT] = state.jobs[lane, 0, JOB_CONTEXT]
    state.log_s[line] = elapsed_s
    for index in range(unit[NUM_COHORTS]):
        if cohorts >> index & 1:
            state.cohorts[index, COMMITS] += 1
            state.cohorts[index, IN_FLIGHT] -= 1
            state.last_s[index] = now
    state.models[model, TOKENS] += size
    if unit[HAS_GROWN]:
        for other in range(unit[NUM_MODELS]):
            state.models[other, PEAK] = state.models[other, USED]
        unit[HAS_GROWN] = 0
    _leave(state, lane, now)


@inlined
def _leave(state: State, lane: int, now: float) -> None:
    """The lane's first job is gone: those behind it move up."""
    unit, running, jobs = state.unit, state.running, state.jobs
    load = state.lanes[lane, LOAD] - 1
    state.lanes[lane, LOAD] = load
    position = 0
    while running[position] != lane:
        position += 1
    last = unit[NUM_RUNNING] - 1
    for after in range(position, last):
        running[after] = running[after + 1]
    unit[NUM_RUNNING] = last
    for place in range(load):
        for column in range(JOB_COLUMNS):
            jobs[lane, place, column] = jobs[lane, place + 1, column]
    if load:
        _start(state, lane, now)


@inlined
def _start(state: State, lane: int, now: float) -> None:
    """The lane's first job begins; `_deal` finds out when it ends."""
    state.running[state.unit[NUM_RUNNING]] = lane
    state.unit[NUM_RUNNING] += 1
    state.times[lane, STARTED_S] = now
    state.times[lane, LEFT] = 1.0
    state.times[lane, END_S] = UNKNOWN_END_S


@inlined
def _pump(state: State, now: float) -> None:
    """Launch whatever fits, on the emptiest lane first, models in turn."""
    has_launched = True
    while has_launched:
        has_launched = False
        for load in range(state.jobs.shape[1]):
            for lane in range(len(state.lanes)):
                if state.lanes[lane, LOAD] == load and _launch_next(state, lane, now):
                    has_launched = True
                    break
            if has_launched:
                break


@inlined
def _launch_next(state: State, lane: int, now: float) -> bool:
    """A step of the first model in turn that may run on the lane."""
    unit = state.unit
    first, num_asked = unit[FIRST_ASKED], unit[NUM_ASKED]
    for turn in range(num_asked):
        place = (first + turn) % num_asked
        model = state.asked[place]
        cohorts = _ready(state, model, lane)
        if cohorts:
            _launch(state, model, cohorts, lane, now)
            if unit[TURNS]:
                unit[FIRST_ASKED] = (place + 1) % num_asked
            return True
    return False


@inlined
def _ready(state: State, model: int, lane: int) -> int:
    """The model's cohorts that may run on the lane, as bits."""
    found = 0
    is_whole = state.models[model, KEPT_WHOLE]
    for index in range(state.unit[NUM_COHORTS]):
        if state.cohorts[index, MODEL] != model:
            continue
        if not state.cohorts[index, IN_FLIGHT] or state.cohorts[index, LANE] == lane:
            found |= 1 << index
        elif is_whole:
            return 0
    return found


@inlined
def _launch(state: State, model: int, cohorts: int, lane: int, now: float) -> None:
    """A decode step of the cohorts, with the blocks that it needs."""
    block_tokens = state.models[model, BLOCK_TOKENS]
    size, context, short = 0, 0, 0
    for index in range(state.unit[NUM_COHORTS]):
        if not cohorts >> index & 1:
            continue
        launches, sequences = state.cohorts[index, LAUNCHES], state.cohorts[index, SIZE]
        at = launches % block_tokens
        short += state.growing[index, at]
        if launches and not at:
            short += state.growing[index, block_tokens]
        state.cohorts[index, CONTEXT] += sequences
        state.cohorts[index, LAUNCHES] = launches + 1
        state.cohorts[index, IN_FLIGHT] += 1
        state.cohorts[index, LANE] = lane
        size += sequences
        context += state.cohorts[index, CONTEXT]
    if short:
        blocks = short * state.models[model, GROUP_BLOCKS]
        state.models[model, USED] += blocks
        state.unit[AVAILABLE] -= blocks
        state.unit[HAS_GROWN] = 1
    load = state.lanes[lane, LOAD]
    state.jobs[lane, load, JOB_MODEL] = model
    state.jobs[lane, load, JOB_COHORTS] = cohorts
    state.jobs[lane, load, JOB_SIZE] = size
    state.jobs[lane, load, JOB_CONTEXT] = context
    state.lanes[lane, LOAD] = load + 1
    if not load:
        _start(state, lane, now)


@inlined
def _deal(state: State, prices: Prices) -> int:
    """Give every running batch its share; -1, or what must be found out first.

    Asked again it does nothing twice: who has what it should have is left alone.
    """
    unit, times, now = state.unit, state.times, state.clock[NOW_S]
    num_running, key = unit[NUM_RUNNING], 0
    for position in range(num_running - 1, -1, -1):
        lane = state.running[position]
        key = key * (unit[NUM_MODELS] + 1) + state.jobs[lane, 0, JOB_MODEL] + 1
    for position in range(num_running):
        lane = state.running[position]
        price = prices.beside[key, position]
        if price < 0:
            unit[WANTED] = key
            return NO_PRICES
        size = state.jobs[lane, 0, JOB_SIZE]
        by_size = prices.by_size[price, size]
        if np.isnan(by_size):
            unit[WANTED], unit[WANTED_SIZE] = price, size
            return NO_PRICE
        whole_s = by_size + _by_context(prices, price, state.jobs[lane, 0, JOB_CONTEXT])
        control_s = prices.factors[price, CONTROL_S] * size
        whole_s *= prices.factors[price, SLOWER]
        whole_s += prices.factors[price, CONTROL_STEP_S] + control_s
        if times[lane, END_S] != UNKNOWN_END_S:
            if whole_s == times[lane, WHOLE_S]:
                continue
            gone = (now - times[lane, SINCE_S]) / times[lane, WHOLE_S]
            times[lane, LEFT] = max(0.0, times[lane, LEFT] - gone)
        times[lane, SINCE_S], times[lane, WHOLE_S] = now, whole_s
        times[lane, END_S] = now + times[lane, LEFT] * whole_s
        state.lanes[lane, EVENT] = unit[EVENTS]
        unit[EVENTS] += 1
    return -1


@inlined
def _by_context(prices: Prices, price: int, context: int) -> float:
    """A `Curve` of monotone.py at `context`, with its sums."""
    begin, end = prices.curves[price, 0], prices.curves[price, 1]
    knots, values = prices.knots, prices.values
    low, high = begin, end
    while low < high:
        middle = (low + high) // 2
        if context < knots[middle]:
            high = middle
        else:
            low = middle + 1
    if low == begin:
        return float(values[begin])
    base, knot = values[low - 1], knots[low - 1]
    if low == end:
        return float(base + prices.factors[price, SLOPE] * (context - knot))
    return float(base + (values[low] - base) * (context - knot) / (knots[low] - knot))
