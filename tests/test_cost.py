"""The planner's cost model: the fit of the shipped profile, the roofline, memory."""

from functools import cache
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxrt.config.cluster import KINDS
from muxrt.config.presets import PRESETS
from muxrt.core import Phase
from muxrt.cost.calibrate import calibrate
from muxrt.cost.fitted import Fitted, find_granularity, fit, fit_lanes
from muxrt.cost.held_out import errors, held_out, read_suspects
from muxrt.cost.memory import MUXSERVE_MEMORY, MemoryRules, allowed_tps, kv_token_bytes, model_bytes
from muxrt.cost.model import CostModel
from muxrt.cost.monotone import Term, fit_surface
from muxrt.cost.profile import Cell, Profile, load_profile, read_cells
from muxrt.cost.roofline import Efficiency, Roofline
from muxrt.cost.steps import SharedSteps
from muxrt.errors import ConfigError
from muxrt.kvcache.layout import KvShape
from muxrt.metrics import percentile

PROFILES = Path(__file__).parent.parent / "configs" / "profiles"
A100 = KINDS["a100-80g"]
KEYS = [(model, tp) for model in ("llama-7b", "llama-13b") for tp in (1, 2, 4, 8)]
KEYS += [("llama-30b", 2), ("llama-30b", 4), ("llama-65b", 4), ("llama-65b", 8)]
SHARES = [share / 100 for share in range(10, 101, 5)]
SIZES = np.unique(np.geomspace(1, 4096, 40).round())
TOKENS = np.unique(np.geomspace(1, 600_000, 50).round())


@cache
def profile() -> Profile:
    return load_profile(PROFILES / "llama_a100.yaml")


@cache
def fitted(model: str, tp: int) -> Fitted:
    return fit(profile().of(model, tp), profile().shapes[model], profile().title)


def test_the_profile_ships_whole_with_its_source() -> None:
    assert len(profile().cells) == 4704 and profile().keys == tuple(sorted(KEYS))
    assert sum(cell.prefill_s is not None for cell in profile().cells) == 4290
    assert profile().licence == "Apache-2.0" and "hao-ai-lab/MuxServe" in profile().source
    assert "Apache-2.0" in (PROFILES / "ATTRIBUTION.md").read_text()


def test_held_out_cells_are_predicted() -> None:
    suspects = read_suspects(PROFILES / "llama_a100_suspect_cells.csv")
    found = errors(held_out(profile(), suspects))
    assert found[Phase.PREFILL].num_cells + found[Phase.DECODE].num_cells == 4290 + 4704 - 46
    # The targets are 4 % and 12 %; measured: 1.0 and 3.6 % (prefill), 1.7 and 5.8 % (decode).
    for phase, median, p90 in ((Phase.PREFILL, 0.015, 0.05), (Phase.DECODE, 0.025, 0.08)):
        assert found[phase].median < median and found[phase].p90 < p90, found


def test_a_held_out_cell_is_not_in_its_fit() -> None:
    cells = [c for c in profile().of("llama-7b", 1) if c.sm_pct in (30, 100)]
    one = Profile("t", "s", "l", "g", profile().shapes, tuple(cells))
    predicted = {(r.phase, r.cell): r.predicted_s for r in held_out(one)}
    odd = cells[20]
    spoilt = Cell(
        odd.model, odd.tp, odd.sm_pct, odd.batch, odd.seq_len, odd.prefill_s, odd.decode_s and 9.0
    )
    cells[20] = spoilt
    other = Profile("t", "s", "l", "g", profile().shapes, tuple(cells))
    again = {(r.phase, r.cell): r.predicted_s for r in held_out(other)}
    assert again[Phase.DECODE, spoilt] == predicted[Phase.DECODE, odd]


def test_a_spike_does_not_move_the_fit() -> None:
    """llama-30b, tp 4, batch 64 of length 64 at 100 %: 231 ms among neighbours of 27 ms."""
    (spike,) = (
        cell
        for cell in profile().of("llama-30b", 4)
        if (cell.sm_pct, cell.batch, cell.seq_len) == (100, 64, 64)
    )
    assert spike.decode_s is not None and spike.decode_s > 0.2
    assert fitted("llama-30b", 4).at(1.0).decode_s(64, 64 * 64) < 0.031


def is_monotone(steps: SharedSteps) -> bool:
    """On a grid of shares x batches x contexts, and shares x tokens x lengths."""
    at = [steps.at(share) for share in SHARES]
    decode = np.array([[[s.decode_s(b, c) for c in TOKENS] for b in SIZES] for s in at])
    lengths = (1, 32, 512, 8192)
    prefill = np.array([[[s.prefill_s(t, t * n) for n in lengths] for t in TOKENS] for s in at])
    return all(
        bool((np.diff(times, axis=1) >= -1e-12).all() and (np.diff(times, axis=2) >= -1e-12).all())
        and bool((np.diff(times, axis=0) <= 1e-12).all() and (times > 0).all())
        for times in (decode, prefill)
    )


@pytest.mark.parametrize(("model", "tp"), KEYS)
def test_the_fit_is_monotone_on_a_dense_grid(model: str, tp: int) -> None:
    assert is_monotone(fitted(model, tp))


@pytest.mark.parametrize("model", PRESETS)
@pytest.mark.parametrize("gpu", ["a100-80g", "l4-24g"])
def test_the_roofline_is_monotone_on_a_dense_grid(model: str, gpu: str) -> None:
    assert is_monotone(Roofline(PRESETS[model], max(allowed_tps(PRESETS[model])), KINDS[gpu]))


batches, contexts = st.floats(1, 5000), st.floats(1, 1e7)
shares = st.floats(0.01, 1)


@given(key=st.sampled_from(KEYS), share=shares, batch=batches, context=contexts, data=st.data())
@settings(max_examples=300, deadline=None)
def test_more_is_never_faster_between_grid_points(
    key: tuple[str, int], share: float, batch: float, context: float, data: st.DataObject
) -> None:
    steps = fitted(*key)
    least = steps.at(share).decode_s(batch, context)
    more, longer = data.draw(st.floats(batch, 6000)), data.draw(st.floats(context, 2e7))
    narrower = data.draw(st.floats(0.01, share))
    # Adding up floats may be off by a rounding.
    assert steps.at(narrower).decode_s(more, longer) >= least * (1 - 1e-9)
    least = steps.at(share).prefill_s(context, context)
    assert steps.at(narrower).prefill_s(longer, longer * 2) >= least * (1 - 1e-9)


def test_noise_that_goes_the_wrong_way_is_levelled() -> None:
    """More work measured faster, more SMs measured slower: the fit is flat where data are not."""
    work = np.array([1.0, 2.0, 4.0] * 2)
    shares = np.array([1.0] * 3 + [0.5] * 3)
    times_s = np.array([1.05, 1.00, 1.02, 1.01, 0.99, 1.00])
    surface = fit_surface([Term(work, np.array([1.0, 2.0, 4.0]))], shares, times_s)
    for share in (1.0, 0.7, 0.5):
        (curve,) = surface.at(share)
        assert curve(1) <= curve(2) <= curve(4) and curve(1) == pytest.approx(1.01, abs=0.02)
    assert surface.at(0.5)[0](3) >= surface.at(1.0)[0](3)


def test_a_machine_of_known_law_is_found_through_noise_and_spikes() -> None:
    rng, cells = Random(0), []
    for pct in (25, 50, 100):
        for batch in (1, 2, 4, 8, 16, 32):
            for length in (32, 128, 512):
                noise = (4.0 if rng.random() < 0.05 else 1.0) * rng.uniform(0.98, 1.02)
                decode_s = (5e-3 + batch * 1e-4 * 100 / pct + 2e-7 * batch * length) * noise
                prefill_s = (6e-3 + batch * length * 7e-5 * 100 / pct) * rng.uniform(0.98, 1.02)
                cells.append(Cell("m", 1, pct, batch, length, prefill_s, decode_s))
    steps = fit(cells, PRESETS["llama-7b"], "made up").at(0.5)
    assert steps.decode_s(12, 2000) == pytest.approx(5e-3 + 12 * 2e-4 + 4e-4, rel=0.04)
    assert steps.prefill_s(1000, 1000 * 100) == pytest.approx(6e-3 + 1000 * 14e-5, rel=0.04)
    # Twice the largest batch and context: the law goes on.
    assert steps.decode_s(64, 32768) == pytest.approx(5e-3 + 64 * 2e-4 + 32768 * 2e-7, rel=0.1)


def test_long_prompts_cost_their_attention() -> None:
    steps = fitted("llama-7b", 1).at(1.0)
    one, many = steps.prefill_s(16384, 16384**2), steps.prefill_s(16384, 32 * 512**2)
    assert one / many == pytest.approx(1.32, abs=0.05)  # 16384 / 2 keys of 4 h FLOPs, 24 h^2 params


def test_a_share_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1: 1.5"):
        fitted("llama-7b", 1).at(1.5)
    with pytest.raises(ValueError, match="above 0 and at most 1: 0"):
        Roofline(PRESETS["llama-7b"], 1, A100).at(0)


def test_below_the_smallest_measured_share_times_grow_as_one_over_it() -> None:
    steps = fitted("llama-7b", 1)
    assert steps.at(0.15).decode_s(8, 1000) == pytest.approx(2 * steps.at(0.3).decode_s(8, 1000))


def test_the_roofline_calibrated_on_the_profile_is_near_it() -> None:
    efficiency = calibrate(profile(), A100)
    off: dict[Phase, list[float]] = {Phase.PREFILL: [], Phase.DECODE: []}
    for cell in profile().cells:
        steps = Roofline(profile().shapes[cell.model], cell.tp, A100, efficiency).at(
            cell.sm_pct / 100
        )
        off[Phase.DECODE].append(abs(steps.decode_s(cell.batch, cell.tokens) / cell.decode_s - 1))
        if cell.prefill_s:
            predicted_s = steps.prefill_s(cell.tokens, cell.tokens * cell.seq_len)
            off[Phase.PREFILL].append(abs(predicted_s / cell.prefill_s - 1))
    for errors_of_phase in off.values():  # measured: 6.8 and 23.0 %, 6.7 and 17.4 %
        assert (percentile(errors_of_phase, 50) or 1) < 0.08
        assert (percentile(errors_of_phase, 90) or 1) < 0.25


def test_the_default_efficiency_is_the_calibrated_one_but_for_launches() -> None:
    found, default = calibrate(profile(), A100), Efficiency()
    for name in ("flops", "bandwidth", "link", "saturating_share"):
        assert getattr(found, name) == pytest.approx(getattr(default, name), rel=0.02), name
    assert found.layer_s == pytest.approx(0.38e-3, rel=0.02) and default.layer_s < found.layer_s


def test_what_was_profiled_is_fitted_and_the_rest_is_roofline() -> None:
    model = CostModel([profile()], KINDS)
    seven = PRESETS["llama-7b"]
    assert model.steps(seven, 4, A100).source == profile().title
    assert model.steps(PRESETS["llama2-7b"], 4, A100).source == profile().title  # the same layers
    assert model.steps(seven, 16, A100).source == "roofline"
    assert model.steps(PRESETS["llama3-8b"], 1, A100).source == "roofline"
    assert model.steps(seven, 4, KINDS["h100-80g"]).source == "roofline"
    assert model.steps(seven, 4, A100) is model.steps(seven, 4, A100)


def test_a_faster_gpu_is_faster() -> None:
    for tp in (1, 2, 4, 8):
        slow, fast = (
            Roofline(PRESETS["llama3-70b"], tp, KINDS[name]).at(1.0)
            for name in ("a100-80g", "h100-80g")
        )
        assert fast.prefill_s(4096, 4096**2) < 0.5 * slow.prefill_s(4096, 4096**2)
        assert fast.decode_s(8, 8000) < 0.7 * slow.decode_s(8, 8000)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_all_reduces_take_the_messages_of_a_ring(tp: int) -> None:
    """Two per layer, each of 2 (n - 1) messages, in every step whatever its size."""
    latency_s, shape = 5e-6, PRESETS["llama-7b"]
    far = msgspec.structs.replace(A100, link_latency_s=latency_s)
    near, slow = (Roofline(shape, tp, gpu).at(1.0) for gpu in (A100, far))
    wanted_s = 2 * shape.num_layers * 2 * (tp - 1) * latency_s
    assert slow.decode_s(8, 800) - near.decode_s(8, 800) == pytest.approx(wanted_s)
    assert slow.prefill_s(512, 512**2) - near.prefill_s(512, 512**2) == pytest.approx(wanted_s)


HEADER = "model,tp,sm_percent,batch,seq_len,prefill_ms,decode_ms\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ": no column model, expected a CSV with the header model,tp,"),
        (HEADER, ": the profile has no cells"),
        (HEADER + "m,1,101,1,32,1,1\n", ":2: found m,1,101,1,32,1,1, expected a model, whole"),
        (HEADER + "m,1,30,1,32,1,-1\n", ":2: found m,1,30,1,32,1,-1, expected a model, whole"),
        (HEADER + "m,1,30,1,32,1,nan\n", ":2: found m,1,30,1,32,1,nan, expected a model, whole"),
        (HEADER + "m,1,30,1,32,fast,1\n", ":2: found m,1,30,1,32,fast,1, expected a model"),
        (HEADER + "m,1,30,1,32,,1\nm,1,30,1,32,2,1\n", ":3: the same cell as on line 2"),
    ],
)
def test_a_wrong_profile_gets_one_error(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_cells(path)
    assert caught.value.message.startswith(f"{path}{expected}")


def test_a_profile_of_a_model_without_a_shape_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(HEADER + "m,1,30,1,32,,1\n")
    (tmp_path / "p.yaml").write_text(
        "{title: t, source: s, licence: l, gpu: a100-80g, table: t.csv,\n"
        " models: [{name: n, preset: llama-7b}]}"
    )
    with pytest.raises(ConfigError, match=r"p.yaml:2: models: 'm' is in t.csv but has no shape"):
        load_profile(tmp_path / "p.yaml")


def test_too_small_a_profile_says_what_is_missing() -> None:
    cells = [Cell("m", 1, 100, 1, length, 0.1, 0.1) for length in (32, 64)]
    with pytest.raises(ConfigError, match="2 decode cells of m tp 1, expected at least two batch"):
        fit(cells, PRESETS["llama-7b"], "t")


@pytest.mark.parametrize(
    ("name", "params", "tps"),
    [
        ("llama-7b", 6.74e9, (1, 2, 4, 8)),
        ("llama-30b", 32.5e9, (1, 2, 4)),  # 52 heads
        ("llama3-70b", 70.6e9, (1, 2, 4, 8)),
        ("qwen2.5-7b", 7.62e9, (1, 2, 4)),  # 28 heads
    ],
)
def test_weights_and_degrees_follow_from_the_shape(
    name: str, params: float, tps: tuple[int, ...]
) -> None:
    found = model_bytes(PRESETS[name], 2, MemoryRules())
    assert found.weights == pytest.approx(params, rel=0.01)  # two bytes each, on two GPUs
    assert allowed_tps(PRESETS[name]) == tps


def test_kv_bytes_come_from_kv_heads() -> None:
    shape = PRESETS["llama3-70b"]
    layout = KvShape("m", shape.num_layers, shape.num_kv_heads, shape.head_dim, 2)
    assert kv_token_bytes(shape, 1, 2) == layout.num_planes * layout.token_plane_bytes == 327_680
    assert kv_token_bytes(shape, 8, 2) == kv_token_bytes(shape, 16, 2) == 40_960  # one head each


def test_muxserves_rule_is_there_to_reproduce_it() -> None:
    found = model_bytes(PRESETS["llama-7b"], 1, MUXSERVE_MEMORY)
    assert found.runtime == 1_600_000_000 and found.activations == 6_000_000_000
    assert "MuxServe" in MUXSERVE_MEMORY.source


def test_more_cores_may_be_slower() -> None:
    """Small steps are cut up for nothing; on a GPU the fit would not believe it."""
    times = {50: 1e-3, 100: 2e-3}
    cells = [
        Cell("m", 1, pct, batch, length, base_s + 1e-6 * batch * length, base_s + 1e-5 * batch)
        for pct, base_s in times.items()
        for batch in (1, 4, 16)
        for length in (16, 64, 256)
    ]
    lanes = fit_lanes(cells, PRESETS["llama-7b"], "test")
    for cell in cells:
        steps = lanes.at(cell.sm_pct / 100)
        assert steps.decode_s(cell.batch, cell.tokens) == pytest.approx(cell.decode_s, rel=0.02)
    assert fit(cells, PRESETS["llama-7b"], "test").at(1.0).decode_s(1, 16) < 1.5e-3


def test_a_share_with_too_few_cells_is_as_its_neighbours_say() -> None:
    cells = [Cell("m", 1, 100, b, n, 1e-3 * n, 1e-3 * b) for b in (1, 4) for n in (16, 64)]
    lanes = fit_lanes([*cells, Cell("m", 1, 50, 1, 16, None, 3e-3)], PRESETS["llama-7b"], "test")
    assert set(lanes.measured) == {100}
    assert lanes.at(0.5).decode_s(1, 16) > lanes.at(1.0).decode_s(1, 16)
    assert lanes.at(0.25).decode_s(1, 16) == lanes.between.at(0.25).decode_s(1, 16)


PROMPTS = (16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 112, 128, 144, 160, 176, 208, 240, 256, 400, 512)


def tiled(tile: int, noise: float = 0.0) -> list[Cell]:
    """A CPU's lane whose prefills compute whole tiles, and decodes that cost what they like."""
    rng = Random(tile)
    prefills = [
        Cell(
            "m", 1, 50, 1, n, (5e-3 + 3e-4 * -(-n // tile) * tile) * rng.uniform(1, 1 + noise), None
        )
        for n in PROMPTS
    ]
    decodes = [Cell("m", 1, 50, b, n, None, 1e-2 + 1e-3 * b) for b in (1, 8) for n in (64, 256)]
    return [*prefills, *decodes]


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("tile", [1, 16, 32, 64])
def test_the_tiles_of_prefills_are_found(tile: int, noise: float) -> None:
    assert find_granularity(tiled(tile, noise), PRESETS["llama-7b"]) == tile


def test_too_few_prefills_show_no_tiles() -> None:
    assert find_granularity(tiled(32)[:9], PRESETS["llama-7b"]) == 1
    assert find_granularity([], PRESETS["llama-7b"]) == 1


def test_a_prefill_takes_as_long_as_the_next_whole_tile() -> None:
    steps = fit(tiled(32), PRESETS["llama-7b"], "test", 32).at(0.5)
    for tokens in (1, 31, 32, 33, 100, 127, 300):
        expected_s = 5e-3 + 3e-4 * -(-tokens // 32) * 32
        assert steps.prefill_s(tokens, 0) == pytest.approx(expected_s, rel=0.03)
    exact = [steps.prefill_s(tokens, 0) for tokens in range(65, 193)]
    assert steps.mean_prefill_s(128.5, 0) == pytest.approx(sum(exact) / len(exact), rel=0.01)


@given(st.integers(1, 300), st.integers(0, 500_000), st.sampled_from([1.0, 0.6, 0.25]))
def test_a_decode_step_is_the_sum_of_its_parts(batch: int, context: int, share: float) -> None:
    """To the last bit: the simulator adds them up by itself."""
    roofline = Roofline(PRESETS["llama-7b"], 1, KINDS["a100-80g"])
    for shared in (fitted("llama-7b", 1), roofline):
        steps = shared.at(share)
        parts = steps.decode_batch_s(batch) + steps.decode_context(context)
        assert parts == steps.decode_s(batch, context)
