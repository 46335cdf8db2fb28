"""What is logged and shown of autoencoders and of what texts say, while they train."""

import json
import logging

import numpy as np
import pytest
import torch
from kept import Kept
from PIL import Image
from small_latent import TEXTS, Clips, decoder, dmae, fit, text, vae

from avdiffusion.callbacks.losses import Losses
from avdiffusion.callbacks.samples import SampleClips
from avdiffusion.metrics.mean import Mean
from avdiffusion.metrics.quality import Restoration
from avdiffusion.metrics.sound import Spectral
from avdiffusion.strip import strip
from avdiffusion.systems.system import unit
from avdiffusion.writer import sound

ORDER = np.random.default_rng(0).permutation(5).tolist()  # in which held-out items are taken
PAD, HEAD = 16, 18  # of a contact sheet


def sampled(run):
    found = run.callback_metrics.items()
    return {k.removeprefix("sample/"): float(v) for k, v in found if k.startswith("sample/")}


def test_the_average_is_validated_and_its_losses_are_logged():
    logger = Kept()
    system = vae(kl=0.3, change=0.2)
    run = fit(system, 4, logger=logger, callbacks=[Losses()], val_check_interval=2)
    names = {"loss", "loss_video", "loss_video_kl", "loss_video_change"}
    assert {f"val/{n}" for n in names} <= run.callback_metrics.keys()
    net = system.ema.ema_model.net
    clips = unit(torch.stack([Clips(5)[i]["video"] for i in range(5)]))
    with torch.no_grad():
        posterior = net.encode(clips)
        losses = system.losses(clips, net.decode(posterior.mean), posterior)
    means = {name: float(value.mean()) for name, value in losses.items()}
    found = {k: float(v) for k, v in logger.steps[4].items() if k.startswith("val/")}
    for name, mean in means.items():
        assert found[f"val/loss_{name}"] == pytest.approx(mean, rel=1e-4)
    total = means["video"] + 0.3 * means["video_kl"] + 0.2 * means["video_change"]
    assert found["val/loss"] == pytest.approx(total, rel=1e-4)
    # there is no time, and so there are no parts of it
    train = {k for values in logger.steps.values() for k in values if k.startswith("train/")}
    assert train == {f"train/{n}" for n in names}


def test_clips_while_it_trains_are_compared_with_themselves(tmp_path):
    callback = SampleClips(
        out=tmp_path / "samples", every=2, num=3, metrics={"restoration": Mean(Restoration())}
    )
    run = fit(vae(), 2, callbacks=[callback])
    assert {"psnr", "psnr_baseline", "ssim", "flicker_error"} <= sampled(run).keys()
    final = tmp_path / "samples" / "final"
    assert (final / "000002.mp4").is_file()
    record = json.loads((final / "samples.json").read_text())
    assert record["settings"]["baseline"] == "thumbnail"
    assert record["settings"]["sampler"] == "None"
    picture = np.asarray(Image.open(final / "compare.png"))
    cell, pad, head = 256, PAD, HEAD
    assert picture.shape == (3 * (cell + head + pad) + pad, 4 * (cell + pad) + pad, 3)
    frame = Clips(5)[ORDER[1]]["video"][:, 1].numpy().transpose(1, 2, 0)
    top = pad + (cell + head + pad) + head
    for column in (0, 3):  # what is given is what should come of it
        left = pad + column * (cell + pad)
        shown = picture[top : top + cell, left : left + cell]
        np.testing.assert_array_equal(shown, frame.repeat(16, 0).repeat(16, 1))


def test_clips_of_sound_are_compared_as_spectrograms(tmp_path):
    """Of an autoencoder that samples: what was given, silence, what was made, what should be."""
    metrics = {"stft": Mean(Spectral())}
    callback = SampleClips(
        out=tmp_path / "samples", every=0, num=2, save=["wav", "png"], metrics=metrics
    )
    system = dmae()
    run = fit(system, 1, ("audio",), callbacks=[callback])
    logged = sampled(run)
    assert any(name.endswith("_baseline") for name in logged)
    final = tmp_path / "samples" / "final"
    assert {f.name for f in final.iterdir()} >= {"000001.wav", "000001.png", "compare.png"}
    assert not list(final.glob("*.mp4"))
    record = json.loads((final / "samples.json").read_text())
    assert record["settings"]["baseline"] == "silence"
    picture = np.asarray(Image.open(final / "compare.png"))
    items = [Clips(5, ("audio",))[i]["audio"] for i in ORDER[:2]]
    cells = [
        np.asarray(strip(None, sound(each), sample_rate=1000))
        for each in (items[1], torch.zeros_like(items[1]))
    ]
    height, width, _ = cells[0].shape
    assert picture.shape == (2 * (height + HEAD + PAD) + PAD, 4 * (width + PAD) + PAD, 3)
    top = PAD + (height + HEAD + PAD) + HEAD
    for column, cell in ((0, cells[0]), (1, cells[1]), (3, cells[0])):
        left = PAD + column * (width + PAD)
        np.testing.assert_array_equal(picture[top : top + height, left : left + width], cell)


def test_samples_are_of_the_captions_of_held_out_clips(tmp_path, caplog):
    """And not compared with these: what a text says may sound in many ways."""
    seen = []

    def metric(clips, rates):
        seen.append(clips["audio"])
        return {"x": float(len(seen))}

    system = text(decoder(gate=False))
    callback = SampleClips(
        out=tmp_path / "samples", every=0, num=3, save=["wav"], metrics={"metric": metric}, seed=4
    )
    with caplog.at_level(logging.WARNING, "avdiffusion"):
        run = fit(system, 1, ("audio", "text"), callbacks=[callback])
    assert caplog.messages == []
    assert sampled(run).keys() == {"x", "x_real", "nonfinite"}
    final = tmp_path / "samples" / "final"
    assert not (final / "compare.png").exists()
    record = json.loads((final / "samples.json").read_text())
    said = [TEXTS[i % len(TEXTS)] for i in ORDER[:3]]
    assert [sample["text"] for sample in record["samples"]] == said
    assert all(each in (final / "gallery.html").read_text() for each in said)
    assert "baseline" not in record["settings"]
    whole = {"audio": torch.zeros(3, 1, 64), "text": said}
    expected = system.conditioned(whole, range(3), seed=4).clips["audio"]
    np.testing.assert_allclose(seen[0], expected.clamp(-1, 1), atol=1e-4)


def test_without_held_out_texts_there_are_no_samples(tmp_path, caplog):
    callback = SampleClips(out=tmp_path / "samples", every=1, num=1)
    with caplog.at_level(logging.WARNING, "avdiffusion"):
        fit(text(), 2, ("audio", "text"), val=0, callbacks=[callback], limit_val_batches=0)
    assert caplog.messages == ["no clips are sampled: there is no validation clip to make them of"]
    assert not (tmp_path / "samples").exists()
