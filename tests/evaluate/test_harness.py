"""lm-eval on our models: its own digits for a dense one, gates from each request's own context for a routed one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tests.dense.architectures import make_model
from tests.model.assembled import dense_model
from tests.options import written
from tests.train.trained import make_models
from tinyonn.cli import app
from tinyonn.config import Config
from tinyonn.errors import InputError

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402

from tinyonn.evaluate.harness import SubjectLM, asked, load_tasks, score  # noqa: E402
from tinyonn.evaluate.tasks import Settings  # noqa: E402

OWN = {
    "task": "weather",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "weather.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Day {{day}}:",
    "doc_to_choice": ["rain", "snow and wind"],
    "doc_to_target": "{{what}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
WRITTEN = {
    **{name: OWN[name] for name in ("dataset_path", "dataset_kwargs", "test_split", "doc_to_text")},
    "task": "written",
    "output_type": "generate_until",
    "doc_to_target": "rain",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
PIQA = [{"goal": f"to dry {n}", "sol1": "hang it", "sol2": "soak it twice"} for n in range(6)]
PROGRAM = {
    "task_id": "HumanEval/0",
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
}
CONTEXT = 2048


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", "utf-8")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "weather.yaml").write_text(yaml.safe_dump(OWN), "utf-8")
    (folder / "written.yaml").write_text(yaml.safe_dump(WRITTEN), "utf-8")
    lines(folder / "weather.jsonl", [{"day": n, "what": n % 2} for n in range(7)])
    lines(folder / "piqa_valid.jsonl", PIQA)
    (folder / "piqa_labels.lst").write_text("0\n1\n" * 3, "utf-8")
    lines(
        folder / "gsm8k_test.jsonl", [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(3)]
    )
    lines(folder / "HumanEval.jsonl", [PROGRAM] * 2)
    return folder


def model_and_tokenizer(folder: Path) -> tuple[Any, Any]:
    path = make_model("qwen2", folder)
    tree = json.loads((path / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps({**tree, "max_position_embeddings": CONTEXT}), "utf-8")
    return dense_model(path, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(path)


def test_the_digits_are_those_of_lm_eval(tmp_path: Path, data: Path) -> None:
    model, tokenizer = model_and_tokenizer(tmp_path / "model")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    settings = Settings(batch=4)
    answers: dict[str, list[Any]] = {"ours": [], "theirs": []}

    class Kept(SubjectLM):
        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            answers["ours"] += super().generate_until(requests, disable_tqdm)
            return answers["ours"]

    class TheirsKept(HFLM):
        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            answers["theirs"] += super().generate_until(requests, disable_tqdm)
            return answers["theirs"]

    ours = score(str(data / "weather.yaml"), settings, SubjectLM(model, tokenizer, 4, CONTEXT))
    score(str(data / "written.yaml"), settings, Kept(model, tokenizer, 4, CONTEXT))
    files = {"dataset_kwargs": {"data_files": {"test": str(data / "weather.jsonl")}}}
    options = {"dtype": "bfloat16", "device": "cpu", "batch_size": 4, "softmax_dtype": "float32"}
    theirs = lm_eval.simple_evaluate(
        TheirsKept(pretrained=str(tmp_path / "model"), **options),
        tasks=[{**OWN, **files}, {**WRITTEN, **files}],
        task_manager=TaskManager(include_defaults=False),
    )
    assert answers["ours"] == answers["theirs"] and len(answers["ours"]) == 7
    found = {key: value for key, value in theirs["results"]["weather"].items() if isinstance(value, float)}
    assert {key: value for key, value in ours.results["weather"].items() if key in found} == found
    assert ours.samples == {"weather": 7}
    each = {(metric, n): value for _, metric, _, n, value in ours.values}
    assert len(each) == 14
    assert sum(each["acc", n] for n in range(7)) / 7 == found["acc,none"]


def test_what_a_task_asks_decides_its_digest(tmp_path: Path, data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_model("qwen2", tmp_path / "model"))

    def of(name: str = "piqa", **options: Any) -> tuple[str, int]:
        found = asked(name, Settings(**{"data": data, "shots": 0, **options}), tokenizer, CONTEXT)
        return found.digest, found.requests

    whole = of()
    assert whole == of() and whole[1] == 12
    assert of(limit=2)[1] == 4
    others = [of(limit=2), of(limit=3), of(chat=True), of(str(data / "weather.yaml"), data=None)]
    assert len({whole[0], *(digest for digest, _ in others)}) == 5
    lines(data / "piqa_valid.jsonl", [*PIQA[:5], {**PIQA[5], "sol1": "iron it"}])
    assert of()[0] != whole[0]
    with pytest.raises(InputError, match="--shots 0"):
        of("gsm8k", shots=None)
    assert asked("gsm8k", Settings(data=data, shots=0), tokenizer, CONTEXT).tokens > 256
    lines(data / "gsm8k_train.jsonl", [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(9)])
    (task,) = load_tasks("gsm8k", Settings(data=data))["tasks"].values()
    task.build_all_requests(limit=1)
    assert task.instances[0].args[0].count("Question:") == 6
    (data / "piqa_labels.lst").write_text("0\n", "utf-8")
    with pytest.raises(InputError, match="1 labels for 6 questions"):
        of()


def test_tasks_that_are_not_there(tmp_path: Path, data: Path) -> None:
    for name, told in {
        "no_such_task": "lm_eval ls tasks",
        "a/b.yaml": "no such file",
        str(tmp_path / "none"): "no such",
    }.items():
        with pytest.raises(InputError, match=told):
            load_tasks(name, Settings())
    with pytest.raises(InputError, match="which files hold"):
        load_tasks("arc_easy", Settings(data=data))


def test_programs_run_apart_and_only_if_asked_for(data: Path) -> None:
    with pytest.raises(InputError, match="--run-code"):
        load_tasks("humaneval", Settings(data=data))
    (task,) = load_tasks("humaneval", Settings(data=data, run_code=True))["tasks"].values()
    task.build_all_requests()
    right, wrong = "    return a + b", "    import os; os._exit(0)"
    for instance, answer in zip(task.instances, (right, wrong), strict=True):
        instance.resps.append(answer)
    task.apply_filters()
    scores = [task.process_results(one.doc, [one.filtered_resps["create_test"]]) for one in task.instances]
    assert scores == [{"pass@1": 1.0}, {"pass@1": 0.0}]


@torch.no_grad()
def test_gates_come_from_the_context_of_each_request(tmp_path: Path) -> None:
    model: Any = make_models(tmp_path)[1].eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    asked_of = SubjectLM(model, tokenizer, 3, 128, experts=2)
    pairs = [
        ("a tale of", " rain"),
        ("a tale of", " snow and wind"),
        ("def f(x):", " return"),
        ("It", " is so"),
    ]
    pairs += [("a tale of ra", "in")]  # the same tokens as the first, of which the router sees more
    requests = [((c, w), tokenizer(c)["input_ids"], tokenizer(w)["input_ids"]) for c, w in pairs]
    for (_, context, wanted), (total, greedy) in zip(
        requests, asked_of._loglikelihood_tokens(requests), strict=True
    ):
        prompt = torch.tensor([context])
        gates = model.router.choose(model.router.logits(prompt), 2).gates_BE
        ids = torch.tensor([context + wanted])
        log_p = model(input_ids=ids, gates=gates).logits[0, len(context) - 1 : -1].float().log_softmax(-1)
        alone = float(log_p.gather(1, torch.tensor(wanted)[:, None]).sum())
        assert total == pytest.approx(alone, rel=1e-3, abs=1e-3)
        assert greedy == (log_p.argmax(1).tolist() == wanted)


@torch.no_grad()
def test_what_is_written_follows_the_router_of_each_prompt(tmp_path: Path) -> None:
    model: Any = make_models(tmp_path)[1].eval()
    model.router.top_k = 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompts = ["a tale of rain", "def f(x):", "It is so"]
    options = {"until": [], "max_gen_toks": 5, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, options), n) for n, prompt in enumerate(prompts)]
    written = SubjectLM(model, tokenizer, 3, 128, experts=2).generate_until(requests)
    for prompt, found in zip(prompts, written, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        alone = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(alone, skip_special_tokens=True) == found


def test_the_shipped_example_is_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(make_model("qwen2", tmp_path / "model"))
    example = Path(__file__).parents[2] / "configs" / "tasks" / "example.yaml"
    assert asked(str(example), Settings(), tokenizer, CONTEXT).requests == 6
    assert asked(str(example.parent), Settings(), tokenizer, CONTEXT).requests == 6


def test_the_command_goes_on(recorded: tuple[Path, Config], data: Path, tmp_path: Path) -> None:
    run, config = recorded
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written(config)), "utf-8")
    given = ["evaluate", str(run), "--config", str(tmp_path / "config.yaml"), "--json", "--limit", "3"]

    def call(*more: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, [*given, *more])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]

    own = str(data / "weather.yaml")
    first = call("--tasks", own, "--subjects", "int8")
    assert first["measured"] == 3
    more = call("--tasks", f"{own},piqa", "--tasks-data", str(data), "--subjects", "int8", "--shots", "0")
    assert more["measured"] == 3  # PIQA's; a task of one's own has no examples anyway
    assert {one["task"] for one in more["results"]} == {"weather", "piqa"}
    assert all(
        one["stderr"] > 0 for one in more["results"] if one["metric"] == "acc" and 0 < one["value"] < 1
    )
    again = call("--tasks", f"{own},piqa", "--tasks-data", str(data), "--subjects", "int8", "--shots", "0")
    assert (again["measured"], again["results"]) == (0, more["results"])
    result = CliRunner().invoke(app, [*given, "--tasks", "humaneval", "--tasks-data", str(data)])
    assert result.exit_code == 2 and "--run-code" in result.output
