"""Streams on a device, and what of it each may use: green contexts where they are to be had."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import torch

from muxrt.engine.build import UnitPlan
from muxrt.errors import MuxrtError
from muxrt.worker.device_lanes import Shares
from muxrt.worker.driver import Driver, DriverError, open_driver
from muxrt.worker.flight import Share
from muxrt.worker.graphs import CudaGraph, Graph, Steps
from muxrt.worker.green import Granule, GreenSplit, share_out

log = logging.getLogger(__name__)

GREEN_SINCE = 12040  # the driver's version that has green contexts


def check_device(device: torch.device) -> None:
    """Raise MuxrtError unless torch can compute there."""
    if device.type == "cuda" and not torch.cuda.is_available():
        why = "was built without CUDA" if torch.version.cuda is None else "finds no GPU it can use"
        raise MuxrtError(f"mesh.device: found gpu, but torch {torch.__version__} {why}")
    if device.type == "cuda" and find_spec("triton") is None:
        raise MuxrtError("mesh.device: found gpu, but no package triton: pip install 'muxrt[gpu]'")


def open_steps(plan: UnitPlan, device: torch.device, agree: Callable[[int], int] = int) -> Steps:
    """For one lane, with its part of a GPU's memory for graphs; none but on CUDA.

    `agree`: see `Steps`.
    """
    if device.type != "cuda":
        return Steps(0, _no_graph, lambda: 0)
    pool = torch.cuda.graph_pool_handle()
    budget_bytes = plan.spec.memory.graph_bytes // plan.num_lanes
    return Steps(
        budget_bytes,
        lambda: CudaGraph(pool),
        lambda: torch.cuda.memory_reserved(device),
        agree,
    )


def _no_graph() -> Graph:
    raise AssertionError("graphs are CUDA's")


def plain_share(name: str, device: torch.device, priority: int) -> Share:
    """A stream on the whole device. Lower numbers of `priority` go first."""
    if device.type != "cuda":
        return Share(name, torch.cpu.Stream(), 1)
    sm_count = torch.cuda.get_device_properties(device).multi_processor_count
    return Share(name, torch.cuda.Stream(device, priority=priority), sm_count)


def priorities(num_lanes: int) -> list[int]:
    """Of each lane's streams, in CUDA's numbers: the lanes of decodes go before that of prefills.

    The first lane has the prefills where there are several; a decode step is short, and everybody
    in it waits for its next token.
    """
    return [0] + [-1] * (num_lanes - 1)


def open_shares(plan: UnitPlan, device: torch.device, stack: ExitStack) -> Shares:
    """What the lanes get of the device, as `lanes.kind` says or, with a word in the log, less."""
    urgent = priorities(plan.num_lanes)
    whole = [plain_share("whole", device, priority) for priority in urgent]
    if plan.spec.lanes.kind != "green" or plan.num_lanes == 1 or device.type != "cuda":
        return Shares(whole, whole)
    try:
        driver = open_driver()
        if driver.version < GREEN_SINCE:
            raise DriverError(f"found a driver for CUDA {driver.version}, expected {GREEN_SINCE}")
        total, granule = device_sms(device)
        counts = share_out(total, granule, plan.spec.lanes.sm_pct or ())
        own = open_green(driver, device, counts, urgent, stack)
    except DriverError as error:
        log.warning("event=lanes kind=stream wanted=green reason=%r", error.message)
        return Shares(whole, whole)
    log.info("event=lanes kind=green sms=%s", [share.sm_count for share in own])
    return Shares(whole, own)


def device_sms(device: torch.device) -> tuple[int, Granule]:
    """How many SMs the GPU has, and in what pieces they can be handed out."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, Granule.of((properties.major, properties.minor))


def open_green(
    driver: Driver,
    device: torch.device,
    counts: Sequence[int],
    urgent: Sequence[int],
    stack: ExitStack,
) -> list[Share]:
    """Shares of disjoint SMs, so many each (see `share_out`); `stack` destroys them.

    Raises DriverError.
    """
    _, granule = device_sms(device)
    split = GreenSplit(driver, device.index or 0, counts, granule.step, urgent)
    stack.callback(split.close)
    return [
        Share(f"green-{sms}", torch.cuda.ExternalStream(stream, device), sms)
        for stream, sms in zip(split.streams, split.sm_counts, strict=True)
    ]
