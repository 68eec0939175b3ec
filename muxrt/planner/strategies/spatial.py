"""Every model on GPUs of its own: what people do without multiplexing (MuxServe's baseline).

MuxServe's runs gave 7B and 13B one GPU each, 30B four and 65B eight. Here each model gets the
smallest mesh that holds it, and GPUs that are left go where a wider mesh helps most.
"""

from muxrt.errors import ConfigError
from muxrt.planner.draft import Draft, Group, Part, num_gpus, packs
from muxrt.planner.meshes import smallest_mesh
from muxrt.planner.search import Search
from muxrt.planner.workload import Problem


def spatial(problem: Problem, search: Search) -> Draft:
    """One group per model. Raises ConfigError where there are too few GPUs."""
    draft = _smallest(problem)
    total = problem.num_gpus
    while not search.is_over():
        search.tell("spatial: GPUs", num_gpus(draft), total)
        wider = _widest_gain(problem, search, draft)
        if wider is None:
            break
        draft = wider
    return draft


def _smallest(problem: Problem) -> Draft:
    """The smallest mesh of each model, in the first pool that still has room for it."""
    needs = {model: smallest_mesh(problem, model)[1] for model in problem.demands}
    draft: Draft = ()
    for model in sorted(needs, key=lambda name: (-needs[name], name)):
        placed = None
        for pool in problem.pools:
            for tp in problem.tps(model, pool.index):
                group = Group(pool.index, tp, (Part(model),))
                if not problem.fits(pool.index, tp, (model,)):
                    continue
                if packs((*draft, group), problem.pools):
                    placed = group if placed is None or tp < placed.size else placed
                break  # the smallest that fits this pool
        if placed is None:
            raise ConfigError(
                f"found {problem.num_gpus} GPUs, expected at least {sum(needs.values())} in whole"
                f" meshes for {len(needs)} models on GPUs of their own ({model} finds none):"
                " strategies muxserve and auto let models share GPUs"
            )
        draft = (*draft, placed)
    return draft


def _widest_gain(problem: Problem, search: Search, draft: Draft) -> Draft | None:
    """The draft with one mesh at its next degree, where goodput per added GPU grows most."""
    best: tuple[float, Draft] | None = None
    for index, group in enumerate(draft):
        model = group.parts[0].model
        degrees = [tp for tp in problem.tps(model, group.pool) if tp > group.size]
        if not degrees:
            continue
        wider = group.with_size(degrees[0])
        changed = (*draft[:index], wider, *draft[index + 1 :])
        if not packs(changed, problem.pools):
            continue
        gain = search.estimator.goodput_rps(wider) - search.estimator.goodput_rps(group)
        per_gpu = gain / (wider.size - group.size)
        if gain > 1e-6 and (best is None or per_gpu > best[0]):
            best = per_gpu, changed
    return best[1] if best else None
