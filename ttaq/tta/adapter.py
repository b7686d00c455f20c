"""The protocol of test-time adaptation: `logits = adapter(x)`, with a state that can be reset, saved, moved, copied."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ttaq.errors import InputError
from ttaq.nn.adapt_norms import adapt_norms
from ttaq.nn.hash_tensors import hash_tensors
from ttaq.tta.checkpoint import check_state
from ttaq.tta.images import check_images
from ttaq.tta.optimizer import zero_state
from ttaq.tta.stopwatch import Stopwatch

__all__ = ["Adapter"]


class Adapter(nn.Module):
    """A model that adapts to the images it sees: `logits = adapter(x)`, x [B, C, H, W] -> [B, classes], without labels.

    The adapter owns a deep copy of `model` in eval mode; the model passed in is never touched, and `train()` or
    `eval()` on the adapter do not reach the copy. It works inside `torch.no_grad()`, `torch.inference_mode()` and
    `torch.autocast`, after `.to()`, and with `copy.deepcopy`; parameters that learn stay in float32. Images that cannot
    be used raise `InputError` before anything changes; `check_finite` counts NaN and Inf among them, at the price of
    one host synchronisation per batch on a GPU. Without it a step never waits for the device.

    A method is a subclass. Its `__init__` hands its options (values that JSON knows) to this class and, if anything of
    it changes, ends with `adapt`; its `step` computes the logits of a batch and learns through `update`; its `answer`
    is what `step` would return, without learning. Whatever changes is one of four things, which `reset`, `state_dict`,
    `.to()` and `copy.deepcopy` therefore cover by themselves: the adapted parameters, the optimizer's state, the
    counters, and buffers changed in place, which the method registers on itself before `adapt` (made outside
    inference mode, as here: `@torch.inference_mode(False)` on `__init__`) or are buffers of the model, such as running
    statistics, that it names to `adapt`. `step` gets x detached, with gradients enabled; a forward of `self.model`
    alone changes nothing. Random numbers come from `generator`, whose seed is made of `seed` and the number of the
    batch, so that there is no state of theirs to keep.

    seed: of the random numbers, 0 unless it is set before the first batch.
    augments: a step needs images of three channels, to change their colours.
    horizon: images after which a step needs as much memory as it ever will; more than one where steps are not alike.
    resizable: names of buffers that begin with 0 elements and take their shape, but for the first dimension, from the
        first images that come.
    waits: the step reads values of tensors on the host, which on a GPU waits for it; False wherever it can be.
    source_images: how many images of the data that the model was trained on the method wants when it is built; a
        method that wants some takes them as `source_images`.
    tallies: names of what the method counts on the device, beside `updates`; see `tally`.
    stopwatch: set to one, it is started and stopped around every `update`.
    """

    method: ClassVar[str]
    source_images: ClassVar[int] = 0
    resizable: ClassVar[tuple[str, ...]] = ()
    waits: ClassVar[bool] = False
    tallies: ClassVar[tuple[str, ...]] = ()
    stopwatch: Stopwatch | None = None
    seed: int = 0
    _tally: Tensor

    @torch.inference_mode(False)
    def __init__(self, model: nn.Module, *, options: Mapping[str, Any], check_finite: bool) -> None:
        super().__init__()
        if not isinstance(model, nn.Module) or isinstance(model, Adapter):
            raise InputError(f"{self._who}: got {type(model).__name__}, expected the bare model, a torch.nn.Module")
        self.model = adapt_norms(copy.deepcopy(model)).eval().requires_grad_(False)
        self.model.register_forward_hook(_SameClasses(self._who))
        self.options = dict(options)
        self.check_finite = check_finite
        self._seen = {"batches": 0, "samples": 0}
        self.register_buffer("_tally", torch.zeros(1 + len(self.tallies), dtype=torch.int64))
        self.optimizer: torch.optim.Optimizer | None = None
        self._adapted: dict[str, nn.Parameter] = {}
        self._buffers_adapted: tuple[str, ...] = ()
        self._initial: dict[str, dict[str, Tensor]] = {}
        self._source: str | None = None
        self._accepted: set[tuple[object, ...]] = set()

    @torch.inference_mode(False)
    def adapt(
        self,
        parameters: Mapping[str, nn.Parameter] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        buffers: Iterable[str] = (),
    ) -> None:
        """Declare what the method learns: `parameters` by name, with `optimizer`. Ends `__init__`.

        parameters: of `self.model`, and of modules of the adapter itself under names that the model does not have.
        buffers: names of buffers of `self.model` that a step changes in place; their state is in the part "extra".
        """
        parameters = parameters or {}
        for parameter in parameters.values():
            self._refuse_half(parameter.dtype)
        self._adapted, self.optimizer = dict(parameters), optimizer
        self._buffers_adapted = tuple(f"model.{name}" for name in buffers)
        if optimizer is not None:
            zero_state(optimizer)
        for parameter in self._adapted.values():
            parameter.requires_grad_(True)
        initial = {part: values for part, values in self._mutable().items() if part != "optimizer"}
        self._initial = {part: {name: v.clone() for name, v in values.items()} for part, values in initial.items()}

    def step(self, x: Tensor) -> Tensor:
        """The method: the logits of the batch, and what it learns from it."""
        raise NotImplementedError

    def answer(self, x: Tensor) -> Tensor:
        """The logits that `step` would return, without learning; changes nothing."""
        logits: Tensor = self.model(x)
        return logits

    def update(self, loss: Tensor, when: Tensor | None = None, start: Sequence[Tensor] | None = None) -> None:
        """One optimizer step on `loss`, and a count of `updates`.

        when: bool scalar; the step is left out, decided on the device, where it is false, as it is where a gradient is
            not finite.
        start: values that the adapted parameters take between the gradient and the step.

        Leaves no gradients behind, not even when it is interrupted.
        """
        if self.optimizer is None or not loss.requires_grad:
            raise InputError(
                f"{self._who}: the loss does not depend on any adapted parameter; "
                f"look for a detach or no_grad inside the model"
            )
        if self.stopwatch is not None:
            self.stopwatch.start()
        try:
            with torch.autocast(loss.device.type, enabled=False):
                loss.backward()  # type: ignore[no-untyped-call]
                if start is not None:
                    self.put(start)
                self._optimize(self.optimizer, when)
        finally:
            self.optimizer.zero_grad()
            if self.stopwatch is not None:
                self.stopwatch.stop()
        # Autocast keeps its casts of trainable weights until the outermost block ends: possibly the whole stream.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def _optimize(self, optimizer: torch.optim.Optimizer, when: Tensor | None) -> None:
        gradients = [p.grad for p in self._adapted.values() if p.grad is not None]
        skip = gradients[0].new_zeros((), dtype=torch.float32)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, skip, torch.ones_like(skip))
        if when is not None:
            skip = skip.maximum(1.0 - when.to(torch.float32))
        # Where it is not 0 torch's fused optimizers leave parameters, moments and step counts as they are.
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
        self.tally(updates=1 - skip)

    @torch.no_grad()
    def tally(self, **amounts: Tensor) -> None:
        """Add to counters of this method that are kept on the device: `updates` and those of `tallies`."""
        for name, amount in amounts.items():
            self._tally[("updates", *self.tallies).index(name)] += amount.to(torch.int64)

    @property
    def counters(self) -> dict[str, int]:
        """`batches` and `samples` that came, `updates` that were made, and what else the method counts. Waits."""
        return {**self._seen, **dict(zip(("updates", *self.tallies), self._tally.tolist(), strict=True))}

    @property
    def source_values(self) -> list[Tensor]:
        """What the adapted parameters were in the source model, in the order of `parameters_adapted`."""
        return [self._initial["adapted"][name] for name in self._adapted]

    @torch.no_grad()
    def put(self, values: Sequence[Tensor]) -> None:
        """Set the adapted parameters, in the order of `parameters_adapted`."""
        torch._foreach_copy_([parameter.detach() for parameter in self._adapted.values()], list(values))

    @torch.no_grad()
    def restore(self, where: Tensor) -> None:
        """Adapted parameters and optimizer back to the beginning if `where`, a bool scalar on the device, is true."""
        states = {} if self.optimizer is None else self.optimizer.state
        for parameter, source in zip(self._adapted.values(), self.source_values, strict=True):
            torch.where(where, source, parameter, out=parameter)
            for value in states[parameter].values():
                value.masked_fill_(where, 0.0)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Random numbers of this batch and of no other: the same in `step`, in `answer` and after a resumption."""
        # Of a seed torch's CPU generator reads 32 bits. An odd factor of that size keeps streams of seeds apart.
        return torch.Generator(device).manual_seed((self._seen["batches"] + 0x9E3779B1 * self.seed) % 2**32)

    @property
    def augments(self) -> bool:
        return False

    @property
    def horizon(self) -> int:
        return 1

    def fill(self, shape: Sequence[int]) -> None:
        """Make what grows with a stream of images of `shape` [C, H, W] as large as it can be, and the next step the
        largest: for measuring. `reset` undoes it."""

    @torch.inference_mode(False)
    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes], detached: unless the method says otherwise, those before it learns from the batch."""
        x = self._check(x)
        with torch.enable_grad():
            logits = self.step(x).detach()
        self._seen["batches"] += 1
        self._seen["samples"] += len(x)
        return logits

    @torch.inference_mode(False)
    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of the model as it is now. Nothing is learned and nothing is counted."""
        return self.answer(self._check(x)).detach()

    @torch.no_grad()
    def reset(self) -> None:
        """Return, bit for bit, to the state after construction."""
        mutable = self._mutable()
        for part, values in self._initial.items():
            for name, value in values.items():
                _overwrite(mutable[part][name], value)
        if self.optimizer is not None:
            zero_state(self.optimizer)
        torch.clear_autocast_cache()
        self._seen = dict.fromkeys(self._seen, 0)

    def parameters_adapted(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that the method learns, with their names in the model."""
        return list(self._adapted.items())

    def buffers_adapted(self) -> list[tuple[str, Tensor]]:
        """The buffers of the model that the method changes, with their names in the model."""
        return [(name.removeprefix("model."), self.get_buffer(name)) for name in self._buffers_adapted]

    @torch.inference_mode(False)
    @torch.no_grad()
    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Any]:  # type: ignore[override]
        """What distinguishes this adapter from a new one, in copies that later steps do not change.

        `method`, `options`, `seed`, `source` (hash of the source model, as in the header of its file), `counters`, and
        by name the tensors `adapted`, `optimizer` and `extra`. Not the weights of the model.
        """
        if args or kwargs:
            raise InputError(
                f"{self._who}.state_dict: takes no arguments; save an adapter by itself, not with a parent"
            )
        copies = {part: {name: v.clone() for name, v in values.items()} for part, values in self._mutable().items()}
        return {**self._identity(), "counters": dict(self._seen), **copies}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continue where `state_dict` was called, with the same outputs bit for bit (on a CPU: with as many threads).

        `CheckpointError`, with the adapter left as it was, for a state that is damaged or of another method, other
        options or another source model.
        """
        mutable = self._mutable()
        check_state(self._who, state, {**self._identity(), "counters": self._seen, **mutable}, self.resizable)
        for part, values in mutable.items():
            for name, value in values.items():
                _overwrite(value, state[part][name])
        torch.clear_autocast_cache()
        self._seen = dict(state["counters"])

    def train(self, mode: bool = True) -> Self:
        """Sets the adapter's own flag only: how the model treats statistics and dropout is the method's business."""
        self.training = mode
        return self

    @property
    def _who(self) -> str:
        return type(self).__name__

    def _check(self, x: Tensor) -> Tensor:
        """The images, if they can be used, detached and made ready for autograd."""
        some = next(itertools.chain(self.model.parameters(), self.model.buffers()), None)
        x = check_images(self._who, x, device=None if some is None else some.device, finite=self.check_finite)
        x = x.clone() if x.is_inference() else x.detach()
        kind = (x.shape[1:], x.dtype, torch.is_autocast_enabled(x.device.type))
        if kind not in self._accepted:
            self._try(x.clone())  # a model may change its input in place
            if self.augments and x.shape[1] != 3:
                raise InputError(
                    f"{self._who}: images have shape {tuple(x.shape)}, expected [B, 3, H, W], whose colours it can "
                    f"change; give the model images of three channels, or use 'tent'"
                )
            self._accepted.add(kind)
        return x

    @torch.no_grad()
    def _try(self, x: Tensor) -> None:
        """Find out, once for every kind of images, what only the model knows: whether it turns them into logits."""
        kind = f"[B, {', '.join(map(str, x.shape[1:]))}] and {x.dtype}"
        try:
            # What a model draws here, it does not draw again when a stream is continued.
            with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
                logits = self.model(x)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise InputError(f"{self._who}: the model cannot take images of shape {kind}: {error}") from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"{self._who}: the model answers with {got}, expected logits [{len(x)}, classes]")

    def _refuse_half(self, dtype: torch.dtype) -> None:
        if dtype in (torch.bfloat16, torch.float16):
            raise InputError(
                f"{self._who}: the parameters to adapt would be {dtype}, where a learning step rounds to nothing; "
                f"expected float32, keep the model so and run it under torch.autocast"
            )

    def _mutable(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor that adaptation changes: the live ones."""
        state = {} if self.optimizer is None else self.optimizer.state
        return {
            "adapted": {name: parameter.detach() for name, parameter in self._adapted.items()},
            "optimizer": {f"{name}/{key}": v for name, p in self._adapted.items() for key, v in state[p].items()},
            "extra": {
                **{name: buffer for name, buffer in self.named_buffers() if not name.startswith("model.")},
                **{name: self.get_buffer(name) for name in self._buffers_adapted},
            },
        }

    def _identity(self) -> dict[str, Any]:
        if self._source is None:  # taken when first needed, since it reads every weight
            initial = {id(p): self._initial["adapted"][name] for name, p in self._adapted.items()}
            initial |= {id(self.get_buffer(name)): self._initial["extra"][name] for name in self._buffers_adapted}
            state = self.model.state_dict(keep_vars=True)
            self._source = hash_tensors({n: initial.get(id(v), v) for n, v in state.items() if isinstance(v, Tensor)})
        return {"method": self.method, "options": dict(self.options), "seed": self.seed, "source": self._source}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to()` and its kin: what nn.Module does not know of moves along."""
        if self._adapted:
            self._refuse_half(fn(torch.zeros(())).dtype)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._initial = {part: {name: fn(v) for name, v in values.items()} for part, values in self._initial.items()}
        for parameter, state in {} if self.optimizer is None else self.optimizer.state.items():
            # The step count stays fp32 whatever the parameters become.
            state.update({key: v.to(parameter.device) if key == "step" else fn(v) for key, v in state.items()})
        self._source = None
        self._accepted.clear()
        return self


class _SameClasses:
    """A forward hook: `InputError` for logits of another number of classes than the first, before anything learns from
    them. It holds nothing of the adapter, so that its model can be copied by itself."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._classes: int | None = None

    def __call__(self, model: nn.Module, inputs: tuple[object, ...], logits: object) -> None:  # noqa: ARG002
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            return
        if self._classes is None:
            self._classes = logits.shape[1]
        if logits.shape[1] != self._classes:
            raise InputError(
                f"{self._who}: the model answers with {logits.shape[1]} classes, expected {self._classes} as before; "
                f"build an adapter for each model"
            )


@torch.inference_mode(False)
@torch.no_grad()
def _overwrite(tensor: Tensor, value: Tensor) -> None:
    """In place; where the shapes differ, `tensor` takes that of `value`, and gives its memory back."""
    if tensor.shape != value.shape:
        tensor.set_(torch.empty_like(value, device=tensor.device))  # type: ignore[call-overload]
    tensor.copy_(value)
