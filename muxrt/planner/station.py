"""The arithmetic of one unit under random arrivals, compiled: a search asks a million times.

`queueing.py` says what is modelled; here are its formulas, on plain arrays. A unit of n models is
`which` [n], the rows of `Times` that hold their step times, and `rates` [n], requests/s offered.
"""

from math import erf, exp, inf, log2, sqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from muxrt.cost.compiled import compiled

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PER_DOUBLING = 4
NUM_DOUBLINGS = 14
# Batches at which decodes are looked up, straight lines in between.
BATCHES = np.array(
    [0.0, *(2 ** (k / PER_DOUBLING) for k in range(PER_DOUBLING * NUM_DOUBLINGS + 1))]
)

# Columns of Times.prefill: one prefill of `SIZE` prompts, alone and while decodes run beside it,
# and what one token more costs in both cases.
SIZE, ALONE_S, BESIDE_S, TOKEN_ALONE_S, TOKEN_BESIDE_S = range(5)
# Columns of Times.facts.
TTFT_S, TPOT_S, OUTPUT, PROMPT_VARIANCE, SEQUENCE_BYTES, SQUARE_BYTES, NUM_SIZES = range(7)
# Columns of an answer, a row per model.
ADMITTED_RPS, ATTAINMENT, MEAN_TTFT_S, MEAN_TPOT_S, BATCH = range(5)

GOOD = 0.95  # attainment from which on nothing is refused
# Loads that are tried, each so much below the one before, then finer around the best.
STEP, PRECISION, LEAST_LOAD = 0.2, 0.02, 1e-4
MAX_ROUNDS, TOLERANCE = 40, 0.005
ALWAYS_THERE = 4.0  # decodes of this many sequences, on average, are as good as always there
HOPELESS = 3.0  # times the target: no use in finding out how late exactly


class Times(NamedTuple):
    """Step times and facts of models on meshes, a row for each."""

    prefill: Floats  # [rows, sizes, 5]
    alone_s: Floats  # [rows, BATCHES]: a decode step
    beside_s: Floats  # likewise on the decode lane, while something runs beside it
    aside_s: Floats  # likewise on the prefill lane
    facts: Floats  # [rows, 7]


class Peak(NamedTuple):
    """How a unit does at the load that serves most; `busy`: share of time in which it prefills."""

    goodput_rps: float
    load: float
    busy: float
    kv_bytes: float


class _Step(NamedTuple):
    """A decode step: what it adds to a round of all models, and how long it takes itself."""

    share_s: float
    own_s: float


class _Prefills(NamedTuple):
    """How prefills do: the share of time they take, the wait, rate x mean square of a prefill."""

    busy: float
    wait_s: float
    longest_s: float
    work_squared: float


@compiled
def _between(row: Floats, batch: float) -> float:
    """A row of a table of BATCHES at any batch."""
    low = 0 if batch < 1 else 1 + int(PER_DOUBLING * log2(batch))
    low = min(low, len(BATCHES) - 2)  # beyond the table: on with the slope of its end
    weight = (batch - BATCHES[low]) / (BATCHES[low + 1] - BATCHES[low])
    found: float = row[low] + weight * (row[low + 1] - row[low])
    return found


@compiled
def decode_s(times: Times, row: int, batch: float, beside: float, others: float) -> _Step:
    """One decode step of `batch` sequences.

    A prefill runs beside it for the share `beside` of the time. In the rest another model decodes
    too with probability `others`: two lanes then share the work, and each is slower.
    """
    own_s = _between(times.alone_s[row], batch)
    share_s = own_s
    if others > 0:
        decode_lane_s = _between(times.beside_s[row], batch)
        prefill_lane_s = _between(times.aside_s[row], batch)
        both_s = decode_lane_s * prefill_lane_s / (decode_lane_s + prefill_lane_s)
        share_s += others * (both_s - share_s)
        own_s += others * (min(decode_lane_s, prefill_lane_s) - own_s)
    if beside > 0:
        decode_lane_s = _between(times.beside_s[row], batch)
        share_s += beside * (decode_lane_s - share_s)
        own_s += beside * (decode_lane_s - own_s)
    return _Step(share_s, own_s)


@compiled
def _prefills_of(
    times: Times, which: Ints, rates: Floats, beside: float, size: int, own_s: Floats
) -> _Prefills:
    """Prefills in batches of the `size`-th size; `own_s` [n] becomes each model's time for one."""
    busy = work = longest_s = 0.0
    for model in range(len(which)):
        row = which[model]
        sizes = int(times.facts[row, NUM_SIZES])
        one = times.prefill[row, min(size, sizes - 1)]
        mean_s = one[ALONE_S] + beside * (one[BESIDE_S] - one[ALONE_S])
        token_s = one[TOKEN_ALONE_S] + beside * (one[TOKEN_BESIDE_S] - one[TOKEN_ALONE_S])
        square = mean_s**2 + token_s**2 * one[SIZE] * times.facts[row, PROMPT_VARIANCE]
        busy += rates[model] / one[SIZE] * mean_s
        work += rates[model] / one[SIZE] * square
        own_s[model] = mean_s
        longest_s = max(longest_s, mean_s)
    wait_s = work / 2 / (1 - busy) if busy < 1 else inf
    return _Prefills(busy, wait_s, longest_s, work)


@compiled
def _prefills(times: Times, which: Ints, rates: Floats, beside: float, own_s: Floats) -> _Prefills:
    """Prefills in batches of the size that makes the mean TTFT shortest."""
    most = 0
    for model in range(len(which)):
        most = max(most, int(times.facts[which[model], NUM_SIZES]))
    best = _prefills_of(times, which, rates, beside, 0, own_s)
    chosen = 0
    for size in range(1, most):
        found = _prefills_of(times, which, rates, beside, size, own_s)
        if found.wait_s + found.longest_s < best.wait_s + best.longest_s:
            best, chosen = found, size
        elif best.busy < 1:
            break
    return _prefills_of(times, which, rates, beside, chosen, own_s)


@compiled
def _rounds(
    times: Times, which: Ints, rates: Floats, is_split: bool, busy: float, tpots: Floats
) -> bool:
    """Time per token of each model into `tpots` [n]; False where sequences pile up.

    A fixed point: the more sequences run, the longer a round, the more sequences run. Aitken's
    delta squared speeds it up. Prefills take `busy` of the time: of the only lane, or of theirs.
    """
    n = len(which)
    left = 1.0 if is_split else 1 - busy
    beside = busy if is_split else 0.0
    before, older, least = np.empty(n), np.empty(n), np.empty(n)
    for model in range(n):
        before[model] = tpots[model] = 0.0
    for number in range(MAX_ROUNDS):
        running = 0.0
        for model in range(n):
            running += rates[model] * times.facts[which[model], OUTPUT] * tpots[model]
        total_s, late = 0.0, n
        for model in range(n):
            row = which[model]
            older[model], before[model] = before[model], tpots[model]
            batch = rates[model] * times.facts[row, OUTPUT] * tpots[model]
            there = 1 - exp(-batch)  # the probability that any of them runs
            others = 1 - exp(batch - running) if is_split else 0.0
            step = decode_s(times, row, batch / there if there > 1e-9 else 1.0, beside, others)
            total_s += there * step.share_s / left
            tpots[model] = (1 - there) * step.share_s / left
            least[model] = step.own_s / left
        settled = True
        for model in range(n):
            tpots[model] = max(tpots[model] + total_s, least[model])
            if number % 3 == 2:
                tpots[model] = _ahead(older[model], before[model], tpots[model])
            settled &= abs(before[model] - tpots[model]) <= TOLERANCE * tpots[model]
            late -= tpots[model] <= HOPELESS * times.facts[which[model], TPOT_S]
        if late == n:
            return False
        if settled and number % 3 < 2:
            break
    return True


@compiled
def _ahead(first: float, second: float, third: float) -> float:
    """Where a sequence that converges is going, not too boldly."""
    last, step = second - first, third - second
    ratio = step / last if last > 0 else 0.0
    return third + step * min(ratio / (1 - ratio), 10.0) if 0 < ratio < 1 else third


@compiled
def at_load(
    times: Times,
    which: Ints,
    offered: Floats,
    is_split: bool,
    capacity: float,
    load: float,
    answer: Floats,
) -> Peak:
    """How the unit does when it admits of each model at most `load` of the most popular one's rate.

    Models take turns, so the rare ones are served in full. `answer` [n, 5] becomes the models'.
    """
    n = len(which)
    rates, own_s, tpots = np.empty(n), np.empty(n), np.empty(n)
    most_rps = _most_rps(offered)
    for model in range(n):
        rates[model] = min(offered[model], load * most_rps)
    prefills = _prefills(times, which, rates, 1.0 if is_split else 0.0, own_s)
    for is_second in (False, True):
        if prefills.busy >= 1:
            return _nothing(answer, load)
        if not _rounds(times, which, rates, is_split, prefills.busy, tpots):
            return _nothing(answer, load)
        running = 0.0
        for model in range(n):
            batch = rates[model] * times.facts[which[model], OUTPUT] * tpots[model]
            answer[model, BATCH] = batch
            running += batch
        if is_second or not is_split or running >= ALWAYS_THERE:
            break
        # Often nothing is beside a prefill.
        prefills = _prefills(times, which, rates, 1 - exp(-running), own_s)
    return _score(times, which, rates, is_split, capacity, prefills, own_s, tpots, answer, load)


@compiled
def _nothing(answer: Floats, load: float) -> Peak:
    for model in range(len(answer)):
        answer[model, ADMITTED_RPS] = answer[model, ATTAINMENT] = answer[model, BATCH] = 0.0
        answer[model, MEAN_TTFT_S] = answer[model, MEAN_TPOT_S] = inf
    return Peak(0.0, load, 1.0, 0.0)


@compiled
def _score(
    times: Times,
    which: Ints,
    rates: Floats,
    is_split: bool,
    capacity: float,
    prefills: _Prefills,
    own_s: Floats,
    tpots: Floats,
    answer: Floats,
    load: float,
) -> Peak:
    """Attainment of each model from waits, rounds and memory."""
    left = 1.0 if is_split else 1 - prefills.busy
    beside = prefills.busy if is_split else 0.0
    used = squares = spread = longest_s = 0.0
    for model in range(len(which)):
        row, batch = which[model], answer[model, BATCH]
        used += times.facts[row, SEQUENCE_BYTES] * batch
        squares += times.facts[row, SQUARE_BYTES] * batch
        more = decode_s(times, row, batch + sqrt(batch), beside, 0.0)
        usual = decode_s(times, row, batch, beside, 0.0)
        spread += ((more.share_s - usual.share_s) / left) ** 2
        longest_s = max(longest_s, tpots[model])
    fit = _normal((capacity - used) / max(sqrt(squares), 1.0))
    longest_step_s = 0.0 if is_split else longest_s
    goodput = 0.0
    for model in range(len(which)):
        row, tpot_s = which[model], tpots[model]
        first_s = own_s[model] + longest_step_s / 2
        on_time = _below(times.facts[row, TTFT_S] - first_s, prefills)
        # A request lives about as long as its companions: half of their variance averages out.
        noise = spread / 2
        if not is_split:  # prefills come in between, more or fewer of them
            noise += prefills.work_squared * tpot_s / times.facts[row, OUTPUT] / (1 - prefills.busy)
        fast = _normal((times.facts[row, TPOT_S] - tpot_s) / max(sqrt(noise), 1e-6))
        answer[model, ADMITTED_RPS] = rates[model]
        answer[model, ATTAINMENT] = on_time * fast * fit
        answer[model, MEAN_TTFT_S] = prefills.wait_s + first_s
        answer[model, MEAN_TPOT_S] = tpot_s
        goodput += rates[model] * answer[model, ATTAINMENT]
    return Peak(goodput, load, prefills.busy, used)


@compiled
def _below(slack_s: float, prefills: _Prefills) -> float:
    """The probability that the wait is within `slack_s`."""
    if slack_s < 0:
        return 0.0
    if prefills.wait_s <= 0:
        return 1.0
    return 1 - prefills.busy * exp(-slack_s * prefills.busy / prefills.wait_s)


@compiled
def _normal(deviations: float) -> float:
    """The standard normal distribution function."""
    return (1 + erf(deviations / sqrt(2))) / 2


@compiled
def _most_rps(offered: Floats) -> float:
    most_rps = 0.0
    for model in range(len(offered)):
        most_rps = max(most_rps, offered[model])
    return most_rps


@compiled
def best_load(
    times: Times,
    which: Ints,
    offered: Floats,
    is_split: bool,
    capacity: float,
    precision: float,
    answer: Floats,
) -> Peak:
    """Admit what serves most of the traffic, found to that relative precision; refuse the rest."""
    best = at_load(times, which, offered, is_split, capacity, 1.0, answer)
    attainment = 1.0
    for model in range(len(which)):
        attainment = min(attainment, answer[model, ATTAINMENT])
    if attainment >= GOOD:
        return best
    most_rps, load = _most_rps(offered), 1.0
    while load > LEAST_LOAD:
        load *= 1 - STEP
        admitted_rps = 0.0
        for model in range(len(which)):
            admitted_rps += min(offered[model], load * most_rps)
        if best.goodput_rps >= admitted_rps:
            break  # less traffic than what is already served well
        found = at_load(times, which, offered, is_split, capacity, load, answer)
        if found.goodput_rps > best.goodput_rps:
            best = found
    step, tries = STEP / 2, 0
    while abs(step) > precision / 2:
        load = best.load * (1 + step)
        if load <= 1:
            found = at_load(times, which, offered, is_split, capacity, load, answer)
            if found.goodput_rps > best.goodput_rps:
                best, tries = found, 1
        step, tries = -step, tries + 1
        if tries == 2:
            step, tries = step / 2, 0
    return at_load(times, which, offered, is_split, capacity, best.load, answer)


@compiled
def goodputs(
    times: Times,
    which: Ints,
    splits: Ints,
    offered: Floats,
    capacity: float,
    multiples: Floats,
    found: Floats,
) -> None:
    """`found` [lanes, multiples]: goodput with each choice of lanes at each multiple of the rates.

    `which` [lanes, n] has the rows of each choice, `splits` [lanes] whether it has two lanes.
    """
    n = which.shape[1]
    answer, rows, rates = np.empty((n, 5)), np.empty(n, np.int64), np.empty(n)
    for lanes in range(len(which)):
        for column in range(len(multiples)):
            for model in range(n):
                rows[model] = which[lanes, model]
                rates[model] = offered[model] * multiples[column]
            # What may come some day need not be known as precisely as what comes now.
            precision = PRECISION if column == 0 else 2 * STEP
            peak = best_load(times, rows, rates, splits[lanes] > 0, capacity, precision, answer)
            found[lanes, column] = peak.goodput_rps
