from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from bitsandbytes.nn import Linear4bit

from tinyonn.dense.nf4 import CODES, NF4Linear, dequantize, quantize, round_to_nf4
from tinyonn.dense.parameters import Use
from tinyonn.record.sums import weight_of


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


def test_codes_are_those_of_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(CODES), get_4bit_type("nf4", device="cpu").float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_and_scales_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    weight = (torch.randn(48, 128) * 0.05).to(dtype)
    weight[1] = 0
    packed, absmax = quantize(weight)
    wanted, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(packed, wanted.view(-1))
    assert torch.equal(dequantize(packed, absmax, dtype).view(48, 128), dequantize_4bit(wanted, state))


def test_a_layer_computes_what_that_of_bitsandbytes_does() -> None:
    plain = torch.nn.Linear(128, 48)
    theirs = Linear4bit(128, 48, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4")
    theirs.load_state_dict(plain.state_dict())
    theirs = theirs.to("cpu")
    theirs.support_avx512bf16_for_cpu = False  # as `prepare_model` has it: that way rounds to bfloat16
    ours = NF4Linear.of(plain, torch.float32)
    X = torch.randn(3, 7, 128)
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(x) for layer, x in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.backward(torch.ones_like(output))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    use = Use("weight", "", ours, "linear")
    assert torch.equal(weight_of(use), round_to_nf4(plain.weight))


SCRIPT = """
import torch
from tinyonn.dense.nf4 import dequantize, quantize
from tinyonn.dense.nf4_triton import dequantize as on_gpu

device = "cuda" if torch.cuda.is_available() else "cpu"
packed, absmax = quantize(torch.randn(70, 64))
for dtype in (torch.bfloat16, torch.float32):
    found = on_gpu(packed.to(device), absmax.to(device), dtype)
    assert torch.equal(found.cpu(), dequantize(packed, absmax, dtype)), dtype
"""


def test_the_gpus_kernel_gives_the_same_values() -> None:
    pytest.importorskip("triton", reason="Triton is an optional package")
    env = {**os.environ, "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
