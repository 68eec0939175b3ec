"""Tensor-parallel placements that this machine cannot run are refused by their key, in one line."""

from io import StringIO
from pathlib import Path

import pytest
from model_folders import two_models
from rich.console import Console

from muxrt.cli.check import check, summary
from muxrt.cli.tables import print_checked
from muxrt.config.document import KeyedError
from muxrt.config.load import load
from muxrt.config.shard import Shard
from muxrt.engine.ranks import plan_rank
from muxrt.errors import ConfigError
from muxrt.worker.boot import with_split

FILE = """\
models:
  - {name: small, path: small}
  - {name: large, path: large}
units:
  - name: main
    memory: {kv_bytes: 24MiB}
    mesh: {gpus: [0, 1]}
    models: [{name: small}, {name: large}]
"""
FOUR = {0, 1, 2, 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    two_models(tmp_path)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


def test_a_mesh_of_cores_can_be_served_here(folder: Path) -> None:
    checked = check(load(write(folder, FILE)), FOUR, {})
    (plan,) = checked.plans
    assert summary(checked)["units"][0]["ranks"] == 2
    # small has 3 kv heads and large one: room for two and for one on each rank.
    planes = {name: model.layout.shape.num_planes for name, model in plan.models.items()}
    assert planes == {"small": 2 * 4, "large": 4 * 2}
    assert with_split(plan.spec, len(FOUR)).lanes.split == (1, 1)
    rank = plan_rank(plan, checked.shapes, Shard(1, 2))
    assert rank.num_blocks * rank.arena.block_bytes * 2 <= 24 << 20


@pytest.mark.parametrize(
    ("old", "new", "key", "message"),
    [
        ("[0, 1]", "[0, 1, 2, 3, 4, 5, 6, 7]", "mesh.gpus", "found 8 ranks and this machine has 4"),
        ("[0, 1]", "[0, 1], cores: [2]", "mesh.gpus", "found 2 ranks and mesh.cores lists 1 cores"),
        ("[0, 1]", "[0, 1, 2]", "mesh.gpus", "found [0, 1, 2], expected 1, 2, 4 or 8 different"),
        ("[0, 1]", "[1, 1]", "mesh.gpus", "found [1, 1], expected 1, 2, 4 or 8 different ranks"),
        ("[0, 1]", "[0, 1, 2, 3]", "", "small cannot be cut over 4 ranks: found 3 heads"),
        (
            "24MiB}",
            "24MiB, planes_per_block: 1}",
            "",
            "planes_per_block of unit main: found 1, expected a multiple of its 2 ranks",
        ),
        (
            "memory:",
            "lanes: {split: [2, 1]}\n    memory:",
            "lanes.split",
            "the lanes need 3 cores and this machine has 4, 2 for each of 2 ranks",
        ),
        (
            "memory:",
            "lanes: {kind: processes}\n    memory:",
            "lanes.kind",
            "found processes on a mesh of 2 ranks, expected cores",
        ),
    ],
)
def test_what_a_mesh_cannot_be(folder: Path, old: str, new: str, key: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(load(write(folder, FILE.replace(old, new, 1))), FOUR, {})
    where = f"units[0].{key}: " if key else "units[0]: "
    assert where in raised.value.message and message in raised.value.message
    assert "\n" not in raised.value.message


def test_ranks_hand_over_through_memory_only(folder: Path) -> None:
    """A mixed unit hands over, too, where others have roles."""
    unit = "  - {{name: {0}, memory: {{kv_bytes: 24MiB}}, models: [{{name: large, role: {0}}}]}}\n"
    text = FILE + "".join(unit.format(role) for role in ("prefill", "decode"))
    assert check(load(write(folder, text)), FOUR, {}).plans[0].spec.has_roles
    over_nixl = text.replace("    mesh:", "    transfer: nixl\n    mesh:", 1)
    with pytest.raises(KeyedError, match=r"units\[0\].transfer: found nixl and 2 ranks"):
        check(load(write(folder, over_nixl)), FOUR, {})


def test_the_shipped_mesh_is_served_where_there_are_two_cores() -> None:
    path = Path(__file__).parent.parent / "configs" / "tensor_parallel.yaml"
    with_cores = check(load(path), {0, 1}, {})
    assert [unit["ranks"] for unit in summary(with_cores)["units"]] == [2]
    with pytest.raises(KeyedError, match="found 2 ranks and this machine has 1 cores"):
        check(load(path), {0}, {})


def test_the_shipped_mesh_of_gpus_is_served_where_there_are_two() -> None:
    """They share a core."""
    path = Path(__file__).parent.parent / "configs" / "tensor_parallel_gpu.yaml"
    checked = check(load(path), {0}, {}, lambda: 2, lambda: None)
    assert [unit["ranks"] for unit in summary(checked)["units"]] == [2]
    printed = StringIO()
    print_checked(Console(file=printed, width=200), path, checked)
    assert "on GPUs 0, 1, 2 ranks in stream lanes of 50 %, 50 %" in printed.getvalue()
    with pytest.raises(KeyedError, match="found GPU 1, expected 0 to 0"):
        check(load(path), {0}, {}, lambda: 1, lambda: None)
