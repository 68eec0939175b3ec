"""From one placement to another: steps in order, nothing started that is there already."""

import msgspec
import pytest

from muxrt.config.placement import Memory, ModelSpec, UnitModel, UnitSpec
from muxrt.engine.reconcile import Change, Deployment, Kind, check_room, diff
from muxrt.errors import ConfigError
from muxrt.planner.diff import diff as planned


def deployment(units: dict[str, str], kv_bytes: int = 1 << 20, **model: object) -> Deployment:
    """`units`: models as letters, by unit."""
    names = sorted({name for models in units.values() for name in models})
    return Deployment(
        tuple(ModelSpec(name=name, path=f"models/{name}", **model) for name in names),  # type: ignore[arg-type]
        tuple(
            UnitSpec(
                name=unit,
                models=tuple(UnitModel(name=name) for name in models),
                memory=Memory(kv_bytes=kv_bytes),
            )
            for unit, models in units.items()
        ),
    )


def steps(change: Change) -> list[str]:
    return [f"{step.kind.value} {step.unit} {step.model}".strip() for step in change.steps]


def test_what_is_there_already_takes_no_step() -> None:
    change = diff(deployment({"x": "ab"}), deployment({"x": "ab"}))
    assert steps(change) == []


def test_a_name_alone_is_no_difference() -> None:
    change = diff(deployment({"x": "ab"}), deployment({"y": "ab"}))
    assert steps(change) == [] and change.after.units[0].name == "x"


def sleepy(units: dict[str, str], weight_bytes: int = 1 << 30) -> Deployment:
    """Likewise, where models may sleep."""
    found = deployment(units)
    memory = Memory(kv_bytes=1 << 20, weight_bytes=weight_bytes)
    placed = tuple(msgspec.structs.replace(unit, memory=memory) for unit in found.units)
    return msgspec.structs.replace(found, units=placed)


ANEW = ["load x.2", "switch", "drain x", "free x"]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (sleepy({"x": "abc"}), sleepy({"x": "ca"}), ["switch", "forget x b"]),
        (sleepy({"x": "abc"}), sleepy({"y": "c"}), ["switch", "forget x a", "forget x b"]),
        # Who is the same is kept before who was larger: y becomes x's model, x is z now.
        (sleepy({"x": "ab", "y": "a"}), sleepy({"x": "a", "z": "b"}), ["switch", "forget x a"]),
        (sleepy({"x": "ab"}), sleepy({"x": "abc"}), ANEW),
        (sleepy({"x": "ab"}), sleepy({"x": "a"}, 1 << 29), ANEW),
        (deployment({"x": "ab"}), deployment({"x": "a"}), ANEW),
    ],
)
def test_a_unit_that_only_loses_models_goes_on(
    before: Deployment, after: Deployment, expected: list[str]
) -> None:
    change = diff(before, after)
    assert steps(change) == expected
    placed = [[part.name for part in unit.models] for unit in change.after.units]
    assert placed == [[part.name for part in unit.models] for unit in after.units]


def tuned(period_s: float, quota: float | None) -> Deployment:
    """A unit of two models in either order, one of them with a quota and half of the traffic."""
    found = deployment({"x": "ab" if quota is None else "ba"})
    (unit,) = found.units
    models = tuple(
        msgspec.structs.replace(part, quota=quota, traffic=1.0 if quota is None else 0.5)
        for part in unit.models
    )
    scheduling = msgspec.structs.replace(unit.scheduling, quota_period_s=period_s)
    unit = msgspec.structs.replace(unit, models=models, scheduling=scheduling)
    return msgspec.structs.replace(found, units=(unit,))


def test_a_planner_keeps_what_a_server_keeps() -> None:
    """Quotas that move by themselves were kept by the plan, and the unit was started anew."""
    change = diff(tuned(2.0, None), tuned(2.0, 0.3))
    assert steps(change) == ["switch"], "the router's shares are new, no process is"
    assert change.after.units[0].models[0].traffic == 0.5
    assert planned(tuned(2.0, None).units, tuned(2.0, 0.3).units).is_empty
    assert "load x.2" in steps(diff(tuned(0.0, None), tuned(0.0, 0.3)))
    assert not planned(tuned(0.0, None).units, tuned(0.0, 0.3).units).is_empty


def test_new_units_are_ready_before_anything_goes_to_them() -> None:
    change = diff(deployment({"x": "ab", "y": "c"}), deployment({"x": "a", "z": "b", "y": "c"}))
    assert steps(change) == ["load x.2", "load z", "switch", "drain x", "free x"]
    assert [unit.name for unit in change.after.units] == ["x.2", "z", "y"]


def test_applied_twice_it_is_done() -> None:
    wanted = deployment({"x": "a", "z": "b"})
    change = diff(deployment({"x": "ab"}), wanted)
    assert steps(diff(change.after, wanted)) == []


def test_back_and_forth_names_stay_apart() -> None:
    first, second = deployment({"x": "ab"}), deployment({"x": "a", "y": "b"})
    there = diff(first, second).after
    back = diff(there, first)
    assert [unit.name for unit in back.after.units] == ["x"]
    assert steps(back) == ["load x", "switch", "drain x.2", "free x.2", "drain y", "free y"]


def test_twins_are_kept_one_by_one() -> None:
    change = diff(deployment({"x": "a", "y": "a"}), deployment({"y": "a"}))
    assert steps(change) == ["switch", "drain x", "free x"]


def test_limits_of_the_endpoint_start_no_unit() -> None:
    change = diff(deployment({"x": "a"}), deployment({"x": "a"}, max_queue=3, rate_rps=9.0))
    assert steps(change) == ["switch"]


def test_another_folder_under_the_same_name_is_another_model() -> None:
    before = deployment({"x": "a"})
    moved = msgspec.structs.replace(before.models[0], path="elsewhere")
    assert Kind.LOAD in [s.kind for s in diff(before, Deployment((moved,), before.units)).steps]


def test_more_memory_than_allowed_is_refused_with_figures() -> None:
    change = diff(deployment({"x": "a"}), deployment({"x": "a"}, kv_bytes=2 << 20))
    assert check_room(change, {"x.2": 500}, 500) == 500
    with pytest.raises(ConfigError, match=r"x\.2 take 501 bytes .* admin\.max_extra_bytes = 500"):
        check_room(change, {"x.2": 501}, 500)


def test_units_with_roles_are_not_changed_at_run_time() -> None:
    before = deployment({"x": "a", "y": "a"})
    parts = ("prefill", "decode")
    units = tuple(
        msgspec.structs.replace(unit, models=(UnitModel(name="a", role=role),))  # type: ignore[arg-type]
        for unit, role in zip(before.units, parts, strict=True)
    )
    with pytest.raises(ConfigError, match="has roles"):
        diff(before, Deployment(before.models, units))
