"""What is evaluated by masks is what is assembled, and its figures get onto the card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from tests.experts.runs import clustered_run
from tests.options import written
from tinyonn.cli import app
from tinyonn.config import EvaluateConfig
from tinyonn.evaluate.stage import evaluate_options, held_out_corpus, samples_of
from tinyonn.experts.folder import open_assembled

FEW = ("--methods", "default", "--budgets", "0.315", "--samples", "6")


def test_the_assembled_model_has_the_loss_that_was_evaluated(tmp_path: Path) -> None:
    config = clustered_run(tmp_path, dtype="float32")
    rows = [{"text": f"def g(y): return y * {n}", "kind": "code"} for n in range(4)]
    rows += [{"text": f"It snowed on the {n}th night.", "kind": "prose"} for n in range(4)]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    data = config.data.model_copy(update={"path": str(tmp_path / "held.jsonl")})
    wanted = EvaluateConfig(data=data)
    config = config.model_copy(update={"evaluate": wanted})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written(config)), "utf-8")
    run, given = str(tmp_path / "run"), ["--config", str(tmp_path / "config.yaml")]

    def tinyonn(*arguments: str) -> dict[str, object]:
        result = CliRunner().invoke(app, [*arguments, *given, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]

    before = tinyonn("assemble", run)
    evaluated = tinyonn("evaluate", run, *FEW, "--allocate")
    assembled = tinyonn("assemble", run)  # anew, with the allocation that was found
    assert before["fresh"] and assembled["fresh"]
    assert before["assembly"] != assembled["assembly"]
    again = tinyonn("evaluate", run, *FEW)
    assert (evaluated["evaluated"], again["evaluated"]) == (3, 0)
    assert isinstance(again["lines"], list)
    line = next(line for line in again["lines"] if line["method"] == "default")

    settings = config.model_copy(
        update={"evaluate": EvaluateConfig(data=data, methods=("default",), budgets=(0.315,), samples=6)}
    )
    options = evaluate_options(run, settings)
    corpus = held_out_corpus(settings, options, tmp_path / "run")
    model = open_assembled(tmp_path / "run" / "experts")
    model.set_path("dense")
    sums: dict[str, list[float]] = {}
    for sample in samples_of(corpus, options.split):
        ids, labels = (torch.from_numpy(array.astype("int64")) for array in (sample.input_ids, sample.labels))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].float()
        total, count = sums.setdefault(sample.slice, [0.0, 0.0])
        loss = cross_entropy(logits, labels[1:], reduction="sum").item()
        sums[sample.slice] = [total + loss, count + int((labels[1:] >= 0).sum())]
    found = {name: total / count for name, (total, count) in sums.items()}
    assert found == pytest.approx(line["losses"]["by_slice"], rel=1e-5)

    tinyonn("export", run, str(tmp_path / "hub"))
    card = (tmp_path / "hub" / "README.md").read_text("utf-8")
    assert f"| this model (31.5% kept) | {line['losses']['by_slice']['code']:.3f} |" in card
