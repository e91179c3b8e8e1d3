"""The configuration: its options are frozen, what is wrong is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tinyonn.config import REMOVED, Config, known_keys, load_config, parse_config
from tinyonn.errors import InputError
from tinyonn.options import is_first, known_options, page

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))

# A new option is a decision: it belongs here, in docs/ and in the design of what it does to a run's bits.
OPTIONS = [
    "cluster.cells",
    "data.format",
    "data.max_tokens",
    "data.messages",
    "data.name",
    "data.path",
    "data.rendered",
    "data.samples",
    "data.slice",
    "data.slices",
    "data.sources.format",
    "data.sources.messages",
    "data.sources.name",
    "data.sources.path",
    "data.sources.samples",
    "data.sources.slice",
    "data.sources.slice_name",
    "data.sources.split",
    "data.sources.text",
    "data.split",
    "data.text",
    "evaluate.data",
    "experts.budget",
    "experts.core",
    "model.checkpointing",
    "model.device",
    "model.dtype",
    "model.path",
    "model.quantization",
    "model.revision",
    "profile.samples",
    "record.max_live",
    "record.segment",
    "record.windows",
    "record.workers",
    "router.shared",
    "router.top_k",
    "score.weights",
    "storage.root",
    "track.tensorboard",
    "track.wandb",
    "train.batch",
    "train.checkpoint_every",
    "train.data",
    "train.loss.balance",
    "train.loss.ce",
    "train.loss.hidden",
    "train.micro_batch",
    "train.optimizers.experts_lr",
    "train.optimizers.norms_lr",
    "train.optimizers.trunk_lr",
    "train.routing.bias_rate",
    "train.routing.capacity",
    "train.routing.dropout",
    "train.routing.ks",
    "train.routing.noise",
    "train.stages.act_k",
    "train.stages.first",
    "train.stages.grow",
    "train.stages.integrity",
    "train.stages.min_k",
    "train.steps",
    "train.teacher",
    "train.teacher_model",
    "train.warm_start",
]


def test_options_are_frozen() -> None:
    assert known_keys() == OPTIONS


def test_there_are_few_options_and_ten_that_a_newcomer_meets() -> None:
    assert len({re.sub(r"^data\.sources\.", "data.", key) for key in OPTIONS}) <= 60
    first = {name for name, field in known_options(Config) if is_first(field)}
    assert len({re.sub(r"^data\.sources\.", "data.", key) for key in first}) == 10


def test_the_page_of_options_is_made_of_them() -> None:
    path = Path(__file__).parent.parent / "docs" / "configuration.md"
    assert path.read_text("utf-8") == page(Config), path.read_text("utf-8").splitlines()[0]


def test_what_is_fixed_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(InputError, match=r"^my\.yaml: cluster\.even was removed: .*; leave it out$"):
        parse_config({"cluster": {"even": False}}, "my.yaml")
    with pytest.raises(InputError, match=r"evaluate\.data\.seed was removed.*evaluate\.budgets.*--budgets"):
        parse_config({"evaluate": {"data": {"seed": 1}, "budgets": [0.5]}})
    with pytest.raises(InputError, match=r"data\.sources\.share was removed.*give samples"):
        parse_config({"data": [{"path": "a", "share": 0.5}]})
    assert not parse_config({"cluster": {"even": False}}, whole=True).cluster.even


def test_no_file_and_an_empty_file_give_the_defaults(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n")
    assert load_config(None) == load_config(empty) == Config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path: Path) -> None:
    assert load_config(path) != Config()


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(InputError, match=r"unknown key 'data\.max_token', did you mean 'data\.max_tokens'"):
        parse_config({"data": {"max_token": 128}})


def test_a_removed_option_or_value_is_refused_with_what_to_do_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(REMOVED, "train.loss.old", "leave it out")
    monkeypatch.setitem(REMOVED, "model.quantization=int8", "use nf4")
    with pytest.raises(InputError, match=r"^my\.yaml: train\.loss\.old was removed: leave it out$"):
        parse_config({"train": {"loss": {"old": 1}}}, "my.yaml")
    with pytest.raises(InputError, match=r"^my\.yaml: model\.quantization = 'int8' was removed: use nf4$"):
        parse_config({"model": {"quantization": "int8"}}, "my.yaml")


def test_what_was_removed_is_not_there() -> None:
    assert not set(REMOVED) & set(known_keys())


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"record": {"workers": 0}}, "record.workers = 0"),
        ({"record": {"segment": "some"}}, "record.segment = 'some'"),
        ({"model": {"quantization": "int8"}}, "model.quantization = 'int8'"),
        ({"data": {"slices": 17}}, "data.slices = 17"),
        ({"data": {"max_tokens": "many"}}, "data.max_tokens = 'many'"),
    ],
)
def test_a_wrong_value_is_refused_by_key_and_value(tree: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_config(tree, "my.yaml")
    assert str(caught.value).startswith(f"my.yaml: {key}")


@pytest.mark.parametrize("text", ["model: [", "- a\n- b\n", "\tmodel: x", "just text"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"bad\.yaml: "):
        load_config(path)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00model")
    for wrong in (path, tmp_path / "nowhere.yaml"):
        with pytest.raises(InputError, match="not a readable YAML file"):
            load_config(wrong)
