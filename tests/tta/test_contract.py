"""What every method of ttaq.tta promises; a new method gets these tests by being in METHODS."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tta_cases import TESTED, assert_same, batch_norm_net, quantized_net, stream

from ttaq.errors import CheckpointError, InputError
from ttaq.io import load_state, model_hash, save_state
from ttaq.tta import METHODS, Adapter

NETS = {"float": batch_norm_net, "W4A4": quantized_net}
methods = pytest.mark.parametrize("name", sorted(TESTED))
nets = pytest.mark.parametrize("net", sorted(NETS))


def make(name: str, net: str = "float", **options: Any) -> Adapter:
    return TESTED[name](NETS[net](), **options)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_registered_under_its_file_name_and_documented(name: str) -> None:
    method = METHODS[name]
    assert method.method == name == method.__module__.rpartition(".")[2]
    assert "State:" in (method.__doc__ or "")


@methods
@nets
def test_the_model_passed_in_stays_as_it_was(name: str, net: str) -> None:
    model = NETS[net]().train()
    before, types = tensors_of(model), [type(module) for module in model.modules()]
    adapter = TESTED[name](model)
    for x in stream():
        adapter(x)
    assert_same(tensors_of(model), before)
    assert [type(module) for module in model.modules()] == types
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@methods
def test_only_what_is_declared_changes(name: str) -> None:
    adapter = make(name)
    before = tensors_of(adapter.model)
    learned = {name for name, _ in (*adapter.parameters_adapted(), *adapter.buffers_adapted())}
    for x in stream():
        adapter(x)
    after = tensors_of(adapter.model)
    assert {key for key in before if not torch.equal(before[key], after[key])} == learned & before.keys()


@methods
@nets
def test_reset_is_a_fresh_adapter(name: str, net: str) -> None:
    fresh, used = make(name, net), make(name, net)
    for _ in range(2):
        for x in stream(seed=7):
            used(x)
        used.reset()
    assert_same(used.state_dict(), fresh.state_dict())
    for x in stream():
        assert torch.equal(used(x), fresh(x))
    assert_same(used.state_dict(), fresh.state_dict())


@methods
@nets
def test_saved_state_continues_with_the_same_outputs(name: str, net: str) -> None:
    adapter, resumed = make(name, net), make(name, net)
    first, *rest = stream(4)
    adapter(first)
    state = adapter.state_dict()
    kept = copy.deepcopy(state)
    expected = [adapter(x) for x in rest]
    assert_same(state, kept)  # a snapshot, not a window
    resumed.load_state_dict(state)
    assert_same([resumed(x) for x in rest], expected)
    assert_same(resumed.state_dict(), adapter.state_dict())
    assert_same(state, kept)


CHILD = """
import sys
import torch
from tta_cases import TESTED, batch_norm_net, stream
from ttaq.io import load_state, save_state

torch.set_num_threads(int(sys.argv[2]))
for name in sorted(TESTED):
    adapter = TESTED[name](batch_norm_net())
    adapter.load_state_dict(load_state(f"{sys.argv[1]}/{name}"))
    logits = [adapter(x) for x in stream(5)[2:]]
    save_state(f"{sys.argv[1]}/{name}.out", {"logits": logits, "state": adapter.state_dict()})
"""


def test_a_new_process_continues_with_the_same_outputs(tmp_path: Path) -> None:
    expected = {}
    for name in TESTED:
        adapter = make(name)
        for x in stream(5)[:2]:
            adapter(x)
        save_state(tmp_path / name, adapter.state_dict())
        expected[name] = {"logits": [adapter(x) for x in stream(5)[2:]], "state": adapter.state_dict()}
    # Another number of threads adds the same numbers in another order.
    arguments = [str(tmp_path), str(torch.get_num_threads())]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    for name in TESTED:
        assert_same(load_state(tmp_path / f"{name}.out"), expected[name], name)


@methods
@nets
def test_source_is_the_hash_of_the_model_file_before_and_after_adapting(name: str, net: str) -> None:
    model = NETS[net]()
    adapter = TESTED[name](model)
    late = TESTED[name](model)
    assert adapter.state_dict()["source"] == model_hash(model)
    late(stream()[0])
    assert late.state_dict()["source"] == model_hash(model)


def _change(part: str, key: str | None = None, value: Any = None) -> Callable[[dict[str, Any]], None]:
    """Replace one entry of a part by `value`; without a value remove it; `key` "*" is the first one there is."""

    def damage(state: dict[str, Any]) -> None:
        where, at = (state, part) if key is None else (state[part], key)
        at = next(iter(where), "none") if at == "*" else at
        if value is None:
            where.pop(at, None)
        else:
            where[at] = value(where[at]) if callable(value) else value

    return damage


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "other method": (_change("method", None, "another"), "method 'another'"),
    "other model": (_change("source", None, "0" * 64), "source '000"),
    "source is a tensor": (_change("source", None, torch.zeros(2)), "source"),
    "no options": (_change("options"), "lacks options"),
    "unknown option": (_change("options", "epsilon", 0.4), "has unknown epsilon"),
    "options are a list": (_change("options", None, []), "options is list"),
    "no extra": (_change("extra"), "lacks extra"),
    "no optimizer": (_change("optimizer"), "lacks optimizer"),
    "unknown part": (_change("teacher", None, {}), "has unknown teacher"),
    "no counter": (_change("counters", "samples"), "lacks samples"),
    "negative counter": (_change("counters", "batches", -1), "batches is -1"),
    "counter is a float": (_change("counters", "batches", 1.0), "batches is 1.0"),
    "unknown tensor": (_change("adapted", "9.weight.old", torch.zeros(1)), "has unknown 9.weight.old"),
}
DAMAGE_OF_LEARNED = {
    "option is a tensor": (_change("options", "*", torch.zeros(2)), "saved with option"),
    "no tensor": (_change("adapted", "*"), "lacks"),
    "tensor of other shape": (_change("adapted", "*", lambda t: t.new_zeros(99)), "(99,)"),
    "tensor of other dtype": (_change("adapted", "*", lambda t: t.double()), "torch.float64"),
    "tensor is a list": (_change("adapted", "*", lambda t: t.tolist()), "is list"),
    "no moment": (_change("optimizer", "*"), "lacks"),
    "moment of other shape": (_change("optimizer", "*", lambda t: t.new_zeros(99)), "(99,)"),
}


def _refuses(name: str, damage: Callable[[dict[str, Any]], None], message: str) -> None:
    adapter, twin = make(name), make(name)
    first, second = stream(2)
    other = make(name)
    other(stream(seed=5)[0])
    state = other.state_dict()
    damage(state)
    for each in (adapter, twin):
        each(first)
    before = adapter.state_dict()
    with pytest.raises(CheckpointError) as caught:
        adapter.load_state_dict(state)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{type(adapter).__name__}: ")
    assert_same(adapter.state_dict(), before)
    assert torch.equal(adapter(second), twin(second))


@methods
@pytest.mark.parametrize("case", sorted(DAMAGE))
def test_refuses_a_state_that_does_not_fit(name: str, case: str) -> None:
    _refuses(name, *DAMAGE[case])


@pytest.mark.parametrize("name", [name for name in sorted(TESTED) if make(name).parameters_adapted()])
@pytest.mark.parametrize("case", sorted(DAMAGE_OF_LEARNED))
def test_refuses_a_state_with_damaged_tensors(name: str, case: str) -> None:
    _refuses(name, *DAMAGE_OF_LEARNED[case])


@methods
@pytest.mark.parametrize("state", [None, [], b"PK"], ids=["none", "list", "bytes"])
def test_refuses_a_state_that_is_no_dict(name: str, state: Any) -> None:
    with pytest.raises(CheckpointError, match="expected a dict"):
        make(name).load_state_dict(state)


@methods
def test_refuses_the_state_of_another_model(name: str) -> None:
    state = TESTED[name](batch_norm_net(seed=3)).state_dict()
    with pytest.raises(CheckpointError, match="source"):
        make(name).load_state_dict(state)


@methods
@nets
def test_a_deep_copy_is_independent_and_learns(name: str, net: str) -> None:
    adapter, twin = make(name, net), make(name, net)
    first, *rest = stream()
    adapter(first), twin(first)
    clone = copy.deepcopy(adapter)
    before = adapter.state_dict()
    expected = [twin(x) for x in rest]
    assert_same([clone(x) for x in rest], expected)
    assert_same(adapter.state_dict(), before)
    assert_same([adapter(x) for x in rest], expected)
    clone.reset()
    assert_same(clone.state_dict(), make(name, net).state_dict())


@methods
def test_pickles(name: str) -> None:
    adapter = make(name)
    first, *rest = stream()
    adapter(first)
    file = io.BytesIO()
    torch.save(adapter, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_same([loaded(x) for x in rest], [adapter(x) for x in rest])


@pytest.mark.parametrize("name", ["source", "everything"])  # the kernels of the others know no float64
def test_moves_to_another_dtype_with_all_its_state(name: str) -> None:
    adapter = make(name)
    first, second, third = stream()
    adapter(first)
    adapter.state_dict()  # takes the hash of the float model
    adapter.double()
    with pytest.raises(InputError, match=r"cannot take images of shape \[B, 3, 8, 8\] and torch.float32"):
        adapter(first)  # which it took before
    assert adapter(second.double()).dtype == torch.float64
    adapter.reset()
    fresh = TESTED[name](batch_norm_net().double()).double()
    assert_same(adapter.state_dict(), fresh.state_dict())
    for x in (second.double(), third.double()):
        assert torch.equal(adapter(x), fresh(x))


@methods
@nets
def test_a_stay_in_another_dtype_and_layout_ends_where_it_began(name: str, net: str) -> None:
    adapter, twin = make(name, net), make(name, net)
    first, *rest = stream()
    adapter(first), twin(first)
    state = adapter.double().state_dict()
    moved = {
        key: v.dtype
        for part in ("adapted", "extra", "optimizer")
        for key, v in state[part].items()
        if v.is_floating_point()  # counts stay whole numbers
    }
    assert moved == {key: torch.float32 if key.endswith("/step") else torch.float64 for key in moved}
    adapter.to(memory_format=torch.channels_last).to(torch.float32)
    assert_same(adapter.state_dict(), twin.state_dict())
    adapter.to(memory_format=torch.contiguous_format)
    assert_same([adapter(x) for x in rest], [twin(x) for x in rest])
    assert_same(adapter.state_dict(), twin.state_dict())


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_learns_does_not_become_half(name: str, dtype: torch.dtype) -> None:
    adapter = make(name)
    if not adapter.parameters_adapted():
        assert next(adapter.to(dtype).parameters()).dtype == dtype
        return
    adapter(stream()[0])
    before = adapter.state_dict()
    with pytest.raises(InputError, match=f"the parameters to adapt would be {dtype}"):
        adapter.to(dtype)
    assert_same(adapter.state_dict(), before)
    with pytest.raises(InputError, match=f"the parameters to adapt would be {dtype}"):
        TESTED[name](batch_norm_net().to(dtype))


def _plain(name: str, xs: list[Tensor]) -> list[Tensor]:
    adapter = make(name)
    return [adapter(x) for x in xs]


@methods
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_inside_the_grad_modes_of_the_caller(name: str, mode: Callable[[], Any]) -> None:
    xs = stream()
    adapter = make(name)
    with mode():
        got = [adapter(x.clone()) for x in xs]
        predicted = adapter.predict(xs[0].clone())
        state = adapter.state_dict()
        adapter.load_state_dict(state)
        adapter.reset()
    saved = [value for part in ("adapted", "optimizer", "extra") for value in state[part].values()]
    assert not any(x.is_inference() or x.requires_grad for x in (*got, predicted, *saved))
    assert_same(got, _plain(name, xs))
    assert_same([adapter(x) for x in xs], got)


@methods
@nets
def test_can_be_built_in_inference_mode(name: str, net: str) -> None:
    with torch.inference_mode():
        adapter = TESTED[name](NETS[net]() if net == "float" else quantized_net())
    twin = make(name, net)
    for x in stream():
        assert torch.equal(adapter(x), twin(x))


@methods
@nets
def test_autocast_around_the_stream_is_autocast_around_each_batch(name: str, net: str) -> None:
    xs = stream(4)
    adapter, twin = make(name, net), make(name, net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = [adapter(x) for x in xs]
        predicted = adapter.predict(xs[0])
        adapter.reset()
        again = [adapter(x) for x in xs]
    assert_same(again, got)
    for x, logits in zip(xs, got, strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(twin(x), logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(twin.predict(xs[0]), predicted)
    assert all(torch.isfinite(logits).all() for logits in got)
    assert all(parameter.dtype == torch.float32 for _, parameter in adapter.parameters_adapted())


@methods
@nets
def test_train_and_eval_do_not_reach_the_model(name: str, net: str) -> None:
    xs = stream()
    adapter, twin = make(name, net), make(name, net)
    nn.Sequential(adapter).train()
    assert adapter.training
    assert not any(module.training for module in adapter.model.modules())
    assert_same([adapter(x) for x in xs], [twin(x) for x in xs])
    assert not adapter.eval().training


@methods
def test_leaves_no_gradients_and_no_graph(name: str) -> None:
    adapter = make(name)
    learned = dict(adapter.parameters_adapted())
    flags = {key: parameter.requires_grad for key, parameter in adapter.model.named_parameters()}
    assert flags == {key: key in learned for key in flags}
    for x in stream():
        x.requires_grad_()
        kept = x.detach().clone()
        assert not adapter(x).requires_grad
        assert not adapter.predict(x).requires_grad
        assert x.grad is None
        assert torch.equal(x.detach(), kept)
    assert all(parameter.grad is None for parameter in adapter.parameters())


@methods
@nets
def test_layout_of_the_images_does_not_matter(name: str, net: str) -> None:
    for change in (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
        lambda x: torch.cat([x, x], 3)[..., :8],
        lambda x: x.repeat_interleave(2, 0)[::2],
    ):
        adapter, twin = make(name, net), make(name, net)
        for x in stream():
            torch.testing.assert_close(adapter(change(x)), twin(x), rtol=1e-5, atol=1e-5)


@methods
@nets
def test_batches_of_any_size(name: str, net: str) -> None:
    adapter = make(name, net)
    for x in (*stream(1, 4), *stream(1, 3), *stream(2, 1), *stream(1, 2, size=3)):
        logits = adapter(x)
        assert logits.shape == (len(x), 5)
        assert torch.isfinite(logits).all()
    assert adapter.counters["batches"] == 5
    assert adapter.counters["samples"] == 11


BAD: dict[str, tuple[Any, str]] = {
    "no tensor": ([[0.0]], "got list, expected a tensor"),
    "one image": (torch.rand(3, 8, 8), "add the batch dimension"),
    "video": (torch.rand(2, 4, 3, 8, 8), "expected [B, C, H, W]"),
    "bytes": (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "torch.uint8, expected floating point"),
    "complex": (torch.zeros(2, 3, 8, 8, dtype=torch.complex64), "expected floating point"),
    "empty": (torch.rand(0, 3, 8, 8), "at least one image"),
    "no pixels": (torch.rand(2, 3, 0, 8), "at least one image"),
    "nan": (torch.full((1, 3, 8, 8), float("nan")), "192 of 192 values are NaN or Inf"),
    "one inf": (torch.rand(2, 3, 8, 8).index_fill_(0, torch.tensor([1]), float("inf")), "192 of 384 values"),
    "device": (torch.rand(2, 3, 8, 8, device="meta"), "on meta, expected cpu"),
    "channels": (torch.rand(2, 1, 8, 8), "cannot take images of shape [B, 1, 8, 8]"),
    "too small": (torch.rand(2, 3, 1, 1), "cannot take images of shape [B, 3, 1, 1]"),
    "dtype": (torch.rand(2, 3, 8, 8, dtype=torch.float64), "and torch.float64"),
}


@methods
@nets
@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_images_change_nothing(name: str, net: str, case: str) -> None:
    images, message = BAD[case]
    adapter, twin = make(name, net), make(name, net)
    first, second = stream(2)
    adapter(first), twin(first)
    before, weights = adapter.state_dict(), tensors_of(adapter.model)
    for call in (adapter, adapter.predict):
        with pytest.raises(InputError) as caught:
            call(images)
        assert message in str(caught.value)
        assert str(caught.value).startswith(f"{type(adapter).__name__}: ")
    assert_same(adapter.state_dict(), before)
    assert_same(tensors_of(adapter.model), weights)
    assert torch.equal(adapter(second), twin(second))


@methods
@nets
def test_predict_is_the_forward_without_its_update(name: str, net: str) -> None:
    adapter = make(name, net)
    for x in stream():
        before, weights = adapter.state_dict(), tensors_of(adapter.model)
        predicted = adapter.predict(x)
        assert_same(adapter.state_dict(), before)
        assert_same(tensors_of(adapter.model), weights)
        assert torch.equal(adapter(x), predicted)


class CountSyncs(TorchDispatchMode):
    """Counts the operations that make the host wait for the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@methods
@nets
@pytest.mark.parametrize("check_finite", [True, False])
def test_the_finite_check_is_the_only_synchronisation(name: str, net: str, check_finite: bool) -> None:
    adapter = make(name, net, check_finite=check_finite)
    first, second = stream(2)
    adapter(first)
    with CountSyncs() as syncs:
        adapter(second)
    assert syncs.count == check_finite


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@methods
@nets
def test_no_step_waits_for_a_gpu(name: str, net: str) -> None:
    adapter = make(name, net, check_finite=False).cuda()
    first, second = (x.cuda() for x in stream(2))
    adapter(first)
    torch.cuda.set_sync_debug_mode("error")
    try:
        if adapter.waits:
            with pytest.raises(RuntimeError, match="synchronizing"):
                adapter(second)
        else:
            adapter(second)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@methods
def test_without_the_finite_check_nothing_is_refused_for_its_values(name: str) -> None:
    make(name, check_finite=False).predict(torch.full((1, 3, 8, 8), float("nan")))


@methods
@pytest.mark.parametrize("model", [None, "resnet18", lambda x: x])
def test_refuses_what_is_no_model(name: str, model: Any) -> None:
    with pytest.raises(InputError, match=r"expected the bare model"):
        TESTED[name](model)


@methods
def test_refuses_to_wrap_an_adapter(name: str) -> None:
    with pytest.raises(InputError, match=r"got .*, expected the bare model"):
        TESTED[name](make("source"))
