"""The Lightning module of autoencoders in whose latent space others diffuse."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avdiffusion.diffusion.noise import Noise
from avdiffusion.media import Media
from avdiffusion.systems.average import EMA, PowerEMA
from avdiffusion.systems.condition import Same
from avdiffusion.systems.moments import Moments
from avdiffusion.systems.step import Step
from avdiffusion.systems.system import Samples, System, finite, unit

ERRORS = {"absolute": torch.abs, "squared": torch.square}


class Autoencoder(nn.Module):
    """A network that encodes and decodes, and the moments of its latents."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.moments = net, Moments(net.latent_channels)


class Itself(Same):
    """The clips of an autoencoder, of themselves; without one, as small as a latent and back."""

    baseline_name = "thumbnail"

    def __init__(self, *, modality: str, factor: int):
        super().__init__(modality=modality, takes=modality)
        self.factor = factor

    def baseline(self, batch: Mapping[str, Any]) -> Media:
        clip = unit(batch[self.takes])
        frames = clip.transpose(1, 2).flatten(0, 1)
        size = [max(1, n // self.factor) for n in frames.shape[-2:]]
        small = F.interpolate(frames, size, mode="bilinear", antialias=True)
        large = F.interpolate(small, frames.shape[-2:], mode="bicubic").clamp(-1, 1)
        return Media({self.modality: large.unflatten(0, (len(clip), -1)).transpose(1, 2)})


class AutoencoderSystem(System):
    """A variational autoencoder of clips, trained to give them back (Kingma and Welling 2014).

    The loss is the `error`, absolute or squared, of a sample of the posterior, of each value; `kl`
    times the divergence of the posterior from N(0, 1), of each value of the latent; and `change`
    times the error of the change from each frame to the next, against flicker.
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        shapes: dict[str, list[int]],
        rates: dict[str, float],
        optimizer: Callable,
        ema: Callable[..., EMA | PowerEMA],
        lr_schedule: Callable | None = None,
        error: str = "absolute",
        kl: float = 1e-4,
        change: float = 0.5,
        seed: int = 0,
    ):
        if len(shapes) != 1:
            raise ValueError(f"an autoencoder is of one modality, not of {list(shapes)}")
        if error not in ERRORS:
            raise ValueError(f"error={error!r} is not one of {', '.join(ERRORS)}")
        modality = next(iter(shapes))
        super().__init__(
            Autoencoder(net),
            shapes=shapes,
            rates=rates,
            optimizer=optimizer,
            ema=ema,
            lr_schedule=lr_schedule,
            weights={f"{modality}_kl": kl, f"{modality}_change": change},
            seed=seed,
        )
        self.modality, self.error = modality, ERRORS[error]

    @property
    def networks(self) -> list[nn.Module]:
        return [self.model.net.encoder, self.model.net.decoder]

    @property
    def remakes(self) -> Itself:
        return Itself(modality=self.modality, factor=self.model.net.factor)

    def training_loss(self, batch: Mapping[str, Any]) -> dict:
        clip = self.clips(batch)[self.modality]
        posterior = self.model.net.encode(clip)
        self.model.moments.update(posterior.mode().detach())
        noise = Noise(self.seed, batch["position"], "train", device=str(self.device))
        made = self.model.net.decode(posterior.sample(noise.like(posterior.mode())))
        losses = self.losses(clip, made, posterior)
        loss = finite(self.total({name: value.mean() for name, value in losses.items()}))
        return {"loss": loss, "losses": {k: v.detach() for k, v in losses.items()}}

    def once(self, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
        posterior = self.model.net.encode(unit(batch[self.modality]))
        return (self.model.net.decode(posterior.mode()),)

    def losses(self, clip: Tensor, made: Tensor, posterior: Any) -> dict[str, Tensor]:
        """Of each sample [B]."""
        made = made.float()[tuple(map(slice, clip.shape))]
        per_value = posterior.mode()[0].numel()
        found = {
            "": self.error(made - clip).flatten(1).mean(1),
            "_kl": posterior.kl() / per_value,
        }
        if clip.shape[2] > 1:
            error = made.diff(dim=2) - clip.diff(dim=2)
            found["_change"] = self.error(error).flatten(1).mean(1)
        return {f"{self.modality}{name}": value for name, value in found.items()}

    def validation_step(self, batch: dict, _: int) -> None:
        """The averaged model's losses, of the mean of the posterior."""
        net, clip = self.ema.ema_model.net, self.clips(batch)[self.modality]
        posterior = net.encode(clip)
        losses = self.losses(clip, net.decode(posterior.mode()), posterior)
        self.log_losses("val", losses, len(clip), sync_dist=True)

    @torch.no_grad()
    def conditioned(
        self,
        batch: Mapping[str, Any],
        index: Sequence[int],
        *,
        seed: int = 0,
        start: int = 0,
        step: Step | None = None,
        progress: Callable[[], object] | None = None,
    ) -> Samples:
        """What the averaged model gives back of a batch's clips, in about [-1, 1] on the CPU.

        It draws nothing: of any `seed`, and of a part from any `start`, it is the same.
        """
        net, call = self.ema.ema_model.eval().net, step or Step(capture=False)
        clip = unit(batch[self.modality]).to(self.device)
        made = net.decode(net.encode(clip, call(net.encoder)).mode(), call(net.decoder))
        made = made[tuple(map(slice, clip.shape))]
        if progress is not None:
            progress()
        return Samples(list(index), Media({self.modality: made.float().cpu()}), 1)
