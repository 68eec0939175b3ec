"""MuxServe's workload and profile JSON: what is read, what `muxrt plan` makes of it, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine
from msgspec.structs import replace

from muxrt.config.placement import Slo
from muxrt.cost.profile import Cell, load_profile
from muxrt.errors import ConfigError
from muxrt.workload.arrivals import arrivals
from muxrt.workload.offered import offered
from muxrt.workload.spec import adjusted, load_workload
from muxrt.workload.trace import TraceRow, read_trace

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture
def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def request(model: str, prompt: int, output: int) -> dict[str, Any]:
    data = [[1, 15043], prompt, output]
    return {"model_name": model, "slo": None, "idx": 0, "time_stamp": {}, "data": data}


def workload() -> dict[str, Any]:
    return {
        "info": {"rates": [["hot", 1.5], ["cold", 0.2]], "start": 0, "duration": 10,
                 "num_requests": [3, 1], "distribution": "poisson", "prompt_len": None},
        "arrivals": [1.0, 2.0, 2.5, 4.0],
        "requests": [request("hot", 10, 5), request("cold", 400, 50), request("hot", 20, 6),
                     request("hot", 30, 7)],
    }  # fmt: skip


def write(folder: Path, value: Any, name: str = "x.json") -> Path:
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_workload_is_a_trace_that_names_models(tmp_path: Path) -> None:
    path = write(tmp_path, workload())
    rows = read_trace(path)
    assert rows[0] == TraceRow(0.0, 10, 5, "hot") and rows[-1] == TraceRow(3.0, 30, 7, "hot")
    found = load_workload(path)
    assert [m.name for m in found.models] == ["hot", "cold"] and found.duration_s == 10
    replayed = arrivals(found, rows)
    assert [(a.at_s, a.model) for a in replayed] == [
        (0, "hot"), (1, "cold"), (1.5, "hot"), (3, "hot"),
    ]  # fmt: skip


def test_a_workload_offers_its_stated_rates_and_each_models_lengths(tmp_path: Path) -> None:
    path = write(tmp_path, workload())
    slo = Slo(ttft_s=1, tpot_s=0.1)
    spec = load_workload(path)
    hot, cold = offered(replace(spec, slo=slo), read_trace(path))
    assert (hot.rate_rps, hot.prompt.mean, hot.output.mean) == (1.5, 20, 6)
    assert (cold.rate_rps, cold.prompt.mean, cold.output.mean_square) == (0.2, 400, 2500)
    fast = adjusted(spec, duration_s=None, speed=2, seed=None)
    assert fast.models[0].rate_rps == 3 and fast.trace is not None and fast.trace.speed == 2


def test_a_workload_that_goes_on_longer_than_it_says_is_kept_whole(tmp_path: Path) -> None:
    value = workload()
    value["info"]["duration"] = 2
    path = write(tmp_path, value)
    assert load_workload(path).duration_s == 4
    assert len(arrivals(load_workload(path), read_trace(path))) == 4


def test_rates_that_are_not_stated_are_counted(tmp_path: Path) -> None:
    value = workload()
    value["info"] = {"rates": None}
    spec = load_workload(write(tmp_path, value))
    assert spec.duration_s == 4  # three gaps of 1 s, and one after the last
    rows = read_trace(tmp_path / "x.json")
    found = offered(replace(spec, slo=Slo(ttft_s=1, tpot_s=0.1)), rows)
    assert {o.model: o.rate_rps for o in found} == {"hot": 0.75, "cold": 0.25}


def test_json_that_is_our_own_workload_stays_ours(tmp_path: Path) -> None:
    own = {"power_law": {"alpha": 1, "rate_rps": 2}, "duration_s": 7}
    assert load_workload(write(tmp_path, own)).duration_s == 7


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in workload().items() if name != key}


BAD_WORKLOADS: dict[str, tuple[Any, str]] = {
    "no arrivals": (without("arrivals"), ": object missing required field `arrivals`"),
    "one too few": (
        {**workload(), "arrivals": [1.0]},
        ": found 1 arrivals and 4 requests, expected as many",
    ),
    "no requests": (
        {**workload(), "requests": [], "arrivals": []},
        ": the workload has no requests",
    ),
    "an empty answer": (
        {**workload(), "requests": [request("a", 1, 0)] * 4},
        ": requests[0].data[2]: expected `int` >= 1",
    ),
    "a length that is text": (
        {**workload(), "requests": [request("a", "10", 1)] * 4},  # type: ignore[arg-type]
        ": requests[0].data[1]: expected `int`, got `str`",
    ),
    "before the start": (
        {**workload(), "arrivals": [1.0, -2.0, 3.0, 4.0]},
        ": arrivals[1]: expected `float` >= 0.0",
    ),
    "all at once, for no time": (
        {**workload(), "arrivals": [1.0] * 4, "info": {}},
        ": all arrive at once, expected info.duration, seconds above 0",
    ),
    "half a file": ('{"requests": [', ": input data was truncated"),
    "a list": ("[1, 2]", ": expected `object`, got `array`"),
}


@pytest.mark.parametrize("case", BAD_WORKLOADS)
def test_a_wrong_workload_gets_one_error(case: str, tmp_path: Path) -> None:
    value, expected = BAD_WORKLOADS[case]
    path = write(tmp_path, value)
    with pytest.raises(ConfigError) as caught:
        load_workload(path)
    assert caught.value.message == f"{path}{expected}"


def test_a_trace_of_other_models_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, workload())
    spec = load_workload(path)
    with pytest.raises(
        ConfigError, match=r"x.json: the trace asks for 'cold', the workload has: hot$"
    ):
        arrivals(replace(spec, models=spec.models[:1]), read_trace(path))


def profile() -> dict[str, Any]:
    """The shipped profile of the 7B on one GPU, as MuxServe writes it."""
    found: dict[str, Any] = {}
    for cell in load_profile(CONFIGS / "profiles" / "llama_a100.yaml").of("llama-7b", 1):
        at: dict[str, Any] = found
        for key in (cell.model, cell.tp, cell.sm_pct, cell.batch):
            at = at.setdefault(str(key), {})
        at[str(cell.seq_len)] = {"prefill": ms(cell.prefill_s), "decoding": ms(cell.decode_s)}
    found["llama-7b"]["1"]["30"]["1"]["9999"] = {"prefill": -1, "decoding": -1}
    return found


def ms(seconds: float | None) -> float:
    return -1 if seconds is None else 1000 * seconds


def test_a_profile_has_the_cells_of_the_table(tmp_path: Path) -> None:
    found = load_profile(write(tmp_path, profile()))
    table = load_profile(CONFIGS / "profiles" / "llama_a100.yaml").of("llama-7b", 1)
    assert (found.gpu, found.keys, found.title) == ("a100-80g", (("llama-7b", 1),), "x.json")
    assert len(found.cells) == len(table)  # what was not measured at all is no cell
    for ours, theirs in zip(sorted(found.cells, key=place), sorted(table, key=place), strict=True):
        assert place(ours) == place(theirs)
        assert ours.prefill_s == pytest.approx(theirs.prefill_s)
        assert ours.decode_s == pytest.approx(theirs.decode_s)
    assert any(cell.prefill_s is None for cell in found.cells)


def place(cell: Cell) -> tuple[int, int, int]:
    return cell.sm_pct, cell.batch, cell.seq_len


ONE = {"llama-7b": {"1": {"30": {"64": {"512": {"prefill": 1611.2, "decoding": 37.7}}}}}}
BAD_PROFILES: dict[str, tuple[str, str, str]] = {
    "a model of unknown shape": (
        "llama-7b", "my-7b", ": my-7b: found 'my-7b', expected one of llama-7b, ",
    ),
    "a share above 100 %": (
        '"30"', '"130"', ": llama-7b.1.130.64.512: found prefill 1611.2 and decoding 37.7",
    ),
    "a time below 0": ("37.7", "-2", ": llama-7b.1.30.64.512: found prefill 1611.2 and"),
    "a batch in words": ('"64"', '"many"', ": llama-7b.1.30.many.512: found prefill 1611.2"),
    "nothing measured": ('1611.2, "decoding": 37.7', '-1, "decoding": -1', ": the profile has"),
    "one phase": (', "decoding": 37.7', "", ": object missing required field `decoding`"),
    "no file of theirs": ('{"llama-7b"', '[{"llama-7b"', ": expected `object`, got `array`"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PROFILES)
def test_a_wrong_profile_gets_one_error(case: str, tmp_path: Path) -> None:
    old, new, expected = BAD_PROFILES[case]
    text = json.dumps(ONE)
    assert text.count(old) == 1
    path = write(tmp_path, text.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    assert caught.value.message.startswith(f"{path}{expected}")
    assert "\n" not in caught.value.message


PLAN = """\
cluster: {nodes: [{gpu: a100-80g, gpus: 2}]}
profiles: [profile.json]
workload: traffic.json
models: [{name: hot, preset: llama-7b}, {name: cold, preset: llama-7b}]
"""


def test_plan_takes_both(command_line: CommandLine, tmp_path: Path) -> None:
    write(tmp_path, profile(), "profile.json")
    write(tmp_path, workload(), "traffic.json")
    plan = write(tmp_path, PLAN, "plan.yaml")
    answer = command_line(
        "plan", plan, "--ttft", 1, "--tpot", 0.1, "--json", "--strategy", "muxserve"
    )
    assert answer.code == 0, answer.err
    data = json.loads(answer.out)
    assert data["offered_rps"] == pytest.approx(1.7)
    assert {unit["times_from"] for unit in data["units"]} == {"profile.json"}


def test_plan_says_what_is_wrong_with_them(command_line: CommandLine, tmp_path: Path) -> None:
    write(tmp_path, ONE, "profile.json")  # one cell is too little for a fit
    traffic = write(tmp_path, "{", "traffic.json")
    plan = write(tmp_path, PLAN, "plan.yaml")
    wrong = command_line("plan", plan, "--ttft", 1, "--tpot", 0.1)
    assert wrong.code == 2 and wrong.err.count("\n") == 1 and str(traffic) in wrong.err
    write(tmp_path, workload(), "traffic.json")
    wrong = command_line("plan", plan, "--ttft", 1, "--tpot", 0.1)
    assert wrong.code == 2 and "has 1 prefill cells of llama-7b tp 1" in wrong.err
    assert "cold has no slo" in command_line("plan", plan).err.replace("hot", "cold")
