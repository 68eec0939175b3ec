"""The ways to place models, by the names that people call them by."""

from muxrt.planner.search import Strategy
from muxrt.planner.strategies.auto import auto
from muxrt.planner.strategies.muxserve import muxserve
from muxrt.planner.strategies.spatial import spatial
from muxrt.planner.strategies.temporal import temporal

STRATEGIES: dict[str, Strategy] = {
    "auto": auto,
    "muxserve": muxserve,
    "spatial": spatial,
    "temporal": temporal,
}
