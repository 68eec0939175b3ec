"""Our own server against the simulator: a short run of the script, and what is published."""

import sys
from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "configs" / "demo_models"
sys.path.append(str(ROOT / "scripts"))

import server_runs  # noqa: E402
import validate_server  # noqa: E402


def test_a_short_run_serves_and_simulates_the_same_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole of it with a small model: profile, server, client, simulator, tables, picture."""
    out = tmp_path / "v.json"
    options = ["--loads", "0.1", "--runs", "2", "--seconds", "2", "--budget", "5", "--quick"]
    folders = [
        "--folders",
        str(DEMO / "pydoc-s"),
        "--lanes",
        "1",
        "--plot",
        str(tmp_path / "p.png"),
    ]
    monkeypatch.setattr(
        sys, "argv", ["validate_server.py", "measure", "--out", str(out), *options, *folders]
    )
    # A larger machine than two cores would be asked for more than a test should.
    monkeypatch.setattr(validate_server, "capacity_rps", lambda world, asked: 40.0)
    validate_server.main()
    shown = capsys.readouterr().out
    assert "| pydoc-s decode |" in shown and "| 10% (4.0/s) |" in shown
    assert (tmp_path / "p.png").stat().st_size > 10_000
    record = msgspec.json.decode(out.read_bytes(), type=server_runs.Record)
    [setup] = record.setups
    [load] = setup.loads
    run = server_runs.replay(server_runs.world(setup, tmp_path), load.asked)
    assert len(load.asked) == len(run.ttft_s) > 0
    for served in load.runs:
        # One token comes from the prefill, and all prompts are computed: no prefix is reused.
        assert _tokens(served) == _tokens(run)
        assert len(served.ttft_s) == len(load.asked) and min(served.ttft_s) > 0


def _tokens(run: server_runs.Run) -> dict[tuple[str, str], int]:
    return {(b.model, b.phase.value): b.tokens for b in run.batches}


def test_figures_compare_the_mean_of_runs_with_the_simulator() -> None:
    asked = (server_runs.Asked(0.0, "a", 10, 3), server_runs.Asked(1.0, "a", 10, 1))
    runs = tuple(server_runs.Run((ttft, ttft), (0.1, None), 4.0, ()) for ttft in (0.9, 1.1))
    load = server_runs.Load(0.5, 2.0, asked, runs)
    simulated = tuple(server_runs.Run((ttft, ttft), (0.1, None), 5.0, ()) for ttft in (1.0, 1.2))
    lines = {line.what: line for line in server_runs.figures(load, simulated)}
    assert lines["TTFT mean"].mean == pytest.approx(1000)
    assert lines["TTFT mean"].spread == pytest.approx(0.2)
    assert lines["TTFT mean"].error == pytest.approx(0.1)
    assert lines["throughput"].measured == (1.0, 1.0)
    assert lines["throughput"].error == pytest.approx(-0.2)
    assert lines["TPOT p50"].error == pytest.approx(0)


@pytest.mark.parametrize(
    ("name", "steps", "tpot", "ttft"), [("1", 0.03, 0.055, 0.05), ("1+1", 0.035, 0.2, 0.08)]
)
def test_the_published_runs_are_predicted_as_well_as_the_page_says(
    name: str, steps: float, tpot: float, ttft: float
) -> None:
    """Requests and times of the real server; the brain and the simulator as they are now."""
    published = ROOT / "docs" / "benchmarks" / "validation_server.json"
    record = msgspec.json.decode(published.read_bytes(), type=server_runs.Record)
    (setup,) = (one for one in record.setups if one.name == name)
    world = server_runs.world(setup, published.parent)
    runs = [(load, server_runs.replays(world, load.asked)) for load in setup.loads]
    assert len(runs) == 5 and all(len(load.runs) == 5 for load, _ in runs)
    for load, several in runs:
        error = {line.what: abs(line.error) for line in server_runs.figures(load, several)}
        assert error["throughput"] < 0.03
        assert error["TPOT mean"] < tpot and error["TTFT mean"] < ttft, (load.load, error)
    assert max(abs(line.error) for line in server_runs.steps(runs)) < steps
