"""Training as a whole: it learns, it leaves untouched what it should, and it goes on to the same bits."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.dense.architectures import make_model
from tests.model.assembled import dense_model
from tests.train.defaults import loss_weights, routing_options, stage_options, training
from tests.train.trained import EXPERTS, OPTIONS, changed, load_models, make_corpus, make_models, read_curve
from tinyonn.corpus.file import Corpus
from tinyonn.errors import InputError
from tinyonn.train.options import TrainOptions
from tinyonn.train.routing import ProfileTargets
from tinyonn.train.teacher import Live, cache_teacher
from tinyonn.train.trainer import Trainer, TrainingDivergedError


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path / "corpus.arrow")


@pytest.fixture
def train(tmp_path: Path, corpus: Corpus) -> Callable[..., Trainer]:
    """A trainer of a fresh model in a folder of this name."""
    make_model("qwen2", tmp_path / "model")

    def made(name: str, options: TrainOptions = OPTIONS, **more: Any) -> Trainer:
        base, student = load_models(tmp_path / "model")
        return Trainer(student, corpus, options, tmp_path / name, **{"teacher": Live(base), **more})

    return made


def curve(tmp_path: Path, name: str) -> list[dict[str, float]]:
    return read_curve(tmp_path / name)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.student.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Going on


@pytest.mark.parametrize(("precision", "rate"), [("float32", 0.0), ("bfloat16", 1e-3)])
def test_a_stopped_training_goes_on_to_the_same_bits(
    tmp_path: Path, train: Callable[..., Trainer], precision: str, rate: float
) -> None:
    trunk = {"norms_lr": rate, "trunk_lr": rate}
    options = changed(precision=precision, warm_start=0, optimizers=trunk)
    whole = train("whole", options)
    assert whole.run() == 6
    for until in (
        1,
        3,
        4,
        5,
        None,
    ):  # between checkpoints and at them; nothing is kept of steps after the last one
        parts = train("parts", options)
        parts.run(until)
    assert curve(tmp_path, "parts") == curve(tmp_path, "whole")
    assert same(weights(parts), weights(whole))
    stages = [line["stage"] for line in read_curve(tmp_path / "whole")]
    assert stages == [1, 1, 1, 2, 2, 2]


def test_a_killed_training_goes_on_to_the_same_bits(
    tmp_path: Path, corpus: Corpus, train: Callable[..., Trainer]
) -> None:
    torch.set_num_threads(1)
    train("whole").run()
    child = [sys.executable, "-m", "tests.train.gloo_child", str(tmp_path), "0", "1"]
    for kill in (3, 0):
        ended = subprocess.run([*child, str(kill)], capture_output=True, timeout=120, check=False)
        assert ended.returncode == (-signal.SIGKILL if kill else 0), ended.stderr.decode()
        if kill:
            assert len(read_curve(tmp_path / "train")) == 3
    assert curve(tmp_path, "train") == curve(tmp_path, "whole")


def test_two_workers_take_the_steps_of_one(
    tmp_path: Path, corpus: Corpus, train: Callable[..., Trainer]
) -> None:
    alone = train("alone")
    alone.run()
    child = [sys.executable, "-m", "tests.train.gloo_child", str(tmp_path)]
    both = [subprocess.Popen([*child, str(rank), "2", "0"], stderr=subprocess.PIPE) for rank in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    ours = read_curve(tmp_path / "alone")
    theirs = read_curve(tmp_path / "train")
    assert len(theirs) == 6
    for one, other in zip(ours, theirs, strict=True):
        assert other == pytest.approx(one, rel=2e-3, abs=1e-5)
    resumed = train("train")  # with one worker where two were
    assert resumed.step == 6
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(resumed)[name], tensor, atol=2e-4, rtol=0, check_dtype=False)


def test_micro_batches_change_rounding_alone(tmp_path: Path, train: Callable[..., Trainer]) -> None:
    train("one", changed(micro_batch=1)).run(3)
    train("all", changed(micro_batch=4, checkpointing=True)).run(3)
    lines = [read_curve(tmp_path / name) for name in ("one", "all")]
    for one, other in zip(*lines, strict=True):
        assert other == pytest.approx(one, rel=2e-3, abs=1e-5)


def test_a_checkpoint_of_another_training_is_refused(train: Callable[..., Trainer]) -> None:
    train("here", identity={"assembly": "x"}).run(2)
    with pytest.raises(InputError, match="assembly is 'x' there and 'y' now"):
        train("here", identity={"assembly": "y"})
    with pytest.raises(InputError, match="seed is 0 there and 1 now"):
        train("here", changed(seed=1), identity={"assembly": "x"})
    assert train("here", changed(keep=3, micro_batch=1), identity={"assembly": "x"}).step == 2


# Learning


LONG = {
    "steps": 24,
    "prompt_loss": True,
    "checkpoint_every": 24,
    "stages": {"min_k": None, "integrity": False, "grow": 0.0},
    "routing": {"dropout": 0.0, "noise": 0.0, "capacity": None},
    "optimizers": {"experts_lr": 5e-3},
}


def losses(folder: Path, name: str = "loss") -> tuple[float, float]:
    """Mean over the first and the last steps."""
    lines = read_curve(folder)
    values = [line[name] for line in lines]
    return float(np.mean(values[:4])), float(np.mean(values[-4:]))


def test_a_routed_model_learns(tmp_path: Path, train: Callable[..., Trainer]) -> None:
    train("long", changed(**LONG)).run()
    first, last = losses(tmp_path / "long")
    assert last < 0.95 * first


def test_a_sparse_model_without_a_router_learns(tmp_path: Path, corpus: Corpus) -> None:
    base, student = make_models(tmp_path / "model", router=False, experts_top_k=3)
    before = {name: p.clone() for name, p in student.named_parameters()}
    options = changed(**{**LONG, "routing": {"ks": ()}, "stages": {"min_k": None}})
    Trainer(student, corpus, options, tmp_path / "t", Live(base)).run()
    first, last = losses(tmp_path / "t", "kl")
    assert last < 0.8 * first
    off = [expert for expert in range(EXPERTS) if expert not in student.config.chosen_experts]
    for name, layer in student.sparse_layers.items():
        sizes = layer.matrix.group_sizes().tolist()
        old, new = (values.split(sizes) for values in (before[f"base.{name}.values"], layer.values.detach()))
        assert all(torch.equal(old[expert], new[expert]) for expert in off)
        assert not torch.equal(old[-1], new[-1])


def test_any_causal_model_learns_by_the_same_script(tmp_path: Path, corpus: Corpus) -> None:
    base = dense_model(make_model("gpt2", tmp_path / "teacher"))
    student = dense_model(make_model("qwen2", tmp_path / "small", num_hidden_layers=1, hidden_size=32))
    options = changed(
        **{
            **LONG,
            "routing": {"ks": ()},
            "weights": {"hidden": 0.0},
            "optimizers": {"trunk_lr": 5e-3, "norms_lr": 5e-3},
        }
    )
    Trainer(student, corpus, options, tmp_path / "t", Live(base)).run()
    first, last = losses(tmp_path / "t")
    assert last < 0.8 * first


def test_a_cached_teacher_teaches(tmp_path: Path, corpus: Corpus, train: Callable[..., Trainer]) -> None:
    live = Live(dense_model(tmp_path / "model"))
    cached = cache_teacher(live, corpus, tmp_path / "cache", "model", k=264)
    options = {**LONG, "weights": {"hidden": 0.0}, "steps": 2, "checkpoint_every": 9}
    train("live", changed(**options)).run()
    train("cached", changed(**options), teacher=cached).run()
    ours, theirs = (read_curve(tmp_path / name) for name in ("live", "cached"))
    assert [line["kl"] for line in theirs] == pytest.approx([line["kl"] for line in ours], rel=2e-2)


def test_a_warm_start_teaches_the_router_alone(
    tmp_path: Path, corpus: Corpus, train: Callable[..., Trainer]
) -> None:
    profiled = corpus.range("code", 0, 4) + corpus.range("prose", 0, 4)
    contribution_SE = np.full((8, EXPERTS), 0.1, np.float32)
    contribution_SE[:4, 1] = contribution_SE[4:, 4] = 1.0
    targets = ProfileTargets([sample.index for sample in profiled], contribution_SE)
    options = changed(warm_start=25, warm_start_batch=8, warm_start_lr=2e-2, routing={"bias_rate": 0.0})
    trainer = train("warm", options, targets=targets)
    before = weights(trainer)
    trainer.run(25)
    lines = read_curve(tmp_path / "warm")
    assert lines[-1]["profile"] < 0.3 * lines[0]["profile"]
    changed_names = {
        name.split(".")[0] for name, t in weights(trainer).items() if not torch.equal(t, before[name])
    }
    assert changed_names == {"router"}
    assert trainer.run() == 31
    again = train("warm", options, targets=targets)
    assert again.step == 31


def test_a_held_router_stays_as_the_warm_start_left_it(corpus: Corpus, train: Callable[..., Trainer]) -> None:
    profiled = corpus.range("code", 0, 4) + corpus.range("prose", 0, 4)
    contribution_SE = np.random.default_rng(0).random((8, EXPERTS), dtype=np.float32)
    targets = ProfileTargets([sample.index for sample in profiled], contribution_SE)
    options = changed(warm_start=4, routing={"bias_rate": 0.0}, optimizers={"router_lr": 0.0})
    trainer = train("held", options, targets=targets)
    before = weights(trainer)
    trainer.run(4)
    taught = weights(trainer)
    trainer.run()
    after = weights(trainer)

    def moved(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> set[str]:
        return {name.split(".")[0] for name, tensor in new.items() if not torch.equal(tensor, old[name])}

    assert moved(before, taught) == {"router"}
    assert "router" not in moved(taught, after) and moved(taught, after)


# What the stages leave untouched


def touched(trainer: Trainer, before: dict[str, torch.Tensor]) -> set[int]:
    """Groups of which any value has changed."""
    found = set()
    for name, layer in trainer.student.model.sparse_layers.items():
        sizes = layer.matrix.group_sizes().tolist()
        old = before[f"base.{name}.values"].split(sizes)
        found |= {
            g for g, new in enumerate(layer.values.detach().split(sizes)) if not torch.equal(new, old[g])
        }
    return found


def test_stage_one_updates_the_least_surprised_and_the_core(train: Callable[..., Trainer]) -> None:
    options = changed(stages={"first": 1.0, "min_k": 2}, routing={"ks": (1,)})
    trainer = train("one", options)
    before = weights(trainer)
    trainer.run(1)
    changed_groups = touched(trainer, before)
    assert EXPERTS in changed_groups and len(changed_groups) == 3
    surprise = trainer.rules.surprise.mean[:-1]
    least = set(surprise.argsort()[:2].tolist())
    assert changed_groups - {EXPERTS} == least
    assert bool((surprise > 0).all())  # experts that were off got gradients too


def test_stage_two_updates_those_that_are_on(train: Callable[..., Trainer]) -> None:
    seen: list[Mapping[str, Any]] = []
    options = changed(batch=2, stages={"first": 0.0, "grow": 0.0}, routing={"ks": (1,), "capacity": None})
    trainer = train("two", options)
    trainer.observe = seen.append
    before = weights(trainer)
    trainer.run(1)
    (line,) = seen
    assert sum(line["load"]) == 2
    on = set(np.flatnonzero(line["load"]).tolist())
    assert touched(trainer, before) == on | {EXPERTS}


def test_frozen_experts_and_trunk_keep_their_bits(train: Callable[..., Trainer]) -> None:
    trainer = train("frozen", changed(optimizers={"experts": "frozen"}))
    before = weights(trainer)
    trainer.run(3)
    moved = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith("router.") for name in moved)


@pytest.mark.parametrize("what", ["norms", "trunk"])
def test_norms_and_biases_learn_apart_from_embeddings_and_head(
    train: Callable[..., Trainer], what: str
) -> None:
    frozen = {"experts": "frozen", "router": "frozen", f"{what}_lr": 0.01}
    trainer = train(
        what, changed(precision="bfloat16", optimizers=frozen, routing={"ks": (2, 4), "bias_rate": 0.0})
    )
    before = weights(trainer)
    trainer.run(3)
    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    vectors = {
        name
        for name, parameter in trainer.student.model.named_parameters()
        if parameter.dim() < 2 and not name.endswith("values") and "router" not in name
    }
    if what == "trunk":
        assert moved == {"base.model.embed_tokens.weight", "base.lm_head.weight"}
    else:
        assert {name for name in vectors if name.endswith("norm.weight")} <= moved <= vectors


def test_trained_norms_keep_their_inputs_and_no_copies_for_every_layer_behind_them(
    train: Callable[..., Trainer],
) -> None:
    ids_BT = torch.randint(0, 250, (2, 64), generator=torch.Generator().manual_seed(0))

    def kept(name: str, **rates: float) -> int:
        trainer = train(name, changed(precision="bfloat16", optimizers={"experts": "frozen", **rates}))
        model, seen = trainer.student.model, dict[int, int]()
        for parameter in model.parameters():  # the same graph, whatever learns
            parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
            parameter.requires_grad_(parameter.dim() < 2)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
            return tensor

        alive: list[torch.Tensor] = []
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            model(input_ids=ids_BT, gates=torch.ones(EXPERTS))
        return sum(seen.values())

    plain, trained = kept("plain"), kept("trained", norms_lr=1e-3, trunk_lr=1e-3)
    assert trained <= 1.05 * plain


def test_the_bias_evens_the_load(train: Callable[..., Trainer]) -> None:
    still = {"router_lr": 0.0, "experts": "frozen", "router": "adamw"}
    plain = {"ks": (1,), "noise": 0.0, "dropout": 0.0, "capacity": None}

    def spread(rate: float) -> float:
        seen: list[Mapping[str, Any]] = []
        options = changed(
            steps=16, batch=8, micro_batch=8, routing={**plain, "bias_rate": rate}, optimizers=still
        )
        trainer = train(f"bias {rate}", options)
        trainer.observe = seen.append
        trainer.run()
        load = np.sum([line["load"] for line in seen[-8:] if "load" in line], axis=0)
        return float(load.std() / load.mean())

    assert spread(0.02) < 0.6 * spread(0.0)


# What is not a number, and what does not fit


def test_a_weight_that_is_not_a_number_is_named(tmp_path: Path, train: Callable[..., Trainer]) -> None:
    trainer = train("bad")
    trainer.run(2)
    name, layer = next(iter(trainer.student.model.sparse_layers.items()))
    layer.values.data[layer.values.numel() - 1] = torch.nan
    with pytest.raises(
        TrainingDivergedError, match=rf"step 3: the weight base\.{name}\.values .*checkpoint-00000002"
    ):
        trainer.run()
    assert train("bad").run() == 6


def test_a_teacher_that_is_not_a_number_is_named(tmp_path: Path, train: Callable[..., Trainer]) -> None:
    base = dense_model(tmp_path / "model")
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(TrainingDivergedError, match=r"step 1: layer 1 of the teacher .*no checkpoint yet"):
        train("bad", teacher=Live(base)).run()


def test_a_gradient_that_is_not_a_number_is_named(train: Callable[..., Trainer]) -> None:
    trainer = train("bad")
    layer = trainer.student.model.sparse_layers["model.layers.0.mlp.down_proj"]
    layer.values.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(
        TrainingDivergedError, match=r"step 1: the gradient of base\.model\.layers\.0\.mlp\.down_proj"
    ):
        trainer.run()


def test_a_router_that_is_not_a_number_is_named(train: Callable[..., Trainer]) -> None:
    trainer = train("bad")
    trainer.student.router.main.weight.data.fill_(torch.nan)
    with pytest.raises(TrainingDivergedError, match="step 1: the router"):
        trainer.run()


def test_a_jump_of_the_gradient_is_reported(
    train: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = train("jump", changed(steps=40, checkpoint_every=40))
    trainer.rules.spikes.load_state({"last": torch.full((32,), 1e-6, dtype=torch.float64)})
    with caplog.at_level(logging.WARNING):
        trainer.run(1)
    assert "step 1: the norm of the gradients jumped" in caplog.text


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({}, {"teacher": None}, "need a teacher"),
        ({"warm_start": 3}, {}, "need the profile's targets"),
        ({"weights": {"profile": 1.0}}, {}, "need the profile's targets"),
        ({"routing": {"ks": (7,)}}, {}, "ks has 7 but there are 6 experts"),
        ({}, {"targets": ProfileTargets([1], np.ones((1, 5), np.float32))}, "the profile is of 5 experts"),
        ({"optimizers": {"experts": "frozen", "router": "frozen"}}, {}, "nothing would be trained"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    train: Callable[..., Trainer], changes: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train("refused", changed(**changes), **more)


def test_routing_without_a_router_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    base, student = make_models(tmp_path / "model", router=False)
    with pytest.raises(InputError, match="the model has none"):
        Trainer(student, corpus, OPTIONS, tmp_path / "t", Live(base))


def test_layers_that_cannot_be_compared_are_refused(tmp_path: Path, corpus: Corpus) -> None:
    base, _ = make_models(tmp_path / "model")
    small = dense_model(make_model("qwen2", tmp_path / "small", num_hidden_layers=1))
    options = changed(routing={"ks": ()}, optimizers={"trunk_lr": 1e-3})
    with pytest.raises(InputError, match="1 layers of width 64 and the teacher 2 of 64"):
        Trainer(small, corpus, options, tmp_path / "t", Live(base)).run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"precision": "float16"}, "precision = 'float16'"),
        ({"temperature": 0.0}, "temperature"),
        ({"stages": stage_options(first=1.5)}, "share of the steps"),
        ({"routing": routing_options(dropout=1.0)}, "dropout"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        training(**changes)


def test_losses_of_weight_zero_leave_no_gradient(train: Callable[..., Trainer]) -> None:
    nothing = loss_weights(kl=0.0, ce=0.0, hidden=0.0, balance=0.0, z=0.0)
    trainer = train("nothing", changed(weights=vars(nothing), optimizers={"router_decay": 0.0}))
    before = weights(trainer)
    trainer.run(2)
    moved = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert moved <= {"router.bias"}
