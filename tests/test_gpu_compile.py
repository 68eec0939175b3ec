"""The device kernels compile for GPUs where there is none, and use what they should."""

import re
from dataclasses import replace

import pytest
import torch
from compiled_kernels import Compiler, compiling
from world_models import make_kv

pytest.importorskip("triton")

from muxrt.kernels import DeviceMeta, KvCache, device, triton_kernels

if triton_kernels.IS_INTERPRETED:
    pytest.skip("what is interpreted is not compiled", allow_module_level=True)

H200 = device.Chip(132, 232448, 233472, (9, 0))
A100 = device.Chip(108, 166912, 167936, (8, 0))
CHIPS = {90: H200, 80: A100}


class Planes:
    num_layers, num_kv_heads, head_dim = 2, 8, 128


@pytest.fixture(params=CHIPS, ids=["sm90", "sm80"])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """With the sizes of that chip."""
    monkeypatch.setattr(device, "chip_of", lambda _: CHIPS[request.param])
    with compiling(monkeypatch, request.param) as compiler:
        yield compiler


def world(
    groups: int, kv_dtype: torch.dtype, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, KvCache, DeviceMeta]:
    kv = make_kv(Planes(), slots=4)  # type: ignore[arg-type]
    kv = replace(kv, arena=kv.arena.to(kv_dtype))
    meta = DeviceMeta.over(torch.zeros(DeviceMeta.num_ints(4, 4), dtype=torch.int32), 4, 4)
    return torch.zeros(4, 8 * (groups + 2) * 128, dtype=dtype), kv, meta


def has(assembly: str, instruction: str) -> bool:
    return re.search(rf"\b{instruction}", assembly) is not None


@pytest.mark.parametrize("groups", [1, 4])
def test_decode_loads_16_bytes_at_a_time(compiler: Compiler, groups: int) -> None:
    qkv, kv, meta = world(groups, torch.bfloat16)
    workspace = device.decode_workspace(kv, 8 * groups, 4, 4096, sm_count=132)
    assert workspace.splits > 1
    out = torch.zeros(4, 8 * groups * 128, dtype=torch.bfloat16)
    triton_kernels.decode_attention(qkv, kv, meta, 0, out, 0.1, workspace)
    code = compiler.assembly["_decode"]
    assert has(code, r"cp\.async\.cg\.shared\.global \[[^]]+\], \[[^]]+\], 0x10")
    assert has(code, r"(wg)?mma") == (groups > 1)
    assert "_add_parts" in compiler.assembly
    chip = CHIPS[compiler.capability]
    assert compiler.shared_bytes["_decode"] <= chip.shared_bytes_per_sm // 2, "two fit on an SM"


@pytest.mark.parametrize("groups", [1, 4])
def test_prefill_multiplies_matrices(compiler: Compiler, groups: int) -> None:
    qkv, kv, meta = world(groups, torch.bfloat16)
    out = torch.zeros(4, 8 * groups * 128, dtype=torch.bfloat16)
    triton_kernels.prefill_attention(qkv, kv, meta, 0, out, 0.1)
    code = compiler.assembly["_prefill"]
    assert has(code, r"cp\.async\.cg\.shared\.global \[[^]]+\], \[[^]]+\], 0x10")
    assert has(code, r"wgmma\.mma_async" if compiler.capability == 90 else r"mma\.sync")
    assert compiler.shared_bytes["_prefill"] <= CHIPS[compiler.capability].shared_bytes


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float8_e4m3fn)],
    ids=["fp32", "fp8"],
)
def test_attention_fits_the_chip_in_other_dtypes(
    compiler: Compiler, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    if kv_dtype.itemsize == 1 and compiler.capability < 89:
        pytest.skip("no float8 on this chip")
    qkv, kv, meta = world(4, kv_dtype, dtype)
    out = torch.zeros(4, 32 * 128, dtype=dtype)
    workspace = device.decode_workspace(kv, 32, 4, 4096, sm_count=132)
    triton_kernels.prefill_attention(qkv, kv, meta, 0, out, 0.1)
    triton_kernels.decode_attention(qkv, kv, meta, 0, out, 0.1, workspace)
    most = CHIPS[compiler.capability].shared_bytes
    assert {name for name, size in compiler.shared_bytes.items() if size > most} == set()


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_float8_is_converted_where_the_chip_can(compiler: Compiler, kv_dtype: torch.dtype) -> None:
    qkv, kv, meta = world(4, kv_dtype)
    rope, norm = torch.zeros(2, 512, 64), torch.zeros(128)
    args = (qkv, kv, meta, 0, (rope[0], rope[1]), (norm, None), 1e-5)
    if kv_dtype.itemsize == 1 and compiler.capability < 89:
        with pytest.raises(ValueError, match="float8 KV on a GPU of capability 8.0"):
            triton_kernels.rope_and_store(*args)
        return
    triton_kernels.rope_and_store(*args)
    assert has(compiler.assembly["_rope_and_store"], r"cvt\.\w+\.satfinite\.e4m3x2") == (
        kv_dtype.itemsize == 1
    )


def test_rows_are_read_16_bytes_at_a_time(compiler: Compiler) -> None:
    x, ids = torch.zeros(4, 4096, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int32)
    triton_kernels.embed(ids, x, x)
    triton_kernels.rms_norm(x, x[0], 1e-5, x, x)
    triton_kernels.silu_mul(x, x[:, :2048].contiguous())
    triton_kernels.copy_blocks(x.view(-1), x.view(-1), ids, ids, 2048)
    assert set(compiler.assembly) == {"_embed", "_rms_norm", "_silu_mul", "_copy_blocks"}
    for name, code in compiler.assembly.items():
        assert has(code, r"ld\.global\.v([24]\.b64|4\.b32)|ld\.global\.v2\.b64"), name
        assert not has(code, r"ld\.global\.b16"), name


def test_sampling_compiles(compiler: Compiler) -> None:
    doubles, ints = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    columns = (doubles, ints, doubles, doubles, ints, ints, ints.int())
    triton_kernels.sample(torch.zeros(4, 32000), *columns)
    assert has(compiler.assembly["_sample"], r"ld\.global\.v4\.b32")
