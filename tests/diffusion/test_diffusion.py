"""Loss and prediction, and the numbers of spec 2.9 that the published implementation gives."""

import pytest
import torch

from avdiffusion.diffusion.diffusion import Diffusion
from avdiffusion.diffusion.path import (
    EDM,
    DiscreteVP,
    RectifiedFlow,
    posterior_mean,
    posterior_variance,
)
from avdiffusion.diffusion.weight import MinSNR
from avdiffusion.media import Media
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.sampler import last

VP = DiscreteVP()


class Toy(torch.nn.Module):
    """The closed form of spec 2.9; `channels=2` adds tanh(x), from which variances are learned."""

    def __init__(self, channels=1):
        super().__init__()
        self.channels = channels
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, video, audio, *, time, gain=1.0):
        def mean(v, like):
            return torch.tanh(v).flatten(1).mean(1).view(-1, *[1] * (like.dim() - 1))

        video_time, audio_time = time if isinstance(time, tuple) else (time, time)
        video_time = video_time.view(-1, 1, 1, 1, 1) / 1000
        audio_time = audio_time.view(-1, 1, 1) / 1000
        out = (
            self.scale * gain * (0.5 * video + 0.1 * video_time + 0.05 * mean(audio, video)),
            self.scale * gain * (0.4 * audio - 0.05 * audio_time + 0.02 * mean(video, audio)),
        )
        if self.channels == 1:
            return out
        return tuple(
            torch.cat([o, torch.tanh(x)], 1) for o, x in zip(out, (video, audio), strict=True)
        )


def state():
    """Published layout [B, F, C, H, W], turned into ours."""
    n = torch.arange(2 * 4 * 3 * 8 * 8, dtype=torch.float64)
    video = (1.3 * torch.sin(0.7 * n + 0.2) + 0.4 * torch.cos(1.9 * n)).view(2, 4, 3, 8, 8)
    n = torch.arange(128, dtype=torch.float64)
    audio = (1.1 * torch.sin(0.9 * n + 0.5)).view(2, 1, 64)
    return Media(video=video.transpose(1, 2).float(), audio=audio.float())


def published(x):
    return x.map(lambda v: v.transpose(1, 2) if v.dim() == 5 else v)


def times(*steps):
    return (torch.tensor(steps, dtype=torch.float64) + 1) / 1000


def clean():
    return state().map(lambda v: v.clamp(-1, 1))


def swapped():
    return state().map(lambda v: v.flip(0))


def norms(x):
    return [float(v.double().norm()) for v in x.values()]


def steps(diffusion, x, pairs, step):
    """`step(found, x, t, s)` of each sample at its own pair of times, with x0 clamped."""
    outs = []
    for row, (t, s) in enumerate(pairs):
        one = x.map(lambda v, row=row: v[row : row + 1])
        t, s = (torch.tensor(v, dtype=torch.float64) for v in (t, s))
        outs.append(step(clamped(diffusion, one, t), one, t, s))
    return outs[0].map(lambda a, b: torch.cat([a, b]), outs[1])


def clamped(diffusion, x, t):
    found = diffusion.predict(x, t, {})
    x0 = found.x0.map(lambda v: v.clamp(-1, 1))
    alpha, sigma = diffusion.path.alpha(t), diffusion.path.sigma(t)
    return found._replace(x0=x0, eps=(x - alpha * x0) / sigma)


# Pairs of times (t, the next lower of the process) for the two samples, and what they lead to.
PAIRS = {
    "[0,613]": [(0.001, 0.0), (0.614, 0.613)],
    "[999,1]": [(1.0, 0.999), (0.002, 0.001)],
    "ddim25[0,24]": [(0.001, 0.0), (0.961, 0.921)],
    "10,10[3,19]": [(0.167, 0.112), (1.0, 0.945)],
}


@pytest.mark.parametrize(
    ("case", "mean", "ddim"),
    [
        ("[0,613]", (34.403675, 8.662303), (34.516240, 8.686123)),
        ("[999,1]", (35.606769, 8.696999), (36.532317, 8.773546)),
        ("ddim25[0,24]", (28.605822, 7.406175), (34.581332, 8.704409)),
        ("10,10[3,19]", (28.056991, 6.984542), (36.926761, 8.867320)),
    ],
)
def test_steps_have_the_recorded_norms(case, mean, ddim):
    diffusion = Diffusion(net=Toy(), path=VP)

    def posterior(found, x, t, s):
        return posterior_mean(VP, x, found.x0, t, s)

    def deterministic(found, x, t, s):
        return last(DDIM().solve(lambda *_: found, x, VP, torch.stack([t, s]), None))

    with torch.no_grad():
        assert norms(steps(diffusion, state(), PAIRS[case], posterior)) == pytest.approx(
            mean, rel=1e-4
        )
        assert norms(steps(diffusion, state(), PAIRS[case], deterministic)) == pytest.approx(
            ddim, rel=1e-4
        )


def test_first_values_of_a_step_are_the_recorded_ones():
    with torch.no_grad():
        found = steps(
            Diffusion(net=Toy(), path=VP),
            state(),
            PAIRS["[0,613]"],
            lambda found, x, t, s: posterior_mean(VP, x, found.x0, t, s),
        )
        clean = steps(
            Diffusion(net=Toy(), path=VP), state(), PAIRS["[0,613]"], lambda found, *_: found.x0
        )
    video, audio = published(found).values()
    assert video.flatten()[:3].tolist() == pytest.approx([0.655007, 0.884604, 0.978188], rel=1e-5)
    assert audio.flatten()[:3].tolist() == pytest.approx([0.525284, 1.0, 0.817035], rel=1e-5)
    assert norms(clean) == pytest.approx([34.233207, 9.629687], rel=1e-5)


def test_ddim25_loop_ends_at_the_recorded_sample():
    diffusion = Diffusion(net=Toy(), path=VP)
    sampler = DDIM(steps=25, grid="leading")
    with torch.no_grad():
        x = last(sampler(lambda x, t: clamped(diffusion, x, t), state(), VP))
    assert norms(x) == pytest.approx([36.377358, 10.661763], rel=1e-4)


def test_loss_has_the_recorded_values():
    loss = Diffusion(net=Toy(), path=VP).loss(clean(), {}, t=times(0, 613), noise=swapped())
    assert loss.keys() == {"video", "audio"}
    assert loss["video"].tolist() == pytest.approx([1.7146801, 0.2909939], rel=1e-5)
    assert loss["audio"].tolist() == pytest.approx([0.4639653, 0.2015574], rel=1e-5)


def test_learned_variance_has_the_recorded_values():
    diffusion = Diffusion(net=Toy(channels=2), path=VP, learned_variance=True)
    loss = diffusion.loss(clean(), {}, t=times(0, 613), noise=swapped())
    assert loss["video"].tolist() == pytest.approx([1.7146801, 0.2909939], rel=1e-5)
    assert loss["video_vb"].tolist() == pytest.approx([3.0082865, 0.0026751], rel=1e-4)
    assert loss["audio_vb"].tolist() == pytest.approx([1.6634253, 0.0018529], rel=1e-4)
    total = sum(loss.values())
    assert total.tolist() == pytest.approx([6.8503571, 0.4970793], rel=1e-5)


def test_learned_log_variances_are_the_recorded_ones():
    """Entry 0 lies between the posterior variance of step 1 and beta_0."""
    diffusion = Diffusion(net=Toy(channels=2), path=VP, learned_variance=True)
    with torch.no_grad():
        spread = published(diffusion.predict(state(), times(0)[0], {}).spread)
    low = posterior_variance(VP, times(1), times(0))[0].log()
    high = posterior_variance(VP, times(0), times(-1))[1].log()
    for name, first in {
        "video": [-9.338527, -9.297992, -9.284808],
        "audio": [-9.366980, -9.272593, -9.308811],
    }.items():
        between = low + (spread[name].flatten()[:3] + 1) / 2 * (high - low)
        assert between.tolist() == pytest.approx(first, rel=1e-6)
    # FIXED_LARGE: log beta of step 613 and, at step 0, the small variance of step 1.
    large = posterior_variance(VP, times(613), times(612))[1].log()
    assert float(low) == pytest.approx(-9.816725, rel=1e-6)
    assert float((low + large) / 2) == pytest.approx(-7.1069970, rel=1e-6)


def test_variational_bound_teaches_only_the_variance():
    net = Toy(channels=2)
    diffusion = Diffusion(net=net, path=VP, learned_variance=True)
    loss = diffusion.loss(clean(), {}, t=times(400, 613), noise=swapped())
    sum(v.sum() for k, v in loss.items() if k.endswith("_vb")).backward()
    assert net.scale.grad is None or float(net.scale.grad) == 0


def test_variational_bound_vanishes_for_the_true_posterior():
    class Perfect(torch.nn.Module):
        def forward(self, video, audio, *, time):
            return tuple(torch.cat([e, -torch.ones_like(e)], 1) for e in swapped().values())

    diffusion = Diffusion(net=Perfect(), path=VP, learned_variance=True)
    loss = diffusion.loss(clean(), {}, t=times(500, 20), noise=swapped())
    for name in ("video_vb", "audio_vb"):
        assert float(loss[name].abs().max()) < 1e-6


def test_bound_is_finite_at_every_time_of_every_path():
    for path in (VP, DiscreteVP(betas="cosine"), RectifiedFlow()):
        diffusion = Diffusion(net=Toy(channels=2), path=path, target="v", learned_variance=True)
        for t in (path.t_min, 1.3 * path.t_min, 1.7 * path.t_min, 0.4567, 0.99999, 1.0):
            t = torch.full((2,), t, dtype=torch.float64)
            loss = diffusion.loss(clean(), {}, t=t, noise=swapped())
            assert all(bool(v.isfinite().all()) for v in loss.values()), (path, t)
    with pytest.raises(ValueError, match="learned_variance"):
        Diffusion(net=Toy(channels=2), path=EDM(), learned_variance=True)


def test_loss_is_one_value_per_sample():
    diffusion = Diffusion(net=Toy(), path=VP, target="v", weight=MinSNR())
    both = diffusion.loss(clean(), {}, t=times(100, 800), noise=swapped())
    for row, t in enumerate((100, 800)):
        alone = diffusion.loss(
            clean().map(lambda v, row=row: v[row : row + 1]),
            {},
            t=times(t),
            noise=swapped().map(lambda v, row=row: v[row : row + 1]),
        )
        for name in both:
            torch.testing.assert_close(alone[name][0], both[name][row])


def test_a_level_per_modality():
    """Equal levels are one level; different ones are noised, weighted and told apart."""
    diffusion = Diffusion(net=Toy(), path=VP, target="v", weight=MinSNR())
    t = times(100, 800)
    one = diffusion.loss(clean(), {}, t=t, noise=swapped())
    same = diffusion.loss(clean(), {}, t=Media(video=t, audio=t), noise=swapped())
    for name in one:
        torch.testing.assert_close(same[name], one[name], rtol=0, atol=0)
    clean_video = torch.full((2,), 1e-9, dtype=torch.float64)
    apart = diffusion.loss(clean(), {}, t=Media(video=clean_video, audio=t), noise=swapped())
    video, audio = clean().values()
    with torch.no_grad():
        out = diffusion.net(
            video,
            (lambda a, s: a * audio + s * swapped()["audio"])(
                *(f(t).float().view(2, 1, 1) for f in (VP.alpha, VP.sigma))
            ),
            time=tuple(VP.embed(v).float() for v in (clean_video, t)),
        )[1]
    alpha, sigma = (f(t).float().view(2, 1, 1) for f in (VP.alpha, VP.sigma))
    error = (out - (alpha * swapped()["audio"] - sigma * audio)).square().flatten(1).mean(1)
    weight = MinSNR()(VP.alpha(t), VP.sigma(t), torch.ones(2).double())
    torch.testing.assert_close(apart["audio"].detach(), (error * weight).float())


def test_mask_restricts_the_mean():
    diffusion = Diffusion(net=Toy(), path=VP)
    plain = diffusion.loss(clean(), {}, t=times(5, 600), noise=swapped())
    ones = diffusion.loss(
        clean(), {}, t=times(5, 600), noise=swapped(), mask=clean().map(torch.ones_like)
    )
    for name in plain:
        torch.testing.assert_close(ones[name], plain[name])
    # Half of the frames: the loss of the other half makes up the rest.
    first = Media(video=torch.zeros(2, 1, 4, 1, 1), audio=torch.zeros(2, 1, 64))
    first["video"][:, :, :2] = 1
    halves = [
        diffusion.loss(clean(), {}, t=times(5, 600), noise=swapped(), mask=mask)
        for mask in (first, 1 - first)
    ]
    mean = (halves[0]["video"] + halves[1]["video"]) / 2
    torch.testing.assert_close(mean, plain["video"])
    assert halves[0]["audio"].tolist() == [0.0, 0.0]
    torch.testing.assert_close(halves[1]["audio"], plain["audio"])


def test_conditions_reach_the_network():
    diffusion = Diffusion(net=Toy(), path=VP)
    off = diffusion.loss(clean(), {"gain": 0.0}, t=times(5, 600), noise=swapped())
    square = swapped().map(lambda v: v.square().flatten(1).mean(1))
    for name in square:
        torch.testing.assert_close(off[name].detach(), square[name])
    with torch.no_grad():
        eps = diffusion.predict(state(), times(9)[0], {"gain": 0.0}).eps
    assert float(eps["video"].abs().max()) == 0


@pytest.mark.parametrize("target", ["eps", "x0", "v", "edm"])
def test_prediction_is_consistent_with_the_state(target):
    diffusion = Diffusion(net=Toy(), path=VP, target=target, sigma_data=0.6)
    for t in (0.001, 0.02, 0.5, 0.93):
        t = torch.tensor(t, dtype=torch.float64)
        x = state()
        found = diffusion.predict(x, t, {})
        back = VP.alpha(t) * found.x0 + VP.sigma(t) * found.eps
        for k in x:
            torch.testing.assert_close(back[k], x[k], rtol=1e-4, atol=1e-4)
            assert found.x0[k].dtype == torch.float32


def test_one_modality_may_be_a_bare_tensor_from_the_network():
    class Single(torch.nn.Module):
        def forward(self, x, *, time):
            return 0.5 * x

    diffusion = Diffusion(net=Single(), path=VP)
    x = Media(audio=torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)))
    loss = diffusion.loss(x, {}, t=times(5, 9), noise=x)
    assert loss["audio"].shape == (2,)
    assert diffusion.predict(x, times(5)[0], {}).x0.keys() == {"audio"}
