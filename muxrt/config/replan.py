"""When a server plans anew by its own traffic, and on what terms."""

from collections.abc import Iterator
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

import msgspec
from msgspec import Meta

from muxrt.config.document import KeyedError
from muxrt.config.placement import Count, Name, NotNegative, Slo
from muxrt.config.schema import DURATION, TIME_OF_DAY, seconds_of

Duration = Annotated[str, Meta(pattern=DURATION)]
TimeOfDay = Annotated[str, Meta(pattern=TIME_OF_DAY)]

DAY_S = 86400
LEAST_WINDOW_S, MOST_WINDOW_S = 900, 7 * DAY_S  # as `muxrt replan --window` has them


class Replan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A placement planned anew from the traffic log: the options of `muxrt replan`."""

    plan: Name  # cluster, profiles and engine facts, as `muxrt plan` reads; relative to the YAML
    every: Duration = "24h"  # a part of a day, or days
    at: TimeOfDay = "04:00"  # where a day of it begins
    timezone: Name = "UTC"  # of `at` and of weekends, such as Europe/Berlin
    strategy: Literal["auto", "muxserve", "spatial", "temporal"] = "auto"
    window: Duration = "24h"  # planned for
    quantile: Annotated[float, Meta(ge=0.01, le=0.99)] = 0.5  # of each hour's traffic: the risk
    margin: NotNegative = 1.0  # a change must earn its cost, and so many times more
    least_gain: NotNegative = 0.02  # and this share of the goodput
    least_history: Duration = "24h"  # of traffic to plan by
    most_age: Duration = "6h"  # of the newest request
    scenarios: Count = 3
    slo: Slo | None = None  # of models that have none
    timeout: Duration = "1h"  # of the planner; then nothing changes

    @property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.timezone)

    @property
    def every_s(self) -> int:
        return round(seconds_of(self.every))

    @property
    def at_minutes(self) -> int:
        """Since midnight."""
        hours, minutes = self.at.split(":")
        return 60 * int(hours) + int(minutes)


def is_zone(name: str) -> bool:
    """Whether this machine knows a time zone of that name."""
    try:
        ZoneInfo(name)
    # Unknown, a path, a folder of zones.
    except (KeyError, ValueError, OSError):
        return False
    return True


def replan_problems(replan: Replan) -> Iterator[KeyedError]:
    """What contradicts itself."""
    if not is_zone(replan.timezone):
        yield KeyedError(
            ("replan", "timezone"),
            f"found {replan.timezone!r}, expected UTC, or a name such as Europe/Berlin that this"
            " machine knows",
        )
    every_s = seconds_of(replan.every)
    if every_s < 1 or every_s % 1 or (DAY_S % every_s and every_s % DAY_S):
        yield KeyedError(
            ("replan", "every"),
            f"found {replan.every!r}, expected a part of a day such as 6h, or days such as 48h",
        )
    if not LEAST_WINDOW_S <= seconds_of(replan.window) <= MOST_WINDOW_S:
        yield KeyedError(("replan", "window"), f"found {replan.window!r}, expected 15min to 7d")
    if not seconds_of(replan.timeout):
        yield KeyedError(("replan", "timeout"), f"found {replan.timeout!r}, expected more than 0s")
