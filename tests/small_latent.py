"""Autoencoders and the systems that diffuse their latents, small enough to train within a test."""

from functools import partial

import torch
from small_system import trainer
from torch.utils.data import Dataset

from avdiffusion.data.module import DataModule
from avdiffusion.diffusion.diffusion import Diffusion
from avdiffusion.diffusion.noise import Noise
from avdiffusion.diffusion.path import CosineVP, DiscreteVP
from avdiffusion.nn.magnitude_encoder import MagnitudeEncoder
from avdiffusion.nn.text import ByteEncoder
from avdiffusion.nn.unet import UNet
from avdiffusion.nn.unet1d import UNet1d
from avdiffusion.nn.vae import VideoVAE
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.systems.autoencoder import AutoencoderSystem
from avdiffusion.systems.average import EMA
from avdiffusion.systems.codec import Identity
from avdiffusion.systems.condition import Encoded, Source, Text
from avdiffusion.systems.diffusion import DiffusionSystem
from avdiffusion.systems.latent import Decoder, Latent

VIDEO, AUDIO = [3, 3, 16, 16], [1, 64]
TEXTS = ["a dog", "a cat", "rain", "wind in the trees"]


def trained(**options):
    """What all of them have in common."""
    return {
        "optimizer": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0),
        "ema": partial(EMA, beta=0.9, inv_gamma=1.0, power=2 / 3),
        **options,
    }


def awake(system, size=0.05):
    """The system with an average that has been somewhere, as few layers are zero any more."""
    rng = torch.Generator().manual_seed(1)
    for model in (system.model, system.ema.ema_model):
        for parameter in model.parameters():
            parameter.data.add_(size * torch.randn(parameter.shape, generator=rng))
    return system


def vae(**options):
    """Latents [2, T, H / 4, W / 4] of video."""
    torch.manual_seed(0)
    net = VideoVAE(latent_channels=2, channels=8, channel_mult=(1, 2), num_res_blocks=1, patch=2)
    return awake(
        AutoencoderSystem(
            net=net, **trained(shapes={"video": VIDEO}, rates={"video": 10}, **options)
        )
    )


def unet1d(channels=1, **options):
    settings = {"channels": (8, 8), "factors": (1, 2), "items": (1, 1), "modulation": 16}
    heads = {"attention_heads": 2, "attention_features": 4, "groups": 4}
    return UNet1d(audio_channels=channels, **{**settings, **heads, **options})


def dmae(**options):
    """Latents [2, L / 16] of sound."""
    torch.manual_seed(0)
    encoder = MagnitudeEncoder(
        in_channels=1,
        channels=8,
        multipliers=(1, 1),
        factors=(2,),
        num_blocks=(1,),
        stft_num_fft=31,
        stft_hop_length=8,
        out_channels=2,
        groups=4,
    )
    net = unet1d(inject_depth=1, inject_channels=2, filters=8, window_length=8, stride=8)
    return awake(_diffusion(net, Encoded(encoder=encoder), {"audio": AUDIO}, **options), 0.2)


def text(codec=None, *, drop=0.1, **options):
    """Sound, or its latents, of a text."""
    torch.manual_seed(0)
    encoder = ByteEncoder(width=8, layers=1, heads=2, max_length=20)
    channels = 2 if codec else 1
    net = unet1d(channels, cross_attentions=(1, 1), context_width=8)
    conditioner = Text(encoder=encoder, drop=drop)
    return awake(_diffusion(net, conditioner, {"audio": AUDIO}, codec=codec, **options), 0.2)


def source(codec=None, **options):
    """Video, or its latents, of other video."""
    torch.manual_seed(0)
    channels = 2 if codec else 3
    net = UNet(
        dims=3,
        video_channels=channels,
        concat_channels=channels,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        num_heads=2,
        resblock_updown=False,
        out_factor=1,
    )
    path = DiscreteVP(betas="cosine")
    return awake(_diffusion(net, Source(), {"video": VIDEO}, path=path, codec=codec, **options))


def _diffusion(net, conditioner, shapes, *, path=None, codec=None, **options):
    diffusion = Diffusion(
        net=net, path=path or CosineVP(scale=1.0), target="v", conditioner=conditioner
    )
    rates = {"video": 10, "audio": 1000}
    return DiffusionSystem(
        diffusion=diffusion,
        shapes=shapes,
        rates={name: rates[name] for name in shapes},
        codec=codec or Identity(),
        **trained(**{"sampler": DDIM(steps=3), **options}),
    )


def videos(count, shape=VIDEO, seed=0):
    """Integers, no two frames alike."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), generator=rng, dtype=torch.uint8)


def sounds(count, shape=AUDIO, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**14), 2**14, (count, *shape), generator=rng, dtype=torch.int16)


def batch(count, position=0):
    """Everything that any of the systems is told."""
    return {
        "video": videos(count, seed=position),
        "source": videos(count, seed=position + 1000),
        "audio": sounds(count, seed=position),
        "text": [TEXTS[(position + k) % len(TEXTS)] for k in range(count)],
        "index": torch.arange(count) + position,
        "position": list(range(position, position + count)),
    }


class Clips(Dataset):
    """Items of noise, of these entries of `batch`."""

    def __init__(self, num, names=("video",)):
        self.num, self.names = num, names

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        item = batch(1, position=index)
        return {"index": index, **{name: item[name][0] for name in self.names}}


def fit(system, steps, names=("video",), val=5, **options):
    """Trains on 16 such clips, 4 at a time; returns the trainer."""
    picture, sound = "video" in names, "audio" in names
    data = DataModule(
        train=Clips(16, names),
        val=Clips(val, names),
        fps=10 if picture else None,
        frames=VIDEO[1] if picture else None,
        size=VIDEO[2:] if picture else None,
        sample_rate=1000 if sound else None,
        samples=AUDIO[1] if sound else None,
        batch_size=4,
    )
    run = trainer(steps, **options)
    run.fit(system, data, weights_only=True)
    return run


def latent(first=None, **options):
    """The codec of an autoencoder that has measured its latents."""
    return Latent(measured(first or vae()), **options)


def decoder(first=None, **options):
    return Decoder(measured(first or dmae()), **options)


def measured(system):
    """The system with the moments of its average's latents of 64 clips."""
    model, given = system.ema.ema_model.eval(), batch(64)
    with torch.no_grad():
        if hasattr(model, "moments"):
            model.moments.update(model.net.encode(given["video"].float() / 127.5 - 1).mode())
        else:
            sound = given["audio"].float() / 32768
            model.conditioner.moments.update(model.conditioner.encoder(sound))
    return system


def step(system, count=4, position=0):
    """One of the optimiser, as the trainer takes it."""
    optimizer = system.configure_optimizers()
    loss = system.training_loss(batch(count, position))["loss"]
    loss.backward()
    optimizer.step()
    system.ema.update()
    return float(loss.detach())


EVERY = {
    "vae": vae,
    "dmae": dmae,
    "text": text,
    "text on latents": lambda: text(decoder(gate=False)),
    "source": source,
    "source on latents": lambda: source(latent(gate=False)),
}


def made(system, count=2, **options):
    """Clips of it, by whichever way they are had."""
    if system.remakes is None:
        told = options.pop("told", lambda numbers: {"text": [TEXTS[i % 4] for i in numbers]})
        return system.sample(count, told=told, **options)
    return system.conditioned(batch(count), range(count), **options).clips


def noise(count, purpose="sample"):
    return Noise(0, range(count), purpose)
