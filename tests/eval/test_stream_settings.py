"""The settings of a stream: which images, corruptions and order each one means."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from ttaq.data.corruptions import corrupt
from ttaq.data.images import to_float
from ttaq.errors import InputError
from ttaq.eval.datasets import open_pool
from ttaq.eval.domains import Domains
from ttaq.eval.order import bursts, thin_out
from ttaq.eval.plan import domain_names, plan_domain
from ttaq.eval.stream import Stream

SMALL = Stream("digits", corruptions=("gaussian_noise", "fog"), images=30, batch_size=8)


def changed(**flags: object) -> Stream:
    return replace(SMALL, **flags)  # type: ignore[arg-type]


def clean_images() -> torch.Tensor:
    pool = open_pool("digits", None, "report", "none")
    return pool.fetch(torch.arange(30))


def test_gradual_climbs_and_descends() -> None:
    stream = changed(setting="gradual", severity=3, corruptions=("fog", "clean"))
    assert domain_names(stream) == ("fog@1", "fog@2", "fog@3", "fog@2-", "fog@1-", "clean")
    domains = Domains(stream)
    plans = [domains.plan(index) for index in range(len(domains))]
    assert [plan.recipes for plan in plans] == [((("fog", s),),) for s in (1, 2, 3, 2, 1)] + [((),)]
    assert not torch.equal(plans[0].images, plans[4].images)


def test_rounds_recur_with_new_noise_and_order() -> None:
    domains = Domains(changed(rounds=3))
    assert domains.names == ("gaussian_noise", "fog", "gaussian_noise#2", "fog#2", "gaussian_noise#3", "fog#3")
    first, second = domains.plan(1), domains.plan(3)
    assert first.recipes == second.recipes
    assert not torch.equal(first.images, second.images)
    once = Domains(SMALL)
    assert torch.equal(next(once.batches(1))[0], next(domains.batches(1))[0])

    def sorted_means(index: int) -> torch.Tensor:
        return torch.cat([images.mean((1, 2, 3)) for images, _, _ in domains.batches(index)]).sort().values

    assert not torch.equal(sorted_means(0), sorted_means(2))


def test_mixed_has_every_image_once_with_every_corruption() -> None:
    domains = Domains(changed(setting="mixed", corruptions=("contrast", "clean")))
    assert (domains.names, domains.images_per_domain, domains.batches_per_domain) == (("mixed",), 60, 8)
    plan = domains.plan(0)
    assert plan.recipes == ((("contrast", 5),), ())
    assert Counter(zip(plan.images.tolist(), plan.recipe.tolist(), strict=True)) == Counter(
        (image, recipe) for image in range(30) for recipe in range(2)
    )
    images, _, recipe = (torch.cat(parts) for parts in zip(*domains.batches(0), strict=True))
    assert 0 < int(recipe[:8].sum()) < 8  # Both kinds in the first batch.
    clean = to_float(clean_images())
    assert torch.equal(images[recipe == 1], clean[plan.images[recipe == 1]])
    # Contrast draws nothing, so it can be checked image by image.
    dull = corrupt(clean, "contrast", 5, torch.Generator())
    assert torch.equal(images[recipe == 0], dull[plan.images[recipe == 0]])


def test_ccc_fades_from_one_corruption_to_the_next() -> None:
    stream = changed(setting="ccc", length=6, severity=3, images=1000, corruptions=("contrast", "fog", "brightness"))
    domains = Domains(stream)
    assert len(domains) == 6
    ends = [name.split("#")[0].split(">") for name in domains.names]
    assert all(one[1] == other[0] for one, other in pairwise(ends))
    assert all(start != end for start, end in ends)
    plan = domains.plan(2)
    start, end = ends[2]
    assert plan.recipes == (((start, 3),), ((start, 2), (end, 1)), ((start, 1), (end, 2)))
    assert plan.recipe.tolist() == sorted(plan.recipe.tolist())
    assert [int((plan.recipe == step).sum()) for step in range(3)] == [334, 333, 333]
    # 1,000 images out of the 480 of the split: each comes twice before one comes for the third time.
    assert Counter(plan.images[:960].tolist()) == dict.fromkeys(range(480), 2)
    longer = Domains(changed(setting="ccc", length=9, severity=3, images=1000, corruptions=stream.corruptions))
    assert longer.names[:6] == domains.names


def test_two_corruptions_are_applied_one_after_the_other() -> None:
    stream = changed(setting="ccc", length=1, severity=2, corruptions=("contrast", "brightness"), batch_size=30)
    domains = Domains(stream)
    plan = domains.plan(0)
    images, _, recipe = next(domains.batches(0))
    (first, _), (second, _) = plan.recipes[1]
    pool = open_pool("digits", None, "report", "none")
    clean = to_float(pool.fetch(plan.images[recipe == 1]))
    once = corrupt(clean, first, 1, torch.Generator())
    assert torch.equal(images[recipe == 1], corrupt(once, second, 1, torch.Generator()))


def changes(labels: torch.Tensor) -> int:
    return int((labels[1:] != labels[:-1]).sum())


def test_bursts_permute_and_depend_on_delta() -> None:
    labels = torch.arange(1000) % 10
    orders = {delta: bursts(labels, delta, seed=1) for delta in (0.0, 0.01, 0.1, 10.0)}
    for order in orders.values():
        assert torch.equal(order.sort().values, torch.arange(1000))
    assert changes(labels[orders[0.0]]) == 9
    counts = [changes(labels[order]) for order in orders.values()]
    assert counts == sorted(counts)
    assert counts[1] < 30 < counts[2] < counts[3] <= 100  # 10 slots of at most 10 classes
    assert torch.equal(bursts(labels, 0.1, 1), orders[0.1])
    assert not torch.equal(bursts(labels, 0.1, 2), orders[0.1])


@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.1, 100.0])
@pytest.mark.parametrize("labels", [[3], [1, 1, 1], [0, 1], list(range(50)), [0] * 90 + [1] * 10])
def test_bursts_of_few_images_and_classes(labels: list[int], delta: float) -> None:
    order = bursts(torch.tensor(labels), delta, seed=0)
    assert sorted(order.tolist()) == list(range(len(labels)))


@pytest.mark.parametrize("flags", [{}, {"setting": "mixed"}, {"setting": "ccc", "length": 1, "images": 300}])
def test_correlated_streams_have_longer_runs_of_a_class(flags: dict[str, object]) -> None:
    pool = open_pool("digits", None, "report", "none")
    whole = changed(images=300, **{key: value for key, value in flags.items() if key != "images"})
    runs = {}
    for delta in (None, 0.01):
        stream = replace(whole, delta=delta)
        labels = pool.labels[:300]
        runs[delta] = changes(labels[plan_domain(stream, labels, 0).images])
    assert runs[0.01] < 0.3 * runs[None]


def test_long_tail_thins_classes_out_exponentially() -> None:
    labels = torch.arange(4000) % 10
    kept = thin_out(labels, 0.05, seed=3)
    counts = sorted(Counter(labels[kept].tolist()).values(), reverse=True)
    assert counts == [round(400 * 0.05 ** (rank / 9)) for rank in range(10)]
    assert torch.equal(kept, kept.sort().values)
    assert not torch.equal(thin_out(labels, 0.05, seed=4), kept)
    domains = Domains(changed(images=480, tail=0.1))
    assert len(set(domains.labels.tolist())) == 10
    assert domains.images_per_domain == len(domains.labels) < 300
    assert sum(len(labels) for _, labels, _ in domains.batches(0)) == domains.images_per_domain


def test_impossible_long_tails() -> None:
    with pytest.raises(InputError, match=r"the rarest 0.05, expected at least 1"):
        thin_out(torch.arange(1000), 0.05, seed=0)
    with pytest.raises(InputError, match="of 1 class"):
        thin_out(torch.zeros(10, dtype=torch.int64), 0.05, seed=0)


def test_a_seed_draws_the_walk_the_bursts_and_the_tail() -> None:
    walk = changed(setting="ccc", length=8, corruptions=("fog", "snow", "frost"))
    walks = {domain_names(replace(walk, seed=seed)) for seed in range(4)}
    assert len(walks) == 4
    for flag in ({"delta": 0.1}, {"tail": 0.2, "images": 300}):
        first, second = (Domains(changed(seed=seed, **flag)) for seed in (0, 1))
        assert not torch.equal(first.labels[first.plan(0).images], second.labels[second.plan(0).images])
