"""Layers in which every sample has its own weight, beside their definition and finite differences in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import tinyonn.model.batched_tinyonn as batched
from tests.dense.architectures import make_model
from tests.dense.conftest import ModelFactory
from tests.model.assembled import UP, assemble, assembled, dense_model, random_groups
from tests.model.test_sparse import by_definition, random_matrix
from tinyonn.experts import TinyONNForCausalLM
from tinyonn.model.sparse_tinyonn import batched_linear, gated_linear

# Without and with the compiled passes; the large one has several blocks of rows
SHAPES = [(7, 13), (301, 270)]
DTYPES = [
    (torch.float64, torch.float64, 1e-12),
    (torch.float32, torch.float32, 1e-5),
    (torch.bfloat16, torch.bfloat16, 2e-2),
    (torch.float32, torch.bfloat16, 2e-2),
]
GATES = torch.tensor(
    [[1, 0, 0.5, 2, 1], [0, 1, 1, 0, 1], [1, 0, 0.3, 0, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1.0]]
)
VALUE_GATES = torch.tensor([[0, 1, 1, 0.5, 1]]).expand(5, -1) * torch.tensor([[1], [1], [0], [2], [1]])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def leaves(
    out: int, inputs: int, values: torch.dtype, dtype: torch.dtype, tokens: int = 6
) -> tuple[Any, torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Matrix, labels, weight; input, values, gates and bias to take gradients of; gradient of the output."""
    torch.manual_seed(1)
    matrix, labels_OI, W_OI = random_matrix(out, inputs, 5, values, skewed=True)
    X = torch.randn(5, tokens, inputs).to(dtype)
    parts = (
        X,
        matrix.values,
        GATES.double() if values == torch.float64 else GATES,
        torch.randn(out).to(dtype),
    )
    G = torch.randn(5, tokens, out).to(dtype)
    return matrix, labels_OI, W_OI, [part.clone().requires_grad_() for part in parts], G


def run(
    matrix: Any, parts: list[torch.Tensor], G: torch.Tensor, value_gates: Any = None
) -> list[torch.Tensor]:
    """Output and gradients."""
    X, values, gates, bias = parts
    Y = batched_linear(X, matrix._replace(values=values), gates, bias, value_gates)
    return [Y, *torch.autograd.grad(Y, parts, G)]


def exact(
    labels_OI: torch.Tensor, W_OI: torch.Tensor, parts: list[torch.Tensor], G: torch.Tensor, value_gates: Any
) -> list[torch.Tensor]:
    """The same by autograd of dense float64 weights."""
    X, _, gates, bias = [part.detach().double().requires_grad_() for part in parts]
    gates_BOI = functional.pad(gates, (0, 1))[:, labels_OI]
    W_BOI = (W_OI.double() * gates_BOI).requires_grad_()
    W_BOI.retain_grad()
    Y = X @ W_BOI.mT + bias
    Y.backward(G.double())
    assert W_BOI.grad is not None and X.grad is not None and gates.grad is not None and bias.grad is not None
    taught = functional.pad(value_gates.double(), (0, 1))[:, labels_OI]
    of_W_OI = (W_BOI.grad * taught).sum(0)
    of_values = torch.cat([of_W_OI[labels_OI == group] for group in range(5)])
    return [Y, X.grad, of_values, gates.grad, bias.grad]


@pytest.mark.parametrize("taught", [GATES, VALUE_GATES])
@pytest.mark.parametrize(("values", "dtype", "limit"), DTYPES)
@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_beside_dense_float64_weights(
    out: int, inputs: int, values: torch.dtype, dtype: torch.dtype, limit: float, taught: torch.Tensor
) -> None:
    """All groups' gates have gradients, those that are off too; values take part as told."""
    matrix, labels_OI, W_OI, parts, G = leaves(out, inputs, values, dtype)
    found = run(matrix, parts, G, None if taught is GATES else taught)
    wanted = exact(labels_OI, W_OI, parts, G, taught)
    for one, other, part in zip(found, wanted, [G, *parts], strict=True):
        assert one.dtype == part.dtype and one.shape == part.shape
        assert (one - other).abs().max() <= limit * other.abs().max()


@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_beside_finite_differences(out: int, inputs: int) -> None:
    """Along random directions, of a loss that bends, about gates of 0 too."""
    matrix, labels_OI, W_OI, parts, _ = leaves(out, inputs, torch.float64, torch.float64)

    def loss(*parts: torch.Tensor) -> torch.Tensor:
        X, values, gates, bias = parts
        return batched_linear(X, matrix._replace(values=values), gates, bias).tanh().sum()

    def taught(step: float, direction: torch.Tensor) -> torch.Tensor:
        """Each sample's weight moves along the values as far as its value gates say."""
        gates_BOI = functional.pad(GATES.double(), (0, 1))[:, labels_OI]
        moved_BOI = functional.pad(VALUE_GATES.double(), (0, 1))[:, labels_OI]
        D_OI = torch.zeros_like(W_OI)
        for group, part in enumerate(direction.split(matrix.group_sizes().tolist())):
            D_OI[labels_OI == group] = part
        W_BOI = W_OI * gates_BOI + step * D_OI * moved_BOI
        return (parts[0] @ W_BOI.mT + parts[3]).tanh().sum()

    gradients = torch.autograd.grad(loss(*parts), parts)
    step = 1e-5
    for number, gradient in enumerate(gradients):
        direction = torch.randn_like(gradient)
        above, below = list(parts), list(parts)
        above[number] = (parts[number] + step * direction).detach()
        below[number] = (parts[number] - step * direction).detach()
        difference = float((loss(*above) - loss(*below)).detach()) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(difference, rel=1e-6)

    X, values, gates, bias = parts
    Y = batched_linear(X, matrix._replace(values=values), gates, bias, VALUE_GATES)
    (gradient,) = torch.autograd.grad(Y.tanh().sum(), values)
    direction = torch.randn_like(gradient)
    difference = float((taught(step, direction) - taught(-step, direction)).detach()) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("masters", [False, True])
def test_weights_are_the_definitions_to_the_bit(masters: bool) -> None:
    """From float32 values they are rounded once, NaN and infinity stay what they are and where they are."""
    matrix, labels_OI, W_OI = random_matrix(301, 270, 5)
    if not masters:
        W_OI = W_OI.bfloat16()
        matrix = matrix._replace(values=matrix.values.bfloat16())
    for place, value in ((0, torch.nan), (1, torch.inf), (2, 3.4e38)):
        W_OI.view(-1)[(labels_OI == 2).flatten().nonzero()[place]] = value
        matrix.values[int(matrix.group_sizes()[:2].sum()) + place] = value
    memory = torch.full((5, 301, 270), torch.nan, dtype=torch.bfloat16)
    batched._dense(matrix, GATES, memory)
    for found_OI, gates_G in zip(memory, GATES, strict=True):
        kept_OI = W_OI.where(functional.pad(gates_G, (0, 1))[labels_OI] != 0, 0)
        wanted_OI = by_definition(labels_OI, kept_OI, gates_G).bfloat16()
        assert torch.equal(found_OI.isnan(), wanted_OI.isnan())
        assert torch.equal(found_OI.nan_to_num(1.5, 2.5), wanted_OI.nan_to_num(1.5, 2.5))


def test_same_bits_again_on_more_threads_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, _, _, parts, G = leaves(301, 270, torch.float32, torch.bfloat16)
    first = run(matrix, parts, G)
    for one, other in zip(run(matrix, parts, G), first, strict=True):
        assert torch.equal(one, other)
    torch.set_num_threads(2)
    for one, other in zip(run(matrix, parts, G)[2:4], first[2:4], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    torch.set_num_threads(1)
    of_W = torch.randn(5, 301, 270).bfloat16()
    sums = []
    for threads, size in ((1, 5), (2, 5), (2, 2)):  # the passes over the entries
        torch.set_num_threads(threads)
        of_values, of_gates = torch.zeros(matrix.values.numel()), torch.zeros(5, 5, dtype=torch.float64)
        for at in range(0, 5, size):
            part = slice(at, at + size)
            batched._gather(matrix, GATES[part], of_W[part], of_values, of_gates[part])
        sums.append((of_values, of_gates))
    torch.set_num_threads(1)
    for others in sums[1:]:
        assert torch.equal(others[0], sums[0][0]) and torch.equal(others[1], sums[0][1])
    monkeypatch.setattr(batched, "CHUNK_WEIGHTS", 2)
    monkeypatch.setattr(batched, "CHUNK_BYTES", 0)
    for one, other in zip(run(matrix, parts, G), first, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_no_more_dense_weights_at_a_time_than_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is made on the way is larger than a chunk."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    monkeypatch.setattr(batched, "CHUNK_BYTES", 0)
    matrix, _, _ = random_matrix(301, 270, 5)
    X = torch.randn(16, 2, 270, requires_grad=True)
    gates = torch.ones(16, 5, requires_grad=True)
    with Watch():  # type: ignore[no-untyped-call]
        batched_linear(X, matrix, gates).sum().backward()
    assert largest == 4 * 301 * 270 * 4


def test_one_pattern_is_gated_linear() -> None:
    matrix, _, _, (X, _, gates, bias), _ = leaves(301, 270, torch.bfloat16, torch.bfloat16)
    one = gated_linear(X, matrix, gates[0], bias)
    assert torch.equal(batched_linear(X[None], matrix, gates[:1], bias)[0], one)
    torch.testing.assert_close(
        batched_linear(X, matrix, gates[:1].expand(5, -1), bias), one, rtol=0.02, atol=0.1
    )


@pytest.mark.parametrize(("out", "inputs"), [*SHAPES, (2, 70_000)])
def test_edges(out: int, inputs: int) -> None:
    """Wide columns, no tokens, no samples, no entries."""
    matrix, labels_OI, W_OI = random_matrix(out, inputs, 5)
    X = torch.randn(5, 1, inputs)
    wanted = torch.stack([x @ by_definition(labels_OI, W_OI, g).T for x, g in zip(X, GATES, strict=True)])
    torch.testing.assert_close(batched_linear(X, matrix, GATES), wanted, rtol=1e-4, atol=1e-2)
    for shape in ((5, 0, inputs), (0, 3, inputs)):
        nothing = torch.randn(shape, requires_grad=True)
        gates = GATES[: shape[0]].clone().requires_grad_()
        Y = batched_linear(nothing, matrix, gates)
        assert Y.shape == (*shape[:2], out)
        Y.sum().backward()
        assert nothing.grad is not None and nothing.grad.shape == shape
        assert gates.grad is not None and not gates.grad.any()
    pointer = torch.zeros_like(matrix.row_pointer)
    values = torch.empty(0, requires_grad=True)
    empty = matrix._replace(values=values, columns=matrix.columns[:0], row_pointer=pointer)
    bias = torch.randn(out)
    X.requires_grad_()
    Y = batched_linear(X, empty, GATES, bias)
    assert torch.equal(Y, bias.expand(5, 1, out))
    Y.sum().backward()
    assert X.grad is not None and not X.grad.any()
    assert values.grad is not None and values.grad.shape == (0,)


def test_what_does_not_fit_is_refused() -> None:
    matrix, _, _ = random_matrix(7, 13, 5)
    with pytest.raises(ValueError, match=r"gates of shape \[4, 5\] do not fit an input of 5 samples"):
        batched_linear(torch.randn(5, 2, 13), matrix, GATES[:4])
    with pytest.raises(ValueError, match=r"value_gates of shape \[5, 4\].* 5 groups"):
        batched_linear(torch.randn(5, 2, 13), matrix, GATES, None, GATES[:, :4])
    with pytest.raises(ValueError, match="does not fit a layer of 13 inputs"):
        batched_linear(torch.randn(5, 2, 12), matrix, GATES)


# The model


@pytest.fixture(scope="module")
def base_folder(model_of: ModelFactory) -> Path:
    return model_of("qwen2")


@pytest.fixture
def model(base_folder: Path) -> TinyONNForCausalLM:
    """In float64, so that differences can be taken."""
    base = dense_model(base_folder, dtype=torch.float64)
    return assemble(base, random_groups(base, 4, 0.6), 4).train()


IDS = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(0))
CHOSEN = torch.tensor([[1, 0, 0.5, 0.2], [0, 2, 1, 1], [1, 0, 0, 0]])


def loss_of(model: TinyONNForCausalLM, gates: torch.Tensor, **given: Any) -> torch.Tensor:
    """In float64; that of ``transformers`` is float32."""
    logits = model(IDS, gates=gates, **given).logits
    loss: torch.Tensor = functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    return loss


def group_of(model: TinyONNForCausalLM, tensor: torch.Tensor, group: int) -> torch.Tensor:
    sizes = model.sparse_layers[UP].matrix.group_sizes().tolist()
    return torch.split(tensor, sizes)[group]


def test_a_gate_that_is_off_has_a_gradient(tmp_path: Path) -> None:
    """Of GPT-2, whose norms are float64 where its weights are."""
    base = dense_model(make_model("gpt2", tmp_path), dtype=torch.float64)
    model = assemble(base, random_groups(base, 4, 0.6), 4)
    gates = CHOSEN.clone().requires_grad_()
    loss_of(model, gates).backward()
    assert gates.grad is not None
    step = 2**-13  # exact in float32, which gates are
    for sample, expert in ((0, 1), (2, 3), (1, 2)):
        losses = []
        for times in range(3):  # gates are never negative, so from one side: exact to the second order
            moved = CHOSEN.clone()
            moved[sample, expert] += times * step
            losses.append(float(loss_of(model, moved).detach()))
        difference = (-3 * losses[0] + 4 * losses[1] - losses[2]) / (2 * step)
        assert float(gates.grad[sample, expert]) == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("gates", [CHOSEN, CHOSEN[0], CHOSEN[:1].expand(3, -1)])
def test_value_gates_freeze_and_teach(model: TinyONNForCausalLM, gates: torch.Tensor) -> None:
    values = model.sparse_layers[UP].values
    (plain,) = torch.autograd.grad(loss_of(model, gates), values)
    (same,) = torch.autograd.grad(loss_of(model, gates, value_gates=gates), values)
    torch.testing.assert_close(same, plain, rtol=1e-6, atol=1e-12)
    taught = loss_of(model, gates, value_gates=[0, 1, 0, 1])
    assert torch.equal(taught, loss_of(model, gates))
    learned = gates.clone().requires_grad_()
    (frozen, of_gates) = torch.autograd.grad(
        loss_of(model, learned, value_gates=[0, 1, 0, 1]), [values, learned]
    )
    (whole,) = torch.autograd.grad(loss_of(model, learned), [learned])
    assert torch.equal(of_gates, whole)
    for expert, on in enumerate((0, 1, 0, 1)):
        assert bool(group_of(model, frozen, expert).any()) == bool(on)
    torch.testing.assert_close(group_of(model, frozen, 4), group_of(model, plain, 4), rtol=1e-6, atol=1e-12)


def test_value_gates_of_each_sample_add_up(model: TinyONNForCausalLM) -> None:
    values = model.sparse_layers[UP].values
    parts = []
    for sample in range(3):
        mask = torch.zeros(3, 4)
        mask[sample] = 1
        (one,) = torch.autograd.grad(loss_of(model, CHOSEN, value_gates=mask), values)
        parts.append(one)
    (whole,) = torch.autograd.grad(loss_of(model, CHOSEN, value_gates=[1, 1, 1, 1]), values)
    for expert in range(4):
        found = sum(group_of(model, part, expert) for part in parts)
        torch.testing.assert_close(found, group_of(model, whole, expert), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(model: TinyONNForCausalLM, reentrant: bool) -> None:
    def gradients() -> list[torch.Tensor]:
        gates = CHOSEN.clone().requires_grad_()
        wanted = [gates, *[layer.values for layer in model.sparse_layers.values()]]
        for one in wanted:
            one.grad = None
        loss_of(model, gates, value_gates=[0, 1, 1, 1]).backward()
        return [one.grad.clone() for one in wanted if one.grad is not None]

    plain = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients()
    assert len(plain) == 1 + len(model.sparse_layers)
    # A reentrant pass adds the gates' gradient, float32, up layer by layer
    torch.testing.assert_close(again[0], plain[0], rtol=1e-4, atol=1e-7)
    for one, other in zip(again[1:], plain[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-15)


def test_float32_masters_under_autocast(base_folder: Path) -> None:
    """Values keep their precision and have gradients of it; evaluation and training say the same."""
    base = dense_model(base_folder, dtype=torch.bfloat16)
    model = assemble(base, random_groups(base, 4, 0.6), 4)
    for layer in model.sparse_layers.values():
        layer.values.data = layer.values.data.float()
    gates = CHOSEN.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.train()(IDS, gates=gates).logits
        functional.cross_entropy(logits.float().flatten(0, 1), IDS.flatten()).backward()
        with torch.no_grad():
            assert torch.equal(model.eval()(IDS, gates=gates.detach()).logits, logits)
    assert gates.grad is not None and gates.grad.all()
    for layer in model.sparse_layers.values():
        assert layer.values.grad is not None and layer.values.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("value_gates", "says"),
    [
        (torch.ones(3), r"value_gates of shape \[3\] do not fit 4 experts; give \[4\] or \[batch, 4\]"),
        (torch.ones(2, 4), "gates for 2 samples do not fit a batch of 3"),
        (torch.ones(3, 9, 4), r"value_gates of shape \[3, 9, 4\]"),
        (-torch.ones(4), "value_gates: the gate at .0. is -1.0"),
    ],
)
def test_bad_value_gates(base_folder: Path, value_gates: torch.Tensor, says: str) -> None:
    _, model = assembled(base_folder, kept=0.6)
    with pytest.raises(ValueError, match=says):
        model(IDS, gates=CHOSEN, value_gates=value_gates)
    with pytest.raises(ValueError, match="do not go with gates per token"):
        model(IDS, gates=torch.ones(3, 9, 4), value_gates=torch.ones(4))
