"""Compile Triton kernels for a card that is not there: the interpreter takes what the compiler refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

SHARED = {90: 232_448, 89: 101_376}  # bytes of shared memory that a block may have, by compute capability


def compile_kernel(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], arch: int, unaligned: tuple[str, ...] = (),
    **options: Any,
) -> None:  # fmt: skip
    """Compile a kernel to machine code.

    Parameters
    ----------
    kernel : triton.JITFunction
    types : mapping of str to str
        Of arguments whose names end in ``_ptr`` (``*bf16``) and of floats (``fp32``); others are i32.
    constants : mapping
        Of constexpr arguments, and of integers that are 1.
    arch : int
        Compute capability: 90 or 89.
    unaligned : tuple of str
        Arguments that are no multiples of 16.
    **options
        ``num_warps`` and the like.
    """
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if name not in constants and name not in unaligned and signature[name] != "fp32":
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, dict(constants), aligned)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert made.asm["cubin"]
    assert made.metadata.shared <= SHARED[arch], (kernel.__name__, made.metadata.shared)
