"""Alarms: what they say, and that they hold their tongue otherwise."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from tinyonn.train.monitor import Alarm, Watch, finite_alarm, load_alarms, spike_alarm


def even_load(experts: int = 100, samples: int = 400, top_k: int = 10, seed: int = 0) -> np.ndarray:
    """Every sample draws its experts at random."""
    chance = np.random.default_rng(seed)
    chosen = np.concatenate([chance.permutation(experts)[:top_k] for _ in range(samples)])
    return np.bincount(chosen, minlength=experts)


@pytest.mark.parametrize("top_k", [1, 10, 50, 100])
def test_an_even_load_raises_none(top_k: int) -> None:
    assert load_alarms(even_load(top_k=top_k), 400) == []


def test_nothing_chosen_raises_none() -> None:
    assert load_alarms(np.zeros(4, np.int64), 0) == []


def test_an_expert_that_nearly_all_samples_have_is_named() -> None:
    load = even_load()
    load[7] = 340  # of 400
    (alarm,) = load_alarms(load, 400)
    assert (alarm.kind, alarm.subjects) == ("high", (7,))
    assert alarm.message.startswith("expert 7 is on for 85% of the samples, over 80%; right where all kinds")
    load[9] = 330
    assert "2 experts (7, 9) are on for up to 85%" in load_alarms(load, 400)[0].message


def test_all_samples_may_have_an_expert_where_most_experts_run() -> None:
    assert load_alarms(np.full(10, 400), 400) == []  # all ten of them


def test_experts_with_next_to_no_load_are_named() -> None:
    load = even_load()
    load[[3, 50]] = (0, 3)  # of about 4,000 choices
    (alarm,) = load_alarms(load, 400)
    assert (alarm.kind, alarm.subjects) == ("low", (3, 50))
    assert alarm.message.startswith("2 experts (3, 50) hold less than 0.1% of the load; raise")
    load[50] = 30
    assert load_alarms(load, 400)[0].message.startswith("expert 3 holds less than 0.1% of the load")


def test_too_few_choices_say_nothing_of_dead_experts() -> None:
    load = even_load(samples=80)  # 800 choices: one in a thousand may well be none
    load[3] = 0
    assert load_alarms(load, 80) == []


def test_all_load_on_one_expert_is_a_collapse() -> None:
    load = np.zeros(100, np.int64)
    load[7], load[8] = 396, 4
    alarm = load_alarms(load, 400)[0]
    assert (alarm.kind, alarm.subjects) == ("collapse", (7,))
    assert alarm.message.startswith("routing has collapsed: expert 7 holds 99.0% of the load")


def test_the_same_experts_for_every_sample_are_a_collapse() -> None:
    load = np.zeros(100, np.int64)
    load[20:30] = 400
    alarms = load_alarms(load, 400)
    assert [alarm.kind for alarm in alarms] == ["collapse", "low"]
    assert "the same 10 experts (20, 21, " in alarms[0].message
    assert alarms[1].subjects == tuple(e for e in range(100) if not 20 <= e < 30)
    assert "0, 1, 2" in alarms[1].message
    assert "..." in alarms[1].message  # a sentence does not list ninety


def test_a_jump_is_told_from_noise() -> None:
    chance = random.Random(0)
    history = [4 + chance.gauss(0, 0.2) for _ in range(50)]
    assert all(spike_alarm("loss", 4 + chance.gauss(0, 0.2), history) is None for _ in range(500))
    alarm = spike_alarm("loss", 9.0, history)
    assert alarm is not None
    assert alarm.message.startswith("loss jumped to 9, its median was ")
    assert spike_alarm("loss", 9.0, history[:5]) is None  # too early to tell
    assert spike_alarm("loss", 4.2, [4.0] * 50) is None  # a flat curve does not make a small step a jump


def test_values_that_are_not_finite_are_named() -> None:
    assert finite_alarm({"loss": 1.0}) is None
    alarm = finite_alarm({"loss": math.nan, "kl": 1.0, "ce": -math.inf})
    assert alarm is not None
    assert alarm.message.startswith("ce is -inf, loss is nan; lower the learning rate")


def test_an_alarm_is_told_once_and_again_when_it_returns_or_spreads() -> None:
    watch = Watch(repeat=10)
    one, two = Alarm("low", "one", (1,)), Alarm("low", "two", (1, 2))
    assert watch.fresh(1, [one], ["low"]) == [one]
    assert watch.fresh(2, [one], ["low"]) == []
    assert watch.fresh(5, [two], ["low"]) == []  # spreads, but too soon
    assert watch.fresh(12, [two], ["low"]) == [two]
    assert watch.fresh(40, [one], ["low"]) == []  # known
    assert watch.fresh(41, [], ["low"]) == []  # over
    assert watch.fresh(42, [one], ["low"]) == [one]
