"""Which experts share a branch of the router, and which are always on: both follow from what each one contributes.

The main router chooses among branches, so experts that are wanted by the same samples belong into one. With
c_se what expert e contributes on sample s:

    share_se = c_se / sum_e c_se                      of the sample
    z_se     = (share_se - mean_s) / (std_s sqrt(S))  so that z' z are correlations over samples

`find_branches` looks for the partition into branches of equal size with the largest sum of correlations within
branches: average linkage gives the first centres, experts are assigned to places next to centres (Hungarian method)
until nothing changes, and pairs change places while that helps. No random numbers.

Shape suffixes: S samples, E experts, N branches, Z components of an expert (one per sample).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform

from tinyonn.errors import InputError

Array = np.ndarray[Any, Any]
ROUNDS = 50  # assignments; they settle after a few
NEARLY_EVERY = 0.1  # share of samples in which a shared expert may be weaker than it is rated
GAIN = 1e-9  # of a correlation: less is rounding


def find_branches(contribution_SE: Array, count: int) -> list[list[int]]:
    """Branches of experts that contribute to the same samples.

    Parameters
    ----------
    contribution_SE : float [S, E], from 0 on
        An expert with the same share everywhere, or none, fills up whatever branch has room.
    count : int
        Branches; their sizes differ by one at most.

    Returns
    -------
    list of lists of int
        Experts ascending, branches by their first expert.

    Raises
    ------
    InputError
        Fewer experts than branches; contributions that are negative or not finite.
    """
    share_SE = _shares(contribution_SE)
    experts = share_SE.shape[1]
    if not 1 <= count <= experts:
        raise InputError(f"{count} branches cannot be made of {experts} experts; give from 1 to {experts}")
    z_EZ = _standardised(share_SE).T
    correlation_EE = z_EZ @ z_EZ.T
    label_E = _balanced(z_EZ, _linked(correlation_EE, count), count)
    label_E = _swapped(correlation_EE, label_E, count)
    branches = [np.flatnonzero(label_E == number).tolist() for number in range(count)]
    return sorted(branches)


def shared_experts(contribution_SE: Array, count: int) -> list[int]:
    """Experts that are strong in nearly every sample: those whose share is highest at its lowest tenth.

    An expert that is strong on the average but varies has a low tenth, and one that is weak everywhere has too.

    Parameters
    ----------
    contribution_SE : float [S, E], from 0 on
    count : int

    Returns
    -------
    list of int
        Ascending.

    Raises
    ------
    InputError
        More than there are experts; contributions that are negative or not finite.
    """
    share_SE = _shares(contribution_SE)
    experts = share_SE.shape[1]
    if not 0 <= count <= experts:
        raise InputError(f"{count} shared experts of {experts} cannot be found; give from 0 to {experts}")
    if not len(share_SE):
        return list(range(count))
    strength_E = np.quantile(share_SE, NEARLY_EVERY, axis=0)
    return sorted(np.argsort(-strength_E, kind="stable")[:count].tolist())


def _shares(contribution_SE: Array) -> Array:
    given_SE = np.asarray(contribution_SE, np.float64)
    if given_SE.ndim != 2:
        raise InputError(f"contributions have the shape {list(given_SE.shape)}; give [samples, experts]")
    wrong = ~((given_SE >= 0) & np.isfinite(given_SE))
    if wrong.any():
        sample, expert = map(int, np.argwhere(wrong)[0])
        raise InputError(
            f"expert {expert} contributes {given_SE[sample, expert]} to sample {sample}; "
            "contributions are finite numbers from 0 on, take the profile again"
        )
    total_S1 = given_SE.sum(1, keepdims=True)
    return _divided(given_SE, total_S1, total_S1 > 0)


def _divided(values: Array, by: Array, where: Array) -> Array:
    """A quotient that is 0 elsewhere."""
    quotient: Array = np.divide(values, by, out=np.zeros_like(values), where=where)
    return quotient


def _standardised(share_SE: Array) -> Array:
    """Columns of mean 0 and length 1; 0 where they do not vary."""
    if not len(share_SE):
        return share_SE
    mean_E = share_SE.mean(0)
    centred_SE = share_SE - mean_E
    length_E = np.sqrt((centred_SE**2).sum(0))
    varies_E = length_E > 1e-12 * np.sqrt(len(share_SE)) * np.maximum(mean_E, 1e-300)
    return _divided(centred_SE, length_E, varies_E)


def _linked(correlation_EE: Array, count: int) -> Array:
    """Clusters of any size by average linkage of 1 - correlation, numbered from 0 by size, the largest first."""
    experts = len(correlation_EE)
    if experts == 1:
        return np.zeros(1, np.int64)
    distance_EE = np.maximum(1 - correlation_EE, 0)
    np.fill_diagonal(distance_EE, 0)
    tree = linkage(squareform((distance_EE + distance_EE.T) / 2, checks=False), "average")
    label_E = fcluster(tree, count, "maxclust") - 1
    sizes = np.bincount(label_E, minlength=count)
    rank_N = np.empty(len(sizes), np.int64)
    rank_N[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    ranked: Array = rank_N[label_E]
    return ranked


def _sizes(experts: int, count: int) -> Array:
    return experts // count + (np.arange(count) < experts % count).astype(np.int64)


def _balanced(z_EZ: Array, label_E: Array, count: int) -> Array:
    """Equal k-means: every expert gets a place of a branch, so that the sum of products with centres is largest."""
    place_E = np.repeat(np.arange(count), _sizes(len(z_EZ), count))
    for _ in range(ROUNDS):
        member_NE = (label_E == np.arange(count)[:, None]).astype(np.float64)
        centre_NZ = member_NE @ z_EZ
        length_N1 = np.sqrt((centre_NZ**2).sum(1, keepdims=True))
        centre_NZ = _divided(centre_NZ, length_N1, length_N1 > 0)
        gain_EN = z_EZ @ centre_NZ.T
        experts, places = linear_sum_assignment(gain_EN[:, place_E], maximize=True)
        found_E = np.empty_like(label_E)
        found_E[experts] = place_E[places]
        if np.array_equal(found_E, label_E):
            break
        label_E = found_E
    return label_E


def _swapped(correlation_EE: Array, label_E: Array, count: int) -> Array:
    """Swap the two experts that gain most, until none do: the sum of correlations within branches only grows."""
    correlation_EE = correlation_EE - np.diag(np.diag(correlation_EE))
    label_E = label_E.copy()
    for _ in range(len(label_E) ** 2):
        member_EN = (label_E[:, None] == np.arange(count)).astype(np.float64)
        with_EN = correlation_EE @ member_EN  # correlation of each expert with each branch
        own_E = with_EN[np.arange(len(label_E)), label_E]
        there_EE = with_EN[:, label_E]  # of expert i with the branch of expert j
        gain_EE = there_EE + there_EE.T - own_E[:, None] - own_E[None] - 2 * correlation_EE
        gain_EE[label_E[:, None] == label_E[None]] = 0
        one, other = divmod(int(np.argmax(gain_EE)), len(label_E))
        if gain_EE[one, other] <= GAIN:
            break
        label_E[[one, other]] = label_E[[other, one]]
    return label_E
