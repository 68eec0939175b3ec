"""When the next replan is due, from the clock alone: a restart changes nothing of it."""

from collections.abc import Iterator
from datetime import date, datetime, time

from muxrt.config.replan import DAY_S, Replan


def next_time(replan: Replan, now_s: float) -> float:
    """The first point of the schedule after `now_s`; both in seconds since 1970.

    A day of it begins at `at` on the clock of `timezone` and lasts until the next one does, be that
    23 or 25 hours. What is more often than daily comes at equal distances from its beginning, as
    many times as in a day of 24 hours at most. Where clocks leave `at` out, it is as much later as
    they were put forward; where they show it twice, it is the first time.
    """
    days = max(1, replan.every_s // DAY_S)
    today = datetime.fromtimestamp(now_s, replan.zone).toordinal()
    first = today - today % days - days
    while True:
        for point_s in _points(replan, first, days):
            if point_s > now_s:
                return point_s
        first += days


def _points(replan: Replan, first: int, days: int) -> Iterator[float]:
    """Of the `days` from the day of that number on."""
    begin_s, end_s = _begin(replan, first), _begin(replan, first + days)
    for number in range(max(1, DAY_S // replan.every_s)):
        point_s = begin_s + number * replan.every_s
        if point_s < end_s:
            yield point_s


def _begin(replan: Replan, day: int) -> float:
    hours, minutes = divmod(replan.at_minutes, 60)
    at = time(hours, minutes, tzinfo=replan.zone)
    return datetime.combine(date.fromordinal(day), at).timestamp()
