"""Plan files: clusters, models without weights, MuxServe's formats, and their errors."""

from pathlib import Path

import pytest

from muxrt.config.cluster import KINDS
from muxrt.config.document import read_document
from muxrt.config.muxserve import is_muxserve, load_muxserve, load_unit
from muxrt.config.plan import load_plan
from muxrt.cost.memory import num_params
from muxrt.cost.profile import load_profile
from muxrt.errors import ConfigError
from muxrt.workload.spec import load_workload

CONFIGS = Path(__file__).parent.parent / "configs"
GOOD = """\
cluster:
  nodes:
    - {gpu: a100-80g, gpus: 8, count: 2}
    - {gpu: tiny, gpus: 4}
  kinds:
    - {name: tiny, memory_bytes: 8GB, bandwidth_bytes_per_s: 1e11, flops: 1e13, sms: 10,
       link_bytes_per_s: 1e10, power_w: 50}
models:
  - {name: a, preset: llama-7b}
  - name: b
    sizes: {hidden_size: 256, num_layers: 2, num_heads: 4, intermediate_size: 512}
"""

BROKEN = {
    "an unknown GPU": (
        "a100-80g",
        "a100",
        ":3: cluster.nodes[0].gpu: found 'a100', expected one of a100-40g, a100-80g, h100-80g,"
        " h200-141g, l4-24g, l40s-48g, tiny; the nearest is a100-80g, or describe it in"
        " cluster.kinds",
    ),
    "an unknown preset": (
        "llama-7b",
        "llama-8b",
        ":9: models[0].preset: found 'llama-8b', expected one of llama-7b, llama-13b, llama-30b,"
        " llama-65b, llama2-7b, llama2-13b, llama2-70b, llama3-8b, llama3-70b, mistral-7b,"
        " qwen2.5-7b, qwen2.5-32b; did you mean llama3-8b?",
    ),
    "no source": (
        "a, preset: llama-7b",
        "a",
        ":9: models[0]: found none of path, preset and sizes, expected exactly one of them",
    ),
    "a folder that is not there": (
        "preset: llama-7b",
        "path: nowhere",
        ":9: models[0].path: FOLDER/nowhere/config.json: no such file; a Hugging Face model folder"
        " holds one",
    ),
    "heads that do not divide": (
        "num_heads: 4",
        "num_heads: 3",
        ":11: models[1].sizes.num_heads: found 3, expected a divisor of hidden_size (256),"
        " or head_dim beside it",
    ),
    "a model twice": (
        "name: b",
        "name: a",
        ":10: models[1].name: 'a' is already in the list",
    ),
    "a rate where no rate belongs": (
        "a, preset",
        "a, rate_rps: 3, preset",
        ":9: models[0].rate_rps: rates of a plan are the workload's: remove this",
    ),
    "no GPUs": (
        "count: 2",
        "count: 0",
        ":3: cluster.nodes[0].count: found 0, expected a whole number of at least 1"
        " and at most 10000",
    ),
}


def write(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_plan_gets_one_error(case: str, tmp_path: Path) -> None:
    old, new, expected = BROKEN[case]
    assert GOOD.count(old) >= 1
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_plan(path)
    assert caught.value.message == f"{path}{expected}".replace("FOLDER", str(tmp_path))


def test_a_mixed_cluster_and_models_without_weights(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, GOOD))
    cluster = plan.file.cluster
    assert cluster.num_gpus == 20 and cluster.kind("tiny").memory_bytes == 8 * 10**9
    assert cluster.kind("a100-80g") == KINDS["a100-80g"]
    assert num_params(plan.shapes["a"]) == 6738415616
    assert plan.shapes["b"].head_dim == 64 and plan.shapes["b"].num_kv_heads == 4


def test_the_shipped_plan_reads() -> None:
    plan = load_plan(CONFIGS / "plans" / "muxserve.yaml")
    assert plan.file.cluster.num_gpus == 32 and len(plan.shapes) == 19
    assert plan.file.workload is not None and load_workload(Path(plan.file.workload)).slo
    assert load_profile(Path(plan.file.profiles[0])).gpu == "a100-80g"


MUXSERVE = """\
cluster: {nnodes: 4, ngpus_per_node: 8}
models:
  - {name: llm-0, model: /path/to/llama-13b, rate: 8.1}
  - {name: llm-1, model: /path/to/llama-7b, rate: 2}
avg_output_len: 261.3
"""


def test_muxserves_planner_input(tmp_path: Path) -> None:
    path = write(tmp_path, MUXSERVE)
    assert is_muxserve(read_document(path))
    assert not is_muxserve(read_document(CONFIGS / "plans" / "muxserve.yaml"))
    found = load_muxserve(path)
    assert found.plan.file.cluster.num_gpus == 32 and found.rates == {"llm-0": 8.1, "llm-1": 2}
    assert found.plan.shapes["llm-0"].num_layers == 40
    assert (found.prompt_tokens, found.output_tokens) == (161, 261.3)


def test_a_muxserve_model_of_unknown_size_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, MUXSERVE.replace("llama-13b", "my-13b"))
    with pytest.raises(ConfigError, match=r":3: models\[0\].model: found '/path/to/my-13b', exp"):
        load_muxserve(path)


UNIT = """\
num_gpus: 2
max_num_seqs: 256
overload_threshold: 2
gpu_memory_utilization: 0.5
models:
  - {name: llm-3, model: /path/to/llama-13b, tensor_parallel_size: 2, pipeline_parallel_size: 1,
     placement: [[0, 1]], mps_percentage: [60, 90], max_num_seqs: 115, model_dtype: fp16}
workloads:
  workload_file:
"""


def test_a_unit_that_muxserve_wrote(tmp_path: Path) -> None:
    unit = load_unit(write(tmp_path, UNIT), 80 * 10**9, node=3)
    assert unit.mesh.gpus == (0, 1) and unit.mesh.node == 3
    assert unit.models[0].sm_pct == (90, 60) and unit.memory.kv_bytes == 80 * 10**9


def test_a_unit_with_stages_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, UNIT.replace("pipeline_parallel_size: 1", "pipeline_parallel_size: 2"))
    with pytest.raises(ConfigError, match="found tp 2 x pp 2, expected tp 2 x pp 1"):
        load_unit(path, 80 * 10**9)
