"""`auto` with both kinds of placement: each model's phases apart, or the model colocated.

It starts from `auto`'s colocated draft on all GPUs. Where that leaves something to gain, the models
that take the most GPUs are offered plans of their phases apart (`planner/apart.py`); the one whose
goodput per GPU grows most goes first, the rest is planned anew on the GPUs that are left, then the
next one, on to the placement with all of them apart. Every step is a candidate, in two sizes: as
few GPUs as keep the goal, and as many as the model's share of the cluster. Where neither serves
everybody the newest of the models is tried in both ways, too: apart on a part of the cluster, with
the requests that keep the goal there, and colocated with the others.

Predictions of the two kinds come from estimators of their own, which are not to be compared too
closely:
they only say who is among the last; a judge, which is the same for all, chooses.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from math import floor, inf

from muxrt.config.placement import Slo
from muxrt.errors import ConfigError
from muxrt.planner.apart import Offer, colocated_gpus, offer, part_of, within
from muxrt.planner.assign import in_order
from muxrt.planner.capacity import Capacity
from muxrt.planner.draft import Draft
from muxrt.planner.feasible import check_feasible
from muxrt.planner.meshes import smallest_mesh
from muxrt.planner.mix import NOBODY, Kept, Mix, apart_units
from muxrt.planner.phase_plan import (
    ModelPlan,
    Objective,
    PhasePlan,
    by_traffic,
    every_gpu,
    fits,
)
from muxrt.planner.phases import Seen
from muxrt.planner.queueing import PartScore, QueueingJudge, Score
from muxrt.planner.rest import Spans, at_most, left_by, rest_of, whole
from muxrt.planner.search import Search, Strategy
from muxrt.planner.strategies.auto import OTHERS_UP_TO, auto
from muxrt.planner.strategies.distserve import Options
from muxrt.planner.strategies.muxserve import muxserve
from muxrt.planner.strategies.spatial import spatial
from muxrt.planner.strategies.temporal import temporal
from muxrt.planner.workload import Problem

NEARLY_ALL = 0.99  # of the traffic: who serves so much has nothing to gain from other placements
MARGIN = 0.15  # predictions of both kinds are taken to be that far apart at most, relative
LEAST_GAIN = 0.005  # relative; below it the simpler placement stays
MOST_MODELS = 6  # that are looked at, those with the most GPUs' worth of traffic
# Goodput per GPU apart over that colocated, as predicted: with less a model stays colocated, unless
# all are apart. Two GPUs are the least, so nobody looks at small models among many others.
LEAST_RATIO = 0.7
LEAST_WORTH = 2 * LEAST_RATIO
NUM_NEXT = 2  # models that are tried as the next one apart
NUM_ENOUGH = 4  # mixes that are predicted to serve nearly all: no more are looked for
NUM_FINAL = 4  # mixes that the judge sees
# Of the cluster: where a model is in both ways, its phases have so much of it at most.
PARTS = (0.25, 0.5, 0.75)
MOST_SHARE = 0.95  # of its requests: with more of them apart it is not in both ways
SINGLES: tuple[Strategy, ...] = (muxserve, spatial, temporal)


@dataclass(frozen=True, slots=True)
class Terms:
    """What is asked for. Without an objective it is the most goodput that the cluster gives.

    With one it is the least that keeps the goal: `attainment` of every model's requests in time.
    """

    judge: Callable[[Mix], Kept]  # of the last candidates
    is_judged: bool = False  # it also says whether a colocated draft leaves anything to gain
    objective: Objective | None = None
    attainment: float = 0.9
    may_split: bool = True  # False: everybody is colocated

    def rank(self, problem: Problem, mix: Mix, kept: Kept) -> tuple[float, float]:
        """More is better."""
        if self.objective is None:
            return kept.goodput_rps, 0.0
        price = mix.price(problem, self.objective)
        return (inf if kept.least >= self.attainment else kept.goodput_rps), -price


@dataclass(frozen=True, slots=True)
class Found:
    """A placement, why each model that was looked at is as it is, and what was not looked at."""

    mix: Mix
    kept: Kept | None  # what the judge said; None: it was not asked
    num_judged: int = 0
    reasons: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def mixed(problem: Problem, search: Search, terms: Terms) -> Found:
    """The best placement found.

    Raises ConfigError where a model fits nowhere, or nobody can serve it as asked.
    """
    mixer = _Mixer(problem, search, terms)
    base, refused = mixer.base()
    if refused is not None:
        mixes = [mix for mix in mixer.mixes() if mixer.keeps(mix)] if mixer.can_split else []
        if not mixes:
            raise refused
        return mixer.explained(mixer.choose([], mixes), None)
    kept = terms.judge(base[0]) if terms.is_judged else None
    mixes = []
    if mixer.has_to_gain(kept or base[0].predicted(problem)):
        mixes = mixer.mixes()
    elif terms.objective is None:
        return Found(base[0], kept, int(kept is not None), notes=tuple(mixer.notes))
    return mixer.explained(mixer.choose(base, mixes), base[0])


class _Mixer:
    """The candidates of one problem."""

    def __init__(self, problem: Problem, search: Search, terms: Terms) -> None:
        self.offers: dict[str, Offer] = {}
        self.notes: list[str] = []
        self._problem, self._search, self._terms = problem, search, terms
        self._capacity = Capacity(problem, search.estimator)
        self._best_rps = 0.0  # that was predicted

    # -- everybody colocated -----------------------------------------------------------------

    def base(self) -> tuple[list[Mix], ConfigError | None]:
        """Colocated placements, those that are preferred first; or why there are none."""
        problem, search = self._problem, self._search
        try:
            check_feasible(problem, self._capacity)
            draft = in_order(problem, auto(problem, search))
        except ConfigError as error:
            return [], error
        first = Mix(NOBODY, rest_of(problem, whole(problem), problem.demands), draft,
                    search.estimator(draft))  # fmt: skip
        self._best_rps = first.predicted(problem).goodput_rps
        if self._terms.objective is None:
            return [first], None
        return self._cheaper(first, whole(problem), tuple(problem.demands)), None

    @property
    def can_split(self) -> bool:
        """Whether there may be units of one phase at all."""
        problem = self._problem
        return self._terms.may_split and not problem.cluster.is_cpu and problem.num_gpus > 1

    def has_to_gain(self, kept: Kept) -> bool:
        """Whether another placement than a colocated one with that could be better."""
        is_enough = kept.attainment >= NEARLY_ALL
        if not self.can_split or (self._terms.objective is None and is_enough):
            return False
        if self._search.is_over():
            self._note("prefills and decodes apart: the time was up")
            return False
        return True

    def keeps(self, mix: Mix) -> bool:
        """Whether every model is predicted to keep the goal."""
        return mix.predicted(self._problem).least >= self._terms.attainment

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _together(self, apart: PhasePlan, spans: Spans, models: Collection[str]) -> Mix | None:
        """The models colocated on these GPUs; None where one finds no room."""
        both = {one.model: 1 - one.share for one in apart.models if one.share < 1}
        problem = self._problem.scaled(both) if both else self._problem
        rest = rest_of(problem, spans, models)
        if not models:
            return Mix(apart, rest, (), Score(()))
        if not spans:
            return None
        estimator = QueueingJudge(rest.problem)
        search = replace(self._search, estimator=estimator, judge=estimator)
        try:
            draft = in_order(rest.problem, auto(rest.problem, search))
        except ConfigError:
            return None
        return Mix(apart, rest, draft, estimator(draft))

    def _cheaper(self, first: Mix, spans: Spans, models: Collection[str]) -> list[Mix]:
        """`first` and what keeps the goal on fewer GPUs, the least first."""
        objective, problem = self._terms.objective, self._problem
        assert objective is not None
        found = [first]
        price = {span: objective.of(problem.pools[span.pool].gpu) for span in spans}
        ordered = tuple(sorted(spans, key=lambda span: (price[span], span.node)))
        orders = [ordered, ordered[::-1]] if len(set(price.values())) > 1 else [ordered]
        for order in orders if models and self.keeps(first) else []:
            low, enough = 0, sum(span.gpus for span in order)
            while enough - low > 1 and not self._search.is_over():
                middle = (low + enough) // 2
                fewer = self._together(first.apart, at_most(order, middle), models)
                if fewer is not None and self.keeps(fewer):
                    found.append(fewer)
                    enough = middle
                else:
                    low = middle
        return sorted(found, key=lambda mix: mix.price(problem, objective))

    # -- some apart --------------------------------------------------------------------------

    def mixes(self) -> list[Mix]:
        """With all models apart, and with one more at a time."""
        self._ask()
        found: list[Mix] = []
        if len(self.offers) == len(self._problem.demands):
            found += self._with(tuple(self.offers))
            found += self._sized(self._machines(), ())
        apart: tuple[str, ...] = ()
        likely = [name for name, one in self.offers.items() if one.ratio >= LEAST_RATIO]
        while len(apart) < len(likely):
            steps: list[tuple[tuple[float, float], str]] = []
            for model in [name for name in likely if name not in apart][:NUM_NEXT]:
                if self._search.is_over():
                    self._note("some mixtures: the time was up")
                    return found
                made = self._with((*apart, model))
                steps.append((max(map(self._rank, made), default=(0.0, -inf)), model))
                found += made
            apart = (*apart, max(steps, key=lambda step: step[0])[1])
            if self._has_enough(found):
                break
        return found

    def _rank(self, mix: Mix) -> tuple[float, float]:
        return self._terms.rank(self._problem, mix, mix.predicted(self._problem))

    def _has_enough(self, found: Iterable[Mix]) -> bool:
        good = [mix for mix in found if self._serves_all(mix)]
        return self._terms.objective is None and len(good) >= NUM_ENOUGH

    def _serves_all(self, mix: Mix) -> bool:
        return mix.predicted(self._problem).attainment >= NEARLY_ALL

    def _ask(self) -> None:
        """What the phases of the largest models take, those that gain most first."""
        problem, search, terms = self._problem, self._search, self._terms
        options = Options(attainment=terms.attainment, objective=terms.objective or Objective.GPU)
        worth = {m: colocated_gpus(problem, self._capacity, m) for m in problem.demands}
        largest = sorted(worth, key=lambda model: (-worth[model], model))
        if len(largest) > MOST_MODELS:
            largest = [one for one in largest[:MOST_MODELS] if worth[one] >= LEAST_WORTH]
            self._note(f"the phases of all but the {len(largest)} largest models")
        found = []
        for number, model in enumerate(largest):
            if search.is_over():
                self._note("the phases of some models: the time was up")
                break
            search.tell(f"phases apart: {model}", number, len(largest))
            one = offer(problem, self._capacity, model, options, search.is_over)
            found += [one] if one is not None else []
        found.sort(key=lambda one: (-one.ratio, one.model))
        self.offers = {one.model: one for one in found}

    def _with(self, models: tuple[str, ...]) -> list[Mix]:
        """Mixes with the phases of these models apart."""
        others = [model for model in self._problem.demands if model not in models]
        self._search.tell(f"apart: {', '.join(models)}", 0, 1)
        found = self._sized(self._fewest(models), others)
        if self._terms.objective is None and not any(map(self._serves_all, found)):
            found += self._sized(self._shares(models, others), others)
            found += self._both(models, others)
        return found

    def _both(self, models: tuple[str, ...], others: Collection[str]) -> list[Mix]:
        """The last of these models apart and colocated, on parts of the cluster."""
        problem, offered = self._problem, self.offers[models[-1]]
        before = self._fewest(models[:-1])
        found: dict[tuple[object, ...], Mix] = {}
        for part in PARTS if before is not None else ():
            if self._search.is_over():
                break
            assert before is not None
            most = {pool.index: floor(part * pool.num_gpus) for pool in problem.pools}
            plan = part_of(problem, offered.judge, offered.plans[0], most)
            if plan is not None and plan.share <= MOST_SHARE:
                both = PhasePlan((*before.models, plan))
                found |= {mix.key: mix for mix in self._sized(both, (*others, models[-1]))}
        return [*found.values()]

    def _sized(self, plan: PhasePlan | None, others: Collection[str]) -> list[Mix]:
        """The others colocated beside a plan: on all that is left, or on as little as needed."""
        problem = self._problem
        units = None if plan is None else apart_units(problem, plan)
        if plan is None or units is None:
            return []
        rates = {name: demand.rate_rps for name, demand in problem.demands.items()}
        shares = {one.model: one.share for one in plan.models}
        most_rps = sum(rates[m.model] * m.share * m.seen.attainment for m in plan.models)
        most_rps += sum(rates[model] * (1 - shares.get(model, 0.0)) for model in others)
        if most_rps < (1 - MARGIN) * self._best_rps:
            return []
        spans = left_by(problem, units)
        mix = self._together(plan, spans, others)
        if mix is None:
            return []
        self._best_rps = max(self._best_rps, mix.predicted(problem).goodput_rps)
        return [mix] if self._terms.objective is None else self._cheaper(mix, spans, others)

    def _fewest(self, models: Collection[str]) -> PhasePlan | None:
        """As few GPUs as keep the goal; None where there are not so many."""
        return self._fitting(models, lambda one: one.plans)

    def _machines(self) -> PhasePlan | None:
        """All models on whole machines, as Splitwise has it."""
        return self._fitting(tuple(self.offers), lambda one: one.machines)

    def _fitting(
        self, models: Collection[str], plans_of: Callable[[Offer], tuple[ModelPlan, ...]]
    ) -> PhasePlan | None:
        left, found = every_gpu(self._problem), []
        for model in by_traffic(self._problem):
            if model in models:
                plans = [plan for plan in plans_of(self.offers[model]) if fits(plan, left)]
                if not plans:
                    return None
                found.append(plans[0])
                left -= plans[0].gpus
        return PhasePlan(tuple(found))

    def _shares(self, models: Collection[str], others: Collection[str]) -> PhasePlan | None:
        """Each model on its part of the cluster, by what it takes; None where that is too small."""
        problem, plans = self._problem, {m: self.offers[m].plans[0] for m in models}
        need: Counter[int] = sum((plan.gpus for plan in plans.values()), Counter())
        worth = sum(self._worth(model) for model in others)
        left, found = every_gpu(problem), []
        for model, plan in plans.items():
            most = {
                pool.index: floor(
                    plan.gpus[pool.index]
                    * pool.num_gpus
                    / (need[pool.index] + worth * pool.num_gpus / problem.num_gpus)
                )
                for pool in problem.pools
                if plan.gpus[pool.index]
            }
            shared = within(problem, self.offers[model].judge, plan, most)
            if shared is None or not fits(shared, left):
                return None
            found.append(shared)
            left -= shared.gpus
        return PhasePlan(tuple(found if others else self._topped(found, left)))

    def _topped(self, plans: list[ModelPlan], left: Counter[int]) -> list[ModelPlan]:
        """With what rounding left over, the first that can use it."""
        found = []
        for plan in plans:
            more = within(self._problem, self.offers[plan.model].judge, plan, plan.gpus + left)
            if more is not None and more.seen.attainment > plan.seen.attainment:
                left = left + plan.gpus - more.gpus
                plan = more
            found.append(plan)
        return found

    def _worth(self, model: str) -> float:
        """GPUs' worth of a model's traffic, colocated."""
        worth = colocated_gpus(self._problem, self._capacity, model)
        return smallest_mesh(self._problem, model)[1] if worth == inf else worth

    # -- the last candidates -----------------------------------------------------------------

    def choose(self, base: list[Mix], mixes: list[Mix]) -> Found:
        """The best by the judge, where there is more than one kind; the simpler one at a tie."""
        finalists = self._finalists(base, mixes)
        problem, judged = self._problem, bool(mixes) or self._terms.is_judged
        found: list[tuple[tuple[float, float], Kept, Mix]] = []
        for number, mix in enumerate(finalists):
            self._search.tell("judging", number, len(finalists))
            kept = self._terms.judge(mix) if judged else mix.predicted(problem)
            found.append((self._terms.rank(problem, mix, kept), kept, mix))
        best = max(rank for rank, _, _ in found)
        _, kept, mix = next(
            one for one in found if one[0] == best or self._is_as_good(one[0], best)
        )
        return Found(mix, kept if judged else None, len(finalists) if judged else 0)

    def _is_as_good(self, rank: tuple[float, float], best: tuple[float, float]) -> bool:
        return self._terms.objective is None and rank[0] >= (1 - LEAST_GAIN) * best[0]

    def _finalists(self, base: list[Mix], mixes: list[Mix]) -> list[Mix]:
        """Colocated ones, those of the other strategies, the best mixes, and all apart."""
        ranked = sorted(mixes, key=self._rank, reverse=True)
        near = [
            mix
            for mix in ranked
            if mix.predicted(self._problem).goodput_rps >= (1 - MARGIN) * self._best_rps
        ]
        singles = self._singles() if self._terms.objective is None and base else []
        plain = (*base[: NUM_FINAL - 1], *base[-1:])  # with an objective the last is the largest
        every = [mix for mix in mixes if not mix.together]  # what the other strategies would do
        # One in both ways comes on top: it would keep a simpler one from the judge.
        simple = [mix for mix in near if not mix.has_both][:NUM_FINAL]
        both = [mix for mix in near if mix.has_both][:1]
        unique = {mix.key: mix for mix in (*plain, *singles, *simple, *both, *every)}
        return list(unique.values()) or ranked[:1]

    def _singles(self) -> list[Mix]:
        """What the other colocated strategies place, as they place it."""
        problem, search, found = self._problem, self._search, []
        if len(problem.demands) > OTHERS_UP_TO:
            return []
        rest = rest_of(problem, whole(problem), problem.demands)
        for strategy in SINGLES:
            try:
                draft: Draft = in_order(problem, strategy(problem, search))
            except ConfigError:
                continue
            found.append(Mix(NOBODY, rest, draft, search.estimator(draft)))
        return found

    def explained(self, found: Found, base: Mix | None) -> Found:
        """With why each model that was looked at is as it is, and what was not looked at."""
        reasons = {model: self._reason(model, found.mix, base) for model in self.offers}
        return replace(found, reasons=reasons, notes=tuple(self.notes))

    def _reason(self, model: str, mix: Mix, base: Mix | None) -> str:
        """Why a model is as it is, by its goodput per GPU in both ways."""
        one = self.offers[model]
        plan = next((plan for plan in mix.apart.models if plan.model == model), None)
        if one.colocated_gpus == inf:
            way = "colocated" if plan is None else "apart"
            return f"{way}: no mesh keeps its targets colocated"
        per_gpu = f"{one.ratio:.1f} x the goodput per GPU"
        if plan is None:
            return f"colocated: apart it would have {per_gpu}"
        text = (
            f"apart: {per_gpu} ({one.gpus} GPUs for its rate, colocated {one.colocated_gpus:.1f})"
        )
        if plan.share < 1:
            text = f"{plan.share:.0%} of its requests {text}, the others colocated"
        parts = [p for g in base.score.groups for p in g.parts if p.model == model] if base else []
        why = _why(self._problem.demands[model].slo, plan.seen, parts)
        return text if why is None else f"{text}: {why}"


def _why(slo: Slo, seen: Seen, parts: list[PartScore]) -> str | None:
    """What delays a colocated model the most, if it delays it less apart."""
    if not parts:
        return None
    ttft_s, tpot_s = max(part.ttft_s for part in parts), max(part.tpot_s for part in parts)
    if tpot_s / slo.tpot_s > ttft_s / slo.ttft_s:
        what, apart_s, colocated_s = (
            "prefills no longer delay its tokens: TPOT",
            seen.tpot_s,
            tpot_s,
        )
    else:
        what, apart_s, colocated_s = (
            "decodes no longer delay its prompts: TTFT",
            seen.ttft_s,
            ttft_s,
        )
    if apart_s >= colocated_s:
        return None
    return f"{what} {1e3 * apart_s:.0f} ms, colocated {1e3 * colocated_s:.0f}"
