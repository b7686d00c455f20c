"""Run adaptation methods over a stream of corrupted images; one JSON line per domain, resumable."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttaq.cli.adapt_flags import add_arguments
from ttaq.cli.arguments import check_output, method_options, set_up_torch
from ttaq.cli.models import Loaded, load
from ttaq.cli.progress import ProgressLine
from ttaq.data.corruptions import frost_source
from ttaq.errors import InputError
from ttaq.eval import Domains, RowFile, Stream, run
from ttaq.eval.batch_size import NO_LIMITS, Need, choose_batch_size, measure_need
from ttaq.eval.checkpoint import refuse_what_is_there
from ttaq.eval.datasets import choose_preprocessing
from ttaq.eval.rows import cell_of
from ttaq.eval.run import build_stepper, what_adapts
from ttaq.tta import METHODS, Limits, build

__all__ = ["IF_INTERRUPTED", "add_arguments", "execute"]

IF_INTERRUPTED = "finished domains are kept, the same command continues behind them"

_FEW = 64
"""Training images that are enough to find out whether a method can be built."""


class _Task(NamedTuple):
    """A model, a method and a stream, and what the rows say of the method."""

    model: Loaded
    method: str
    stream: Stream
    in_rows: dict[str, Any]


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    check_output(args.out, "--out")
    options = method_options(args.option, args.methods)
    unknown = [method for method in args.methods if method not in METHODS]
    if unknown:
        raise InputError(f"--methods: unknown {', '.join(unknown)}, expected some of: {', '.join(METHODS)}")
    if args.source_images is not None and not any(METHODS[method].source_images for method in args.methods):
        raise InputError(f"--source-images: none of {', '.join(args.methods)} wants any; leave it out")
    device = set_up_torch(args)
    frost = _frost(args)
    preprocessing = args.preprocessing
    if preprocessing == "auto":
        preprocessing = "none" if args.stored else choose_preprocessing(args.dataset, args.data)
    streams = [_stream(args, seed, frost, preprocessing) for seed in args.seeds]
    domains = Domains(streams[0], args.data, frost)
    models = {(text, seed): text.replace("{seed}", str(seed)) for seed in args.seeds for text in args.model}
    loaded = {text: load(text) for text in dict.fromkeys(models.values())}
    in_rows, needs = _try_methods(args, list(loaded.values()), options, domains, device)
    if args.max_memory is not None:
        size, why = choose_batch_size(needs, args.batch_size, args.max_memory, args.window)
        print(f"batch size {size}: {why}", flush=True)
        streams = [replace(stream, batch_size=size) for stream in streams]
    tasks = [
        _Task(model, method, stream, in_rows[model.info.model_hash, method])
        for stream in streams
        for model in (loaded[models[text, stream.seed]] for text in args.model)
        for method in args.methods
    ]
    done = 0
    with RowFile(args.out) as rows:
        if not args.resume:
            for task in tasks:  # All of them now, not hours into the run.
                refuse_what_is_there(rows, _cell(task))
        for task in tasks:
            if domains.stream != task.stream:
                domains = Domains(task.stream, args.data, frost)
            title = f"{task.model.info.scheme} {task.method} seed {task.stream.seed}"
            with ProgressLine(title) as progress:
                new = run(
                    task.model.model,
                    task.method,
                    domains,
                    rows,
                    options=options[task.method],
                    info=task.model.info,
                    device=device,
                    progress=progress,
                    source_images=_source_images(args, task.method, domains),
                    shadow=args.shadow,
                    guards=Limits() if args.guards else None,
                    resume=args.resume,
                    checkpoint_every=args.checkpoint_every,
                )
            done += bool(new)
            print(f"{title}: " + (_result(new[-1]) if new else "already complete"), flush=True)
    if not done:
        print(f"nothing to do: {args.out} already holds every row of this command")


def _try_methods(
    args: argparse.Namespace,
    models: Sequence[Loaded],
    options: Mapping[str, dict[str, Any]],
    domains: Domains,
    device: torch.device,
) -> tuple[dict[tuple[str, str], dict[str, Any]], list[Need]]:
    """Build every method on every model, so that wrong options are found now, not hours into the run.

    Returns what rows say of a method, by model hash and method, and with --max-memory what each of them needs.
    """
    in_rows, needs = {}, []
    for model in models:
        for method in args.methods:
            images = _source_images(args, method, domains)
            few = images if images is None or args.max_memory is not None else images[:_FEW]
            adapter = build(method, model.model, source_images=few, **options[method])
            in_rows[model.info.model_hash, method] = what_adapts(
                adapter, images, args.shadow, Limits() if args.guards else None
            )
            if args.max_memory is not None:
                shape = next(domains.batches(0))[0].shape[1:]
                adapter = adapter.to(device)
                guards = NO_LIMITS if args.guards else None
                stepper = build_stepper(adapter, model.model, 1, guards, args.shadow)
                who = f"{method} on {model.info.scheme}"
                needs.append(measure_need(stepper, shape, who, keeps_images=args.window > 1))
    return in_rows, needs


def _source_images(args: argparse.Namespace, method: str, domains: Domains) -> Tensor | None:
    wanted = METHODS[method].source_images
    if not wanted:
        return None
    preprocessing = None if args.preprocessing == "auto" else args.preprocessing
    return domains.source_images(args.source_images or wanted, preprocessing)


def _cell(task: _Task) -> str:
    info = task.model.info
    return cell_of(task.in_rows | {"scheme": info.scheme, "model_hash": info.model_hash, "stream": str(task.stream)})


def _result(summary: Mapping[str, Any]) -> str:
    in_shadow = f", of the method in shadow {summary['shadow_error']:.2f} %" if "shadow_error" in summary else ""
    counters = summary["counters"]
    reasons = [f"{name.removeprefix('alarms_')} {count}" for name, count in counters.items() if "alarms_" in name]
    alarms = f"; {counters['alarms']} alarms ({', '.join(reasons)})" if reasons else ""
    return f"mean error {summary['error']:.2f} %{in_shadow}{alarms}"


def _frost(args: argparse.Namespace) -> Path | None:
    if args.frost is None and args.data is not None and (Path(args.data) / "frost").is_dir():
        return Path(args.data) / "frost"
    return args.frost if args.frost is None else Path(args.frost)


def _stream(args: argparse.Namespace, seed: int, frost: Path | None, preprocessing: str) -> Stream:
    return Stream(
        dataset=args.dataset,
        corruptions=tuple(args.corruptions),
        severity=args.severity,
        images=args.images,
        split=args.split,
        batch_size=args.batch_size,
        seed=seed,
        setting=args.setting,
        source="stored" if args.stored else "generated",
        frost=frost_source(frost),
        rounds=args.rounds,
        delta=args.delta,
        tail=args.tail,
        window=args.window,
        length=args.length,
        preprocessing=preprocessing,
    )
