"""What work costs on the lanes of one mesh, alone and beside other work.

Assumptions, each of which a measurement on GPUs may replace:

* `stream`: no partition. A batch alone has the whole mesh; batches beside each other get equal
  parts of its SMs.
* `green`: partitions made beforehand, of which work takes the next size at its next kernel. Alone a
  batch has the whole mesh, so what is left of it goes faster when a neighbour ends. Beside others a
  prefill has the lanes' first share, decodes divide the rest. A model's own `sm_pct` goes before.
* `mps`: a share is a limit that a process got at its start. A batch has no more than it even when
  it is alone; limits of more than 100 % in all are cut in proportion.
* `cores` and `processes` (CPU): a lane has its cores and no others, alone or not.
* Whatever runs beside other work is slower by the engine's `interference` on top, or that of its
  phase: memory bandwidth and caches are not partitioned.
* The engine's `control_s` per sequence and decode step and its `control_step_s` per step are time
  of the lane that no share shortens. On a CPU a free core hides them behind the work in flight;
  while every core is a busy lane's, they are spread over the lanes, whoever caused them.
* Copies between the arena and host memory (sim/copies.py) slow no batch down.
"""

from collections.abc import Sequence
from typing import NamedTuple

from muxrt.config.cluster import GpuKind
from muxrt.config.placement import UnitSpec
from muxrt.core import Batch, Phase
from muxrt.cost.batch import BatchWork, batch_s
from muxrt.cost.steps import SharedSteps, Steps
from muxrt.errors import ConfigError
from muxrt.sim.setting import Setting

LANES = {"gpu": ("green", "mps", "stream"), "cpu": ("cores", "processes")}


class Runner(NamedTuple):
    """A batch on a lane, as far as shares depend on it."""

    model: str
    phase: Phase
    lane: int = 0  # where lanes differ


class DecodePrice(NamedTuple):
    """Seconds of a decode step: `steps` times `slower`, and control."""

    steps: Steps
    slower: float
    control_step_s: float
    control_s: float  # for each sequence


class MeshCost:
    """Seconds of batches on one unit's mesh."""

    def __init__(self, spec: UnitSpec, setting: Setting) -> None:
        """Raises ConfigError for a mesh of a kind that nobody knows, or lanes that are not its."""
        gpus = setting.gpus
        kind, numbers = spec.mesh.kind, spec.mesh.gpus
        if kind is None or kind not in gpus or spec.mesh.device != gpus[kind].device or not numbers:
            raise ConfigError(
                f"{spec.name}: found a mesh of {kind or spec.mesh.device}, expected a list of gpus,"
                f" a kind and its device: {', '.join(sorted(gpus))}"
            )
        allowed = LANES[spec.mesh.device]
        if spec.lanes.kind not in allowed:
            raise ConfigError(
                f"{spec.name}: found lanes of kind {spec.lanes.kind}, expected {_either(allowed)}"
            )
        self._split = _split(spec, gpus[kind]) if spec.mesh.device == "cpu" else None
        self._cores = gpus[kind].sms
        self._kind = spec.lanes.kind
        self._own = {model.name: model.sm_pct for model in spec.models}
        self._lanes = spec.lanes.sm_pct or (100,)
        tp = len(numbers)
        self._steps: dict[str, SharedSteps] = {
            model.name: setting.cost.steps(setting.shapes[model.name], tp, gpus[kind])
            for model in spec.models
        }
        self._at: dict[tuple[str, float], Steps] = {}
        self._shares: dict[tuple[Runner, ...], list[float]] = {}
        self._engine = setting.engine
        self._control_s = {
            model.name: setting.control_s.get(model.name, setting.engine.control_s)
            for model in spec.models
        }
        self._control_step_s = setting.engine.control_step_s

    @property
    def can_fold(self) -> bool:
        """A batch takes as long on any lane, whatever batch of the same model runs beside it."""
        if self._split is None:
            return True
        has_control = any((self._control_step_s, *self._control_s.values()))
        return self._has_equal_lanes and not (has_control and self._is_covered(len(self._split)))

    @property
    def _has_equal_lanes(self) -> bool:
        return self._split is None or len(set(self._split)) == 1

    def _is_covered(self, num_busy: int) -> bool:
        """Busy lanes leave no core of a CPU for anything else."""
        split = self._split or ()
        return num_busy == len(split) and sum(split) == self._cores

    def runner(self, batch: Batch) -> Runner:
        """The batch, as far as shares depend on it."""
        return Runner(batch.model, batch.phase, 0 if self._has_equal_lanes else batch.lane)

    def together_s(self, runners: Sequence[Runner], works: Sequence[BatchWork]) -> list[float]:
        """Seconds of each of the batches that run now, if they all ran on like this."""
        is_alone = len(runners) == 1
        found = [
            self.batch_s(runner.model, work, share, is_alone)
            for runner, work, share in zip(runners, works, self.shares(runners), strict=True)
        ]
        if self._split is None or not self._is_covered(len(runners)):
            return found
        control = sum(
            self._batch_control_s(runner.model, work) / seconds
            for runner, work, seconds in zip(runners, works, found, strict=True)
        )
        return [seconds * (1 + control / len(found)) for seconds in found]

    def shares(self, runners: Sequence[Runner]) -> list[float]:
        """What each of the batches that run now has of the SMs, in (0, 1]."""
        key = tuple(runners)
        if key not in self._shares:
            self._shares[key] = self._deal(runners)
        return self._shares[key]

    def _deal(self, runners: Sequence[Runner]) -> list[float]:
        if self._split is not None:
            return [self._split[runner.lane] / self._cores for runner in runners]
        if self._kind == "mps":
            return _within_one([self._limit(runner) for runner in runners])
        if len(runners) == 1:
            return [1.0]
        if self._kind == "stream":
            return [1 / len(runners)] * len(runners)
        if all(self._own[runner.model] for runner in runners):
            return _within_one([self._limit(runner) for runner in runners])
        prefills = sum(runner.phase is not Phase.DECODE for runner in runners)
        if not 0 < prefills < len(runners):
            return [1 / len(runners)] * len(runners)
        part = self._lanes[0] / 100 / prefills
        rest = (1 - self._lanes[0] / 100) / (len(runners) - prefills)
        return [rest if runner.phase is Phase.DECODE else part for runner in runners]

    def _limit(self, runner: Runner) -> float:
        pcts = self._own[runner.model] or self._lanes
        return (pcts[-1] if runner.phase is Phase.DECODE else pcts[0]) / 100

    def batch_s(self, model: str, work: BatchWork, share: float, is_alone: bool) -> float:
        """Seconds from start to end of a batch that has `share` all the time.

        Without what control takes of a CPU's lanes: that depends on who runs beside it.
        """
        seconds = batch_s(self._steps_at(model, share), work)
        seconds *= self._slower(work.prefill_tokens > 0, is_alone)
        return seconds if self._split else seconds + self._batch_control_s(model, work)

    def _slower(self, is_prefill: bool, is_alone: bool) -> float:
        """How much longer a batch takes for what else the device does."""
        if is_alone:
            return 1.0
        engine = self._engine
        own = engine.prefill_interference if is_prefill else engine.decode_interference
        return 1 + (engine.interference if own is None else own)

    def _batch_control_s(self, model: str, work: BatchWork) -> float:
        return self._control_step_s * work.share + self._control_s[model] * work.decodes

    def _steps_at(self, model: str, share: float) -> Steps:
        steps = self._at.get((model, share))
        if steps is None:
            steps = self._at[model, share] = self._steps[model].at(share)
        return steps

    def decode_price(self, model: str, share: float, is_alone: bool) -> DecodePrice:
        """What `batch_s` makes of decode steps at that share."""
        slower = self._slower(is_prefill=False, is_alone=is_alone)
        steps = self._steps_at(model, share)
        if self._split is not None:  # no core is short of time for control, or nothing is folded
            return DecodePrice(steps, slower, 0.0, 0.0)
        return DecodePrice(steps, slower, self._control_step_s, self._control_s[model])


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _split(spec: UnitSpec, kind: GpuKind) -> tuple[int, ...]:
    """The cores of each lane of a CPU. Raises ConfigError for more than it has."""
    split = spec.lanes.split or ()
    if not split or sum(split) > kind.sms:
        raise ConfigError(
            f"{spec.name}: found lanes.split {list(split)}, expected cores of one lane or more,"
            f" {kind.sms} together at most"
        )
    return split


def _within_one(shares: list[float]) -> list[float]:
    total = sum(shares)
    return [share / total for share in shares] if total > 1 + 1e-9 else shares
