"""Which rows are drawn, and in which order."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np

from tinyonn.corpus.corpus import even_shares, stored_order
from tinyonn.corpus.rows import Row
from tinyonn.corpus.slices import even_sample


def test_the_sample_that_slices_are_fitted_on_is_even() -> None:
    rows = [Row(number, text=str(number), fault="bad" if number % 2 else None) for number in range(400)]
    drawn = Counter(text for seed in range(300) for text in even_sample(rows, 20, seed))
    assert sum(drawn.values()) == 300 * 20
    assert set(drawn) == {str(number) for number in range(0, 400, 2)}
    assert max(drawn.values()) < 60  # 30 each on average
    first, last = (sum(drawn[str(n)] for n in part) for part in (range(0, 200, 2), range(200, 400, 2)))
    assert abs(first - last) < 400
    assert len(even_sample(rows, 500, 0)) == 200


def test_shares_are_even_and_use_up_the_total() -> None:
    generator = random.Random(0)
    for _ in range(300):
        sizes = [generator.randrange(40) for _ in range(generator.randrange(1, 9))]
        total = generator.randrange(200)
        shares = even_shares(sizes, total)
        assert sum(shares) == min(total, sum(sizes))
        assert all(share <= size for share, size in zip(shares, sizes, strict=True))
        free = [share for share, size in zip(shares, sizes, strict=True) if share < size]
        assert not free or max(shares) - min(free) <= 1
    assert even_shares([5, 7], None) == [5, 7]


def test_a_slices_order_does_not_depend_on_the_other_slices() -> None:
    alone = stored_order([9], ["b"], 4)[0]
    among = stored_order([3, 9], ["a", "b"], 4)[1]
    assert np.array_equal(alone, among)
    assert Counter(alone.tolist()) == Counter(range(9))
    assert not np.array_equal(alone, stored_order([9], ["b"], 5)[0])
