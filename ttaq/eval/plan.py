"""Which images a domain of a stream holds, how each is corrupted, and in which order they come."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ttaq.errors import InputError
from ttaq.eval.order import bursts
from ttaq.eval.stream import CLEAN, Stream

__all__ = ["Plan", "Recipe", "domain_names", "plan_domain", "recipe_name", "recipes_of"]

Recipe = tuple[tuple[str, int], ...]
"""Corruptions with their severities, applied one after the other; none of them leaves the image clean."""


@dataclass(frozen=True, eq=False)
class Plan:
    """One domain: image `images[i]` of the pool comes at place i, corrupted by `recipes[recipe[i]]`."""

    name: str
    recipes: tuple[Recipe, ...]
    images: Tensor
    recipe: Tensor

    def __len__(self) -> int:
        return len(self.images)


def recipe_name(recipe: Recipe) -> str:
    """Such as `fog@5`, `fog@3+snow@2` or `clean`."""
    return "+".join(f"{name}@{severity}" for name, severity in recipe) or CLEAN


def domain_names(stream: Stream) -> tuple[str, ...]:
    """The name of each domain in order, each different.

    `fog`; `fog@3`, going up, and `fog@3-`, coming down ("gradual"); `mixed`; `fog>snow#12`, the 12th transition
    ("ccc"). With rounds, `#2` and so on follow the name from the second round on.
    """
    return tuple(name for name, _ in _domains(stream))


def recipes_of(stream: Stream) -> set[Recipe]:
    """Every recipe that occurs in the stream."""
    return {recipe for _, recipes in _domains(stream) for recipe in recipes}


def plan_domain(stream: Stream, labels: Tensor, index: int) -> Plan:
    """The domain at `index`, drawn from (seed, name of the domain) and nothing else.

    labels: int64 [N], those of the pool in its order. A domain takes every image of the pool once per recipe; in "ccc",
    `images` of them one after the other, the pool in a new order whenever it is used up, and the recipes, one for each
    step of a transition, follow each other.
    """
    name, recipes = _domains(stream)[index]
    count = len(labels)
    if stream.setting == "ccc":
        length = stream.images or count
        shuffle = stream.generator("images", name)
        images = torch.cat([torch.randperm(count, generator=shuffle) for _ in range(-(-length // count))])[:length]
        recipe = torch.arange(length) * len(recipes) // length
        if stream.delta is not None:
            images = images[bursts(labels[images], stream.delta, stream.number("order", name))]
        return Plan(name, recipes, images, recipe)
    images = torch.arange(count).repeat(len(recipes))
    recipe = torch.arange(len(recipes)).repeat_interleave(count)
    if stream.delta is None:
        order = torch.randperm(len(images), generator=stream.generator("order", name))
    else:
        order = bursts(labels[images], stream.delta, stream.number("order", name))
    return Plan(name, recipes, images[order], recipe[order])


@lru_cache(maxsize=16)
def _domains(stream: Stream) -> tuple[tuple[str, tuple[Recipe, ...]], ...]:
    if stream.setting == "ccc":
        return tuple(_walk(stream))
    once = list(_one_round(stream))
    suffixes = ["", *(f"#{number}" for number in range(2, stream.rounds + 1))]
    return tuple((f"{name}{suffix}", recipes) for suffix in suffixes for name, recipes in once)


def _one_round(stream: Stream) -> list[tuple[str, tuple[Recipe, ...]]]:
    if stream.setting == "mixed":
        return [("mixed", tuple(_recipe(name, stream.severity) for name in stream.corruptions))]
    if stream.setting != "gradual":
        return [(name, (_recipe(name, stream.severity),)) for name in stream.corruptions]
    domains: list[tuple[str, tuple[Recipe, ...]]] = []
    for name in stream.corruptions:
        if name == CLEAN:
            domains.append((name, ((),)))
            continue
        up = [(f"{name}@{severity}", severity) for severity in range(1, stream.severity + 1)]
        down = [(f"{name}@{severity}-", severity) for severity in range(stream.severity - 1, 0, -1)]
        domains += [(title, (_recipe(name, severity),)) for title, severity in (*up, *down)]
    return domains


def _recipe(name: str, severity: int) -> Recipe:
    return () if name == CLEAN else ((name, severity),)


def _walk(stream: Stream) -> list[tuple[str, tuple[Recipe, ...]]]:
    """From each corruption to another one drawn by the seed: as the first loses a degree the second gains one."""
    if stream.length is None:
        raise InputError("Stream: 'ccc' has no length, expected the number of transitions")
    draw = stream.generator("walk")
    top, names = stream.severity, stream.corruptions
    here = int(torch.randint(len(names), (), generator=draw))
    domains: list[tuple[str, tuple[Recipe, ...]]] = []
    for number in range(1, stream.length + 1):
        step = int(torch.randint(1, len(names), (), generator=draw))
        there = (here + step) % len(names)
        recipes: tuple[Recipe, ...] = tuple(
            ((names[here], top - rise), (names[there], rise)) if rise else ((names[here], top),) for rise in range(top)
        )
        domains.append((f"{names[here]}>{names[there]}#{number}", recipes))
        here = there
    return domains
