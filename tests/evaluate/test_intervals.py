from __future__ import annotations

import math

import numpy as np
import pytest

from tinyonn.evaluate.intervals import Interval, interval_of, resampled
from tinyonn.evaluate.loss import Losses
from tinyonn.evaluate.report import EvaluateReport, Line


def model(shift: float = 0.0, spread: float = 1.0, documents: int = 60, seed: int = 0) -> Losses:
    """Two slices of documents of unlike lengths; the loss of a token varies by document."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[list[float]]] = {}
    for name in ("a", "b"):
        tokens = rng.integers(5, 50, documents)
        losses = 2 + spread * rng.normal(size=documents) + shift
        rows[name] = [[float(n * x), int(n)] for n, x in zip(tokens, losses, strict=True)]
    tokens_of = {name: int(sum(n for _, n in its)) for name, its in rows.items()}
    by_slice = {name: math.fsum(x for x, _ in its) / tokens_of[name] for name, its in rows.items()}
    return Losses(by_slice, tokens_of, rows)


def test_an_interval_is_as_wide_as_documents_are_unlike() -> None:
    one = model()
    means = resampled([one])
    assert means is not None
    found = interval_of(means[0])
    assert found is not None and found.low < one.mean < found.high
    variances = []
    for its in one.documents.values():  # of a ratio of sums, by the delta method
        nats, tokens = np.array(its).T
        rest = nats - nats.sum() / tokens.sum() * tokens
        variances.append((rest**2).sum() / tokens.sum() ** 2)
    expected = 1.96 * math.sqrt(sum(variances)) / 2
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.1)
    again = resampled([one])
    assert again is not None and np.array_equal(means, again)
    other = resampled([one], seed=1)
    assert other is not None and not np.array_equal(means, other)


def test_what_two_models_differ_by_is_of_the_same_documents() -> None:
    lines = [Line("original", 1.0, 100, model(-1)), Line("dense", 1.0, 100, model(-1))]
    lines += [Line("default", 0.5, 50, model()), Line("wanda", 0.5, 50, model(0.25))]
    report = EvaluateReport("run", tuple(lines), 120, 3000, 4, 1.0)
    original, _, default, wanda = report.spreads
    assert original.interval is not None and original.behind is None
    assert default.behind == 0 and default.behind_interval == Interval(0, 0)
    assert wanda.behind == pytest.approx(0.25)
    assert wanda.interval is not None and wanda.interval.high - wanda.interval.low > 0.1
    assert wanda.behind_interval is not None
    assert wanda.behind_interval.tree() == pytest.approx([0.25, 0.25])
    tree = report.figures()["lines"][3]
    assert tree["behind_interval"] == pytest.approx([0.25, 0.25]) and len(tree["interval"]) == 2
    assert "documents" not in tree["losses"]
    cell = report.table().rows[1].cells[1]
    assert cell.splitlines()[2].startswith("Δ +0.250 [+0.250, +0.250]")


def test_losses_that_are_not_finite_or_whose_documents_are_not_known() -> None:
    broken = model()
    broken.documents["a"][3][0] = math.inf
    means = resampled([model(), broken])
    assert means is not None and interval_of(means[0]) is not None and interval_of(means[1]) is None
    old = Losses({"a": 1.0}, {"a": 10})
    assert resampled([old]) is None
    report = EvaluateReport("run", (Line("default", 0.5, 50, old),), 1, 10, 1, 1.0)
    assert report.figures()["lines"][0]["interval"] is None
