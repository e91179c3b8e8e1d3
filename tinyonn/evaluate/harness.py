"""lm-eval on models that are loaded already: which requests a task makes, and what a model scores on them.

Prompts, few-shot examples, filters and metrics are lm-eval's own (Gao et al., the Language Model Evaluation Harness).
Its own command gives the same digits for the original model with ``--model_args ...,softmax_dtype=float32`` and the
same batch size, which decides how products are rounded. float32 because lm-eval's default sums log-probabilities in
the model's bfloat16, three digits in all, which makes ties of what is none.

A sparse model with a router chooses its experts from each request's context alone, never from a continuation that is
compared: `SubjectLM` runs such requests in batches of its own with a row of gates for each. Generated text follows the
model's own rule, which reads the prompt. The "context" of a rolling window of lm-eval is the one token before it.

Importing this module imports lm-eval, the extra ``eval``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import evaluate as metrics_library
import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tinyonn.errors import InputError, first_line
from tinyonn.evaluate.local_tasks import read_local
from tinyonn.evaluate.sandbox import REMEDY, CodeEval
from tinyonn.show.escape import shortened

if TYPE_CHECKING:
    from tinyonn.evaluate.tasks import Settings

CODE_TASKS = ("humaneval", "mbpp")  # whose programs are judged by `code_eval` and so run apart
SEEDS = (0, 1234, 1234, 1234)  # lm-eval's: of Python, NumPy, Torch, few-shot examples
SOFTMAX = "float32"
YAML = (".yaml", ".yml")
GENERATE = "generate_until"
GENERATED = 256  # tokens that lm-eval lets a model write, where a task does not say
BETWEEN_TOLD = 0.5  # seconds


@dataclass(frozen=True)
class Asked:
    """What a task will ask.

    Attributes
    ----------
    digest : str
        Of every prompt, continuation, target and metric, as they are after few-shot examples and chat template.
    requests : int
    tokens : int
        Of the longest request, what is generated included.
    compared : bool
        Whether continuations are compared, for which lm-eval holds the logits of all tokens.
    """

    digest: str
    requests: int
    tokens: int
    compared: bool


@dataclass(frozen=True)
class Scored:
    """What a model scored on a task, or on a group of tasks.

    Attributes
    ----------
    results : dict
        By task and group, then by ``metric,filter`` and ``metric_stderr,filter``.
    samples : dict of str to int
        Documents by task.
    shots, versions : dict
        By task.
    values : list of (str, str, str, int, float)
        Task, metric, filter, document, value: what the means are of.
    """

    results: dict[str, dict[str, float]]
    samples: dict[str, int]
    shots: dict[str, int]
    versions: dict[str, Any]
    values: list[tuple[str, str, str, int, float]]


class _Followed:
    """In place of lm-eval's cache of answers: tells of the requests that are done, which come a batch at a time."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self.tell = tell
        self._told, self._done = time.monotonic(), 0

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """A request is done."""
        self._done += 1
        if time.monotonic() - self._told > BETWEEN_TOLD:
            self.tell(self._done)
            self._told, self._done = time.monotonic(), 0


class SubjectLM(HFLM):
    """A loaded model as lm-eval asks it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    batch : int
        Requests at a time.
    context : int
        Tokens at most.
    experts : int, optional
        On for a request, by the model's router; None where nothing is to be chosen.
    tell : callable
        Called now and then with how many more requests are done.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch: int,
        context: int,
        experts: int | None = None,
        tell: Callable[[float], None] = lambda done: None,
    ) -> None:
        options = {"backend": "causal", "max_length": context, "softmax_dtype": SOFTMAX}
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch, **options)
        self.experts = experts
        self.set_cache_hook(_Followed(tell))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As in lm-eval, without its bar."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """As in lm-eval, without its bar."""
        answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """As in lm-eval, without its bar."""
        answers: list[str] = super().generate_until(requests, disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        if self.experts is None:
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, True, override_bs)
            return found
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))
        answers: dict[int, tuple[float, bool]] = {}
        for first in range(0, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            for row, answer in zip(rows, self._routed([requests[row][1:] for row in rows]), strict=True):
                answers[row] = answer
                if requests[row][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[row][0], answer)
        return [answers[row] for row in range(len(requests))]

    @torch.no_grad()
    def _routed(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """Log-likelihood of every continuation with gates from its own context, and whether it is the likeliest."""
        inputs = [(context + wanted)[-(self.max_length + 1) : -1] for context, wanted in pairs]
        prompts = [len(ids) + 1 - len(wanted) for ids, (_, wanted) in zip(inputs, pairs, strict=True)]
        ids_BT = _padded(inputs, self.device)
        prompt_BP = _padded([ids[:n] for ids, n in zip(inputs, prompts, strict=True)], self.device)
        lengths_B = torch.tensor(prompts, device=self.device)
        mask_BP = torch.arange(prompt_BP.shape[1], device=self.device)[None] < lengths_B[:, None]
        choice = self.model.router.choose(self.model.router.logits(prompt_BP, mask_BP), self.experts)
        logits_BTV = self.model(input_ids=ids_BT, gates=choice.gates_BE, use_cache=False).logits
        for row, (ids, (_, wanted)) in enumerate(zip(inputs, pairs, strict=True)):
            log_p_TV = logits_BTV[row, len(ids) - len(wanted) : len(ids)].float().log_softmax(-1)
            target_T = torch.tensor(wanted, device=log_p_TV.device)
            total = float(log_p_TV.gather(1, target_T[:, None]).sum())
            yield total, bool((log_p_TV.argmax(1) == target_T).all())


def _padded(rows: Sequence[list[int]], device: torch.device) -> torch.Tensor:
    """Rows of tokens padded at the end, int64: in a causal model no token sees what stands behind it."""
    parts = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(device)


@cache
def _manager(folders: tuple[Path, ...]) -> TaskManager:
    return TaskManager(include_path=list(folders))


def load_tasks(spec: str, settings: Settings) -> Any:
    """A task, or all tasks of a group or a folder, as `lm_eval.evaluate` takes them, with their examples and seeds.

    Parameters
    ----------
    spec : str
        A name that lm-eval knows, or a YAML file of its kind, or a folder of these. Paths of data in such a file may be
        relative to it.
    settings : Settings

    Raises
    ------
    InputError
        No such task; its data cannot be had; it runs programs and may not, or not apart.
    """
    try:
        with _programs_apart(settings.run_code):
            loaded = _manager(_folders(spec)).load(_specs(spec, settings))
    except InputError:
        raise
    except Exception as error:  # lm-eval, datasets and the hub each have their own
        raise InputError(
            f"--tasks {shortened(spec)} cannot be loaded ({type(error).__name__}: {first_line(error)}); give a name "
            "that `lm_eval ls tasks` lists, a YAML file of such a task, or --tasks-data with its files"
        ) from None
    for name, task in loaded["tasks"].items():
        _check_code(name, task, settings)
        shots = task.get_config("num_fewshot")
        if settings.shots is not None and shots != 0:  # as lm-eval: a task that says 0 keeps it
            shots = settings.shots
        task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SEEDS[3] if settings.seed is None else settings.seed)
    return loaded


@contextlib.contextmanager
def _programs_apart(allowed: bool) -> Iterator[None]:
    """Meanwhile a task that asks for the metric ``code_eval`` gets ours; its modules ask as they are imported."""
    before = metrics_library.load

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return CodeEval(allowed) if path == "code_eval" else before(path, *arguments, **options)

    metrics_library.load = load
    try:
        yield
    finally:
        metrics_library.load = before


def _check_code(name: str, task: Any, settings: Settings) -> None:
    if not getattr(task, "UNSAFE_CODE", False):
        return
    if not name.startswith(CODE_TASKS):
        raise InputError(
            f"--tasks {name} runs what the model writes in this process itself; of such tasks there are here "
            f"{' and '.join(CODE_TASKS)}, whose programs run apart"
        )
    if not settings.run_code:
        raise InputError(f"--tasks {name} runs programs that the model writes; {REMEDY}")


def _folders(spec: str) -> tuple[Path, ...]:
    path = Path(spec).expanduser()
    if path.is_dir():
        return (path.resolve(),)
    return (path.resolve().parent,) if path.suffix in YAML and path.is_file() else ()


def _specs(spec: str, settings: Settings) -> list[Any]:
    """What lm-eval's manager is asked for: names, with data of files where there are some."""
    folders = _folders(spec)
    if not folders:
        if Path(spec).suffix in YAML or "/" in spec:
            raise InputError(f"--tasks {shortened(spec)}: there is no such file or folder")
        if settings.data is None:
            return [spec]
        return [_with(spec, read_local(spec, settings.data, settings.shots))]
    entries = _manager(folders).task_index
    wanted = Path(spec).expanduser().resolve()
    own = {
        name: entry
        for name, entry in entries.items()
        if entry.yaml_path is not None
        and wanted in (entry.yaml_path.resolve(), *entry.yaml_path.resolve().parents)
    }
    if not own:
        raise InputError(
            f"--tasks {shortened(spec)}: no task is described there; see configs/tasks/example.yaml"
        )
    return [_with(name, _beside(entry)) for name, entry in own.items()]


def _with(name: str, changes: dict[str, Any]) -> Any:
    """A task with changes to its description: a member of a group says so to lm-eval, and nothing else does."""
    return {"group": "files", "task": [{"task": name, **changes}]} if changes else name


def _beside(entry: Any) -> dict[str, Any]:
    """Files of data of a YAML file, where they lie beside it."""
    options = dict((entry.cfg or {}).get("dataset_kwargs") or {})
    files = options.get("data_files")

    def placed(path: Any) -> Any:
        if isinstance(path, dict):
            return {name: placed(one) for name, one in path.items()}
        if isinstance(path, list):
            return [placed(one) for one in path]
        beside = entry.yaml_path.parent / str(path)
        return str(beside) if beside.exists() else path

    return {"dataset_kwargs": {**options, "data_files": placed(files)}} if files else {}


def asked(spec: str, settings: Settings, tokenizer: Any, context: int) -> Asked:
    """What a task will ask any model with this tokenizer; nothing is run."""
    digest, requests, lengths, compared = hashlib.blake2b(digest_size=16), 0, [1], False
    for name, task in sorted(load_tasks(spec, settings)["tasks"].items()):
        task.build_all_requests(limit=settings.limit, **_template(settings, tokenizer))
        described = {key: value for key, value in task.dump_config().items() if key not in LEFT_OUT}
        digest.update(json.dumps([name, described], sort_keys=True, default=_plain).encode())
        for instance in task.instances:
            requests += instance.repeats
            compared |= instance.request_type != GENERATE
            told = [instance.request_type, instance.args, instance.doc]
            digest.update(json.dumps(told, sort_keys=True, default=str).encode())
        if (generated := max(_generated(one) for one in task.instances)) >= context:
            raise InputError(
                f"--tasks {name} has the model write up to {generated:,} tokens, and its context is {context:,}; leave "
                "the task out, or describe it in a YAML file of your own with fewer max_gen_toks"
            )
        longest = sorted(task.instances, key=lambda one: -sum(len(str(part)) for part in one.args))[:4]
        lengths += [_tokens(one, tokenizer) for one in longest]
    return Asked(digest.hexdigest(), requests, min(context, max(lengths)), compared)


LEFT_OUT = ("metadata", "custom_dataset", "dataset_kwargs", "dataset_path")  # the documents themselves count


def _plain(value: Any) -> str:
    """Without the address of a function."""
    return getattr(value, "__qualname__", type(value).__qualname__)


def _tokens(instance: Any, tokenizer: Any) -> int:
    texts = [part for part in instance.args if isinstance(part, str)]
    return len(tokenizer("".join(texts))["input_ids"]) + _generated(instance)


def _generated(instance: Any) -> int:
    """Tokens that the model may write."""
    if instance.request_type != GENERATE:
        return 0
    options = instance.args[1]
    return int(options.get("max_gen_toks", options.get("max_new_tokens", GENERATED)))


def _template(settings: Settings, tokenizer: Any) -> dict[str, Any]:
    """How `build_all_requests` is to use the chat template."""
    if not settings.chat:
        return {}

    def applied(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            tokenizer.apply_chat_template(
                history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    return {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": applied}


def score(spec: str, settings: Settings, model: SubjectLM) -> Scored:
    """Ask a model all of a task."""
    tasks = load_tasks(spec, settings)
    seeds = SEEDS if settings.seed is None else (settings.seed,) * 4
    random.seed(seeds[0])
    np.random.seed(seeds[1])  # noqa: NPY002  (lm-eval's tasks draw from it)
    torch.manual_seed(seeds[2])
    found = lm_eval.evaluate(
        model,
        tasks,
        limit=settings.limit,
        apply_chat_template=settings.chat,
        fewshot_as_multiturn=True,
        confirm_run_unsafe_code=settings.run_code,
    )
    results = {
        name: {key: float(value) for key, value in sorted(values.items()) if _is_number(value)}
        for name, values in found["results"].items()
    }
    samples = {name: int(count["effective"]) for name, count in found["n-samples"].items()}
    shots = {name: int(count) for name, count in found["n-shot"].items()}
    return Scored(results, samples, shots, dict(found["versions"]), list(_values(found["samples"])))


def _values(samples: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, str, str, int, float]]:
    """What each document scored, where that is a number."""
    for task, documents in sorted(samples.items()):
        for document in documents:
            for metric in document["metrics"]:
                if _is_number(document[metric]):
                    yield task, metric, document["filter"], int(document["doc_id"]), float(document[metric])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number)
