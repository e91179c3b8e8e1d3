"""What every tensor keeps under growing budgets, and the budget under which it keeps a weight.

Shape suffixes: ``L`` budgets, ``T`` tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Curves:
    """What every tensor keeps under growing budgets.

    Attributes
    ----------
    budgets_L : float [L]
        Ascending, shares of all weights.
    shares_LT : float [L, T]
        Of the tensors' own weights.
    weights : int
        Of all tensors.
    """

    budgets_L: np.ndarray
    shares_LT: np.ndarray
    weights: int


def shares_under(budget: float, curves: Curves) -> np.ndarray:
    """What every tensor keeps of itself under a budget, float [T]: `needed_budgets` the other way round."""
    if budget <= curves.budgets_L[0]:
        return np.asarray(curves.shares_LT[0] * budget / curves.budgets_L[0])
    logs_LT = np.log(np.maximum(curves.shares_LT, 1e-9))
    at = np.log(budget), np.log(curves.budgets_L)
    return np.asarray(np.exp([np.interp(*at, logs_L) for logs_L in logs_LT.T]))


def needed_budgets(ranks: Any, budgets_L: Any, shares_L: Any) -> Any:
    """The budget under which a tensor keeps the weights of a rank.

    Parameters
    ----------
    ranks : float [...]
        Share of the tensor's weights that stand higher, above 0.
    budgets_L : float [L]
        Ascending, shares of all weights.
    shares_L : float [L]
        That the tensor keeps of itself under each.

    Returns
    -------
    float [...]
        Between the given budgets and up to 1 by powers, below the smallest in proportion.
    """
    shares = np.maximum.accumulate(np.append(np.maximum(shares_L, 1e-9), 1.0))
    shares = shares * (1 + 1e-9 * np.arange(shares.size))  # rising, where an allocation stands still
    logs, budgets = np.log(shares), np.log(np.append(budgets_L, 1.0))
    found = np.interp(np.log(ranks), logs, budgets)
    return np.exp(np.where(np.log(ranks) < logs[0], np.log(ranks) - logs[0] + budgets[0], found))
