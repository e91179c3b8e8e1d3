"""Every family from a small random model through record, score, cluster and assembly: logits are the dense model's.

The table of `docs/families.md` is made here, and so are the reasons why others are refused before anything is read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.dense.architectures import ARCHITECTURES, FAMILIES, VOCAB, make_model
from tests.experts.runs import clustered_run
from tests.families.table import FAMILY_NOTES, REFUSALS, families_table, refusals_table, write_settings
from tests.model.assembled import assembled
from tinyonn.config import ExpertsConfig, ModelConfig, parse_config
from tinyonn.dense.load import load_model
from tinyonn.errors import InputError
from tinyonn.evaluate.dense import DenseWeights
from tinyonn.experts.assemble import assemble_run
from tinyonn.experts.export import export_model
from tinyonn.experts.folder import open_assembled
from tinyonn.plan.facts import describe_model, plan_run
from tinyonn.record.driver import record

DOCS = Path(__file__).parents[2] / "docs" / "families.md"
IDS = torch.randint(0, VOCAB - 14, (2, 12), generator=torch.Generator().manual_seed(0))
# Unquantized too by default: what NF4 changes the shape of, and what is particular behind or around the matrices.
BOTH = {"gpt2", "gemma2", "gemma3_vision", "granite", "gpt_neox", "opt", "qwen3_wide"}


def cases() -> list[Any]:
    found = [pytest.param(name, "nf4", id=f"{name}-nf4") for name in FAMILY_NOTES]
    for name in FAMILY_NOTES:
        marks = [] if name in BOTH else [pytest.mark.slow]
        found.append(pytest.param(name, "none", id=f"{name}-none", marks=marks))
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "quantization"), cases())
def test_everything_kept_and_all_on_is_the_dense_model(name: str, quantization: str, tmp_path: Path) -> None:
    config = clustered_run(tmp_path, name, quantization, "float32", rows_each=4)
    report = assemble_run(str(tmp_path / "run"), config.model, ExpertsConfig(budget=1.0))
    assert report.budget == report.linear == sum(report.sizes)
    sparse, wanted = open_assembled(report.folder), logits(load_model(config.model).model)
    assert wanted.std() > 0.05
    assert torch.equal(logits(DenseWeights(config.model).model), wanted)
    sparse.set_path("dense")
    assert torch.equal(logits(sparse), wanted)
    sparse.set_path("sparse")
    assert (logits(sparse) - wanted).abs().max() <= 1e-5 * wanted.abs().max()

    export_model(Path(report.folder), tmp_path / "dense", "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert type(dense) is type(sparse.base)
    assert torch.equal(logits(dense), wanted)
    sparse.save_pretrained(tmp_path / "saved")
    again = open_assembled(tmp_path / "saved")
    again.set_path("dense")
    assert torch.equal(logits(again), wanted)


def test_attention_is_what_the_base_can_do(tmp_path: Path) -> None:
    _, sparse = assembled(make_model("gemma2", tmp_path / "capped"))
    assert sparse.base.config._attn_implementation == sparse.config._attn_implementation == "eager"
    assert not sparse._supports_sdpa
    with pytest.raises(ValueError, match="does not support an attention implementation"):
        sparse.set_attn_implementation("sdpa")
    _, sparse = assembled(make_model("llama", tmp_path / "plain"))
    assert sparse.base.config._attn_implementation == "sdpa"
    sparse.set_attn_implementation("eager")
    assert sparse.base.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_what_cannot_be_recorded_is_refused_by_its_configuration(
    name: str, quantization: str, tmp_path: Path
) -> None:
    folder = write_settings(name, tmp_path)
    with pytest.raises(InputError, match=REFUSALS[name].message):
        describe_model(ModelConfig(path=str(folder), quantization=quantization))


def test_plan_and_record_refuse_before_any_text_is_read(tmp_path: Path) -> None:
    folder = write_settings("mixtral", tmp_path / "model")
    config = parse_config(
        {"model": {"path": str(folder), "device": "cpu"}, "data": {"path": str(tmp_path / "no data")}}
    )
    with pytest.raises(InputError, match="MixtralExperts"):
        plan_run(str(tmp_path / "run"), tmp_path / "run", config, {})
    with pytest.raises(InputError, match="MixtralExperts"):
        record(str(tmp_path / "run"), config, progress=False)


def test_the_tables_in_the_docs_are_these() -> None:
    assert FAMILY_NOTES.keys() == {**ARCHITECTURES, **FAMILIES}.keys()
    text = DOCS.read_text("utf-8")
    for name, table in (("families", families_table()), ("refused", refusals_table())):
        found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)
        assert found is not None and found.group(1).strip() == table, f"docs/families.md, {name}:\n\n{table}"
