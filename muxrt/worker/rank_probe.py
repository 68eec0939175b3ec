"""Lanes of a mesh of cores for a probe: every pass is one of all ranks."""

from collections.abc import Callable, Mapping, Sequence

from muxrt.config.model import ModelShape
from muxrt.config.placement import Mesh, ModelSpec
from muxrt.config.shard import Shard
from muxrt.engine.build import UnitPlan
from muxrt.engine.ranks import rank_cores
from muxrt.models.llama import Llama
from muxrt.worker.load import load_model
from muxrt.worker.mesh import open_mesh
from muxrt.worker.probe import Opened


class OnRanks:
    """Lanes on sets of each rank's cores; sets may overlap as those of `OnCores`."""

    warm_runs = 1  # records programs of this size

    def __init__(
        self,
        models: Mapping[str, tuple[ModelSpec, ModelShape]],
        cores: Sequence[int],
        num_ranks: int,
        share: Callable[[Sequence[int]], Sequence[Sequence[int]]],
    ) -> None:
        """`share` cuts lanes out of a rank's cores; ranks load the models themselves."""
        self.mesh = Mesh(gpus=tuple(range(num_ranks)))
        self.num_lanes = len(share(rank_cores(cores, num_ranks)[0]))
        self._models = models
        self._cores = cores
        self._share = share

    def open(self, plan: UnitPlan) -> Opened:
        specs = [spec for spec, _ in self._models.values()]
        shapes = {name: shape for name, (_, shape) in self._models.items()}

        def load(shard: Shard) -> dict[str, Llama]:
            return {
                name: load_model("profile", spec, shape, lambda _: None, shard)
                for name, (spec, shape) in self._models.items()
            }

        def share(cores: Sequence[int], _: Sequence[int] | None) -> Sequence[Sequence[int]]:
            return self._share(cores)

        executor = open_mesh(plan, specs, shapes, self._cores, load, share=share)
        return Opened(executor, None)
