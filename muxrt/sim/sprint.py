"""The innermost loop of a folded run: one model on one busy lane.

With nothing beside it a step's time depends on its own batch only, and the next batch is known
before this one is done. What `MeshLanes`, `DecodeRun` and the policy would do is then a handful of
sums; they are the same sums in the same order.
"""

from muxrt.core import Sequence
from muxrt.cost.batch import BatchWork
from muxrt.cost.latency import BatchShape
from muxrt.engine.unit import Unit
from muxrt.sim.cohort import Cohort
from muxrt.sim.executor import Job, MeshLanes


def run_steps(
    unit: Unit,
    lanes: MeshLanes,
    cohorts: list[Cohort],
    jobs: list[Job],
    steps: int,
    until_s: float,
    has_grown: bool,
) -> bool:
    """Up to `steps` steps of all `cohorts` that end before `until_s`.

    `jobs` are those in flight, the running one first, its end cancelled; they are made to be those
    in flight afterwards. `has_grown`: blocks were taken since the last commit; returns the same.
    """
    first, memory = jobs[0], unit.scheduler.memory
    model, lane = first.runner.model, first.lane
    layout = unit.scheduler.queues[model].model.layout
    observe, cost = unit.scheduler.latency.observe, lanes.cost
    (share,) = cost.shares([first.runner])
    size = sum(len(cohort.sequences) for cohort in cohorts)
    contexts = [job.work.context for job in jobs]
    context, launched = contexts[0], contexts[-1]
    growth = _Growth(cohorts, layout.block_tokens)
    assert first.end is not None
    end_s, started_s, busy_s = first.end.at_s, first.started_s, lanes.busy_s.get(lane, 0.0)
    last_s, whole_s, done = 0.0, 0.0, 0
    depth = len(jobs)
    while done < steps and end_s < until_s:
        short = growth.at(done)
        if short and not memory._may_take(model, len(short) * layout.blocks_per_group):
            break
        last_s, elapsed_s = end_s, end_s - started_s
        busy_s += elapsed_s
        observe(model, BatchShape(size, context), elapsed_s)
        if has_grown:
            unit._note_peaks()
            has_grown = False
        for sequence in short:
            sequence.groups += memory._take(sequence, 1)
            has_grown = True
        done += 1
        launched += size
        context = launched - (depth - 1) * size
        started_s = last_s
        whole_s = cost.batch_s(model, BatchWork(0, 0, size, context), share, is_alone=True)
        end_s = last_s + whole_s
    if done:
        lanes.busy_s[lane] = busy_s
        lanes.num_batches += done
        unit.scheduler.counters[model].output_tokens += done * size
        _write(cohorts, done, last_s)
        for position, job in enumerate(jobs):
            job.work = BatchWork(0, 0, size, context + position * size)
        first.started_s = first.since_s = started_s
        first.left, first.whole_s = 1.0, whole_s
    lanes.ends(first, end_s)
    return has_grown


def _write(cohorts: list[Cohort], steps: int, last_s: float) -> None:
    for cohort in cohorts:
        cohort.commits += steps
        cohort.launches += steps
        cohort.context += steps * len(cohort.sequences)
        cohort.last_s = last_s


class _Growth:
    """Who needs a group at which launch from now on."""

    def __init__(self, cohorts: list[Cohort], block_tokens: int) -> None:
        self._cohorts = cohorts
        self._block_tokens = block_tokens

    def at(self, launch: int) -> list[Sequence]:
        """Sequences that need one at the launch of that number, 0 being the next."""
        cohort, *others = self._cohorts
        found = cohort.short(cohort.launches + launch, self._block_tokens)
        for cohort in others:
            found = found + cohort.short(cohort.launches + launch, self._block_tokens)
        return found
