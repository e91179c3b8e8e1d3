"""What merging costs in fidelity: Spearman with the exact means, by the shape of the tree.

python -m benchmarks.merge_tree
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata, spearmanr

from benchmarks.simulated import Float64, codebooks_of, encode, segment_means
from tinyonn.store.records import (
    UInt16,
    average_records,
    averaged_codebooks,
    unpack,
    value_tables,
    weighted_values,
)
from tinyonn.store.tree import Node, merge_tree

SEGMENTS, SAMPLES, ROWS, COLUMNS = 64, 16, 128, 256


def binary(first: int, last: int) -> Node:
    """The balanced binary tree."""
    if last - first == 1:
        return Node(first, last)
    middle = (first + last) // 2
    return Node(first, last, (binary(first, middle), binary(middle, last)))


@dataclass(frozen=True)
class Part:
    """Records and what their codes stand for."""

    records: UInt16
    books: Float64

    def means(self) -> Float64:
        """Decoded: float64 [3, n]."""
        codes = unpack(self.records)
        return np.stack([self.books[s][codes[s]] for s in range(3)])


def merge(node: Node, leaves: list[Part], root_nearest: bool, root: bool = True) -> Part:
    """Records of a node."""
    if not node.children:
        return leaves[node.first]
    parts = [merge(child, leaves, root_nearest, False) for child in node.children]
    weights = np.array([child.last - child.first for child in node.children], float)
    weights /= weights.sum()
    books = averaged_codebooks([part.books for part in parts], weights)
    out = np.empty_like(parts[0].records)
    average_records(
        tuple(part.records for part in parts),
        weighted_values([part.books for part in parts], weights),
        value_tables(books),
        np.uint64(node.first * 1000 + node.last),
        np.uint64(0),
        root and root_nearest,
        out,
    )
    return Part(out, books)


def _bin_means(means: Float64, codes: Float64) -> Float64:
    """The mean of each code, for every weight that has it."""
    codes = codes.astype(np.int64)
    totals = np.bincount(codes, means, 16) / np.maximum(np.bincount(codes, minlength=16), 1)
    return np.asarray(totals[codes])


def main() -> None:
    """Print one line per way of merging."""
    means, exact = segment_means(ROWS, COLUMNS, SEGMENTS, SAMPLES)
    books = [codebooks_of(means[k]) for k in range(SEGMENTS)]
    leaves = [Part(encode(means[k], books[k], k + 1), books[k]) for k in range(SEGMENTS)]
    float_means = means.mean(axis=0).reshape(3, -1)

    def show(label: str, decoded: Float64, merges: int = 0, depth: int = 0) -> None:
        rank = [spearmanr(decoded[s], exact[s].ravel()).statistic for s in range(3)]
        spread = float_means.std(axis=1)
        error = np.sqrt(((decoded - float_means) ** 2).mean(axis=1)) / spread
        figures = " ".join(f"{value:.4f}" for value in rank)
        print(
            f"{label:34s} merges {merges:3d} depth {depth:2d}  Spearman {figures}  error/sd {error.round(3)}"
        )

    show("float means of clipped levels", float_means)
    ideal = np.floor(rankdata(float_means, axis=1) * (16 / (float_means.shape[1] + 1)))
    show("ideal 4-bit codes", np.stack([_bin_means(float_means[s], ideal[s]) for s in range(3)]))
    show("all leaves live, averaged", np.mean([leaf.means() for leaf in leaves], axis=0))
    for label, tree in [
        ("one after another (max_live 1)", merge_tree(SEGMENTS, 1)),
        ("binary, balanced (needs 6 live)", binary(0, SEGMENTS)),
        *((f"ours, max_live {live}", merge_tree(SEGMENTS, live)) for live in (2, 3, 4, 5)),
    ]:
        count = len(list(tree.inner()))
        show(label, merge(tree, leaves, False).means(), count, tree.depth)
        show(f"{label}, root nearest", merge(tree, leaves, True).means(), count, tree.depth)


if __name__ == "__main__":
    main()
