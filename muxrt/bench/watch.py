"""What the server's own /metrics says while a benchmark runs, where the server is muxrt."""

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import aiohttp

from muxrt.bench.client import CONNECT_S
from muxrt.bench.job import Target

PERIOD_S = 1.0
USED, QUOTA, BORROWED = "muxrt_blocks_used", "muxrt_blocks_quota", "muxrt_blocks_borrowed"
GAUGES = (USED, QUOTA, BORROWED)
PREEMPTED = "muxrt_preemptions_total"
_SAMPLE = re.compile(r"(\w+)\{([^}]*)\}\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Reading = Mapping[str, Mapping[str, float]]  # metric -> model -> value, all units together


@dataclass(slots=True)
class ModelBlocks:
    """One model's blocks over a run; `used` and `borrowed` are the most that were seen."""

    used: int = 0
    quota: int = 0
    borrowed: int = 0
    preempted: int = 0

    def see(self, used: int, quota: int, borrowed: int) -> None:
        """Take in one reading of the gauges."""
        self.used, self.borrowed = max(self.used, used), max(self.borrowed, borrowed)
        self.quota = quota


@dataclass(slots=True)
class Blocks:
    """All models' blocks over a run; `total` is the most of all models at one time."""

    models: dict[str, ModelBlocks] = field(default_factory=dict)
    total: ModelBlocks = field(default_factory=ModelBlocks)
    _first: dict[str, float] = field(default_factory=dict)

    def add(self, reading: Reading) -> None:
        """Take in one reading; counters count from the first."""
        for model in reading.get(USED, {}):
            seen = self.models.setdefault(model, ModelBlocks())
            seen.see(*(int(reading.get(name, {}).get(model, 0)) for name in GAUGES))
            preempted = reading.get(PREEMPTED, {}).get(model, 0.0)
            # A restarted unit counts from 0 again: then its own count is all there is.
            before = min(self._first.setdefault(model, preempted), preempted)
            seen.preempted = max(seen.preempted, int(preempted - before))
        self.total.see(*(int(sum(reading.get(name, {}).values())) for name in GAUGES))
        self.total.preempted = sum(seen.preempted for seen in self.models.values())


def parse_metrics(text: str) -> Reading:
    """The samples of Prometheus text that have a `model` label, added up over other labels."""
    reading: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, model, value in _samples(text):
        reading[name][model] += value
    return reading


def _samples(text: str) -> Iterator[tuple[str, str, float]]:
    for match in _SAMPLE.finditer(text):
        labels = dict(_LABEL.findall(match[2]))
        if "model" in labels:
            yield match[1], labels["model"], float(match[3])


@asynccontextmanager
async def watching(http: aiohttp.ClientSession, targets: Sequence[Target]) -> AsyncIterator[Blocks]:
    """Read /metrics once a second inside the block, and once more when it ends."""
    blocks = Blocks()
    task = asyncio.create_task(_poll(http, targets, blocks))
    try:
        yield blocks
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await _read_all(http, targets, blocks)


async def _poll(http: aiohttp.ClientSession, targets: Sequence[Target], blocks: Blocks) -> None:
    while True:
        await _read_all(http, targets, blocks)
        await asyncio.sleep(PERIOD_S)


async def _read_all(http: aiohttp.ClientSession, targets: Sequence[Target], blocks: Blocks) -> None:
    """One reading of all; what no server has is not added."""
    texts = await asyncio.gather(*(_read(http, target) for target in targets))
    with suppress(ValueError):  # no number where Prometheus text has one
        if any(texts):
            blocks.add(parse_metrics("\n".join(texts)))


async def _read(http: aiohttp.ClientSession, target: Target) -> str:
    """What /metrics says; nothing for a server without it, which is none of our business."""
    try:
        limit = aiohttp.ClientTimeout(total=CONNECT_S)
        async with http.get(f"{target.root}/metrics", timeout=limit) as response:
            return await response.text(errors="replace") if response.status == 200 else ""
    except (aiohttp.ClientError, TimeoutError):
        return ""
