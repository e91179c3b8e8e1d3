"""The training stage: from an assembled and profiled run to a model that generates, also after a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.dense.architectures import make_model
from tests.train.defaults import loss_weights, optimizer_options
from tests.train.runs import OPTIONS, ROUTER, World
from tests.train.trained import read_curve
from tinyonn.errors import CapacityError, InputError, StoreBusyError
from tinyonn.evaluate.loss import evaluate_routed
from tinyonn.evaluate.stage import EvaluateOptions, held_out_corpus, samples_of
from tinyonn.evaluate.trained import (
    ASSEMBLED,
    DENSE,
    TRAINED,
    continued,
    evaluate_trained,
    most_in_need,
    trained_card_figures,
)
from tinyonn.files import read_json, write_json
from tinyonn.show.sizes import MiB
from tinyonn.store.lock import RunLock
from tinyonn.train.data import held_out_batches
from tinyonn.train.monitor import FILE, read_lines
from tinyonn.train.report import TrainReport
from tinyonn.train.spec import RouterShape
from tinyonn.train.stage import train_run

STEPS = OPTIONS.warm_start + OPTIONS.steps


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainReport, list[str]]:
    """A training that nothing disturbed: its folder, its report and what it told."""
    folder, told = tmp_path_factory.mktemp("trained"), list[str]()
    report = train_run(world.run, world.config, world.options(folder), told.append)
    return folder, report, told


def curve_of(folder: Path) -> list[dict[str, float]]:
    return read_curve(folder / "train")


def test_the_trained_model_loads_and_generates(
    world: World, trained: tuple[Path, TrainReport, list[str]]
) -> None:
    folder = trained[0]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert model.router.top_k == 2
    assert sorted(e for branch in model.router.options.branches for e in branch) == list(range(6))
    assert model.config.assembly["training"]["steps"] == STEPS
    before = AutoModelForCausalLM.from_pretrained(world.folder / "run" / "experts")
    assert model.config.assembly["assembled"] == before.config.assembly["id"]
    changed = [
        name
        for name, layer in model.sparse_layers.items()
        if not layer.values.equal(before.sparse_layers[name].values)
    ]
    assert changed
    out = model.generate(**tokenizer("def f(", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 4


def test_the_report_says_what_happened(trained: tuple[Path, TrainReport, list[str]]) -> None:
    folder, report, told = trained
    lines = list(read_lines(folder / "train" / FILE))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert (report.steps, report.resumed, report.workers, report.device) == (STEPS, 0, 1, "cpu")
    assert report.tokens == sum(line["tokens"] for line in lines[OPTIONS.warm_start :])
    assert report.losses["loss"][1] < report.losses["loss"][0]
    values = lines[-1]["values"]
    assert {"kl", "ce", "hidden", "gate_entropy", "active_weights", "surprise", "integrity"} <= values.keys()
    assert report.active_weights == values["active_weights"]
    assert sum(lines[-1]["load"]) == 2 * OPTIONS.batch
    assert told[0].startswith("training needs ")
    assert told[-1].startswith(f"step {STEPS} of {STEPS}: loss ")
    assert report.need_bytes > 0 and report.peak_worker_bytes > 0  # of all that this process ever held
    assert [Path(path).name for path in report.pictures] == ["load.png"]
    json.dumps(report.figures())
    assert len(report.table().rows) == len(report.losses)


def test_the_trained_model_is_measured_beside_the_dense_one(
    world: World, trained: tuple[Path, TrainReport, list[str]], tmp_path: Path
) -> None:
    held_out = shutil.copy(world.config.data.path, tmp_path / "held-out.jsonl")
    data = world.config.data.model_copy(update={"path": str(held_out)})
    options = EvaluateOptions(data=data, samples=8, split="all")
    report = evaluate_trained(world.run, world.config, options, trained[0] / "model")
    shares = [line.weights / report.linear for line in report.lines]
    assert [line.model for line in report.lines] == [DENSE, ASSEMBLED, *[TRAINED] * 4]
    assert [line.experts for line in report.lines] == [
        None,
        6,
        6,
        3,
        2,
        1,
    ]  # of 6: all, half, as set, a quarter
    assert shares[0] == 1 and shares[1] == shares[2] == pytest.approx(0.6, abs=0.001)
    assert shares[2:] == sorted(shares[2:], reverse=True)
    lines = report.figures()["lines"]
    assert lines[0]["ratio"] == 1 and len(report.table().rows) == len(lines)
    dense = world.folder / "model"
    of_dense = evaluate_routed(
        AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16),
        held_out_batches(samples_of(held_out_corpus(world.config, options, Path(world.run)))),
    )
    assert report.lines[0].losses == of_dense
    model = json.loads((trained[0] / "model" / "config.json").read_text("utf-8"))["assembly"]["id"]
    figures = trained_card_figures(Path(world.run), model)
    assert figures is not None
    assert list(figures)[:3] == [DENSE, ASSEMBLED, f"this model, 6 experts on ({shares[2]:.1%} active)"]
    assert figures[DENSE] == {**of_dense.by_slice, "mean": of_dense.mean}
    assert trained_card_figures(Path(world.run), "another") is None


def test_a_text_goes_on_by_the_experts_that_its_prompt_chose(
    trained: tuple[Path, TrainReport, list[str]],
) -> None:
    folder, prompt = trained[0] / "model", "a few words"
    text = continued(folder, prompt, tokens=5)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    on_E = model.router(inputs["input_ids"])[0]
    assert text.experts == tuple(on_E.nonzero().ravel().tolist()) and len(text.experts) == 2 and text.of == 6
    with model.gates(on_E):  # as if somebody had set them
        written_BT = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert text.text == tokenizer.decode(
        written_BT[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert text.slice in ("code", "prose")


def test_the_slice_in_need_is_told_beside_what_it_needs_of_all() -> None:
    needs = {
        "hungry": [0.1, 0.1, 0.1],
        "own": [0.9, 0.3, 2.0],
    }  # the first needs all of them more than the second
    assert most_in_need(needs, [1]) == "own"
    assert most_in_need(needs, [0, 2]) == "hungry"
    assert most_in_need({}, [0]) == ""


def test_a_second_call_has_nothing_to_do(world: World, trained: tuple[Path, TrainReport, list[str]]) -> None:
    folder, report, _ = trained
    before = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    again = train_run(world.run, world.config, world.options(folder))
    assert again == replace(report, fresh=False)
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == before


def train_in_child(world: World, folder: Path) -> None:
    train_run(world.run, world.config, world.options(folder))


def test_killed_and_called_again_the_curve_is_the_same(
    world: World, trained: tuple[Path, TrainReport, list[str]], tmp_path: Path
) -> None:
    process = multiprocessing.get_context("spawn").Process(target=train_in_child, args=(world, tmp_path))
    process.start()
    while len(curve_of(tmp_path)) < 6:  # the checkpoint of step 4 is there, that of step 8 is not
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "model").exists()
    report = train_run(world.run, world.config, world.options(tmp_path))
    assert report.resumed in (4, 8)
    assert curve_of(tmp_path) == curve_of(trained[0])
    assert [line["step"] for line in read_lines(tmp_path / "train" / FILE)] == list(range(1, STEPS + 1))
    one, other = (
        AutoModelForCausalLM.from_pretrained(path / "model").state_dict() for path in (tmp_path, trained[0])
    )
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_other_options_are_refused_until_told_to_begin_anew(
    world: World, trained: tuple[Path, TrainReport, list[str]], tmp_path: Path
) -> None:
    shutil.copytree(trained[0] / "train", tmp_path / "train")
    other = world.options(tmp_path, temperature=2.0)
    with pytest.raises(InputError, match=r"temperature is 1\.0 there and 2\.0 now; .* --fresh"):
        train_run(world.run, world.config, other)
    wider = world.options(tmp_path, router=replace(ROUTER, width=8))
    with pytest.raises(InputError, match=r"router\.width is 16 there and 8 now"):
        train_run(world.run, world.config, wider)
    report = train_run(world.run, world.config, replace(other, fresh=True))
    assert (report.resumed, report.fresh, len(curve_of(tmp_path))) == (0, True, STEPS)


def test_a_dense_and_a_static_model_are_trained_by_the_same_code(world: World, tmp_path: Path) -> None:
    trunk = optimizer_options(router_lr=2e-3, experts="adamw", experts_lr=1e-4, trunk_lr=1e-4, norms_lr=1e-4)
    dense = world.options(tmp_path / "dense", student=world.folder / "model", router=None, warm_start=0,
                          steps=3, optimizers=trunk, weights=loss_weights(kl=0, ce=1, hidden=0))  # fmt: skip
    report = train_run(world.run, world.config, dense)
    assert (report.loads, report.active_weights) == ({}, None)
    assert list(report.losses) == ["loss", "ce"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense" / "model")
    static = world.options(tmp_path / "static", router=None, warm_start=0, steps=3)
    assert train_run(world.run, world.config, static).loads == {}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "static" / "model").router is None


def test_a_cached_teacher_is_cached_once(world: World, tmp_path: Path) -> None:
    options = world.options(tmp_path, teacher_k=8, steps=3, warm_start=0, weights=loss_weights(hidden=0))
    first = train_run(world.run, world.config, options)
    (cache,) = (tmp_path / "train" / "teacher").iterdir()
    parts = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    again = train_run(world.run, world.config, replace(options, fresh=True))
    assert again.losses == first.losses
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == parts


def test_what_is_missing_is_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no model to train; run `tinyonn assemble` first"):
        train_run(world.run, world.config, world.options(tmp_path, student=tmp_path / "none"))
    copy = world.copy(tmp_path / "copy")
    manifest = copy.folder / "run" / "profile" / "manifest.json"
    tree = read_json(manifest, "")
    tree["groups"]["id"] = "another"
    write_json(manifest, tree)
    with pytest.raises(InputError, match="is a profile of assembly another, not of"):
        train_run(copy.run, copy.config, copy.options(tmp_path))
    shutil.rmtree(manifest.parent)
    with pytest.raises(InputError, match="holds no profile; run `tinyonn profile` first"):
        train_run(copy.run, copy.config, copy.options(tmp_path))


def test_a_teacher_with_another_tokenizer_is_refused(world: World, tmp_path: Path) -> None:
    other = tmp_path / "teacher"
    shutil.copytree(world.folder / "model", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    model = world.config.model.model_copy(update={"path": str(other)})
    with pytest.raises(InputError, match="student and teacher have different vocabularies"):
        train_run(world.run, world.config.model_copy(update={"model": model}), world.options(tmp_path))


def test_another_model_teaches(
    world: World, trained: tuple[Path, TrainReport, list[str]], tmp_path: Path
) -> None:
    """The same weights elsewhere teach the same; others, also of another shape, something else."""

    def taught_by(path: Path, into: str, **changes: Any) -> TrainReport:
        teacher = world.config.model.model_copy(update={"path": str(path)})
        train = world.config.train.model_copy(update={"teacher_model": teacher})
        config = world.config.model_copy(update={"train": train})
        return train_run(world.run, config, world.options(tmp_path / into, **changes))

    same = shutil.copytree(world.folder / "model", tmp_path / "same")
    assert taught_by(same, "a").losses == trained[1].losses
    deeper = make_model("qwen2", tmp_path / "deeper", seed=1, num_hidden_layers=3)
    with pytest.raises(InputError, match=r"of width \d+ and its teacher .* 3 of \d+"):
        taught_by(deeper, "b")
    losses = taught_by(deeper, "c", weights=loss_weights(hidden=0)).losses
    assert losses["kl"] > trained[1].losses["kl"]
    with pytest.raises(InputError, match=r"teacher.* --fresh"):
        taught_by(make_model("qwen2", tmp_path / "other", seed=2), "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": replace(ROUTER, top_k=7)}, r"router\.top_k = 7; give from 0 to 6"),
        ({"router": RouterShape(shared=9)}, "9 shared experts of 6"),
        ({"workers": 0}, r"train\.workers = 0; give at least 1"),
        ({"threads": 0}, r"train\.threads = 0; give at least 1"),
        (
            {"warm_start": 0, "optimizers": optimizer_options(router_lr=0.0)},
            "leave a new router as it was drawn",
        ),
        ({"router": None}, "need a router and the model has none"),
        ({"teacher_k": 8}, "needs the teacher's hidden states, which a cache does not hold"),
    ],
)
def test_what_cannot_be_is_refused(
    world: World, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train_run(world.run, world.config, world.options(tmp_path, **changes))


def test_a_folder_that_is_no_model_is_not_replaced(world: World, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").write_text("all of it", "utf-8")
    with pytest.raises(InputError, match="is not empty and holds no model"):
        train_run(world.run, world.config, world.options(tmp_path))


def test_a_second_trainer_is_refused(world: World, tmp_path: Path) -> None:
    with RunLock(tmp_path / "train"), pytest.raises(StoreBusyError, match="the run is held by process"):
        train_run(world.run, world.config, world.options(tmp_path))


def test_what_does_not_fit_is_refused_before_anything_is_loaded(world: World, tmp_path: Path) -> None:
    with pytest.raises(
        CapacityError, match=r"training needs .* of RAM and 100 MiB are there .*use a smaller train"
    ):
        train_run(world.run, world.config, world.options(tmp_path, memory=100 * MiB))
    assert not list((tmp_path / "train").glob("checkpoint-*"))


def test_a_loss_that_is_not_a_number_stops_at_the_last_checkpoint(world: World, tmp_path: Path) -> None:
    wild = optimizer_options(router_lr=2e-3, experts="adamw", experts_lr=1e30, norms_lr=0.0)
    with pytest.raises(
        InputError, match=r"step \d+: .*(is the last good checkpoint|there is no checkpoint yet); lower"
    ):
        train_run(world.run, world.config, world.options(tmp_path, optimizers=wild))
    assert not (tmp_path / "model").exists()
    for path in (tmp_path / "train").glob("checkpoint-*/state.safetensors"):
        assert all(
            bool(torch.isfinite(t).all()) for n, t in load_file(path).items() if n.startswith("model/")
        )
