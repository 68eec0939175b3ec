"""What `muxrt simulate --compare` names: placements, policies, strategies."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec

from muxrt.cli.simulate_input import Variant, load_variant
from muxrt.config.placement import Scheduling
from muxrt.config.serve import ServeConfig
from muxrt.errors import ConfigError

POLICIES: tuple[str, ...] = get_args(get_type_hints(Scheduling)["policy"])


@dataclass(frozen=True, slots=True)
class Comparison:
    """Placements from files, policies for each of them, and placements by strategies."""

    paths: tuple[Path, ...] = ()
    policies: tuple[str, ...] = ()  # instead of those in the files
    strategies: tuple[str, ...] = ()


def parse(words: Iterable[str]) -> Comparison:
    """`policy=a,b`, `strategy=a,b`, or files. Raises ConfigError for a name that is not known."""
    from muxrt.planner.strategies import STRATEGIES

    paths: list[Path] = []
    policies: list[str] = []
    strategies: list[str] = []
    for word in words:
        axis, sign, names = word.partition("=")
        if sign and axis == "policy":
            policies += _known(axis, names.replace("_", "-"), POLICIES)
        elif sign and axis == "strategy":
            strategies += _known(axis, names, tuple(STRATEGIES))
        else:
            paths.append(Path(word))
    return Comparison(tuple(paths), tuple(policies), tuple(strategies))


def _known(axis: str, names: str, known: Sequence[str]) -> Iterator[str]:
    for name in dict.fromkeys(names.split(",")):
        if name not in known:
            raise ConfigError(f"found {axis}={name}, expected {axis}= and of {', '.join(known)}")
        yield name


def variants(
    config: Path, comparison: Comparison, plan: Path | None, workload: Path
) -> list[Variant]:
    """All that are compared, `config` first; strategies plan for `workload` at its own rates.

    Raises ConfigError for strategies without `plan`, and where a file is wrong.
    """
    placements = [load_variant(path) for path in (config, *comparison.paths)]
    if comparison.strategies:
        placements += _planned(comparison.strategies, plan, workload)
    if not comparison.policies:
        return placements
    return [
        replace(
            one,
            name=f"{one.name}, {policy}" if len(placements) > 1 else policy,
            config=with_policy(one.config, policy),
        )
        for one in placements
        for policy in comparison.policies
    ]


def with_policy(config: ServeConfig, policy: str) -> ServeConfig:
    """The same placement with all units scheduled by `policy`."""
    convert = msgspec.structs.replace
    units = tuple(
        convert(unit, scheduling=convert(unit.scheduling, policy=policy)) for unit in config.units
    )
    return convert(config, units=units)


def _planned(strategies: Sequence[str], plan: Path | None, workload: Path) -> list[Variant]:
    from muxrt.cli.plan_input import load_problem
    from muxrt.cli.plan_strategy import planned

    if plan is None:
        raise ConfigError("found strategies to compare, expected --plan with cluster and models")
    asked = load_problem(plan, workload, None, None)
    shapes = {name: demand.shape for name, demand in asked.problem.demands.items()}
    return [Variant(name, planned(asked, name), shapes) for name in strategies]
