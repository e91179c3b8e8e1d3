"""The nearest orthogonal matrix, roughly: Newton-Schulz iterations in bfloat16.

    X <- a X + (b A + c A^2) X,   A = X X^T,   a, b, c = 3.4445, -4.7750, 2.0315

from X = M / |M|. Singular values end between about 0.7 and 1.2. Source: Jordan et al. 2024, Muon. Torch's own
function is used where there is one, so that this is the same, to the bit, as its `torch.optim.Muon`.
"""

from __future__ import annotations

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST = 1e-7


def orthogonalised(M_OI: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """U V^T of M = U S V^T, roughly.

    Parameters
    ----------
    M_OI : float [out, in]
    steps : int

    Returns
    -------
    bfloat16 [out, in]
        0 where a whole row or column of M is 0.
    """
    try:
        from torch.optim._muon import _zeropower_via_newtonschulz as of_torch
    except ImportError:
        return iterated(M_OI, steps)
    result: torch.Tensor = of_torch(M_OI, COEFFICIENTS, steps, SMALLEST)
    return result


def iterated(M_OI: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The same without Torch's function."""
    a, b, c = COEFFICIENTS
    tall = M_OI.shape[0] > M_OI.shape[1]
    X = (M_OI.T if tall else M_OI).bfloat16()
    X = X / X.norm().clamp(min=SMALLEST)
    for _ in range(steps):
        A = X @ X.T
        B = torch.addmm(A, A, A, beta=b, alpha=c)  # rounded to bfloat16 once, as Torch's is
        X = torch.addmm(X, B, X, beta=a)
    result: torch.Tensor = X.T if tall else X
    return result
