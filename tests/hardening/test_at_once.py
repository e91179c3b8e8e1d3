"""What cannot be is said when the configuration is read, or as soon as the model is known, not after hours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.dense.architectures import make_model
from tests.record.runs import write_rows
from tinyonn.checks import OTHERS, UPDATED, Preset, check_model, experts_of
from tinyonn.config import PRESETS, Config, load_config, parse_config
from tinyonn.dense.parameters import Parameter
from tinyonn.errors import InputError
from tinyonn.evaluate.baselines import METHODS
from tinyonn.plan.facts import plan_run
from tinyonn.record.driver import record
from tinyonn.score.scores import SCORES
from tinyonn.train.plan import train_stage_options
from tinyonn.yaml_text import parse_yaml

TWINS = [
    ("train: {steps: 1}\nrecord: {}\ntrain: {batch: 2}\n", "'train'", 1, 3),
    ("train:\n  loss:\n    kl: 1\n    ce: 2\n    kl: 3\n", "'kl'", 3, 5),
    ("data:\n  sources:\n  - {path: a}\n  - {path: b, share: 0.5,\n     path: c}\n", "'path'", 4, 5),
    ('model:\n  "path": a\n  path: b\n', "'path'", 2, 3),
    (
        "model: &m {path: a}\ntrain:\n  teacher_model:\n    <<: *m\n    dtype: float32\n    <<: *m\n",
        "'<<'",
        4,
        6,
    ),
    ("a:\n  1: x\n  0x1: y\n", "'0x1'", 2, 3),
]


@pytest.mark.parametrize(("text", "key", "first", "second"), TWINS)
def test_a_key_that_is_there_twice_is_refused_with_both_lines(
    tmp_path: Path, text: str, key: str, first: int, second: int
) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(InputError) as caught:
        load_config(path)
    told = str(caught.value)
    assert str(path) in told and f"the key {key} is there twice, in lines {first} and {second}" in told


def test_a_key_of_its_own_beside_a_merged_one_is_no_twin() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: [*a, *b], x: 4}\nd: [*a, *a, *b]\n"
    tree = parse_yaml(text)
    assert tree["b"] == {"x": 1, "y": 3}
    assert tree["c"]["x"] == 4


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"cluster": {"cells": 8}, "train": {"routing": {"ks": [4, 9]}}}, r"train\.routing\.ks has 9 but there are 8"),
    ({"train": {"routing": {"ks": [-1]}}}, r"train\.routing\.ks has -1"),
    ({"cluster": {"cells": 5}, "train": {"routing": {"ks": [6]}}}, r"5 experts \(cluster"),
    ({"cluster": {"cells": 8}, "router": {"top_k": 9}}, r"router\.top_k = 9 but there are 8"),
    ({"cluster": {"cells": 8}, "router": {"top_k": 6, "shared": 3}}, r"5 experts beside the 3 shared"),
    ({"cluster": {"cells": 8}, "router": {"shared": 8}}, r"router\.shared = 8 of 8"),
    ({"cluster": {"cells": 8}, "experts": {"top_k": 9}}, r"experts\.top_k = 9 but there are 8"),
    ({"experts": {"core": 1.0}}, r"experts\.core = 1"),
    ({"experts": {"budget": 1000.5}}, r"experts\.budget = 1000\.5"),
    ({"train": {"warm_start": 0}}, r"train\.warm_start = 0 leaves a new router"),
    ({"train": {"teacher": "cached"}}, r"train\.loss\.hidden = 0\.1 needs the teacher's hidden states"),
    ({"evaluate": {"methods": ["wandb"]}}, r"evaluate\.methods has 'wandb'"),
    ({"evaluate": {"methods": ["sparsegpt+update"]}}, r"evaluate\.methods has 'sparsegpt\+update'"),
    ({"evaluate": {"budgets": [0.5, 1.5]}}, r"evaluate\.budgets has 1\.5"),
    ({"record": {"segment": 4370}}, r"record\.segment = 4,370"),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "told"), CONTRADICTIONS)
def test_options_that_contradict_each_other_are_refused_when_they_are_read(
    tree: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=rf"^my\.yaml: .*{told}"):
        parse_config(tree, "my.yaml", whole=True)


def test_defaults_are_fitted_to_fewer_experts() -> None:
    few = train_stage_options(parse_config({"cluster": {"cells": 8}, "router": {"shared": 2}}))
    assert few.train.routing.ks == (0,)
    assert few.router is not None and few.router.top_k == 6
    some = train_stage_options(parse_config({"cluster": {"cells": 30}}))
    assert some.train.routing.ks == (10, 25, 0)
    many = train_stage_options(Config())
    assert many.train.routing.ks == (10, 25, 50, 0)
    assert many.router is not None and many.router.top_k == 10
    assert experts_of(Config()) == 100


def test_the_names_of_scores_and_methods_are_those_that_there_are() -> None:
    assert {*get_args(Preset), *OTHERS} == set(SCORES) and set(get_args(Preset)) == set(PRESETS)
    parse_config(
        {"evaluate": {"methods": [*METHODS, *SCORES, *(f"{name}{UPDATED}" for name in SCORES)]}}, whole=True
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen2", tmp_path_factory.mktemp("at-once") / "model")


def config_for(model: Path, rows: Path, **sections: Any) -> Config:
    tree = {"path": str(model), "quantization": "none", "dtype": "float32", "device": "cpu"}
    return parse_config({"model": tree, "data": {"path": str(rows), "slice": "kind"}, **sections}, whole=True)


FITTING: list[tuple[dict[str, Any], str]] = [
    ({"experts": {"budget": 1e12}}, "experts.budget: 1,000,000,000,000 weights, but only 73,728"),
    ({"evaluate": {"budgets": [1e12]}}, "evaluate.budgets: 1,000,000,000,000 weights"),
    ({"experts": {"budget": 50}, "cluster": {"cells": 60}}, "keeps 50 weights, below one for each of 60 experts"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "told"), FITTING)
def test_options_that_do_not_fit_the_model_are_refused_by_plan_and_by_the_first_stage(
    model: Path, tmp_path: Path, sections: dict[str, Any], told: str
) -> None:
    write_rows(tmp_path / "rows.jsonl")
    config = config_for(model, tmp_path / "rows.jsonl", **sections)
    run = tmp_path / "run"
    with pytest.raises(InputError, match=told):
        plan_run(str(run), run, config, {})
    with pytest.raises(InputError, match=told):
        record(str(run), config)
    assert not (run / "corpus.arrow").exists() and not (run / "store").exists()


def test_a_teacher_that_cannot_teach_is_refused_by_plan(model: Path, tmp_path: Path) -> None:
    other = make_model("qwen2", tmp_path / "other")
    settings = json.loads((other / "config.json").read_text("utf-8"))
    write_rows(tmp_path / "rows.jsonl")
    for change, told in (
        ({"vocab_size": settings["vocab_size"] - 8}, "tokens in its head"),
        (
            {"num_hidden_layers": 1, "layer_types": settings["layer_types"][:1]},
            "train.loss.hidden = 0.1 compares",
        ),
    ):
        (other / "config.json").write_text(json.dumps({**settings, **change}), "utf-8")
        teacher = {"path": str(other), "quantization": "none", "dtype": "float32", "device": "cpu"}
        config = config_for(model, tmp_path / "rows.jsonl", train={"teacher_model": teacher})
        with pytest.raises(InputError, match=told):
            plan_run(str(tmp_path / "run"), tmp_path / "run", config, {})


def test_kinds_of_every_architecture_may_stand_in_the_trunk_of_any() -> None:
    parameters = [Parameter(f"layers.0.{role}.weight", (40, 40), 0, "linear") for role in ("up", "down")]
    check_model(Config(), parameters)  # neither norms nor biases nor a head
    assert all(kind.kind == "linear" for kind in parameters)
