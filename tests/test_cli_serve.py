"""`muxrt serve --check` and `muxrt models`: what would be served, or one line of what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import CommandLine
from model_folders import SERVE_FILE as FILE
from model_folders import two_models

CONFIGS = Path(__file__).parent.parent / "configs"


DISAGG = Path(__file__).parent.parent / "configs" / "disagg.yaml"


@pytest.fixture
def muxrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models of different shapes, as far as `--check` reads them."""
    two_models(tmp_path)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


def test_check_shows_models_and_shares(muxrt: CommandLine, folder: Path) -> None:
    answer = muxrt("serve", write(folder, FILE), "--check")
    assert (answer.code, answer.err) == (0, "")
    for piece in ("can be served at", "small", "2 (1 kv) x 128", "1024 tokens", "blocks of"):
        assert piece in answer.out


def test_check_as_json_has_the_same_figures(muxrt: CommandLine, folder: Path) -> None:
    answer = muxrt("serve", write(folder, FILE), "--check", "--json")
    data = json.loads(answer.out)
    small, large = data["models"]
    # By hand: ends 2 x 1000 x 256 + 256, per layer 4 x 256 x 192 + 3 x 256 x 512 + 2 x 256.
    assert small["num_params"] == 512_256 + 2 * (196_608 + 393_216 + 512)
    assert (small["dtype"], small["weight_bytes"]) == ("float32", 4 * small["num_params"])
    (unit,) = data["units"]
    assert sum(model["quota_blocks"] for model in unit["models"]) == unit["num_blocks"]
    assert unit["num_blocks"] * unit["block_bytes"] == 24 << 20
    assert large["head_dim"] == 128


def test_check_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from muxrt.cli.main import build_app;"
        f" argv = ['serve', {str(write(folder, FILE))!r}, '--check'];"
        " build_app(argv)(argv, standalone_mode=False); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


BROKEN = {
    "no folder": (
        "path: small",
        "path: tiny",
        ":2: models[0].path: there is no folder {folder}/tiny,"
        " expected a Hugging Face model folder",
    ),
    "an arena too small": (
        "24MiB",
        "6MiB",
        ":6: units[0].memory.kv_bytes: found 6.0 MiB, expected at least 7168KiB (7.0 MiB), one"
        " sequence of maximum length per model: small 1024 tokens = 3.0 MiB"
        " + large 1024 tokens = 4.0 MiB",
    ),
    "longer than the model": (
        "path: small",
        "path: small, max_model_len: 2048",
        ":2: models[0].max_model_len: found 2048, expected at most 1024,"
        " the positions the model was made for",
    ),
    "a core that is not there": (
        "memory:",
        "mesh: {cores: [9999]}\n    memory:",
        ":6: units[0].mesh.cores: found core 9999, expected cores this process may use: {cores}",
    ),
    "more lanes than cores": (
        "memory:",
        "lanes: {split: [9999]}\n    memory:",
        ":6: units[0].lanes.split: the lanes need 9999 cores and this machine has {num_cores}:"
        " expected a sum of at most {num_cores}",
    ),
    "pipeline stages": (
        "memory:",
        "mesh: {gpus: [0, 1], pp: 2}\n    memory:",
        ":6: units[0].mesh.pp: found 2, expected 1: `muxrt serve` has no pipeline stages, such a"
        " placement is a plan only",
    ),
    "no key file": (
        "models:\n",
        "endpoint: {api_keys: {file: keys.txt}}\nmodels:\n",
        ":1: endpoint.api_keys.file: there is no file {folder}/keys.txt,"
        " expected one with an API key per line",
    ),
    "no key variable": (
        "models:\n",
        "endpoint: {api_keys: {env: MUXRT_NO_SUCH_KEYS}}\nmodels:\n",
        ":1: endpoint.api_keys.env: the variable MUXRT_NO_SUCH_KEYS is not set,"
        " expected API keys separated by commas",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_served_here_gets_one_line(
    muxrt: CommandLine, folder: Path, case: str
) -> None:
    old, new, expected = BROKEN[case]
    path = write(folder, FILE.replace(old, new, 1))
    cores = sorted(os.sched_getaffinity(0))
    expected = expected.format(
        folder=folder, cores=", ".join(map(str, cores)), num_cores=len(cores)
    )
    answer = muxrt("serve", path, "--check")
    assert (answer.code, answer.out, answer.err) == (2, "", f"error: {path}{expected}\n")


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("config.json", "config.json is missing in {model}"),
        ("tokenizer.json", "tokenizer.json is missing in {model}"),
        (
            "model.safetensors",
            "no *.safetensors in {model}: weights in other formats are not read",
        ),
    ],
)
def test_a_missing_file_is_named(
    muxrt: CommandLine, folder: Path, missing: str, expected: str
) -> None:
    (folder / "small" / missing).unlink()
    path = write(folder, FILE)
    answer = muxrt("serve", path, "--check")
    wrong = expected.format(model=folder / "small")
    assert (answer.code, answer.err) == (2, f"error: {path}:2: models[0].path: {wrong}\n")


def test_the_smallest_arena_that_is_named_is_enough(muxrt: CommandLine, folder: Path) -> None:
    assert muxrt("serve", write(folder, FILE.replace("24MiB", "7168KiB")), "--check").code == 0


def test_the_short_form_is_named_as_it_is_written(muxrt: CommandLine, folder: Path) -> None:
    text = FILE[: FILE.index("units:")] + "kv_bytes: 1MiB\n"
    answer = muxrt("serve", write(folder, text), "--check")
    assert ":4: kv_bytes: found 1.0 MiB, expected at least" in answer.err


def test_json_without_check_is_a_misuse(muxrt: CommandLine, folder: Path) -> None:
    answer = muxrt("serve", write(folder, FILE), "--json")
    assert answer.code == 2 and "--json goes with --check" in answer.err


def test_help_ends_in_an_example(muxrt: CommandLine) -> None:
    for verb in ("serve", "models", "bench", "demo"):
        assert f"Example: muxrt {verb} " in muxrt(verb, "--help").out


def test_models_of_a_file(muxrt: CommandLine, folder: Path) -> None:
    path = write(folder, FILE)
    assert "1.7 M" in muxrt("models", path).out
    names = [model["name"] for model in json.loads(muxrt("models", path, "--json").out)]
    assert names == ["small", "large"]


def test_models_of_an_endpoint_that_is_not_there(muxrt: CommandLine) -> None:
    answer = muxrt("models", "http://127.0.0.1:9/v1")
    assert answer.code == 1
    assert answer.err.startswith("error: http://127.0.0.1:9 cannot be reached: ")


def test_check_says_who_prefills_and_who_decodes(muxrt: CommandLine) -> None:
    answer = muxrt("serve", DISAGG, "--check")
    assert answer.code == 0, answer.err
    for text in ("pydoc-s (prefills)", "pydoc-m (decodes)", "K and V by shared memory"):
        assert text in answer.out


def test_check_says_who_sleeps_and_over_how_many_ranks_models_run(muxrt: CommandLine) -> None:
    tail = muxrt("serve", DISAGG.with_name("longtail.yaml"), "--check")
    assert "27.0 MiB of weights are awake" in tail.out.replace("\n", " ")
    assert "tail-20 (asleep)" in tail.out and "tail-01 (asleep)" not in tail.out
    mesh = muxrt("serve", DISAGG.with_name("tensor_parallel.yaml"), "--check")
    assert "every core, 2 ranks" in mesh.out
    both = muxrt("serve", DISAGG.with_name("longtail_ranks.yaml"), "--check").out
    assert "2 ranks" in both and "pydoc-l (asleep)" in both and "pydoc-s (asleep)" not in both


def test_check_says_how_requests_are_routed(muxrt: CommandLine, tmp_path: Path) -> None:
    plain = muxrt("serve", DISAGG, "--check")
    assert "routing distserve: each phase of a request to its shortest queue" in plain.out
    text = DISAGG.read_text().replace("path: demo_models", f"path: {DISAGG.parent}/demo_models")
    (tmp_path / "pools.yaml").write_text(text + "routing: {policy: splitwise, borrow_batches: 6}\n")
    pools = muxrt("serve", tmp_path / "pools.yaml", "--check")
    assert "more than 6 prefill batches wait or 90% of the KV memory" in " ".join(pools.out.split())
    data = json.loads(muxrt("serve", tmp_path / "pools.yaml", "--check", "--json").out)
    assert data["routing"]["policy"] == "splitwise" and data["routing"]["return_kv"] == 0.7
    text += "routing: {policy: splitwise, borrow: false}\n"
    (tmp_path / "pools.yaml").write_text(text)
    assert "none is borrowed" in muxrt("serve", tmp_path / "pools.yaml", "--check").out


def test_check_says_that_mixed_units_exchange_with_others(
    muxrt: CommandLine, tmp_path: Path
) -> None:
    text = DISAGG.read_text().replace("path: demo_models", f"path: {DISAGG.parent}/demo_models")
    mixed = "  - {name: both, models: [{name: pydoc-s}], memory: {kv_bytes: 8MiB}}\n"
    (tmp_path / "pools.yaml").write_text(text + mixed)
    answer = muxrt("serve", tmp_path / "pools.yaml", "--check")
    assert answer.code == 0, answer.err
    assert " ".join(answer.out.split()).count("K and V by shared memory") == 3
