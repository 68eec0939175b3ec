"""What Triton's compiler makes of the device kernels, where there is no GPU to run them on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
}


@dataclass
class Compiler:
    """Compiles what is launched instead of running it."""

    capability: int  # 80, 90
    assembly: dict[str, str] = field(default_factory=dict)  # PTX by kernel
    shared_bytes: dict[str, int] = field(default_factory=dict)  # of a program, by kernel

    def launch(self, kernel: JITFunction[Any], args: tuple[Any, ...], options: Any) -> None:
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for index, (param, value) in enumerate(zip(kernel.params, args, strict=True)):
            kind = _kind(param, value)
            signature[param.name] = kind
            if kind == "constexpr":
                constants[(index,)] = value
            elif isinstance(value, torch.Tensor) or (
                isinstance(value, int) and value % 16 == 0 and not param.do_not_specialize
            ):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        target = GPUTarget("cuda", self.capability, 32)
        compiled = compile(source, target, options)
        self.assembly[kernel.fn.__name__] = compiled.asm["ptx"]
        self.shared_bytes[kernel.fn.__name__] = compiled.metadata.shared


def _kind(param: Any, value: Any) -> str:
    if param.is_constexpr or value is None:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value == 1 and not param.do_not_specialize:
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@contextmanager
def compiling(monkeypatch: pytest.MonkeyPatch, capability: int) -> Iterator[Compiler]:
    """Launches of Triton kernels are compiled for a capability such as 90, and not run."""
    compiler = Compiler(capability)

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiler.launch(self, args, options)

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        yield compiler
