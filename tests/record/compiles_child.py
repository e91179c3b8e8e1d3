"""Compile the recorder's kernels, and that of NF4, for a compute capability: python compiles_child.py 90."""

from __future__ import annotations

import sys

from tests.compiled import compile_kernel
from tinyonn.dense import nf4_triton
from tinyonn.record import kernels_triton as kernels
from tinyonn.record.activations import BINS, COLUMN_LOW, TOKEN_CHUNK

ARCH = int(sys.argv[1])
SUMS = {"sums_ptr": "*u8", "top_ptr": "*i32"}
ROWS = {"ids_ptr": "*i64", "order_ptr": "*i64", "ends_ptr": "*i64", "G_ptr": "*bf16", "scale": "fp32"}
UNALIGNED = ("top_ptr", "base", "T", "chunks", "first_row", "last_row")
EXACT = {"enable_fp_fusion": False}

for bits, magnitude, shift in (("*i16", 0x7FFF, 6), ("*i32", 0x7FFFFFFF, 22)):
    known = {"MAGNITUDE": magnitude, "SHIFT": shift, "BLOCK": kernels.BLOCK}
    compile_kernel(kernels._add_levels, SUMS | {"bits_ptr": bits}, known, ARCH, UNALIGNED)
tile, options = kernels.tile_of(ARCH // 10)
products = SUMS | {"A_ptr": "*bf16", "B_ptr": "*bf16"}
compile_kernel(kernels._add_product_levels, products, tile | {"EXACT": False}, ARCH, UNALIGNED, **options)
for kind in ("*bf16", "*fp32"):
    known = {"CHUNK": TOKEN_CHUNK, "BLOCK": kernels.COLUMN_BLOCK}
    inputs = {"X_ptr": kind, "partial_ptr": "*fp32"}
    compile_kernel(kernels._square_sums, inputs, known, ARCH, UNALIGNED, num_warps=2, **EXACT)
types = {
    "partial_ptr": "*fp32",
    "quarters_ptr": "*i32",
    "bins_ptr": "*u8",
    "top_ptr": "*i32",
    "tokens": "fp32",
}
known = {"LOW": COLUMN_LOW, "HIGHEST": BINS - 1, "BLOCK": kernels.COLUMN_BLOCK}
compile_kernel(kernels._bins, types, known, ARCH, UNALIGNED, num_warps=2, **EXACT)
known = {"BLOCK": kernels.ROW_BLOCK}
compile_kernel(kernels._add_row_levels, SUMS | ROWS, known, ARCH, UNALIGNED, **EXACT)
compile_kernel(kernels._add_rows, ROWS | {"band_ptr": "*fp32"}, known, ARCH, UNALIGNED, **EXACT)
types = {"W_ptr": "*bf16", "row_ptr": "*fp32", "column_ptr": "*fp32", "act_ptr": "*u8", "freq_ptr": "*u8"}
compile_kernel(
    kernels._add_dense_levels,
    types | {"threshold": "fp32"},
    {"BLOCK": kernels.BLOCK},
    ARCH,
    UNALIGNED,
    **EXACT,
)
types = {"packed_ptr": "*u8", "absmax_ptr": "*fp32", "codes_ptr": "*fp32"}
for rounded in (True, False):
    known = {"ROUNDED": rounded, "VALUES": nf4_triton.VALUES, "BLOCK": 64}
    compile_kernel(nf4_triton._dequantize, types | {"out_ptr": "*i16" if rounded else "*fp32"}, known, ARCH)
