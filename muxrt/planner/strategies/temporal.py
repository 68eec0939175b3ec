"""MuxServe's placement with one lane: every step has the whole mesh, in turns (its baseline)."""

from muxrt.planner.draft import Draft, Group, Part
from muxrt.planner.search import Search
from muxrt.planner.strategies.muxserve import muxserve
from muxrt.planner.workload import Problem


def temporal(problem: Problem, search: Search) -> Draft:
    """`muxserve` without shares of SMs. Raises ConfigError."""
    return tuple(
        Group(group.pool, group.size, tuple(Part(p.model, p.traffic) for p in group.parts))
        for group in muxserve(problem, search)
    )
