"""The machines to plan for: nodes, and the kinds of GPU in them."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from muxrt.config.document import Key, KeyedError
from muxrt.config.placement import Count, Name, NotNegative, Positive

MAX_GPUS_PER_NODE, MAX_NODES = 128, 10_000  # beyond what is built; a plan would take hours


class GpuKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One kind of GPU; bandwidths in bytes/s, dense fp16 FLOP/s.

    Or, on a CPU, a set of cores that one unit takes, or one rank of it: `sms` are its cores, a
    share is a lane's part of them.
    """

    name: Name
    device: Literal["gpu", "cpu"] = "gpu"
    memory_bytes: Count
    bandwidth_bytes_per_s: Positive
    flops: Positive
    sms: Count
    link_bytes_per_s: Positive  # to the other GPUs of its node, one direction
    # Of a message to one of them, whatever its size; 0 = no more than a layer's launches hide.
    link_latency_s: NotNegative = 0.0
    power_w: NotNegative = 0.0  # 0 = not stated
    price_per_hour: NotNegative = 0.0  # 0 = not stated


class NodeGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Identical machines."""

    gpu: Name  # a kind
    gpus: Annotated[int, Meta(ge=1, le=MAX_GPUS_PER_NODE)] = 8  # per node
    count: Annotated[int, Meta(ge=1, le=MAX_NODES)] = 1


class Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Nodes, possibly of several kinds; `kinds` adds to the known GPUs or replaces one."""

    nodes: tuple[NodeGroup, ...]
    kinds: tuple[GpuKind, ...] = ()
    network_bytes_per_s: Positive = 25e9  # between nodes, per node: 200 Gb/s
    # For `muxrt replan`: weights from where they are kept into the memory of a node, all its units
    # together (assumed: one NVMe disk), and what a unit takes to start beside them (3.4 s: our
    # server of three small models on two cores; no unit on a GPU was measured).
    load_bytes_per_s: Positive = 2e9
    unit_start_s: NotNegative = 3.4

    @property
    def num_gpus(self) -> int:
        return sum(group.count * group.gpus for group in self.nodes)

    @property
    def is_cpu(self) -> bool:
        """Whether its only machine is planned by its cores."""
        return any(self.kind(group.gpu).device == "cpu" for group in self.nodes)

    def kind(self, name: str) -> GpuKind:
        """The GPU called `name`; KeyError where nobody knows it."""
        return {**KINDS, **{kind.name: kind for kind in self.kinds}}[name]


def _kind(
    name: str,
    memory_gb: float,
    bandwidth: float,
    flops: float,
    sms: int,
    link: float,
    power_w: float,
) -> GpuKind:
    return GpuKind(
        name=name,
        memory_bytes=round(memory_gb * 10**9),
        bandwidth_bytes_per_s=bandwidth,
        flops=flops,
        sms=sms,
        link_bytes_per_s=link,
        power_w=power_w,
    )


# NVIDIA's data sheets (A100: June 2021; H100 and H200 SXM: 2023, 2024; L4, L40S: 2023): dense fp16,
# one direction of NVLink or PCIe. No prices: they are the reader's.
KINDS = {
    kind.name: kind
    for kind in (
        _kind("a100-40g", 40, 1.555e12, 312e12, 108, 300e9, 400),
        _kind("a100-80g", 80, 2.039e12, 312e12, 108, 300e9, 400),
        _kind("h100-80g", 80, 3.35e12, 989e12, 132, 450e9, 700),
        _kind("h200-141g", 141, 4.8e12, 989e12, 132, 450e9, 700),
        _kind("l4-24g", 24, 300e9, 121e12, 58, 32e9, 72),
        _kind("l40s-48g", 48, 864e9, 362e12, 142, 32e9, 350),
    )
}


def cluster_problems(cluster: Cluster, at: Key) -> Iterator[KeyedError]:
    """What contradicts itself in a cluster that stands under the key `at`."""
    if not cluster.nodes:
        yield KeyedError(
            (*at, "nodes"), "found an empty list, expected at least one group of nodes"
        )
    own = [kind.name for kind in cluster.kinds]
    for index, name in enumerate(own):
        if name in own[:index]:
            yield KeyedError((*at, "kinds", index, "name"), f"{name!r} is already in the list")
    known = [*KINDS, *(name for name in own if name not in KINDS)]
    for index, group in enumerate(cluster.nodes):
        if group.gpu not in known:
            close = get_close_matches(group.gpu, known, n=1, cutoff=0.4)
            hint = f"; the nearest is {close[0]}" if close else ""
            yield KeyedError(
                (*at, "nodes", index, "gpu"),
                f"found {group.gpu!r}, expected one of {', '.join(known)}{hint},"
                f" or describe it in {'.'.join([*map(str, at), 'kinds'])}",
            )
            return
    if cluster.is_cpu and (len(cluster.nodes) > 1 or cluster.nodes[0].count > 1):
        yield KeyedError(
            (*at, "nodes"),
            "found a CPU among several nodes, expected one node: `muxrt serve` runs on one machine"
            " and has no worker for GPUs",
        )
