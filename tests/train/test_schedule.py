"""Phases of the learning rate."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tinyonn.errors import InputError
from tinyonn.train.optimizers import Schedule


def test_warm_up_stay_decay() -> None:
    schedule = Schedule(10, warmup=2, decay=4, floor=0.2)
    factors = [schedule.factor(step) for step in range(12)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_the_decay_falls_from_one_to_the_floor() -> None:
    schedule = Schedule(100, decay=50, floor=0.1)
    factors = [schedule.factor(step) for step in range(49, 101)]
    assert factors[:2] == [1, 1]
    assert all(before > after for before, after in pairwise(factors[1:]))
    assert schedule.factor(75) == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1)


def test_without_phases_the_rate_stays() -> None:
    assert [Schedule(3).factor(step) for step in range(5)] == [1] * 5


def test_shares_of_steps_never_overlap() -> None:
    assert Schedule.of_shares(200, 0.05, 0.2) == Schedule(200, 10, 40)
    for steps in range(12):
        schedule = Schedule.of_shares(steps, 0.5, 0.5)
        assert all(0 < schedule.factor(step) <= 1 for step in range(steps))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 10, "warmup": 6, "decay": 5}, "6 steps of warmup and 5 of decay do not fit into 10"),
        ({"steps": 10, "warmup": -1}, "-1 steps of warmup"),
        ({"steps": 10, "floor": 1.5}, r"floor of the learning rate is 1\.5"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Schedule(**values)  # type: ignore[arg-type]


def test_no_step_is_before_the_first() -> None:
    with pytest.raises(InputError, match="step -1"):
        Schedule(3).factor(-1)
