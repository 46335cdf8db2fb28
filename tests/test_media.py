"""Media behaves like a tensor in formulas and like a dict everywhere else."""

import copy
import operator
import pickle

import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils.data import default_collate

from avdiffusion.media import Media

OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv]


def media(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return Media(
        a=torch.rand(2, 3, 4, generator=rng) + 0.5, b=torch.rand(2, 5, generator=rng) + 0.5
    )


def same(x, y):
    assert type(x) is Media
    assert x.keys() == y.keys()
    assert all(torch.equal(x[k], y[k]) for k in y)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize(
    "other",
    [2.5, 3, torch.tensor(1.5), torch.tensor(1.5, dtype=torch.float64)],
    ids=["float", "int", "tensor", "double"],
)
def test_arithmetic_with_a_scalar_on_either_side(op, other):
    x = media()
    same(op(x, other), {k: op(v, other) for k, v in x.items()})
    same(op(other, x), {k: op(other, v) for k, v in x.items()})
    assert all(v.dtype == torch.float32 for v in op(other, x).values())


@pytest.mark.parametrize("op", OPERATORS)
def test_arithmetic_with_media_is_entry_by_entry(op):
    x, y = media(), media(1)
    same(op(x, y), {k: op(x[k], y[k]) for k in x})


def test_negation_and_in_place_operators():
    x = y = media()
    same(-x, {k: -v for k, v in x.items()})
    y += 1
    same(y, {k: v + 1 for k, v in x.items()})
    same(x, media())


def test_order_of_keys_does_not_matter_but_the_keys_do():
    x = media()
    same(x + Media(b=x["b"], a=x["a"]), {k: v + v for k, v in x.items()})
    for other in (Media(a=x["a"]), Media(**x, c=x["a"]), Media(a=x["a"], c=x["b"])):
        with pytest.raises(ValueError, match="meets Media"):
            x + other
        with pytest.raises(ValueError, match="meets Media"):
            torch.add(x, other)


def test_map_hands_over_what_is_no_media():
    x = media()
    same(x.map(lambda v, s, k: v * s**k, 2.0, 3), {k: v * 8 for k, v in x.items()})
    assert x.map(lambda v, w: w is None, None) == {"a": True, "b": True}
    with pytest.raises(ValueError, match="meets Media"):
        x.map(lambda v, w: v, Media())


def test_torch_functions():
    x, y = media(), media(1)
    same(torch.exp(x), {k: v.exp() for k, v in x.items()})
    same(torch.zeros_like(x, dtype=torch.int16), {k: v.short() * 0 for k, v in x.items()})
    same(torch.lerp(x, y, 0.25), {k: torch.lerp(x[k], y[k], 0.25) for k in x})
    same(torch.mul(torch.tensor(2.0), x), {k: 2 * v for k, v in x.items()})
    same(torch.where(x.map(lambda v: v > 1), x, y), {k: x[k].where(x[k] > 1, y[k]) for k in x})
    same(torch.clamp(x, min=0.7, max=1.1), {k: v.clamp(0.7, 1.1) for k, v in x.items()})
    same(torch.add(input=x, other=y), {k: x[k] + y[k] for k in x})
    same(torch.add(x, other=y, alpha=2), {k: x[k] + 2 * y[k] for k in x})
    assert torch.randn_like(x)["a"].shape == x["a"].shape
    with pytest.raises(TypeError, match="map"):
        torch.cat([x, y])


def test_to_moves_every_entry():
    assert {v.dtype for v in media().to(torch.float64).values()} == {torch.float64}
    assert {v.device.type for v in media().to("meta").values()} == {"meta"}


def test_collate_and_lightning_keep_the_type():
    x = default_collate([media(0), media(1)])
    same(x, {k: torch.stack([media(0)[k], media(1)[k]]) for k in x})
    same(apply_to_collection(media(), torch.Tensor, torch.neg), -media())


@pytest.mark.parametrize(
    "through", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_keep_type_and_values(through):
    x = media()
    same(through(x), x)
    assert through(x) is not x
    if through is copy.deepcopy:
        assert through(x)["a"].data_ptr() != x["a"].data_ptr()


def test_gradients_flow_through():
    x = media().map(lambda v: v.requires_grad_())
    y = torch.tensor(2.0, dtype=torch.float64) * (1 - x) / media(1) + x * x
    loss = sum(v.sum() for v in y.values())
    loss.backward()
    for k, v in x.items():
        torch.testing.assert_close(v.grad, -2 / media(1)[k] + 2 * v.detach())
