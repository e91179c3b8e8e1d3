"""NF4: what `bitsandbytes` makes of a tensor, without it.

Every 64 values share a scale ``absmax``, their largest absolute value; a value becomes the nearest of sixteen codes
(Dettmers et al. 2023, QLoRA, appendix E) times that scale; two codes share a byte, the first in its upper half.
`round_to_nf4` goes there and back in one pass, bit for bit ``dequantize_4bit(quantize_4bit(...))``, which a test
compares, and some twenty times faster on a CPU. `NF4Linear` holds the codes, as ``bitsandbytes.nn.Linear4bit`` does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

BLOCK = 64
CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def round_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """A tensor after quantization to NF4 and back.

    Parameters
    ----------
    weight : bfloat16 or float32 tensor
        Blocks of 64 follow its order in memory.

    Returns
    -------
    tensor of the same dtype and shape
    """
    codes = np.array(CODES, np.float32)
    bounds = ((codes[1:] + codes[:-1]) / 2).astype(np.float32)
    flat = weight.detach().contiguous().reshape(-1)
    if weight.dtype == torch.bfloat16:
        bits = flat.view(torch.uint16).numpy()
        rounded = np.empty_like(bits)
        _round_bfloat16(bits, bounds, codes, rounded)
        return torch.from_numpy(rounded).view(torch.bfloat16).reshape(weight.shape)
    values = flat.float().numpy()
    out = np.empty_like(values)
    _round_float32(values, bounds, codes, out)
    return torch.from_numpy(out).to(weight.dtype).reshape(weight.shape)


@njit(inline="always")
def _round_block(values: Any, largest: Any, bounds: Any, codes: Any, out: Any) -> None:
    """Round 64 values, which are scaled in place; loops have a fixed length, so that they are vectorised."""
    scale = np.float32(1) / max(largest, np.float32(1e-38))
    for i in range(BLOCK):
        values[i] = values[i] * scale
        out[i] = codes[0]
    for code in range(15):
        bound, above = bounds[code], codes[code + 1]
        for i in range(BLOCK):
            out[i] = above if values[i] > bound else out[i]
    for i in range(BLOCK):
        out[i] = out[i] * largest


@njit(inline="always")
def _round_rest(values: Any, count: Any, bounds: Any, codes: Any, out: Any) -> None:
    """Round the last, shorter block, which bitsandbytes divides instead of multiplying."""
    largest = np.float32(0)
    for i in range(count):
        largest = max(largest, abs(values[i]))
    largest = max(largest, np.float32(1e-38))
    for i in range(count):
        place = 0
        for bound in bounds:
            place += values[i] / largest > bound
        out[i] = codes[place] * largest


@njit(nogil=True, cache=True)
def _round_bfloat16(bits: Any, bounds: Any, codes: Any, rounded: Any) -> None:
    given, found = np.zeros(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    values, out = given.view(np.float32), found.view(np.float32)
    top = np.empty(1, np.uint32)
    largest = top.view(np.float32)
    half, one, shift = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
    for begin in range(0, bits.size, BLOCK):
        count = min(BLOCK, bits.size - begin)
        if count == BLOCK:
            most = np.uint32(0)
            for i in range(BLOCK):
                given[i] = np.uint32(bits[begin + i]) << shift
                most = max(most, given[i] & np.uint32(0x7FFFFFFF))  # positive floats order like their bits
            top[0] = most
            _round_block(values, largest[0], bounds, codes, out)
        else:
            for i in range(count):
                given[i] = np.uint32(bits[begin + i]) << shift
            _round_rest(values, count, bounds, codes, out)
        for i in range(count):  # to the nearest, ties to even
            rounded[begin + i] = np.uint16((found[i] + half + ((found[i] >> shift) & one)) >> shift)


@njit(nogil=True, cache=True)
def _round_float32(given: Any, bounds: Any, codes: Any, rounded: Any) -> None:
    values, out = np.zeros(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for begin in range(0, given.size, BLOCK):
        count = min(BLOCK, given.size - begin)
        largest = np.float32(0)
        for i in range(count):
            values[i] = given[begin + i]
            largest = max(largest, abs(values[i]))
        if count == BLOCK:
            _round_block(values, largest, bounds, codes, out)
        else:
            _round_rest(values, count, bounds, codes, out)
        for i in range(count):
            rounded[begin + i] = out[i]


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a tensor, on its device.

    Parameters
    ----------
    weight : float tensor
        Its number of values a multiple of 64.

    Returns
    -------
    packed : uint8 [values / 2]
    absmax : float32 [values / 64]
    """
    blocks = weight.detach().reshape(-1, BLOCK).float()
    absmax = blocks.abs().amax(1)
    codes = torch.tensor(CODES, device=weight.device)
    bounds = (codes[1:] + codes[:-1]) / 2
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    numbers = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8).view(-1, 2)
    return (numbers[:, 0] << 4) | numbers[:, 1], absmax


def dequantize(packed: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values of codes and scales, float32 products rounded once; on a GPU by a Triton kernel where there is one.

    Parameters
    ----------
    packed : uint8 [values / 2]
    absmax : float32 [values / 64]
    dtype : torch.dtype
        ``bfloat16`` or ``float32``.

    Returns
    -------
    tensor [values]
    """
    if packed.is_cuda:
        try:
            from tinyonn.dense.nf4_triton import dequantize as on_gpu
        except ImportError:  # Triton is optional
            pass
        else:
            found: torch.Tensor = on_gpu(packed, absmax, dtype)
            return found
    codes = torch.tensor(CODES, device=packed.device)
    numbers = torch.stack([packed >> 4, packed & 15], dim=1).view(-1, BLOCK)
    return (codes[numbers.int()] * absmax[:, None]).to(dtype).view(-1)


def is_nf4(module: torch.nn.Module) -> bool:
    """Whether a layer holds its weight in NF4, ours or that of ``bitsandbytes``."""
    return (
        isinstance(module, NF4Linear)
        or getattr(getattr(module, "weight", None), "quant_state", None) is not None
    )


def dequantized(module: Any) -> torch.Tensor:
    """The weight of a layer in NF4, [out, in]."""
    if isinstance(module, NF4Linear):
        return module.dequantized()
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight


class NF4Linear(torch.nn.Linear):
    """A frozen linear layer in NF4 without ``bitsandbytes``; its weight is made anew for every product.

    Parameters
    ----------
    out_features, in_features : int
        Their product a multiple of 64.
    packed, absmax : tensor
        As of `quantize`; they decide the device.
    dtype : torch.dtype
        In which it computes.
    bias : tensor [out], optional
    """

    def __init__(
        self, out_features: int, in_features: int, packed: torch.Tensor, absmax: torch.Tensor,
        dtype: torch.dtype = torch.bfloat16, bias: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = torch.nn.Parameter(packed.view(-1, 1), requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
        self.register_buffer("absmax", absmax)
        self.compute_dtype = dtype

    @classmethod
    def of(cls, linear: torch.nn.Linear, dtype: torch.dtype = torch.bfloat16) -> NF4Linear:
        """Quantize a layer."""
        return cls(
            linear.out_features, linear.in_features, *quantize(linear.weight), dtype,
            None if linear.bias is None else linear.bias.detach(),
        )  # fmt: skip

    def dequantized(self) -> torch.Tensor:
        """The weight, [out, in], in the dtype that it computes in."""
        absmax = self.get_buffer("absmax")
        values = dequantize(self.weight.data.view(-1), absmax, self.compute_dtype)
        return values.view(self.out_features, self.in_features)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """X [..., in] -> [..., out]; gradients reach X alone."""
        Y: torch.Tensor = _Product.apply(X, self)  # type: ignore[no-untyped-call]
        return Y


class _Product(torch.autograd.Function):
    """Nothing of the weight is kept between the passes."""

    @staticmethod
    def forward(ctx: Any, X: torch.Tensor, layer: NF4Linear) -> torch.Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(X, layer.dequantized(), layer.bias)

    @staticmethod
    def backward(ctx: Any, G: torch.Tensor) -> tuple[torch.Tensor, None]:
        return G @ ctx.layer.dequantized(), None
