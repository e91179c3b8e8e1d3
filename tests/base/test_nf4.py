from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from tinyonn.base.nf4 import round_to_nf4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(256, 704), (48, 40), (3, 34)])
def test_the_same_bits_as_bitsandbytes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    weight = (torch.randn(shape, generator=generator) * 0.05).to(dtype)
    weight[0, :3] = torch.tensor([0.0, -0.0, 0.9])
    weight[1] = 0
    wanted = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", blocksize=64))
    assert torch.equal(round_to_nf4(weight), wanted)


def test_values_between_two_codes_go_where_bitsandbytes_puts_them() -> None:
    grid = torch.linspace(-1, 1, 64 * 500, dtype=torch.float32)
    blocks = grid.reshape(500, 64)
    blocks = torch.cat([blocks, torch.ones(500, 64)], dim=1).reshape(500, 128)
    shuffled = blocks.T.contiguous().reshape(-1, 64)
    wanted = dequantize_4bit(*quantize_4bit(shuffled, quant_type="nf4", blocksize=64))
    assert torch.equal(round_to_nf4(shuffled), wanted)
