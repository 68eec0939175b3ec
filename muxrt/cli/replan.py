"""`muxrt replan`: from the traffic that came to the placement for what will come."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from muxrt.config.placement import Slo


class StrategyName(StrEnum):
    """How to place, as `muxrt plan` has them."""

    AUTO = "auto"
    MUXSERVE = "muxserve"
    SPATIAL = "spatial"
    TEMPORAL = "temporal"


Traffic = Annotated[
    Path | None,
    typer.Option(help="The log of the server; left out, the folder of traffic.path in CONFIG."),
]
Plan = Annotated[
    Path | None,
    typer.Option(
        help="Cluster, profiles and engine facts: configs/plans/*.yaml, or your own; left out,"
        " replan.plan of CONFIG."
    ),
]
Window = Annotated[
    float, typer.Option(min=0.25, max=168, help="Hours to plan for; the next replan is then.")
]
Quantile = Annotated[
    float,
    typer.Option(
        min=0.01,
        max=0.99,
        help="Of each hour's traffic: 0.9 plans for what one hour in ten exceeds.",
    ),
]
Margin = Annotated[
    float, typer.Option(min=0, help="A change must earn its cost, and so many times more.")
]
LeastGain = Annotated[
    float, typer.Option(min=0, help="And this share of the goodput: less is within the error.")
]
LeastHistory = Annotated[float, typer.Option(min=0, help="Hours of traffic to plan by.")]
MostAge = Annotated[float, typer.Option(min=0, help="Hours since the newest request, at most.")]
At = Annotated[
    str | None,
    typer.Option(help="As if it were then, such as 2026-01-31T04:00 (UTC); left out, now."),
]
Out = Annotated[
    Path | None, typer.Option(help="Write the new file here, if the change is worth it.")
]
Picture = Annotated[
    Path | None, typer.Option(help="Draw both placements beside each other: .svg or .png.")
]
Scenarios = Annotated[
    int,
    typer.Option(
        min=1,
        help="Ways that the traffic may go, the forecast and others within its errors: a change"
        " must gain on average.",
    ),
]
Timezone = Annotated[
    str, typer.Option(help="Whose Saturdays and Sundays are weekends: UTC, or Europe/Berlin.")
]
Apply = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Of a running server: the old units are its own, and it gets"
        " the new ones if the change is worth it.",
    ),
]
AdminKey = Annotated[
    str | None, typer.Option(envvar="MUXRT_ADMIN_KEY", help="The server's, for --apply.")
]
Ttft = Annotated[float | None, typer.Option(min=1e-3, help="Seconds, for models without an slo.")]
Tpot = Annotated[float | None, typer.Option(min=1e-4, help="Seconds, for models without an slo.")]


def replan(
    config: Annotated[Path, typer.Argument(help="What is served: its units are the old ones.")],
    traffic: Traffic = None,
    plan: Plan = None,
    strategy: Annotated[StrategyName, typer.Option(help="How to place.")] = StrategyName.AUTO,
    window: Window = 24.0,
    quantile: Quantile = 0.5,
    margin: Margin = 1.0,
    least_gain: LeastGain = 0.02,
    least_history: LeastHistory = 24.0,
    most_age: MostAge = 6.0,
    at: At = None,
    scenarios: Scenarios = 3,
    timezone: Timezone = "UTC",
    ttft: Ttft = None,
    tpot: Tpot = None,
    out: Out = None,
    picture: Picture = None,
    apply: Apply = None,
    admin_key: AdminKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Plan anew by the traffic that came: what would change, what it brings, what it costs.

    Without --apply nothing is changed: it says what it would do, and --out writes the new file
    where it is worth it. Refuses (exit status 1) where the log says too little or is stale.

    Example: muxrt replan serve.yaml --traffic traffic --plan plan.yaml --out new.yaml
    """
    from time import time

    from muxrt.cli.admin_client import administrator
    from muxrt.cli.replan_input import Words, look_out, zone_of
    from muxrt.cli.replan_report import carried_out, check_paths, report
    from muxrt.cli.replan_run import replan as run
    from muxrt.cli.replan_run import window_s
    from muxrt.cli.traffic_files import point_in_time
    from muxrt.planner.moving import Terms

    check_paths(out, picture)
    now_s, slo = time() if at is None else point_in_time("--at", at), _slo(ttft, tpot)
    zone = zone_of(timezone)
    admin = administrator(apply, admin_key)
    units = admin.units() if admin else None
    history = (window, quantile, least_history, most_age)
    outlook = look_out(Words(config, traffic, plan, now_s, *history, slo, scenarios, units, zone))
    terms = Terms(window_s(outlook), margin, least_gain)
    found = run(outlook, strategy.value, terms)
    wanted = carried_out(admin, found, units)
    report(found, wanted, out=out, picture=picture, as_json=as_json)


def _slo(ttft: float | None, tpot: float | None) -> "Slo | None":
    if (ttft is None) != (tpot is None):
        raise typer.BadParameter("one goes with the other", param_hint="--ttft and --tpot")
    from muxrt.config.placement import Slo

    return Slo(ttft_s=ttft, tpot_s=tpot) if ttft is not None and tpot is not None else None
