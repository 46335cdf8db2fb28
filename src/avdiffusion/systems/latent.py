"""Codecs that are models trained before: what is diffused is what such a model encodes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from avdiffusion.diffusion.diffusion import Prediction
from avdiffusion.diffusion.noise import Noise
from avdiffusion.media import Media
from avdiffusion.samplers.sampler import last
from avdiffusion.systems.codec import Caller, Identity, as_it_is
from avdiffusion.systems.condition import Encoded
from avdiffusion.systems.moments import Moments
from avdiffusion.systems.system import System, empty

MEAN, DEVIATION = 0.2, (0.8, 1.25)  # how far off latents may be that are to have 0 and 1
SEEN = 128  # clips that are looked at


class Frozen(Identity):
    """The averaged model of another system, which stays as it is, and the latents it makes.

    Latents have mean 0 and deviation 1 in every channel, by the moments that were measured while
    the model was trained. Whether they have them on other data, too, is looked at over the first
    clips that are encoded in training: with `gate`, latents that do not are an error.
    """

    holds = False

    def __init__(self, system: System, *, gate: bool = True):
        if not self.fits(system.model):
            raise ValueError(
                f"{type(self).__name__} makes latents by {self.kind}, which init.codec.system has "
                "to name: this is a model of another kind"
            )
        super().__init__()
        self.model = system.ema.ema_model.eval()
        self.modality, self.own = next(iter(system.shapes.items()))
        self.gate, self.seen, self.found = gate, 0, []

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.model.eval()
        return self

    def checked(self, z: Media) -> Media:
        """Latents as they are; an error where the training's first have not 0 and 1."""
        if self.gate and self.training and self.seen < SEEN:
            latent = z[self.modality]
            if not self.found:  # a list, so that it is no part of the module
                self.found = [Moments(latent.shape[1]).to(latent.device)]
            self.found[0].update(latent)
            self.seen += len(latent)
            if self.seen >= SEEN:
                self._judge(self.found[0].mean.tolist(), self.found[0].deviation.tolist())
        return z

    def _judge(self, means: list[float], deviations: list[float]) -> None:
        low, high = DEVIATION
        if all(abs(m) < MEAN for m in means) and all(low < d < high for d in deviations):
            return
        told = ", ".join(f"{m:.2f} +- {d:.2f}" for m, d in zip(means, deviations, strict=True))
        raise ValueError(
            f"the latents of the first {self.seen} clips are not normalised (by channel: {told}): "
            "the model that encodes was trained on other data, or too little. Train it on these "
            "(init.codec.system=CKPT), or allow it with model.codec.gate=false"
        )


class Latent(Frozen):
    """The latents of an autoencoder (`systems.autoencoder`): Rombach et al. 2022.

    Encoding takes the mean of the posterior.
    """

    kind = "an autoencoder such as exp=v2v_vae"

    @staticmethod
    def fits(model: nn.Module) -> bool:
        return hasattr(model, "moments")

    def shapes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        return {self.modality: self.model.net.shape(shapes[self.modality])}

    def encode(self, x: Media) -> Media:
        latent = self.model.net.encode(x[self.modality]).mode()
        return Media({self.modality: self.model.moments.normalise(latent)})

    def decode(self, z: Media, noise: Noise, call: Caller = as_it_is) -> Media:
        net, latent = self.model.net, self.model.moments.restore(z[self.modality])
        return Media({self.modality: net.decode(latent, call(net.decoder))})


class Decoder(Frozen):
    """The latents of a diffusion autoencoder (`condition.Encoded`), whose decoding is sampling.

    It is done by the other system's own `sampler` (Schneider et al. 2023, section 3.3), in the
    space of that system's own codec, `inner`.
    """

    kind = "a diffusion autoencoder such as exp=dmae"

    @staticmethod
    def fits(model: nn.Module) -> bool:
        return isinstance(getattr(model, "conditioner", None), Encoded)

    def __init__(self, system: System, *, gate: bool = True):
        super().__init__(system, gate=gate)
        self.sampler, self.inner = system.sampler, system.codec

    def shapes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        encoder, (_, length) = self.model.conditioner.encoder, shapes[self.modality]
        return {self.modality: [encoder.out_channels, -(-length // encoder.factor)]}

    def encode(self, x: Media) -> Media:
        latent = self.model.condition(x, self.inner.encode)["concat"]
        moments = self.model.conditioner.moments
        return Media({self.modality: moments.normalise(latent)})

    def decode(self, z: Media, noise: Noise, call: Caller = as_it_is) -> Media:
        conditioner, path = self.model.conditioner, self.model.path
        told = {"concat": conditioner.moments.restore(z[self.modality]).clamp(-1, 1)}
        count, _, length = told["concat"].shape
        clip = {self.modality: [self.own[0], length * conditioner.encoder.factor]}
        blank = empty(count, self.inner.shapes(clip), told["concat"].device)
        start = self.inner.noise(noise.fork("decoded")).like(blank)
        x, net = path.sigma(torch.tensor(path.t_max)) * start, call(self.model.net)

        def denoise(x: Media, t: Tensor) -> Prediction:
            return self.model.predict(x, t, told, net)

        made = last(self.sampler(denoise, x, path, noise=noise.fork("decoding")))
        return self.inner.decode(made, noise.fork("inner"), call)
