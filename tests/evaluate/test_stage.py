from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tinyonn.config import Config, DataConfig
from tinyonn.corpus.file import Sample
from tinyonn.errors import InputError, StoreDamagedError
from tinyonn.evaluate.report import EvaluateReport, card_figures
from tinyonn.evaluate.stage import EvaluateOptions, evaluate_run, held_out_corpus, samples_of, split_of
from tinyonn.files import write_json
from tinyonn.select.selection import SelectOptions


@pytest.fixture(scope="module")
def prepared(
    recorded: tuple[Path, Config], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Config, EvaluateOptions]:
    place, config = recorded
    rows = tmp_path_factory.mktemp("texts") / "heldout.jsonl"
    texts = [("code", "def g(y): return y * {}"), ("prose", "It snowed on the {}th night.")]
    lines = [json.dumps({"text": text.format(n), "kind": kind}) for n in range(5) for kind, text in texts]
    rows.write_text("\n".join(lines), "utf-8")
    data = config.data.model_copy(update={"path": str(rows)})
    options = EvaluateOptions(
        methods=("default", "gblm", "sparsegpt", "default+update"),
        budgets=(1.0, 0.3),
        data=data,
        samples=8,
        split="all",
        calibration=4,
        selection=SelectOptions(allocation="global", score="wg"),
    )
    return place, config, options


@pytest.fixture(scope="module")
def report(prepared: tuple[Path, Config, EvaluateOptions]) -> EvaluateReport:
    place, config, options = prepared
    return evaluate_run(str(place), config, options)


def test_published_methods_and_float_gradients(prepared: tuple[Path, Config, EvaluateOptions]) -> None:
    place, config, options = prepared
    methods = (
        *("default", "root", "default+uniform", "magnitude+uniform", "sparsegpt+uniform"),
        *("wanda-float", "wanda-float+uniform", "wanda-float+update", "root-float-3", "root-float-3+update"),
    )
    report = evaluate_run(str(place), config, replace(options, methods=methods, budgets=(0.3,)))
    found = {line.method: line for line in report.lines}
    assert {found[method].weights for method in methods} == {round(0.3 * found["dense"].weights)}
    assert len({found[method].losses.mean for method in methods}) == len(methods)
    assert report.calibration == 4 and report.split == "all"
    assert not list((place / "evaluate").glob("gradients.*"))
    tree = {line["method"]: line for line in report.figures()["lines"]}
    assert tree["root-float-3"]["behind_interval"] is not None and tree["dense"]["behind"] is None
    notes = " ".join(report.table().notes)
    assert "took 4 recorded ones" in notes and "+uniform: the same share in every tensor" in notes
    many = replace(options, methods=("root-float-1000",), budgets=(0.3,))
    with pytest.raises(
        InputError, match=r"root-float-1000 needs calibration samples, 1000 or more, and \d+ are"
    ):
        evaluate_run(str(place), config, many)
    for name in ("sparsegpt+update", "root-float-", "root-float-0", "default+uniform+update"):
        with pytest.raises(InputError, match="which is no method"):
            evaluate_run(str(place), config, replace(options, methods=(name,)))


def test_splits_of_the_held_out_documents(prepared: tuple[Path, Config, EvaluateOptions]) -> None:
    place, config, options = prepared
    options = replace(options, samples=None)
    corpus = held_out_corpus(config, options, place)
    every = {(s.slice, s.index): split_of(s) for s in samples_of(corpus, "all")}
    parts = {}
    for split in set(every.values()):
        parts[split] = {(s.slice, s.index) for s in samples_of(corpus, split)}
        assert parts[split] == {key for key, own in every.items() if own == split}
    assert len(parts) > 1 and sum(map(len, parts.values())) == len(every) == 10
    few = replace(options, methods=(), budgets=(0.3,))
    found = {split: evaluate_run(str(place), config, replace(few, split=split)) for split in parts}
    for split, report in found.items():
        assert report.split == split and report.samples == len(parts[split]) and report.evaluated == 2
    with pytest.raises(
        InputError, match="there is no split 'dev'; choose one of development, test, final, all"
    ):
        evaluate_run(str(place), config, replace(few, split="dev"))


def test_a_split_holds_its_share_of_documents() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 1000, 20).astype(np.int32) for _ in range(2000)]
    counts = Counter(split_of(Sample(0, "a", row, row)) for row in rows)
    assert counts["test"] == pytest.approx(1000, abs=80)
    assert counts["development"] == pytest.approx(500, abs=70)
    assert counts["final"] == pytest.approx(500, abs=70)


def test_the_whole_budget_is_the_dense_model(report: EvaluateReport) -> None:
    found = {(line.method, line.share): line for line in report.lines}
    dense = found["dense", 1.0]
    assert found["original", 1.0].losses != dense.losses
    assert set(dense.losses.by_slice) == {"code", "prose"} and report.samples == 8
    for method in ("default", "gblm", "sparsegpt", "default+update"):
        assert found[method, 1.0].losses == dense.losses
        assert found[method, 0.3].losses != dense.losses
        assert found[method, 0.3].weights == round(0.3 * dense.weights)


def test_lines_are_evaluated_once(
    prepared: tuple[Path, Config, EvaluateOptions], report: EvaluateReport
) -> None:
    place, config, options = prepared
    again = evaluate_run(str(place), config, options)
    assert again.evaluated == 0 and again.lines == report.lines
    told: list[str] = []
    more = replace(options, methods=(*options.methods, "random"), plot=True)
    found = evaluate_run(str(place), config, more, told.append)
    assert found.evaluated == len(told) == 2 and all(line.startswith("random at") for line in told)
    assert Path(found.plot or "").read_bytes()[:4] == b"\x89PNG"
    assert len(found.table().rows) == 5
    assert found.table().columns[1].heading == "100.0%"
    other = replace(options, methods=("random",), selection=SelectOptions(seed=1))
    assert evaluate_run(str(place), config, other).evaluated == 2  # another draw


def test_a_killed_evaluation_goes_on(prepared: tuple[Path, Config, EvaluateOptions], tmp_path: Path) -> None:
    place, config, options = prepared
    few = replace(options, methods=("magnitude", "wanda"), budgets=(0.4,))

    class Kill(BaseException):
        pass

    def die(line: str) -> None:
        raise Kill

    with pytest.raises(Kill):
        evaluate_run(str(place), config, few, die)
    assert evaluate_run(str(place), config, few).evaluated == 1


def test_shares_by_budget_replace_the_allocation(prepared: tuple[Path, Config, EvaluateOptions]) -> None:
    place, config, options = prepared
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    given = {0.3: {kind: 0.6 if kind[1] == "_" else 0.2 for kind in kinds}}
    few = replace(options, methods=("gblm",), budgets=(0.3,))
    plain, changed = (
        evaluate_run(str(place), config, one).lines[-1] for one in (few, replace(few, shares=given))
    )
    assert plain.weights == changed.weights and plain.losses != changed.losses


def test_what_cannot_be_evaluated(
    prepared: tuple[Path, Config, EvaluateOptions], report: EvaluateReport
) -> None:
    place, config, options = prepared
    with pytest.raises(InputError, match="there are no held-out data"):
        evaluate_run(str(place), config, replace(options, data=None))
    with pytest.raises(InputError, match="is what was recorded"):
        evaluate_run(str(place), config, replace(options, data=config.data))
    with pytest.raises(InputError, match="'best', which is no method; there are default, root, source, "):
        evaluate_run(str(place), config, replace(options, methods=("best",)))
    with pytest.raises(InputError, match="needs calibration samples"):
        evaluate_run(
            str(place), config, replace(options, methods=("sparsegpt",), budgets=(0.2,), calibration=0)
        )
    other = config.model_copy(update={"model": config.model.model_copy(update={"path": "reference"})})
    with pytest.raises(InputError, match="not the model that was recorded"):
        evaluate_run(str(place), other, options)
    lines = place / "evaluate" / "lines.json"
    kept = lines.read_text()
    lines.write_text("{")
    with pytest.raises(StoreDamagedError, match=r"lines\.json is damaged .*delete it and evaluate again"):
        evaluate_run(str(place), config, options)
    lines.write_text(kept)


def test_held_out_data_of_other_slices(
    prepared: tuple[Path, Config, EvaluateOptions], tmp_path: Path
) -> None:
    place, config, options = prepared
    rows = tmp_path / "other.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"Number {n} is odd.", "kind": "maths"}) for n in range(4)))
    data: DataConfig = config.data.model_copy(update={"path": str(rows)})
    report = evaluate_run(str(place), config, replace(options, data=data, methods=(), budgets=(0.3,)))
    assert [set(line.losses.by_slice) for line in report.lines] == [{"maths"}] * 2


def test_lines_of_masks_of_slices_that_earlier_versions_wrote_are_passed_over(
    prepared: tuple[Path, Config, EvaluateOptions], report: EvaluateReport
) -> None:
    place, config, options = prepared
    path = place / "evaluate" / "lines.json"
    tree = json.loads(path.read_text("utf-8"))
    lines = [dict(line, mask_slice=None) for line in tree["lines"].values()]
    tree["lines"] = dict(zip(tree["lines"], lines, strict=True))
    tree["lines"]["0" * 32] = {**lines[0], "method": "oracle", "mask_slice": "code"}
    write_json(path, {"version": tree["version"], "lines": tree["lines"]})
    again = evaluate_run(str(place), config, options)
    assert again.evaluated == 0 and again.lines == report.lines


@pytest.mark.parametrize("damage", [b"{", b'"cards"'], ids=["no JSON", "another key"])
def test_damaged_figures_for_cards_are_left_out_with_a_warning(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert card_figures(tmp_path, {}) is None and not caplog.text  # nothing was evaluated
    path = tmp_path / "evaluate" / "cards.json"
    path.parent.mkdir()
    write_json(path, {"cards": []})
    assert card_figures(tmp_path, {}) is None and not caplog.text
    path.write_bytes(path.read_bytes().replace(damage, b"[" * len(damage), 1))
    assert card_figures(tmp_path, {}) is None
    assert "cards.json is damaged" in caplog.text
