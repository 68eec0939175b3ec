"""The comparison of policies in short: its cases run, and `slo` serves no fewer in time."""

import sys
from dataclasses import replace
from math import log
from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))

from bench_record import read  # noqa: E402
from compare_policies import (  # noqa: E402
    POLICIES,
    Score,
    fairness,
    geometric_mean,
    largest_rate,
    page_table,
    ratios,
    score,
)
from policy_cases import CASES, TUNED, Case  # noqa: E402

from muxrt.config.serve import check_references  # noqa: E402

SECONDS = {False: 15.0, True: 3.0}  # of load, on GPUs and on a CPU
SOME = (
    "calm",
    "overload",
    "long-beside-chat",
    "tight-tpot",
    "bursts",
    "azure-code",
    "demo-overload",
)


def short(name: str) -> Case:
    """The first seconds of a case."""
    case = CASES[name]
    traffic = msgspec.structs.replace(case.traffic, duration_s=SECONDS[case.is_cpu])
    return replace(case, traffic=traffic)


@pytest.fixture(scope="module")
def scores() -> dict[tuple[str, str], Score]:
    return {(n, p): score(short(n), p, seed=3) for n in SOME for p in ("adbs", "slo")}


@pytest.mark.parametrize("name", SOME)
def test_slo_serves_no_fewer_in_time(name: str, scores: dict[tuple[str, str], Score]) -> None:
    ours, theirs = scores[name, "slo"], scores[name, "adbs"]
    assert ours.goodput_rps >= theirs.goodput_rps > 0 or name == "demo-overload"
    assert ours.output_tokens_per_s > 0.95 * theirs.output_tokens_per_s


def test_and_more_in_the_mean(scores: dict[tuple[str, str], Score]) -> None:
    pairs = [(scores[n, "slo"].goodput_rps, scores[n, "adbs"].goodput_rps) for n in SOME]
    gains = [log(ours / theirs) for ours, theirs in pairs if theirs]
    assert sum(gains) / len(gains) > log(1.1)


@pytest.mark.parametrize("name", CASES)
def test_every_case_can_be_served_by_every_policy(name: str) -> None:
    for policy in POLICIES:
        check_references(CASES[name].config(policy))
    assert CASES[name].requests(1)
    assert set(CASES) > TUNED


def test_all_policies_get_the_same_requests_and_other_seeds_others() -> None:
    assert CASES["skewed"].requests(5) == CASES["skewed"].requests(5)
    assert CASES["skewed"].requests(5) != CASES["skewed"].requests(6)


def test_fairness_is_one_where_all_have_what_they_need_in_proportion() -> None:
    assert fairness({"a": 0.2, "b": 0.4}, {"a": 1, "b": 2}) == pytest.approx(1)
    assert fairness({"a": 0.2, "b": 0.0}, {"a": 1, "b": 1}) == pytest.approx(0.5)


def test_ratios_are_of_means_over_seeds() -> None:
    rows = [
        {"case": "x", "policy": policy, "goodput_rps": value}
        for policy, values in (("adbs", (1.0, 3.0)), ("slo", (3.0, 5.0)))
        for value in values
    ]
    assert ratios(rows, "goodput_rps", "slo") == {"x": 2.0}
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_the_largest_rate_is_higher_with_slo() -> None:
    case = short("tight-ttft")
    assert largest_rate(case, "slo", 3, 0.9) > largest_rate(case, "adbs", 3, 0.9) > 0


def test_the_page_has_the_figures_that_were_simulated() -> None:
    page = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    rows = read(ROOT / "docs" / "benchmarks" / "policies.json")["runs"]
    assert page_table(rows) in page
