"""Without balancing all prompts crowd into a few experts, and the monitor says so; with it the load is even."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.defaults import optimizer_options
from tests.train.trained import changed, load_models, make_corpus, make_models
from tinyonn.train.monitor import FILE, Monitor, read_lines
from tinyonn.train.teacher import Live
from tinyonn.train.trainer import Trainer

STEPS, WINDOW = 120, 40


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("balanced", [False, True])
def test_collapse(tmp_path: Path, balanced: bool) -> None:
    torch.set_num_threads(1)
    make_models(tmp_path / "model")
    corpus = make_corpus(tmp_path / "corpus.arrow", {"code": 60, "prose": 60})
    base, student = load_models(tmp_path / "model")
    routing = {"ks": (2,), "noise": 0.0, "dropout": 0.0, "capacity": None}
    options = changed(
        steps=STEPS,
        batch=8,
        micro_batch=8,
        routing=routing | {"bias_rate": 0.05 if balanced else 0.0},
        weights={"balance": 0.05 if balanced else 0.0, "ce": 0.0},
        stages={"first": 0.0, "min_k": None, "grow": 0.0, "integrity": False},
        optimizers=optimizer_options(router_lr=0.03, experts="muon", experts_lr=1e-3, norms_lr=0.0),
    )
    trainer = Trainer(student, corpus, options, tmp_path / "train", Live(base))
    trainer.monitor = Monitor(tmp_path / "train", window=WINDOW)
    trainer.run()
    lines = list(read_lines(tmp_path / "train" / FILE))
    last = lines[-1]["values"]
    alarms = [alarm for line in lines[WINDOW:] for alarm in line.get("alarms", ())]
    assert last["load_dead"] == 0
    if balanced:
        assert last["load_cv"] <= 0.5
        assert not alarms
    else:
        assert last["load_cv"] > 0.6
        assert any("of the samples, over 80%" in alarm for alarm in alarms)
