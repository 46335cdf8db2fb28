"""Moûsai's models by their published names and calls (Schneider et al. 2023, 2301.11757).

All of it is built of parts that stand elsewhere: other sizes are had from `UNet1d`,
`MagnitudeEncoder` and `T5Encoder` by their arguments. Sound is [B, C, L], its latent [B, c, l].
Training with averages, other samplers and files is what train.py and sample.py are for.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from avdiffusion import weights
from avdiffusion.diffusion.diffusion import Diffusion, Prediction
from avdiffusion.diffusion.guide import ClassifierFree, Denoise, Task
from avdiffusion.diffusion.noise import Noise
from avdiffusion.diffusion.path import CosineVP
from avdiffusion.media import Media
from avdiffusion.nn.magnitude_encoder import MagnitudeEncoder
from avdiffusion.nn.text import T5Encoder
from avdiffusion.nn.unet1d import UNet1d
from avdiffusion.samplers.ddim import DDIM
from avdiffusion.samplers.sampler import last
from avdiffusion.systems.condition import Encoded, Text

LAYOUT = "audio_diffusion"


class Model(nn.Module):
    """A `Diffusion` of one tensor on the published path, with noise of its own.

    Nothing draws from torch's global generator: the n-th sample that a model makes, or is trained
    on, has the n-th noise of its `seed`, unless a call is given a `generator`, which then draws a
    seed for it.
    """

    def __init__(self, *, net: UNet1d, conditioner: nn.Module, seed: int = 0):
        super().__init__()
        path = CosineVP(scale=1.0, t_min=0.0)  # its network learns frequencies of t itself
        self.model = Diffusion(net=net, path=path, target="v", conditioner=conditioner)
        self.seed, self.drawn = seed, 0

    def load(self, file: str | Path) -> None:
        """Takes weights from a file in the published layout, averages before what is trained."""
        from avdiffusion import convert  # Lightning and Hydra take seconds to import

        layout, path = convert.LAYOUTS[LAYOUT], Path(file)
        found = convert.fitting(self.model, convert.weights(path, LAYOUT)[0], path, layout)
        self.model.load_state_dict(self.model.state_dict() | found)

    def noise(self, count: int, generator: torch.Generator | None = None) -> Noise:
        """That of the next `count` samples, or of a seed which the generator draws."""
        if generator is not None:
            device = generator.device
            seed = torch.randint(2**62, (), generator=generator, device=device)
            return Noise(int(seed), range(count))
        first, self.drawn = self.drawn, self.drawn + count
        return Noise(self.seed, range(first, self.drawn), type(self).__name__)

    def loss(self, x: Tensor, batch: Mapping[str, object]) -> Tensor:
        """The mean error of v at a time of each sample's own."""
        noise = self.noise(len(x))
        t = self.model.density(noise.uniform(), self.model.path)
        cond = self.model.condition(batch, u=noise.fork("condition").uniform())
        x = Media(audio=x)
        return self.model.loss(x, cond, t=t, noise=noise.like(x))["audio"].mean()

    @torch.no_grad()
    def sampled(
        self, noise: Tensor, cond: Mapping[str, Tensor], steps: int, scale: float = 1.0
    ) -> Tensor:
        """What `steps` of DDIM make of noise, with classifier-free guidance by `scale`."""

        def told(cond: Mapping[str, Tensor]) -> Denoise:
            def denoise(x: Media, t: Tensor) -> Prediction:
                return self.model.predict(x, t, dict(cond))

            return denoise

        denoise, path = told(cond), self.model.path
        if scale != 1:
            free = told(self.model.conditioner.null(cond))
            denoise = ClassifierFree(scale=scale)(denoise, Task(path, free=free))
        return last(DDIM(steps=steps)(denoise, Media(audio=noise), path))["audio"]


class DiffAE(Model):
    """The diffusion autoencoder of sound: a network that is told what an encoder makes of it."""

    def __init__(self, *, net: UNet1d, encoder: MagnitudeEncoder, seed: int = 0):
        if net.inject_factor != encoder.factor:
            raise ValueError(
                f"the network is told a step for every {net.inject_factor} samples, the encoder "
                f"makes one of {encoder.factor}: change factors, stride or inject_depth"
            )
        super().__init__(net=net, conditioner=Encoded(encoder=encoder), seed=seed)

    def forward(self, audio: Tensor) -> Tensor:
        """The loss, one number."""
        return self.loss(audio, {"audio": audio})

    def encode(self, audio: Tensor) -> Tensor:
        """The latent, within (-1, 1)."""
        return self.model.conditioner.encoder(audio)

    def decode(
        self, latent: Tensor, num_steps: int = 100, generator: torch.Generator | None = None
    ) -> Tensor:
        """Sound of a latent of any length, not held within [-1, 1]."""
        net, (count, _, length) = self.model.net, latent.shape
        like = latent.new_empty(count, net.takes[0], length * net.inject_factor)
        noise = self.noise(count, generator).like(like)
        return self.sampled(noise, {"concat": latent}, num_steps)


class DiffGen(Model):
    """The generator of latents of texts, which are given as such or as their embeddings [B, N, D].

    `encoder` makes embeddings of texts; there are as many tokens as it has, or fewer.
    """

    def __init__(self, *, net: UNet1d, encoder: T5Encoder, seed: int = 0):
        super().__init__(net=net, conditioner=Text(encoder=encoder), seed=seed)

    def forward(
        self,
        latent: Tensor,
        *,
        embedding: Tensor | None = None,
        text: Sequence[str] | None = None,
        embedding_mask_proba: float = 0.1,
    ) -> Tensor:
        """The loss, one number; so many of the samples are told nothing."""
        self.model.conditioner.drop = embedding_mask_proba
        return self.loss(latent, self.told(embedding, text))

    def sample(
        self,
        noise: Tensor,
        *,
        embedding: Tensor | None = None,
        text: Sequence[str] | None = None,
        embedding_scale: float = 5.0,
        num_steps: int = 100,
    ) -> Tensor:
        """Latents of noise, away by `embedding_scale` from those of no text; 1 is no guidance."""
        cond = self.model.condition(self.told(embedding, text))
        return self.sampled(noise, cond, num_steps, embedding_scale)

    def told(self, embedding: Tensor | None, text: Sequence[str] | None) -> dict[str, object]:
        """Either as a batch has it."""
        if (embedding is None) == (text is None):
            raise ValueError("the generator is told a text or its embedding: give one of the two")
        if text is not None:
            return {"text": [text] if isinstance(text, str) else list(text)}
        most = self.model.conditioner.encoder.max_length
        if embedding.shape[1] > most:
            raise ValueError(
                f"embedding has {embedding.shape[1]} tokens, this generator is told {most} at most"
            )
        return {"embedding": embedding}


class CombinedSampler(nn.Module):
    """Sound of texts: a generator of latents, an autoencoder that decodes them, a text encoder.

    All are moved to `device`, a GPU if there is one.
    """

    def __init__(
        self,
        diffae: DiffAE,
        diffgen: DiffGen,
        *,
        text_encoder_name: str = "t5-base",
        text_encoder_max_length: int = 128,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.diffae, self.diffgen = diffae.to(self.device), diffgen.to(self.device)
        self.text_encoder = T5Encoder(
            text_encoder_name,
            width=diffgen.model.net.context_width,
            max_length=text_encoder_max_length,
        )

    def sample(
        self,
        text: str | Sequence[str],
        sampling_steps: int = 100,
        decoding_steps: int = 100,
        embedding_scale: float = 5.0,
        latent_length: int = 2048,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sound of each text, [B, C, 1024 `latent_length`] by default, not held within [-1, 1]."""
        embedding, _ = self.text_encoder([text] if isinstance(text, str) else text, self.device)
        channels = self.diffgen.model.net.takes[0]
        like = embedding.new_empty(len(embedding), channels, latent_length)
        latent = self.diffgen.sample(
            self.diffgen.noise(len(embedding), generator).like(like),
            embedding=embedding,
            embedding_scale=embedding_scale,
            num_steps=sampling_steps,
        )
        return self.diffae.decode(latent, decoding_steps, generator)


def get_default_diffae(state_dict_file: str | Path | None = None) -> DiffAE:
    """The published autoencoder of 48 kHz stereo, 185 million parameters, latents 64 times smaller.

    With weights of a file in the published layout, or new ones.
    """
    model = DiffAE(net=UNet1d(filters=128, inject_depth=4), encoder=MagnitudeEncoder())
    if state_dict_file is not None:
        model.load(state_dict_file)
    return model


def get_pretrained_diffae_from_huggingface() -> DiffAE:
    """`get_default_diffae` with the weights of archinetai/dmae1d-ATC64-v2, trained on music.

    They are looked for where `avdiffusion.weights` keeps them and in the hub's cache; nothing is
    fetched.
    """
    return get_default_diffae(weights.find("dmae1d-ATC64-v2"))


def get_default_diffgen(state_dict_file: str | Path | None = None) -> DiffGen:
    """The published generator, 563 million parameters, told 128 tokens of t5-base.

    With weights of a file in the published layout, or new ones.
    """
    net = UNet1d(
        audio_channels=32,
        channels=[128, 256, 512, 512, 1024, 1024],
        factors=[1, 2, 2, 2, 2, 2],
        items=[2, 2, 2, 4, 8, 8],
        attentions=[0, 0, 1, 1, 1, 1],
        cross_attentions=[1, 1, 1, 1, 1, 1],
    )
    model = DiffGen(net=net, encoder=T5Encoder())
    if state_dict_file is not None:
        model.load(state_dict_file)
    return model


def get_default_combined_sampler(
    diffae_state_dict_file: str | Path | None = None,
    diffgen_state_dict_file: str | Path | None = None,
) -> CombinedSampler:
    """The two published models as one."""
    return CombinedSampler(
        get_default_diffae(diffae_state_dict_file), get_default_diffgen(diffgen_state_dict_file)
    )
