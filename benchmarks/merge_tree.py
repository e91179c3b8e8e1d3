"""What merging costs in fidelity: Spearman with the exact means, by the shape of the tree.

python -m benchmarks.merge_tree
"""

from __future__ import annotations

import numpy as np
from scipy.stats import spearmanr

from benchmarks.simulated import Float64, codebooks_of, encode, segment_means
from tinyonn.store.records import UInt16, average_records, unpack, value_tables
from tinyonn.store.tree import Node, merge_tree

SEGMENTS, SAMPLES, ROWS, COLUMNS = 64, 16, 128, 256


def binary(first: int, last: int) -> Node:
    """The balanced binary tree."""
    if last - first == 1:
        return Node(first, last)
    middle = (first + last) // 2
    return Node(first, last, (binary(first, middle), binary(middle, last)))


def merge(node: Node, leaves: list[UInt16], books: Float64, root_nearest: bool, root: bool = True) -> UInt16:
    """Records of a node."""
    if not node.children:
        return leaves[node.first]
    parts = tuple(merge(child, leaves, books, root_nearest, False) for child in node.children)
    weights = np.array([child.last - child.first for child in node.children], float)
    out = np.empty_like(parts[0])
    seed = np.uint64(node.first * 1000 + node.last)
    average_records(
        parts,
        weights / weights.sum(),
        books,
        *value_tables(books),
        seed,
        np.uint64(0),
        root and root_nearest,
        out,
    )
    return out


def main() -> None:
    """Print one line per way of merging."""
    means, exact = segment_means(ROWS, COLUMNS, SEGMENTS, SAMPLES)
    books = codebooks_of(means[:2].mean(axis=0))
    leaves = [encode(means[k], books, k + 1) for k in range(SEGMENTS)]
    float_means = means.mean(axis=0).reshape(3, -1)

    def show(label: str, decoded: Float64, merges: int = 0, depth: int = 0) -> None:
        rank = [spearmanr(decoded[s], exact[s].ravel()).statistic for s in range(3)]
        spread = float_means.std(axis=1)
        error = np.sqrt(((decoded - float_means) ** 2).mean(axis=1)) / spread
        figures = " ".join(f"{value:.4f}" for value in rank)
        print(
            f"{label:34s} merges {merges:3d} depth {depth:2d}  Spearman {figures}  error/sd {error.round(3)}"
        )

    def decode(records: UInt16) -> Float64:
        return np.stack([books[s][unpack(records)[s]] for s in range(3)])

    show("float means of clipped levels", float_means)
    ideal = [np.abs(books[s][:, None] - float_means[s]).argmin(axis=0) for s in range(3)]
    show("ideal 4-bit codes", np.stack([books[s][ideal[s]] for s in range(3)]))
    show("all leaves live, averaged", np.mean([decode(leaf) for leaf in leaves], axis=0))
    for label, tree in [
        ("one after another (max_live 1)", merge_tree(SEGMENTS, 1)),
        ("binary, balanced (needs 6 live)", binary(0, SEGMENTS)),
        *((f"ours, max_live {live}", merge_tree(SEGMENTS, live)) for live in (2, 3, 4, 5)),
    ]:
        count = len(list(tree.inner()))
        show(label, decode(merge(tree, leaves, books, False)), count, tree.depth)
        show(f"{label}, root nearest", decode(merge(tree, leaves, books, True)), count, tree.depth)


if __name__ == "__main__":
    main()
