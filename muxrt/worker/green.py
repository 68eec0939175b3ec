"""Green contexts: streams whose kernels run on disjoint sets of SMs of one device.

CUDA Driver API, "Green Contexts": one split of the device's SM resource gives groups that share no
SM; a context over some of them; streams in it. Memory, modules and the primary context are common.
Contexts that were split off separately may overlap, so all lanes of a split come from one call.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

from muxrt.errors import ConfigError
from muxrt.worker.driver import Driver, DriverError

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: the only flag that green streams may have
BALANCED_SINCE = 13010  # the driver's version from which on work queues can be kept apart


@dataclass(frozen=True, slots=True)
class Granule:
    """In what pieces a device's SMs can be handed out."""

    least: int  # SMs of a part
    step: int  # of which a part has a multiple

    @classmethod
    def of(cls, capability: tuple[int, int]) -> "Granule":
        """Of a compute capability, as the documentation of cuDevSmResourceSplitByCount has it."""
        major, _ = capability
        if major >= 9:
            return cls(8, 8)
        return cls(4, 2) if major == 8 else cls(2, 2)


def share_out(total: int, granule: Granule, percents: Sequence[int]) -> tuple[int, ...]:
    """SMs of each lane: all that there are, in proportion to `percents`, in whole granules.

    The last lane has what is left over, which need be no multiple. Raises ConfigError where a lane
    would have too few.
    """
    step, whole = granule.step, sum(percents)
    counts = [
        max(granule.least, round(total * percent / whole / step) * step)
        for percent in percents[:-1]
    ]
    # What rounding up took from the last lane, the largest of the others gives back.
    while counts and total - sum(counts) < granule.least:
        largest = max(range(len(counts)), key=lambda lane: counts[lane])
        if counts[largest] - step < granule.least:
            break
        counts[largest] -= step
    counts.append(total - sum(counts))
    if counts[-1] < granule.least:
        raise ConfigError(
            f"lanes.sm_pct: found {len(percents)} lanes, expected at most {total // granule.least}:"
            f" this GPU has {total} SMs, and green contexts at least {granule.least} each"
        )
    return tuple(counts)


class GreenSplit:
    """One split of a device: a green context and a stream per lane. Owns both."""

    def __init__(
        self,
        driver: Driver,
        ordinal: int,
        counts: Sequence[int],
        step: int,
        priorities: Sequence[int],
    ) -> None:
        """`counts` as `share_out` gave them; lower numbers of `priorities` go first.

        Raises DriverError, with nothing left open.
        """
        self._resources = ExitStack()
        with ExitStack() as stack:
            device = driver.call("cuDeviceGet", ordinal)
            groups = self._split(driver, device, counts, step)
            queues = _balanced_queues(driver, device)
            self.streams: list[int] = []  # CUstream handles, by lane
            self.sm_counts: list[int] = []
            for resources, priority in zip(groups, priorities, strict=True):
                stream, sms = self._open(driver, device, [*resources, *queues], priority, stack)
                self.streams.append(stream)
                self.sm_counts.append(sms)
            self._resources = stack.pop_all()

    @staticmethod
    def _split(driver: Driver, device: Any, counts: Sequence[int], step: int) -> list[list[Any]]:
        """The resources of each lane, from ONE call: groups of `step` SMs, and the rest."""
        api = driver.api
        sms = driver.call(
            "cuDeviceGetDevResource", device, api.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        )
        if len(counts) == 1:
            return [[sms]]
        wanted = sum(counts[:-1]) // step
        groups, _, rest = driver.call("cuDevSmResourceSplitByCount", wanted, sms, 0, step)
        found = [group.sm.smCount for group in groups]
        if found != [step] * wanted:
            raise DriverError(f"found groups of {found} SMs, expected {wanted} of {step}")
        ends = [sum(counts[: lane + 1]) // step for lane in range(len(counts) - 1)]
        begins = [0, *ends[:-1]]
        parts = [groups[begin:end] for begin, end in zip(begins, ends, strict=True)]
        return [*parts, [rest]]

    @staticmethod
    def _open(
        driver: Driver, device: Any, resources: list[Any], priority: int, stack: ExitStack
    ) -> tuple[int, int]:
        """(stream, SMs) of a new context over `resources`; `stack` closes them."""
        api = driver.api
        descriptor = driver.call("cuDevResourceGenerateDesc", resources, len(resources))
        flags = api.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        context = driver.call("cuGreenCtxCreate", descriptor, device, flags)
        stack.callback(driver.call, "cuGreenCtxDestroy", context)
        stream = driver.call("cuGreenCtxStreamCreate", context, NON_BLOCKING, priority)
        stack.callback(driver.call, "cuStreamDestroy", stream)
        kind = api.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        return int(stream), driver.call("cuGreenCtxGetDevResource", context, kind).sm.smCount

    def close(self) -> None:
        """Destroy streams and contexts; their work must be done."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _balanced_queues(driver: Driver, device: Any) -> list[Any]:
    """Work queues that lanes do not share, so that none waits behind another's kernels."""
    api = driver.api
    kind = getattr(api.CUdevResourceType, "CU_DEV_RESOURCE_TYPE_WORKQUEUE_CONFIG", None)
    if kind is None or driver.version < BALANCED_SINCE:
        return []
    queues = driver.call("cuDeviceGetDevResource", device, kind)
    scope = api.CUdevWorkqueueConfigScope.CU_WORKQUEUE_SCOPE_GREEN_CTX_BALANCED
    queues.wqConfig.sharingScope = scope
    return [queues]
