"""/ready: whether every model answers, and what is missing."""

from collections.abc import Iterable, Mapping

import msgspec

from muxrt.server.dispatch import Dispatcher
from muxrt.server.unit_process import UnitProcess, UnitState


class Readiness(msgspec.Struct, frozen=True):
    """The body of GET /ready."""

    ready: bool
    message: str  # for people
    missing: list[str]  # models that do not answer


def readiness(dispatcher: Dispatcher, units: Mapping[str, UnitProcess]) -> Readiness:
    """What the endpoint can do now."""
    missing = [name for name in dispatcher.models if not dispatcher.is_served(name)]
    if dispatcher.is_draining:
        return Readiness(False, "shutting down", missing)
    if not missing:
        return Readiness(True, "every model answers" + _warning(units.values()), missing)
    return Readiness(False, "; ".join(_words(units.values())), missing)


def _warning(units: Iterable[UnitProcess]) -> str:
    """What nobody may overlook: a null executor's tokens look like an answer."""
    if any(model.is_made_up for unit in units for model in unit.models.values()):
        return ", but tokens are MADE UP by a null executor"
    return ""


def _words(units: Iterable[UnitProcess]) -> list[str]:
    return [describe(unit) for unit in units if not unit.is_ready]


def describe(unit: UnitProcess) -> str:
    """What a unit does, in a few words: `unit main: loading weights of a, 40 %`."""
    words = f"unit {unit.name}: {unit.state.value}"
    if unit.state is UnitState.DOWN and unit.error:
        return f"{words}, {unit.error}"
    loading = unit.loading
    if unit.state is not UnitState.LOADING or loading is None:
        return words
    model = f" of {loading.model}" if loading.model else ""
    share = f", {100 * loading.done // loading.total} %" if loading.total else ""
    return f"{words} {loading.stage}{model}{share}"
