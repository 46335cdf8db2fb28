"""The system that trains a variational autoencoder: its losses, its average, its latents."""

import numpy as np
import pytest
import torch
from small_latent import Clips, batch, fit, step, vae, videos

from avdiffusion.diffusion.noise import Noise
from avdiffusion.systems.system import unit

# ---------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(("error", "power"), [("absolute", 1), ("squared", 2)])
def test_losses_are_those_of_their_formulas(error, power):
    """Of a sample of the posterior; the divergence by torch's own distributions."""
    system, given = vae(error=error, kl=0.3, change=0.2), batch(4)
    found = system.training_loss(given)
    clip, net = given["video"].float() / 127.5 - 1, system.model.net
    with torch.no_grad():
        mean, log_variance = net.encode(clip)
        deviation = (log_variance / 2).exp()
        drawn = Noise(0, given["position"], "train").like(mean)
        made = net.decode(mean + deviation * drawn)
    own = torch.distributions.Normal(mean, deviation)
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    error = made - clip
    expected = {
        "video": (error.abs() ** power).mean((1, 2, 3, 4)),
        "video_kl": torch.distributions.kl_divergence(own, standard).mean((1, 2, 3, 4)),
        "video_change": error.diff(dim=2).abs().pow(power).mean((1, 2, 3, 4)),
    }
    assert found["losses"].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found["losses"][name], value, rtol=1e-4, atol=1e-6)
    total = sum(w * expected[n].mean() for n, w in zip(expected, (1, 0.3, 0.2), strict=True))
    torch.testing.assert_close(found["loss"].detach(), total, rtol=1e-4, atol=1e-6)
    assert "t" not in found
    assert not any(value.requires_grad for value in found["losses"].values())


def test_a_single_frame_has_no_change():
    system = vae(change=0.5)
    system.shapes = {"video": [3, 1, 16, 16]}
    given = {**batch(2), "video": videos(2, [3, 1, 16, 16])}
    found = system.training_loss(given)
    assert found["losses"].keys() == {"video", "video_kl"}
    assert bool(found["loss"].isfinite())


def test_a_size_that_the_factor_does_not_divide_is_compared_as_it_is():
    system = vae()
    system.shapes = {"video": [3, 3, 13, 10]}
    given = {**batch(2), "video": videos(2, [3, 3, 13, 10])}
    assert bool(system.training_loss(given)["loss"].isfinite())
    logged = {}
    system.log_dict = lambda values, **_: logged.update(values)
    system.validation_step(given, 0)
    assert np.isfinite(float(logged["val/loss"]))


def test_the_loss_depends_on_positions_and_seed_alone():
    base = vae().training_loss(batch(4))["losses"]
    torch.manual_seed(99)
    again = vae().training_loss(batch(4))["losses"]
    moved = vae().training_loss({**batch(4), "position": [9, 8, 7, 6]})["losses"]
    seeded = vae(seed=1).training_loss(batch(4))["losses"]
    assert torch.equal(base["video"], again["video"])
    assert not torch.equal(base["video"], moved["video"])
    assert not torch.equal(base["video"], seeded["video"])
    assert torch.equal(base["video_kl"], moved["video_kl"])


def test_halves_of_a_batch_make_the_gradient_of_the_whole():
    whole, halves, given = vae(), vae(), batch(4)
    whole.training_loss(given)["loss"].backward()
    for part in (slice(0, 2), slice(2, 4)):
        (halves.training_loss({k: v[part] for k, v in given.items()})["loss"] / 2).backward()
    pairs = zip(whole.model.parameters(), halves.model.parameters(), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-3, atol=1e-5)


def test_clips_of_another_shape_or_of_two_modalities_are_named():
    with pytest.raises(ValueError, match=r"video comes as \[3, 3, 8, 8\], the model expects"):
        vae().training_loss({**batch(2), "video": videos(2, [3, 3, 8, 8])})
    with pytest.raises(ValueError, match=r"of one modality, not of \['video', 'audio'\]"):
        type(vae())(
            net=vae().model.net,
            shapes={"video": [3, 1, 4, 4], "audio": [1, 8]},
            rates={},
            optimizer=None,
            ema=None,
        )


# -------------------------------------------------------------------------------------- training


def test_moments_are_those_of_the_latents_of_the_training_clips():
    """Of the network as it was at each step; at a learning rate of 0, of the one that there is."""
    system = vae()
    system.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    fit(system, 4)  # all 16 clips, once
    with torch.no_grad():
        clips = unit(torch.stack([Clips(16)[i]["video"] for i in range(16)]))
        latents = system.model.net.encode(clips).mean.transpose(0, 1).flatten(1)
    moments = system.model.moments
    torch.testing.assert_close(moments.mean, latents.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        moments.deviation, latents.std(1, correction=0), rtol=1e-3, atol=1e-5
    )
    assert int(moments.batches) == 4
    # clips of validation are none of them
    before = moments.mean.clone()
    system.log_dict = lambda *_, **__: None
    system.eval().validation_step(batch(4), 0)
    assert torch.equal(moments.mean, before)


def test_training_makes_clips_more_like_themselves():
    system = vae(kl=1e-4)
    first = float(system.training_loss(batch(4))["losses"]["video"].mean())
    flat = {"video": torch.full((4, 3, 3, 16, 16), 200, dtype=torch.uint8)}
    optimizer = torch.optim.Adam(system.model.parameters(), lr=3e-3)
    for k in range(30):
        optimizer.zero_grad()
        system.training_loss({**flat, "position": list(range(4 * k, 4 * k + 4))})["loss"].backward()
        optimizer.step()
    last = system.training_loss({**flat, "position": [0, 1, 2, 3]})["losses"]["video"]
    assert float(last.mean()) < 0.3 * first


# ---------------------------------------------------------------------------------- clips of it


def test_clips_are_made_of_the_mean_of_the_average():
    system, given = vae(), {"video": videos(2)}
    for k in range(2):  # the first average is a copy
        step(system, position=4 * k)
    calls = []
    found = system.conditioned(given, [4, 9], seed=3, progress=lambda: calls.append(1))
    net = system.ema.ema_model.net
    with torch.no_grad():
        expected = net.decode(net.encode(unit(given["video"])).mean)
        online = system.model.net.decode(system.model.net.encode(unit(given["video"])).mean)
    torch.testing.assert_close(found.clips["video"], expected)
    assert float((online - expected).abs().max()) > 1e-3
    assert (found.index, found.evaluations, len(calls)) == ([4, 9], 1, 1)
    assert torch.equal(system.conditioned(given, [0, 1]).clips["video"], found.clips["video"])


def test_beside_it_are_pictures_as_small_as_the_latents():
    """Of a plain colour there is nothing to lose, of a pattern of pixels everything."""
    remakes = vae().remakes
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 200, (1, 3, 2, 1, 1)).astype(np.uint8).repeat(16, 3).repeat(16, 4)
    fine = np.indices((16, 16)).sum(0) % 2 * 255
    fine = np.broadcast_to(fine, (1, 3, 2, 16, 16)).astype(np.uint8).copy()
    for clip, kept in ((coarse, True), (fine, False)):
        given = torch.from_numpy(clip)
        found = remakes.baseline({"video": given})["video"]
        assert found.shape == given.shape
        assert float(found.abs().max()) <= 1
        assert (float((found - unit(given)).abs().max()) < 0.02) == kept
    assert (remakes.modality, remakes.takes, remakes.baseline_name) == (
        "video",
        "video",
        "thumbnail",
    )
