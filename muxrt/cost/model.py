"""Step times of any model on any mesh: a profile's where there is one, else the roofline's."""

from collections.abc import Mapping, Sequence

from muxrt.config.cluster import GpuKind
from muxrt.config.model import ModelShape
from muxrt.cost.calibrate import calibrate
from muxrt.cost.fitted import fit, fit_lanes
from muxrt.cost.profile import Profile
from muxrt.cost.roofline import Efficiency, Roofline
from muxrt.cost.steps import SharedSteps

_Arithmetic = tuple[int, int, int, int, int, int, int]


class CostModel:
    """Fits lazily and keeps what it fitted; `gpus` are the kinds that profiles speak of."""

    def __init__(
        self,
        profiles: Sequence[Profile] = (),
        gpus: Mapping[str, GpuKind] | None = None,
        efficiency: Efficiency | None = None,
    ) -> None:
        """`efficiency` is the roofline's; None takes it from the first profile, or the default."""
        self._profiles = tuple(profiles)
        self._gpus = dict(gpus or {})
        self._efficiency = efficiency
        self._kept: dict[tuple[_Arithmetic, int, str], SharedSteps] = {}
        self._tps: dict[tuple[_Arithmetic, str], frozenset[int]] = {}

    @property
    def efficiency(self) -> Efficiency:
        """What the roofline assumes of the engine."""
        if self._efficiency is None:
            known = [p for p in self._profiles if p.gpu in self._gpus and p.cells]
            self._efficiency = (
                calibrate(known[0], self._gpus[known[0].gpu]) if known else Efficiency()
            )
        return self._efficiency

    def steps(self, shape: ModelShape, tp: int, gpu: GpuKind) -> SharedSteps:
        """Times of a model of that shape on `tp` GPUs of one node."""
        key = (arithmetic(shape), tp, gpu.name)
        if key not in self._kept:
            self._kept[key] = self._find(shape, tp, gpu)
        return self._kept[key]

    def profiled_tps(self, shape: ModelShape, gpu: GpuKind) -> frozenset[int]:
        """On how many GPUs of that kind a model of that shape was measured."""
        key = (arithmetic(shape), gpu.name)
        if key not in self._tps:
            self._tps[key] = frozenset(
                tp
                for profile in self._profiles
                if profile.gpu == gpu.name
                for name, tp in profile.keys
                if arithmetic(profile.shapes[name]) == key[0]
            )
        return self._tps[key]

    def _find(self, shape: ModelShape, tp: int, gpu: GpuKind) -> SharedSteps:
        for profile in self._profiles:
            for name, profiled in profile.shapes.items():
                same = profile.gpu == gpu.name and arithmetic(profiled) == arithmetic(shape)
                if same and (name, tp) in profile.given:
                    return profile.given[name, tp]
                cells = profile.in_service(name, tp) if same else ()
                if cells:
                    made = fit_lanes if profile.is_cpu else fit
                    return made(cells, shape, profile.title, profile.granularity(name))
        return Roofline(shape, tp, gpu, self.efficiency)


def arithmetic(shape: ModelShape) -> _Arithmetic:
    """What the time of a step depends on."""
    return (
        shape.hidden_size,
        shape.num_layers,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.intermediate_size,
        shape.vocab_size,
    )
