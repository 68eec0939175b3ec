"""Where models may sleep: the shipped long tail, and what contradicts itself."""

from pathlib import Path

import pytest

from muxrt.cli.check import check_file, summary
from muxrt.config.load import load
from muxrt.errors import ConfigError

LONGTAIL = Path(__file__).parent.parent / "configs" / "longtail.yaml"
MODELS = "models: [{name: a, path: a%s}]\n"
UNIT = "units: [{name: x, models: [{name: a%s}], memory: {kv_bytes: 1MiB%s}%s}]\n"
PEER = "units: [{name: x, models: [{name: a, role: prefill}], memory: {kv_bytes: 1, weight_bytes: 1}}, {name: y, models: [{name: a, role: decode}], memory: {kv_bytes: 1}}]\n"  # noqa: E501


def test_twenty_models_in_the_memory_of_six() -> None:
    checked = check_file(LONGTAIL)
    sizes = sorted(model["weight_bytes"] for model in summary(checked)["models"])
    (plan,) = checked.plans
    assert len(sizes) == 20
    # Panels are padded to 64 features, which the estimate leaves out.
    assert sum(sizes[-6:]) < plan.weight_bytes < 1.05 * sum(sizes[-6:])
    assert plan.weight_bytes < 0.4 * sum(sizes)
    assert "tail-01" in plan.awake and 6 <= len(plan.awake) < 10


BROKEN = {
    "a pinned model that sleeps": (
        MODELS % ", pin: true, idle_timeout_s: 5" + UNIT % ("", "", ""),
        "models[0].idle_timeout_s: found 5, expected none: a is pinned",
    ),
    "tensor parallel": (
        MODELS % ", idle_timeout_s: 5" + UNIT % ("", "", ", mesh: {gpus: [0, 1]}"),
        "units[0].memory: found idle_timeout_s of a and no weight_bytes, expected it: 2 ranks",
    ),
    "a GPU": (
        MODELS % ", idle_timeout_s: 5" + UNIT % ("", "", ", mesh: {device: gpu}"),
        "units[0]: found idle_timeout_s of a, expected none on a GPU",
    ),
    "roles": (MODELS % "" + PEER, "units[0]: found memory.weight_bytes and roles"),
    "two places for an admin key": (
        "admin: {keys: {file: k, env: K}}\n" + MODELS % "" + UNIT % ("", "", ""),
        "admin.keys: found both of file and env",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_contradicts_itself_is_said(case: str, tmp_path: Path) -> None:
    text, expected = BROKEN[case]
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert expected in caught.value.message
