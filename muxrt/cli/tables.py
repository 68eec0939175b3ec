"""Tables for people: models, units, shares."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from muxrt.cli.check import Checked, device_of
from muxrt.cli.show import show_bytes, show_count
from muxrt.config.model import ModelShape
from muxrt.config.placement import UnitSpec
from muxrt.config.routing import Routing
from muxrt.cost.memory import num_params
from muxrt.engine.build import UnitPlan, linear_dtype, weight_bytes


def print_checked(console: Console, file: Path, checked: Checked) -> None:
    """What `muxrt serve --check` shows: each model, then each unit and how its arena is shared."""
    endpoint = checked.config.endpoint
    console.print(
        f"[bold]{file}[/bold] can be served at http://{endpoint.host}:{endpoint.port}/v1",
        highlight=False,
    )
    console.print(models_table(checked))
    if any(plan.spec.has_roles for plan in checked.plans):
        console.print(_routing_line(checked.config.routing), highlight=False)
    for plan in checked.plans:
        console.print(_unit_line(plan), highlight=False)
        console.print(shares_table(plan))


def models_table(checked: Checked) -> Table:
    """One line per model: its shape and its weights."""
    table = _table("model", "family", "layers", "hidden", "heads x dim", "parameters", "weights")
    for model in checked.config.models:
        shape, device = checked.shapes[model.name], device_of(model, checked.config)
        table.add_row(
            model.name,
            shape.family,
            str(shape.num_layers),
            str(shape.hidden_size),
            _heads(shape),
            show_count(num_params(shape)),
            f"{show_bytes(weight_bytes(model, shape, device))}"
            f" {linear_dtype(model, shape, device)}",
        )
    return table


def _heads(shape: ModelShape) -> str:
    heads = str(shape.num_heads)
    if shape.num_kv_heads != shape.num_heads:
        heads += f" ({shape.num_kv_heads} kv)"
    return f"{heads} x {shape.head_dim}"


def _routing_line(routing: Routing) -> str:
    if routing.policy == "distserve":
        return "routing distserve: each phase of a request to its shortest queue"
    line = "routing splitwise: both units of a request are chosen when it comes"
    if not routing.borrow:
        return f"{line}; none is borrowed"
    return (
        f"{line}; one is borrowed where more than {routing.borrow_batches:g} prefill batches wait"
        f" or {routing.borrow_kv:.0%} of the KV memory is taken, until it is"
        f" {routing.return_batches:g} and {routing.return_kv:.0%}"
    )


def _unit_line(plan: UnitPlan) -> str:
    spec, arena = plan.spec, plan.arena
    line = (
        f"unit [bold]{spec.name}[/bold]: {spec.scheduling.policy} on {_mesh(spec)};"
        f" an arena of {show_bytes(spec.memory.kv_bytes)} ="
        f" {plan.num_blocks} blocks of {show_bytes(arena.block_bytes)}"
    )
    swap_bytes = spec.memory.swap_bytes
    line = f"{line}; {show_bytes(swap_bytes)} to swap" if swap_bytes else line
    if plan.habits is not None:
        line += f"; {show_bytes(plan.weight_bytes)} of weights are awake at a time"
    return f"{line}; K and V by {_TRANSFERS[spec.transfer]}" if spec.has_roles else line


_TRANSFERS = {"gloo": "gloo", "shared": "shared memory", "nixl": "NIXL"}
_DOES = {"prefill": " (prefills)", "decode": " (decodes)", "mixed": ""}


def _mesh(spec: UnitSpec) -> str:
    if spec.mesh.device == "gpu":
        shares = ", ".join(f"{share} %" for share in spec.lanes.sm_pct or (100,))
        gpus = spec.mesh.gpus or (0,)
        where = f"GPU {gpus[0]}" if len(gpus) == 1 else f"GPUs {_listed(gpus)}, {len(gpus)} ranks"
        return f"{where} in {spec.lanes.kind} lanes of {shares}"
    cores = "every core" if spec.mesh.cores is None else f"cores {_listed(spec.mesh.cores)}"
    if spec.mesh.tp > 1:
        cores += f", {spec.mesh.tp} ranks"
    return f"{cores} in lanes of {_listed(spec.lanes.split)}" if spec.lanes.split else cores


def _asleep(plan: UnitPlan, model: str) -> str:
    """Who has no quota before somebody asks for it."""
    return "" if plan.habits is None or model in plan.awake else " (asleep)"


def shares_table(plan: UnitPlan) -> Table:
    """One line per model of a unit: what its quota holds."""
    table = _table(
        "model", "quota\nblocks", "share", "= tokens", "longest\nsequence", "= blocks", "that fit"
    )
    roles = {part.name: part.role for part in plan.spec.models}
    for model in plan.models.values():
        quota, layout = plan.quotas[model.name], model.layout
        table.add_row(
            model.name + _DOES[roles[model.name]] + _asleep(plan, model.name),
            str(quota),
            f"{quota / plan.num_blocks:.0%}",
            str(quota // layout.blocks_per_group * layout.block_tokens),
            f"{model.max_model_len} tokens",
            str(model.floor_blocks),
            f"{quota / model.floor_blocks:.1f}",
        )
    return table


def _table(*headers: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left", no_wrap=True)
    return table


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(str(number) for number in numbers)
