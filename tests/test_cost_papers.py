"""Other people's latency models: DistServe's coefficients, Splitwise's predictor."""

from pathlib import Path

import pytest

from muxrt.config.cluster import KINDS
from muxrt.cost.coefficients import LARGE, LinearSteps, read_coefficients
from muxrt.cost.knots import Knots, read_knots
from muxrt.cost.model import CostModel
from muxrt.cost.profile import load_profile
from muxrt.errors import ConfigError

PROFILES = Path(__file__).parent.parent / "configs" / "profiles"
OPT = read_coefficients(PROFILES / "opt_a100.csv", "test")
VLLM = read_coefficients(PROFILES / "opt_a100_vllm.csv", "test")
A100 = read_knots(PROFILES / "splitwise_a100.csv", "test")["bloom-176b", 8]
H100 = read_knots(PROFILES / "splitwise_h100.csv", "test")["bloom-176b", 8]
ALL = [*(("own", key) for key in sorted(OPT)), *(("vllm", key) for key in sorted(VLLM))]


def opt(engine: str, key: tuple[str, int]) -> LinearSteps:
    return (OPT if engine == "own" else VLLM)[key]


@pytest.mark.parametrize(
    ("key", "tokens", "ms"),
    [
        (("opt-13b", 1), 128, 31.26),
        (("opt-13b", 1), 2048, 256.7),
        (("opt-13b", 2), 512, 50.5),
        (("opt-66b", 4), 1024, 193.1),
    ],
)
def test_prefills_are_the_published_ones(key: tuple[str, int], tokens: int, ms: float) -> None:
    assert OPT[key].prefill_s(tokens, tokens**2) == pytest.approx(ms / 1e3, rel=2e-3)
    assert OPT[key].published.prefill_s(tokens, tokens**2) == pytest.approx(ms / 1e3, rel=2e-3)


@pytest.mark.parametrize(
    ("key", "batch", "ms"),
    [(("opt-13b", 1), 16, 25.7), (("opt-66b", 4), 64, 49.6), (("opt-66b", 2), 64, 87.3)],
)
def test_decodes_are_the_published_ones(key: tuple[str, int], batch: int, ms: float) -> None:
    assert OPT[key].decode_s(batch, 512 * batch) == pytest.approx(ms / 1e3, rel=2e-3)
    assert OPT[key].published.decode_s(batch, 512 * batch) == pytest.approx(ms / 1e3, rel=2e-3)


@pytest.mark.parametrize(
    ("tp", "jump"), [(2, -0.248), (3, -0.065), (4, 0.004), (8, 0.252)], ids=str
)
def test_the_published_sets_do_not_meet(tp: int, jump: float) -> None:
    published = OPT["opt-66b", tp].published
    before, after = (
        line.a + line.b * LARGE * 512 + line.c * LARGE
        for line in (published.small, published.large)
    )
    assert after / before - 1 == pytest.approx(jump, abs=2e-3)


@pytest.mark.parametrize(("engine", "key"), ALL, ids=str)
def test_more_work_is_never_faster(engine: str, key: tuple[str, int]) -> None:
    steps = opt(engine, key).at(1.0)
    decodes = [steps.decode_s(batch, 400.0 * batch) for batch in range(1, 200)]
    prefills = [steps.prefill_s(n, n * n) for n in range(1, 4096, 64)]
    assert decodes == sorted(decodes) and prefills == sorted(prefills)
    assert steps.decode_s(7, 900) == steps.decode_batch_s(7) + steps.decode_context(900)


def test_a_share_slows_prefills_by_itself_and_decodes_once_reading_suffers() -> None:
    whole, part, little = (OPT["opt-13b", 1].at(share) for share in (1.0, 0.5, 0.205))
    assert part.prefill_s(512, 512**2) == 2 * whole.prefill_s(512, 512**2)
    assert part.decode_s(8, 900) == whole.decode_s(8, 900)
    assert little.decode_s(8, 900) == pytest.approx(2 * whole.decode_s(8, 900))
    with pytest.raises(ValueError, match="above 0"):
        OPT["opt-13b", 1].at(0.0)


def test_a_profile_of_coefficients_needs_no_fit() -> None:
    profile = load_profile(PROFILES / "opt_a100.yaml")
    costs = CostModel([profile], {"a100-80g": KINDS["a100-80g"]})
    steps = costs.steps(profile.shapes["opt-66b"], 4, KINDS["a100-80g"])
    assert steps.source == "OPT on A100-80G, DistServe's engine"
    assert steps.at(1.0).prefill_s(512, 512**2) == OPT["opt-66b", 4].prefill_s(512, 512**2)
    assert costs.steps(profile.shapes["opt-66b"], 1, KINDS["a100-80g"]).source == "roofline"
    assert profile.keys[0] == ("opt-13b", 1) and "Apache-2.0" in profile.licence


def test_the_released_predictor_is_asked_with_sequences() -> None:
    # The released notebook has 31 token times of H100 at batch 1: 1.0951447 s.
    assert 31 * H100.as_released().decode_s(1, 1024) == pytest.approx(1.0951447, abs=1e-6)
    many = A100.as_released().decode_s(64, 64 * 576)
    assert many == pytest.approx(47.6e-3, abs=1e-4)  # 96.6 ms were measured


@pytest.mark.parametrize("knots", [A100, H100], ids=["a100", "h100"])
def test_repaired_decodes_are_what_was_measured(knots: Knots) -> None:
    steps = knots.repaired()
    for batch, prompt, measured_s in knots.decode:
        found_s = steps.decode_s(batch, batch * (prompt + 64))
        assert found_s == pytest.approx(measured_s, rel=0.03), (batch, prompt)
    decodes = [steps.decode_batch_s(batch) for batch in range(1, 200)]
    assert decodes == sorted(decodes)
    assert A100.repaired().decode_context(1e6) == pytest.approx(0.457, rel=0.01)


def test_prefills_go_by_the_tokens_of_a_batch() -> None:
    steps = A100.repaired().at(1.0)
    assert steps.prefill_s(2048, 0) == steps.prefill_s(2048, 2048**2)
    assert steps.prefill_s(3072, 0) == pytest.approx((0.536055 + 1.332643) / 2, rel=1e-5)
    assert A100.repaired().at(0.5).prefill_s(512, 0) == 2 * steps.prefill_s(512, 0)


def test_the_capped_machine_was_not_measured() -> None:
    cap = load_profile(PROFILES / "splitwise_h100_cap.yaml")
    assert cap.file is not None and cap.file.kind is not None and cap.file.kind.power_w == 490
    for tokens in (128, 777, 5000):
        ratio = cap.given["bloom-176b", 8].at(1.0).prefill_s(tokens, 0) / (
            H100.repaired().prefill_s(tokens, 0)
        )
        assert ratio == pytest.approx(1.3, rel=1e-4)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model,tp\n", "expected a CSV with the header model,tp,phase,a_ms,b_ms,c_ms"),
        ("model,tp,phase,a_ms,b_ms,c_ms\na,1,prefill,1,x,2\n", "expected numbers"),
        ("model,tp,phase,a_ms,b_ms,c_ms\na,1,prefill,1,1,2\n", "a tp 1 has prefill, expected"),
    ],
)
def test_a_broken_table_of_coefficients(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_coefficients(path, "test")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model,tp\n", "expected a CSV with the header"),
        ("model,tp,curve,batch,tokens,ms\na,8,oops,1,1,1\n", "not a table of"),
        ("model,tp,curve,batch,tokens,ms\na,8,prefill,1,1,1\n", "a tp 8 has no prefill curve"),
    ],
)
def test_a_broken_table_of_knots(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_knots(path, "test")
