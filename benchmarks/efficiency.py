"""What a model costs to run, with all that a user waits for: the dense one, in 4 bits, llama.cpp's, and ours.

    python benchmarks/efficiency.py storage/smollm2 --config configs/smollm2.yaml
    python benchmarks/efficiency.py storage/demo-full --config configs/demo-full.yaml --lengths 32 256

Every model is held by a process of its own; they take turns, prompt after prompt, so that the load of others meets all
of them. A prompt is so many tokens of held-out text, another one at every draw; after it `--new` tokens are written,
greedily, one at a time, with a cache. Counted are

- the first token: reading the prompt, with routing and with whatever is merged for it;
- a second's tokens after it: of all the model, head and attention included, the median of the steps;
- merging: what a prompt costs more than the same prompt once more (other models have nothing to merge);
- bytes: on the disk, held after a prompt (what is merged counted, caches of keys and values not), and read for a token.

llama.cpp's models are the file of a GGUF model and its requantization to Q8_0; they need the package
`llama-cpp-python`, and are left out without it. What a larger model weighs: `weights.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from report import Goal, at_least, at_most, finish, show

BF16, NF4, Q8, Q4 = "dense BF16", "dense NF4", "llama.cpp Q8_0", "llama.cpp Q4"


def main() -> None:
    """Parse and carry out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", default=Path("storage/smollm2"))
    parser.add_argument("--config", type=Path, default=Path("configs/smollm2.yaml"))
    parser.add_argument(
        "--model", type=Path, help="folder of the trained model, if it is not the run's model/"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 256, 2048], help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to write")
    parser.add_argument("--draws", type=int, default=5, help="prompts of each length")
    parser.add_argument("--ks", type=int, nargs="+", default=[10, 25], help="experts on, beside all of them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hold", help="hold one model and measure what standard input says")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.hold:
        hold(options.hold, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        arms = {name: Arm(name, folder) for name in names(options)}
        try:
            found = turns(arms, options)
        finally:
            for arm in arms.values():
                arm.end()
    report(found, options)


def names(options: Any) -> list[str]:
    """The models that can be measured here."""
    from tinyonn.config import load_config

    path = load_config(options.config).model.path
    try:
        import llama_cpp  # noqa: F401

        peers = [Q8, Q4] if path.endswith(".gguf") else []
    except ImportError:
        peers = []
    if not peers:
        print("llama.cpp is left out: it wants the package llama-cpp-python and a model from a GGUF file")
    return [BF16, NF4, *peers, "all", *map(str, sorted(options.ks, reverse=True))]


class Arm:
    """A process that holds a model; it answers lines of JSON with lines of JSON."""

    def __init__(self, name: str, folder: str) -> None:
        self.name = name
        arguments = [argument for argument in sys.argv[1:] if argument != "--json"]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments, "--hold", f"{name}:{folder}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._answer()

    def ask(self, ids: list[int]) -> dict[str, float]:
        """Seconds of a prompt."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(ids) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(f"the process that holds {self.name!r} has ended; its error stands above")

    def end(self) -> None:
        """Let it go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def turns(arms: dict[str, Arm], options: Any) -> dict[str, Any]:
    """Every model on every prompt, in turns; the first prompt of a length is not counted."""
    times: dict[str, dict[int, list[dict[str, float]]]] = {name: {} for name in arms}
    for length in options.lengths:
        for draw, ids in enumerate(prompts(options, length)):
            for name, arm in arms.items():
                answer = arm.ask(ids)
                if draw:
                    times[name].setdefault(length, []).append(answer)
    found = {}
    for name, arm in arms.items():
        medians = {
            str(length): {key: statistics.median(one[key] for one in several) for key in several[0]}
            for length, several in times[name].items()
        }
        found[name] = {**arm.facts, "lengths": medians}
    return found


def prompts(options: Any, length: int) -> list[list[int]]:
    """Prompts of so many tokens, and one more: held-out texts one after another, from another one on each time."""
    from tinyonn.config import load_config
    from tinyonn.evaluate.stage import EvaluateOptions, held_out_corpus, samples_of

    config = load_config(options.config)
    held_out = EvaluateOptions(data=config.evaluate.data, samples=config.evaluate.samples)
    samples = samples_of(held_out_corpus(config, held_out, options.run))
    found = []
    for draw in range(options.draws + 1):
        ids: list[int] = []
        number = draw * len(samples) // (options.draws + 1)
        while len(ids) < length:
            ids += samples[number % len(samples)].input_ids.tolist()
            number += 1
        found.append(ids[:length])
    return found


def hold(arm: str, options: Any) -> None:
    """Load a model, tell what it weighs, then measure prompts until standard input ends."""
    name, _, folder = arm.partition(":")
    model = LlamaCpp(name, Path(folder), options) if name in (Q8, Q4) else Torch(name, options)
    print(json.dumps(model.facts()), flush=True)
    for line in sys.stdin:
        ids = json.loads(line)
        model.forget()
        cold = model.times(ids)
        merged = model.merged_bytes()
        warm = model.times(ids)
        answer = {
            "first": cold[0],
            "step": statistics.median(late - early for early, late in pairwise(cold[1:])),
            "all": cold[-1],
            "merge": max(0.0, cold[1] - warm[1]) if name not in (BF16, NF4, Q8, Q4) else 0.0,
            "merged_bytes": merged,
        }
        print(json.dumps(answer), flush=True)


class Torch:
    """The dense model, or ours, in transformers."""

    def __init__(self, name: str, options: Any) -> None:
        import torch

        from tinyonn.config import load_config
        from tinyonn.dense.load import load_model
        from tinyonn.experts.folder import open_assembled

        torch.set_num_threads(options.threads)
        self.name, self.new = name, options.new
        self.folder = options.model or options.run / "model"
        if name in (BF16, NF4):
            config = load_config(options.config).model
            kind = "none" if name == BF16 else "nf4"
            self.model: Any = load_model(config.model_copy(update={"quantization": kind})).model.eval()
            return
        self.model = open_assembled(self.folder).eval()
        if name != "all":
            self.model.router.top_k = min(int(name), int(self.model.config.experts))
        else:
            self.model.router.top_k = int(self.model.config.experts) - len(self.model.router.options.shared)

    def facts(self) -> dict[str, Any]:
        """Bytes on the disk, held, and read for a token besides what is merged."""
        tensors = {tensor.data_ptr(): tensor for tensor in [*self.model.parameters(), *self.model.buffers()]}
        held = sum(tensor.nbytes for tensor in tensors.values())
        embedding, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        untied = 0 if embedding.data_ptr() == head.data_ptr() else embedding.nbytes
        if self.name in (BF16, NF4):
            return {"disk": held, "held": held, "read": held - untied}
        disk = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        return {"disk": disk, "held": held, "read": head.nbytes}  # and what is merged

    def forget(self) -> None:
        """As if no prompt had been read."""
        if hasattr(self.model, "forget"):
            self.model.forget()

    def merged_bytes(self) -> int:
        """What is held besides for the latest prompt."""
        layers = getattr(self.model, "sparse_layers", {})
        return sum(kept.bytes for layer in layers.values() for kept in layer._kept.values())

    def times(self, ids: list[int]) -> list[float]:
        """Seconds from the start to every new token."""
        import torch

        times: list[float] = []

        def tell(ids: Any, scores: Any, **more: Any) -> Any:
            times.append(time.perf_counter() - started)
            return torch.zeros(len(ids), dtype=torch.bool)

        batch = torch.tensor([ids])
        started = time.perf_counter()
        with torch.no_grad():
            self.model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=self.new,
                min_new_tokens=self.new,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[tell],
            )
        return times


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, name: str, folder: Path, options: Any) -> None:
        import llama_cpp

        from tinyonn.config import load_config

        self.path, self.new = Path(load_config(options.config).model.path), options.new
        if name == Q8:
            settings = llama_cpp.llama_model_quantize_default_params()
            settings.ftype, settings.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
            source, self.path = self.path, folder / "q8.gguf"
            llama_cpp.llama_model_quantize(str(source).encode(), str(self.path).encode(), settings)
        self.model = llama_cpp.Llama(
            str(self.path),
            n_ctx=max(options.lengths) + options.new,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            verbose=False,
        )

    def facts(self) -> dict[str, Any]:
        """Bytes: llama.cpp holds and reads its file, here with tied embeddings."""
        size = self.path.stat().st_size
        return {"disk": size, "held": size, "read": size}

    def forget(self) -> None:
        """Nothing is kept that `times` does not drop."""

    def merged_bytes(self) -> int:
        """Nothing is merged."""
        return 0

    def times(self, ids: list[int]) -> list[float]:
        """Seconds from the start to every new token."""
        self.model.reset()
        started, times = time.perf_counter(), []
        for _, _ in zip(range(self.new), self.model.generate(ids, temp=0.0, top_k=1), strict=False):
            times.append(time.perf_counter() - started)
        return times


def report(found: dict[str, Any], options: Any) -> None:
    """Tables and goals."""
    base = found[BF16]
    for length in map(str, options.lengths):
        rows = []
        for name, one in found.items():
            its, dense = one["lengths"][length], base["lengths"][length]
            rows.append([
                title(name),
                f"{its['first'] * 1e3:.0f}",
                f"{its['merge'] * 1e3:.0f}",
                f"{1 / its['step']:.1f}",
                f"{dense['step'] / its['step']:.2f}",
                f"{its['all']:.2f}",
                f"{dense['all'] / its['all']:.2f}",
            ])  # fmt: skip
        columns = (
            "model",
            "first token, ms",
            "merging, ms",
            "tokens/s",
            "x BF16",
            f"s for {options.new} tokens",
            "x BF16",
        )
        show(f"prompts of {length} tokens", columns, rows)
    middle = str(options.lengths[len(options.lengths) // 2])
    rows = []
    for name, one in found.items():
        merged = one["lengths"][middle]["merged_bytes"]
        sizes = (one["disk"], one["held"] + merged, one["read"] + merged)
        rows.append([title(name), *(f"{size / 1e6:.1f}" for size in sizes)])
    few = str(min(options.ks))
    goals = [
        at_least(
            f"tokens/s of {few} experts on to dense BF16",
            base["lengths"][middle]["step"] / found[few]["lengths"][middle]["step"],
            1.0,
        ),
        at_most("bytes on the disk to dense BF16", found["all"]["disk"] / base["disk"], 1.0),
    ]
    for peer in (Q8, Q4):
        if peer in found:
            ratio = found[peer]["lengths"][middle]["step"] / found[few]["lengths"][middle]["step"]
            goals.append(Goal(f"tokens/s of {few} experts on to {peer}", ratio, ">= 1", ratio >= 1))
    finish(
        "efficiency",
        ("MB", "on the disk", "held", "read for a token"),
        rows,
        goals,
        options.json,
        {"models": found, "threads": options.threads},
    )


def title(name: str) -> str:
    """Of a row."""
    return f"ours, {name} experts on" if name == "all" or name.isdigit() else name


if __name__ == "__main__":
    main()
