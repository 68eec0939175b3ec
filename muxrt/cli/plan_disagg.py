"""What `muxrt plan` says of a disaggregated placement."""

from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.table import Table

from muxrt.cli.plan_input import Asked
from muxrt.cli.show import console
from muxrt.config.load import dump
from muxrt.config.placement import Placement
from muxrt.config.routing import Routing
from muxrt.config.serve import ServeConfig
from muxrt.planner.phase_plan import ModelPlan, PhasePlan, to_placement
from muxrt.planner.strategies.distserve import Options, distserve
from muxrt.planner.strategies.splitwise import splitwise
from muxrt.planner.workload import Problem

DISAGGREGATING = {"distserve": distserve, "splitwise": splitwise}
HEADERS = ("model", "instances", "GPUs", "rate\n1/s", "attain-\nment", "TTFT\nms", "TPOT\nms")
ONLY_SIMULATED = "It has pipeline stages, which nothing here runs: it is a plan only."


def report(asked: Asked, strategy: str, options: Options, out: Path | None, as_json: bool) -> None:
    """Plan, write and say it. Raises ConfigError where a model finds no room."""
    found = DISAGGREGATING[strategy](asked.problem, options)
    placement = to_placement(asked.problem, found)
    if out is not None:
        routing = Routing(policy="splitwise" if strategy == "splitwise" else "distserve")
        config = ServeConfig(models=asked.models, units=placement.units, routing=routing)
        out.write_text(dump(config))
    if as_json:
        data = as_data(asked, found, placement)
        print(msgspec.json.format(msgspec.json.encode(data)).decode())
    else:
        _print(asked, found)


def as_data(asked: Asked, found: PhasePlan, placement: Placement) -> dict[str, Any]:
    """What `--json` prints; the units are in the schema of `muxrt serve`."""
    demands = asked.problem.demands
    return {
        "goodput_rps": _goodput(asked, found),
        "offered_rps": sum(demand.rate_rps for demand in demands.values()),
        "gpus": asked.problem.num_gpus,
        "gpus_used": found.num_gpus,
        "simulated_only": found.is_simulated_only,
        "models": models_data(asked.problem, found),
        "units": [msgspec.to_builtins(unit) for unit in placement.units],
    }


def models_data(problem: Problem, found: PhasePlan) -> list[dict[str, Any]]:
    """Each model's instances, and what is expected of them."""
    return [
        {
            "model": model.model,
            "prefill_gpu": problem.pools[model.prefill_pool].gpu.name,
            "decode_gpu": problem.pools[model.decode_pool].gpu.name,
            "copies": model.copies,
            "prefill": _side(model, "prefill"),
            "decode": _side(model, "decode"),
            "share": model.share,
            "attainment": model.seen.attainment,
            "ttft_s": model.seen.ttft_s,
            "tpot_s": model.seen.tpot_s,
            "reason": model.reason,
        }
        for model in found.models
    ]


def _side(model: ModelPlan, role: str) -> dict[str, int]:
    split = model.split
    instance = split.prefill if role == "prefill" else split.decode
    num = split.num_prefill if role == "prefill" else split.num_decode
    return {"instances": model.copies * num, "tp": instance.tp, "pp": instance.pp}


def _goodput(asked: Asked, found: PhasePlan) -> float:
    demands = asked.problem.demands
    return sum(demands[m.model].rate_rps * m.seen.attainment for m in found.models)


def _print(asked: Asked, found: PhasePlan) -> None:
    offered = sum(demand.rate_rps for demand in asked.problem.demands.values())
    to = console()
    to.print(
        f"[bold]{_goodput(asked, found):.1f} of {offered:.1f} requests/s within SLO[/bold],"
        f" {found.num_gpus} of {asked.problem.num_gpus} GPUs, prefills and decodes apart",
        highlight=False,
    )
    to.print(phase_table(asked.problem, found))
    for model in found.models:
        to.print(f"{model.model}: {model.reason}", highlight=False)
    if found.is_simulated_only:
        to.print(ONLY_SIMULATED)


def phase_table(problem: Problem, found: PhasePlan) -> Table:
    """A line for each model."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for header in HEADERS:
        words = header in ("model", "instances")
        table.add_column(header, justify="left" if words else "right", overflow="fold")
    for model in found.models:
        times = f"{model.copies} times " if model.copies > 1 else ""
        table.add_row(
            model.model,
            times + model.split.name,
            str(model.gpus.total()),
            f"{problem.demands[model.model].rate_rps * model.share:.2f}",
            f"{model.seen.attainment:.1%}",
            f"{1e3 * model.seen.ttft_s:.0f}",
            f"{1e3 * model.seen.tpot_s:.1f}",
        )
    return table
