"""Chance that depends on its key alone."""

import pytest
import torch

from avdiffusion.diffusion.noise import Noise, key
from avdiffusion.media import Media


def draw(index, shape=(3, 16), *, seed=0, purpose="noise", calls=1):
    noise = Noise(seed, index, purpose)
    for _ in range(calls):
        out = noise.like(torch.empty(len(index), *shape))
    return out


def test_a_sample_does_not_depend_on_its_batch():
    together = draw([0, 1, 2, 3])
    for i in range(4):
        assert torch.equal(draw([i])[0], together[i])
    assert torch.equal(draw([3, 1]), together[[3, 1]])
    assert torch.equal(draw([2, 2]), together[[2, 2]])


def test_every_part_of_the_key_counts():
    base = draw([5])
    others = [
        draw([6]),
        draw([5], seed=1),
        draw([5], purpose="other"),
        draw([5], calls=2),
        Noise(0, [5]).fork("x").like(torch.empty(1, 3, 16)),
        Noise(0, [5]).like(Media(v=torch.empty(1, 3, 16)))["v"],
    ]
    for k, other in enumerate(others):
        assert abs(float(torch.corrcoef(torch.stack([base.ravel(), other.ravel()]))[0, 1])) < 0.6
        assert all(not torch.equal(other, each) for each in others[k + 1 :])
    assert torch.equal(draw([5]), base)


def test_modalities_are_independent_of_each_other_and_of_their_order():
    x, y = torch.empty(2, 4), torch.empty(2, 4)
    both = Noise(0, [0, 1]).like(Media(x=x, y=y))
    turned = Noise(0, [0, 1]).like(Media(y=y, x=x))
    alone = Noise(0, [0, 1]).like(Media(x=x))
    assert not torch.equal(both["x"], both["y"])
    assert torch.equal(both["x"], turned["x"])
    assert torch.equal(both["x"], alone["x"])
    assert list(turned) == ["y", "x"]


def test_global_generators_are_left_alone():
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    draw([0, 1])
    Noise(0, [0]).uniform()
    assert torch.equal(torch.randn(4), expected)
    torch.manual_seed(4)
    again = draw([0, 1])
    torch.manual_seed(5)
    assert torch.equal(draw([0, 1]), again)


def test_forks_do_not_share_a_counter():
    one, other = Noise(0, [0]), Noise(0, [0])
    one.fork("a").like(torch.empty(1, 2))
    assert torch.equal(one.like(torch.empty(1, 2)), other.like(torch.empty(1, 2)))
    assert torch.equal(
        one.fork("a").like(torch.empty(1, 9)), other.fork("a").like(torch.empty(1, 9))
    )


def test_noise_is_standard_normal():
    x = draw(range(64), (4096,))
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.std()) - 1) < 0.01
    assert abs(float((x**4).mean()) - 3) < 0.1
    correlation = torch.corrcoef(x) - torch.eye(64)
    assert float(correlation.abs().max()) < 0.1


def test_uniform_is_uniform_inside_the_open_interval_and_keyed():
    u = Noise(0, range(4000), "t").uniform()
    assert u.dtype == torch.float64
    assert u.device.type == "cpu"
    assert 0 < float(u.min()) < float(u.max()) < 1
    at = torch.linspace(0, 1, 21, dtype=torch.float64)
    assert float(((u[None] <= at[:, None]).double().mean(1) - at).abs().max()) < 0.03
    assert torch.equal(Noise(0, [7, 3], "t").uniform(), u[[7, 3]])
    noise = Noise(0, [7], "t")
    noise.like(torch.empty(1, 2))
    assert torch.equal(noise.uniform(), u[[7]])


def test_type_and_device_are_those_of_what_it_resembles():
    out = Noise(0, [0]).like(torch.empty(1, 3, dtype=torch.float64))
    assert out.dtype == torch.float64
    assert Noise(0, [0]).like(torch.empty(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert Noise(0, [0]).like(torch.empty(1, 3, device="meta")).device.type == "meta"


def test_first_values_never_change():
    """Published samples depend on them."""
    assert key(0, 0, "noise", 1, 0) == 7063408971411859549
    assert key(1, "a") != key("1", "a")
    assert key(1, 23) != key(12, 3)
    expected = torch.tensor([0.5237851738929749, 0.6201214790344238, 0.41274896264076233])
    torch.testing.assert_close(draw([0], (16,))[0, :3], expected, rtol=1e-5, atol=1e-6)
    assert float(Noise(0, [0]).uniform()) == pytest.approx(0.7552145240744009, abs=1e-15)


def test_wrong_batch_size_is_named():
    with pytest.raises(ValueError, match="noise for 2 samples, asked for 3"):
        Noise(0, [0, 1]).like(torch.empty(3, 2))
