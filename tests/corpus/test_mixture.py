"""Corpora of several sources, and corpora that grow: what is there keeps its place, what is new comes after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.dense.conftest import ModelFactory
from tinyonn.config import Config, DataConfig, ModelConfig, load_config, parse_config
from tinyonn.corpus.corpus import Corpus, prepare_corpus
from tinyonn.corpus.files import stem_of
from tinyonn.corpus.growth import Earlier, match_keys
from tinyonn.dense.load import load_tokenizer
from tinyonn.errors import InputError
from tinyonn.plan.facts import describe_data


class Room:
    """A folder of sources, a model's tokenizer, and the way to prepare."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = ModelConfig(path=str(model), device="cpu")
        self.tokenizer = load_tokenizer(self.model)

    def texts(self, name: str, count: int, first: int = 0, **more: str) -> str:
        """A JSONL file of numbered texts; its path."""
        path = self.folder / f"{name}.jsonl"
        rows = [{"text": f"{name} number {number}", **more} for number in range(first, first + count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return str(path)

    def prepare(self, data: Any, out: str = "corpus.arrow", earlier: Earlier | None = None) -> Corpus:
        config = Config(model=self.model, data=DataConfig.model_validate(data))
        return prepare_corpus(config, self.tokenizer, self.folder / out, earlier)

    def grow(self, data: Any, begun: Corpus) -> Corpus:
        """What becomes of a corpus that a run was begun with."""
        return self.prepare(data, begun.path.name, Earlier(begun, begun.fingerprint, begun.slices))

    def read(self, corpus: Corpus, slice: str) -> list[str]:
        """A slice's texts in their stored order."""
        samples = corpus.range(slice, 0, corpus.slices[slice])
        return [str(self.tokenizer.decode(sample.input_ids.tolist())) for sample in samples]


@pytest.fixture
def room(tmp_path: Path, model_of: ModelFactory) -> Room:
    return Room(tmp_path, model_of("qwen2"))


def test_each_source_is_a_slice_and_gives_its_number_or_share(room: Room) -> None:
    sources = [
        {"path": room.texts("plain", 20), "samples": 7},
        {"path": room.texts("half", 20), "share": 0.5, "slice_name": "The Half"},
        {"path": room.texts("whole", 5)},
        {"path": room.texts("sorted", 6, kind="kind of it"), "slice": "kind"},
    ]
    corpus = room.prepare(sources)
    assert corpus.slices == {"kind_of_it": 6, "plain": 7, "the_half": 10, "whole": 5}
    for name, words in [
        ("plain", "plain"),
        ("the_half", "half"),
        ("whole", "whole"),
        ("kind_of_it", "sorted"),
    ]:
        texts = room.read(corpus, name)
        assert len(set(texts)) == len(texts)
        assert all(text.startswith(f"{words} number ") for text in texts)
    samples = [
        sample.index for name, count in corpus.slices.items() for sample in corpus.range(name, 0, count)
    ]
    assert len(set(samples)) == len(samples)  # rows are numbered through all sources
    assert [line.split(": ")[1] for line in corpus.header.described] == ["text"] * 4


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/Tool calls.JSON.gz", "Tool calls"),
        ("v1.5.jsonl", "v1.5"),
        ("rows.csv.xz", "rows"),
        ("notes.txt", "notes"),
        ("folder.d", "folder.d"),
        ("org/data-set", "data-set"),
    ],
)
def test_a_source_is_called_like_its_file(path: str, name: str) -> None:
    assert stem_of(Path(path)) == name


def test_sources_may_share_a_slice_and_all_together_give_data_samples(room: Room) -> None:
    data = {
        "sources": [
            {"path": room.texts("a", 9), "slice_name": "prose"},
            {"path": room.texts("b", 9), "slice_name": "prose", "samples": 4},
            {"path": room.texts("c", 30), "slice_name": "code"},
        ],
        "samples": 20,
    }
    corpus = room.prepare(data)
    assert corpus.slices == {"code": 10, "prose": 10}
    texts = [text[0] for text in room.read(corpus, "prose")]
    assert texts == sorted(texts)  # by source
    assert set(texts) == {"a", "b"}


def test_sources_of_unlike_forms(room: Room) -> None:
    chat = room.folder / "chat.json"
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    chat.write_text(json.dumps([{"conversations": turns}] * 3), "utf-8")
    tasks = room.folder / "tasks.jsonl"
    tasks.write_text(json.dumps({"instruction": "add", "input": "1 1", "output": "2"}) * 1, "utf-8")
    corpus = room.prepare([{"path": str(chat)}, {"path": str(tasks)}, {"path": room.texts("text", 2)}])
    assert corpus.slices == {"chat": 3, "tasks": 1, "text": 2}
    forms = [line.removeprefix(str(room.folder)).split(": ")[1] for line in corpus.header.described]
    assert forms == ["sharegpt", "alpaca", "text"]


def test_a_source_in_a_list_is_one_slice(room: Room) -> None:
    path = room.texts("one", 40)
    alone = room.prepare({"path": path}, "alone.arrow")
    listed = room.prepare([{"path": path}], "listed.arrow")
    assert len(alone.slices) > 1  # derived
    assert listed.slices == {"one": 40}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([{"path": "missing.jsonl"}], r"missing\.jsonl.*does not exist"),
        ([{"path": "a.jsonl"}, {"path": "b.jsonl", "text": "no"}], r"source 2 of data: data\.text = 'no'"),
        ([{"path": "a.jsonl"}, {"path": "empty.jsonl"}], "source 2 of data: .*no readable rows"),
    ],
)
def test_a_bad_source_is_named(room: Room, data: list[dict[str, Any]], said: str) -> None:
    room.texts("a", 3)
    room.texts("b", 3)
    (room.folder / "empty.jsonl").write_text("", "utf-8")
    placed = [{**source, "path": str(room.folder / source["path"])} for source in data]
    with pytest.raises(InputError, match=said):
        room.prepare(placed)


def test_too_many_sources_are_refused(room: Room) -> None:
    path = room.texts("a", 2)
    with pytest.raises(InputError, match="more than 16"):
        room.prepare([{"path": path, "slice_name": f"slice {number}"} for number in range(17)])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("[{path: a, samples: 3, share: 0.5}]", "give one of them"),
        ("[{path: a, slice: kind, slice_name: b}]", "give one of them"),
        ("[{path: a, share: 1.5}]", r"data\.sources\.0\.share = 1\.5"),
        ("[{path: a, slice_nam: b}]", r"unknown key 'data\.sources\.0\.slice_nam', did you mean"),
        ("[]", "there is no source"),
    ],
)
def test_bad_options_of_sources(tmp_path: Path, data: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"data: {data}\n", "utf-8")
    with pytest.raises(InputError, match=said):
        parse_config(yaml.safe_load(path.read_text("utf-8")), whole=True)


def test_a_list_is_short_for_sources(tmp_path: Path) -> None:
    short, long = tmp_path / "short.yaml", tmp_path / "long.yaml"
    short.write_text(yaml.safe_dump({"data": [{"path": "a"}, {"path": "b"}]}), "utf-8")
    long.write_text(yaml.safe_dump({"data": {"sources": [{"path": "a"}, {"path": "b"}]}}), "utf-8")
    config = load_config(short)
    assert config == load_config(long)
    assert [origin.path for origin in config.data.origins()] == ["a", "b"]
    assert config == Config.model_validate(config.model_dump())
    both = DataConfig.model_validate({"path": "c", "sources": [{"path": "a"}]})
    assert [origin.path for origin in both.origins()] == ["c", "a"]


def test_an_appended_source_leaves_all_positions_as_they_are(room: Room) -> None:
    first = [{"path": room.texts("m", 12), "samples": 9}]
    begun = room.prepare(first)
    before = room.read(begun, "m")
    grown = room.grow(
        [*first, {"path": room.texts("b", 4)}, {"path": room.texts("z", 5), "slice_name": "m"}], begun
    )
    assert list(grown.slices.items()) == [("m", 14), ("b", 4)]  # new slices come last
    assert room.read(grown, "m")[:9] == before
    assert sorted(room.read(grown, "m")[9:]) == [f"z number {number}" for number in range(5)]
    assert grown.begins_with(begun.fingerprint)
    assert grown.fingerprint != begun.fingerprint
    again = room.grow(
        [*first, {"path": room.texts("b", 4)}, {"path": room.texts("z", 5), "slice_name": "m"}], begun
    )
    assert again.fingerprint == grown.fingerprint


def test_more_of_a_source_and_rows_added_to_a_file(room: Room) -> None:
    begun = room.prepare([{"path": room.texts("m", 30), "samples": 9}])
    more = room.grow([{"path": room.texts("m", 30), "samples": 20}], begun)
    assert room.read(more, "m")[:9] == room.read(begun, "m")
    assert len(set(room.read(more, "m"))) == 20
    longer = room.grow([{"path": room.texts("m", 50)}], more)
    assert room.read(longer, "m")[:20] == room.read(more, "m")
    assert len(set(room.read(longer, "m"))) == 50
    assert longer.header.grown_from == [begun.fingerprint, more.fingerprint]


def test_derived_slices_stay_what_they_are(room: Room) -> None:
    path = room.folder / "mixed.jsonl"
    rows = [
        {"text": f"{word} {number} {word}"} for number in range(12) for word in ("apple", "stone", "river")
    ]

    def write(count: int) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]), "utf-8")

    write(24)
    begun = room.prepare({"path": str(path), "slices": 3})
    write(36)
    grown = room.grow({"path": str(path), "slices": 3, "sources": [{"path": room.texts("new", 3)}]}, begun)
    assert set(grown.slices) == {*begun.slices, "new"}
    assert sum(grown.slices.values()) == 39
    for name, count in begun.slices.items():
        assert room.read(grown, name)[:count] == room.read(begun, name)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 3},
        {"max_tokens": 4},
        {"sources": [{"path": "m.jsonl", "samples": 3}]},
        {"sources": [{"path": "o.jsonl"}]},
    ],
)
def test_what_does_not_hold_the_earlier_samples_is_another_corpus(room: Room, change: dict[str, Any]) -> None:
    data = {"sources": [{"path": room.texts("m", 12)}]}
    room.texts("o", 12)
    begun = room.prepare(data)
    placed = {**data, **change}
    if "sources" in change:
        source = change["sources"][0]
        placed["sources"] = [{**source, "path": str(room.folder / source["path"])}]
    other = room.grow(placed, begun)
    if change == {"sources": [{"path": "m.jsonl", "samples": 3}]}:  # never fewer than were recorded
        assert (other.slices, other.fingerprint) == (begun.slices, begun.fingerprint)
    else:
        assert not other.begins_with(begun.fingerprint)


def test_a_plan_says_what_the_columns_are(room: Room) -> None:
    sources = [{"path": room.texts("a", 3), "samples": 2}, {"path": room.texts("b", 3), "samples": 2}]
    facts = describe_data(DataConfig.model_validate(sources), room.folder)
    assert (facts.samples, facts.slices) == (4, 2)
    assert [form.split(": ", 1)[1] for form in facts.forms] == ["text: text"] * 2


def test_a_share_is_of_all_rows_however_few_are_tokenised(room: Room) -> None:
    path = room.texts("a", 1000)
    assert room.prepare([{"path": path, "share": 0.1}]).slices == {"a": 100}
    assert room.prepare(
        [{"path": path, "share": 0.03}, {"path": room.texts("b", 2), "share": 0.1}]
    ).slices == {
        "a": 30,
        "b": 1,
    }


def test_samples_are_found_where_rows_before_them_were_added(room: Room) -> None:
    def array(name: str, count: int) -> dict[str, Any]:
        path = room.folder / f"{name}.json"
        path.write_text(json.dumps([{"text": f"{name} number {number}"} for number in range(count)]), "utf-8")
        return {"path": str(path), "samples": 9}

    begun = room.prepare([array("a", 30), array("b", 400)])
    longer = room.grow(
        [array("a", 90), array("b", 500)], begun
    )  # all rows have other numbers or another order
    assert longer.fingerprint == begun.fingerprint
    rows = [[sample.index for sample in corpus.range("b", 0, 9)] for corpus in (begun, longer)]
    assert rows[0] == rows[1]  # a teacher's cache of the same fingerprint knows them by these
    assert [room.read(longer, name) for name in "ab"] == [room.read(begun, name) for name in "ab"]
    turned = room.grow([array("c", 5), array("b", 600), array("a", 90)], longer)
    assert turned.slices == {"a": 9, "b": 9, "c": 5}
    assert [room.read(turned, name) for name in "ab"] == [room.read(begun, name) for name in "ab"]


def test_equal_rows_are_found_in_their_own_source(room: Room) -> None:
    path = room.folder / "equal.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"n {number % 40}"}) + "\n" for number in range(200)), "utf-8"
    )
    sources = [{"path": str(path), "slice_name": "x", "samples": count} for count in (30, 20)]
    begun = room.prepare(sources)
    grown = room.grow([*sources, {"path": room.texts("z", 5)}], begun)
    assert grown.slices == {"x": 50, "z": 5}
    places = [[sample.index for sample in corpus.range("x", 0, 50)] for corpus in (begun, grown)]
    assert places[0] == places[1]


def test_a_source_with_derived_slices_is_added_to_one_without(room: Room) -> None:
    sources = [{"path": room.texts("b", 30)}]
    begun = room.prepare({"sources": sources})
    grown = room.grow({"path": room.texts("a", 40), "slices": 3, "sources": sources}, begun)
    assert grown.begins_with(begun.fingerprint)
    assert (room.read(grown, "b"), len(grown)) == (room.read(begun, "b"), 70)
    further = room.grow({"path": room.texts("a", 50), "slices": 3, "sources": sources}, grown)
    assert (further.begins_with(grown.fingerprint), len(further)) == (True, 80)
    other = room.grow({"path": room.texts("a", 50), "slices": 4, "sources": sources}, further)
    assert not other.begins_with(begun.fingerprint)


def test_equal_keys_are_matched_in_order_and_once() -> None:
    chance = np.random.default_rng(1)
    for _ in range(50):
        wanted = chance.integers(0, 4, (chance.integers(0, 12), 2)).astype(np.uint64)
        given = chance.integers(0, 4, (chance.integers(0, 12), 2)).astype(np.uint64)
        left = [tuple(row) for row in given.tolist()]
        expected = []
        for row in map(tuple, wanted.tolist()):
            place = left.index(row) if row in left else -1
            expected.append(place)
            if place >= 0:
                left[place] = ()
        assert match_keys(wanted, given).tolist() == expected
