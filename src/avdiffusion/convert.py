"""Checkpoints from the weights that others have published.

python -m avdiffusion.convert mm_diffusion Landscape.pt landscape.ckpt exp=landscape
python -m avdiffusion.convert mm_diffusion AIST++.pt aist.ckpt exp=aist
python -m avdiffusion.convert mm_diffusion ema_0.9999_100000.pt own.ckpt exp=folder data.root=DIR
python -m avdiffusion.convert guided_diffusion Landscape_SR.pt landscape_sr.ckpt exp=landscape_sr
python -m avdiffusion.convert guided_diffusion 64_256_upsampler.pt upsampler.ckpt exp=landscape_sr
python -m avdiffusion.convert audio_diffusion pytorch_model.bin dmae.ckpt exp=dmae data.root=DIR
python -m avdiffusion.convert audio_diffusion diffgen.pt diffgen.ckpt exp=diffgen data.root=DIR \\
    init.codec.system=dmae.ckpt
python -m avdiffusion.convert audio_diffusion dmae.ckpt dmae.safetensors --export

What follows the two files are overrides as for train.py: the config that the weights are for.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from avdiffusion import checkpoint, published, published_audio, published_unet
from avdiffusion.checkpoint import CheckpointError
from avdiffusion.nn.coupled_unet import CoupledUNet
from avdiffusion.nn.unet import UNet
from avdiffusion.nn.unet1d import UNet1d
from avdiffusion.published import OtherWeights, bare, differences
from avdiffusion.weights import read, write

# Where files keep weights among other things, the average before what is trained.
PLACES = ("ema", "ema_state_dict", "model_ema", "state_dict", "model_state_dict", "model")
NET = "model.diffusion.net"


@dataclass(frozen=True)
class Layout:
    """How others name the weights of a network, which is `what` in words.

    `keys`: the module that knows these names; `first`: what is in the name of its first convolution
    and in none of another layout; `unused`: tensors that ours has no use for.
    """

    net: type[nn.Module]
    what: str
    keys: ModuleType
    first: str
    experiments: str
    unused: tuple[str, ...] = ()


LAYOUTS = {
    "mm_diffusion": Layout(
        CoupledUNet,
        "a network of video and sound together",
        published,
        "input_blocks.0.0.video_conv.",
        "exp=landscape or exp=aist",
    ),
    "guided_diffusion": Layout(
        UNet,
        "an image network",
        published_unet,
        "input_blocks.0.0.weight",
        "exp=landscape_sr or exp=aist_sr",
        unused=("label_emb.weight",),
    ),
    "audio_diffusion": Layout(
        UNet1d, "a network of sound", published_audio, "net.blocks.", "exp=dmae or exp=diffgen"
    ),
}


def convert(
    layout: str,
    source: str | Path,
    target: str | Path,
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the checkpoint of a file in a published `layout`, one of LAYOUTS; tells what is in it.

    `overrides` are composed to the config that it is to hold. Trained weights and their average are
    the published ones. There is no optimiser state, so training does not go on from it, but a new
    run may begin with its weights.
    """
    source, target = _files(source, target, overwrite)
    found, place = weights(source, layout)
    unused = [key for key in LAYOUTS[layout].unused if key in found]
    used = {key: value for key, value in found.items() if key not in unused}
    where = "paths.run=${paths.runs}/${name}"  # there is no run whose folder it could be
    given = checkpoint.compose([where, *overrides])
    codec = checkpoint.graft(given)
    config = checkpoint.plain(given)
    system = checkpoint.build(config["model"])
    fill(system, used, config, source, LAYOUTS[layout])
    if codec:
        checkpoint.pour(codec, system)
        if normalised(system):
            raise CheckpointError(
                f"{codec} was trained here and normalises its latents, which {source} does not "
                "expect: give the autoencoder that it was trained with, converted as it is"
            )
    content = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": version("pytorch-lightning"),
        "state_dict": system.state_dict(),
        "hyper_parameters": config,
        "converted": {"layout": layout, "file": source.name},
    }
    system.on_save_checkpoint(content)
    checkpoint.write(content, target)
    return {
        "file": target,
        "parameters": sum(p.numel() for p in system.model.parameters()),
        "tensors": len(used),
        "unused": unused,
        "place": place,
        "told": _words(system),
    }


def export(
    layout: str, source: str | Path, target: str | Path, *, overwrite: bool = False
) -> dict[str, Tensor]:
    """Writes the average of a checkpoint of ours as a file in a published layout; what is in it.

    It is a table of tensors as torch saves it, or as safetensors, which `target` then ends in.
    """
    source, target = _files(source, target, overwrite)
    system = checkpoint.load(source, device="cpu")
    check(system, LAYOUTS[layout])
    if normalised(system):
        raise CheckpointError(
            f"{source} makes latents that are normalised, which has no place in the published "
            "layout: others would decode them as they are"
        )
    found = LAYOUTS[layout].keys.of_model(system.ema.ema_model)
    found = {key: value.detach().clone() for key, value in found.items()}  # in memory of its own
    if target.suffix == ".safetensors":
        write(found, target)
    else:
        checkpoint.write(found, target)
    return found


def _files(source, target, overwrite) -> tuple[Path, Path]:
    """What to read and to write, if it may be written."""
    source, target = Path(source), Path(target)
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder: name the file to write")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target} cannot be written: there is no folder {target.parent}")
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} is there already: give another name, or --overwrite")
    if target.exists() and source.exists() and target.samefile(source):
        raise CheckpointError(f"{target} is the file to read: give another name")
    return source, target


def _words(system: nn.Module) -> str:
    """What sample.py has to be given besides the checkpoint."""
    if system.remakes:
        return " given=DIR"
    return "" if system.model.conditioner is None else ' text="a dog barking"'


def normalised(system: nn.Module) -> bool:
    """Whether a system diffuses what another model encodes, brought to mean 0, deviation 1."""
    means = (v for k, v in system.codec.named_buffers() if k.endswith("moments.mean"))
    return any(bool(mean.any()) for mean in means)  # of a copy, batches are not counted


def check(system: nn.Module, layout: Layout) -> None:
    """Raises if a system's network is none of this layout."""
    if not isinstance(system.model.net, layout.net):
        raise CheckpointError(
            f"{NET} is a {type(system.model.net).__name__}, the weights are of a "
            f"{layout.net.__name__}: give {layout.experiments}"
        )


def fill(
    system: nn.Module,
    found: Mapping[str, Tensor],
    config: dict,
    source: str | Path,
    layout: Layout,
) -> None:
    """Puts published weights into a system's model and its averages, if they are of that model.

    All of them then share their memory, and so does what is saved of them.
    """
    check(system, layout)
    try:
        state = fitting(system.model, found, source, layout)
    except OtherWeights as error:
        raise OtherWeights("\n".join([str(error), *advice(found, config, layout)])) from None
    if layout.net is CoupledUNet:  # the others take clips of any size
        system.model.net.check(*system.latent(1).values(), None)
    for each in (*system.model.modules(), *system.ema.modules()):
        if isinstance(each, type(system.model)):
            each.load_state_dict(each.state_dict() | state, assign=True)


def fitting(
    model: nn.Module, found: Mapping[str, Tensor], source: str | Path, layout: Layout
) -> dict[str, Tensor]:
    """Published weights as part of the state dict of a `Diffusion`, if they are of that."""
    try:
        state = layout.keys.for_model(model, found)
    except OtherWeights as error:
        text = f"{source} does not hold the network of this config\n{error}"
        raise OtherWeights(text) from None
    broken = [key for key, value in found.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{source} holds NaN or infinity in {len(broken)} tensors, such as {broken[0]}"
        )
    return state


def weights(path: Path, layout: str) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a file that may be weights in this layout, and where in it they are."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    tables = path.suffix == ".safetensors"
    content, place = read(path) if tables else checkpoint.content(path, mmap=True), None
    if isinstance(content, dict):
        if "avdiffusion" in content:
            raise CheckpointError(f"{path} is an avdiffusion checkpoint already: sample from it")
        if "param_groups" in content:
            raise CheckpointError(
                f"{path} holds the state of an optimiser: the weights are in the file beside it, "
                "such as ema_0.9999_100000.pt"
            )
        held = (key for key in PLACES if isinstance(content.get(key), dict) and content[key])
        place = next(held, None)
    found = content if place is None else content[place]
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path} holds no weights by name")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds no weights: {key!r} in it is a {type(value).__name__}. They may "
                f"stand at its top, or under {', '.join(PLACES)}"
            )
    found = bare(found)
    for name, other in LAYOUTS.items():
        if name != layout and any(other.first in key for key in found):
            raise CheckpointError(f"{path} holds {_what(found, other)}: convert it as {name}")
    return found, place


def _what(found: Mapping[str, Tensor], layout: Layout) -> str:
    """The kind of network, in words."""
    first = found.get(layout.first)
    if first is None:
        return layout.what
    what = "a super-resolution network" if first.shape[1] == 6 else layout.what
    return f"{what} ({first.shape[1]} channels in, {first.shape[0]} wide)"


def advice(found: Mapping[str, Tensor], config: dict, layout: Layout) -> list[str]:
    """What to change in a config for these weights, where their shapes tell."""
    if "input_blocks.1.0.video_in_layers.2.video_conv.weight" in found:
        return ["its convolutions of video are 3-D (video_type=3d), those of this network are not"]
    shapes = layout.keys.settings(found) if hasattr(layout.keys, "settings") else None
    if shapes is None:
        return []
    with torch.device("meta"):
        if not differences(layout.keys.entries(layout.net()), found):
            return [f"it is the published network: give {layout.experiments}, and no other size"]
    given = config["model"]["diffusion"]["net"]
    changes = {k: v for k, v in shapes.items() if v != _comparable(given.get(k))}
    words = [f"{NET}.{key}={_text(value)}" for key, value in changes.items()]
    if "out_factor" in changes:
        words.append(f"model.diffusion.learned_variance={_text(changes['out_factor'] > 1)}")
    if "audio_channels" in changes:
        words.append(f"data.channels={changes['audio_channels']}")
    text = f"its shapes fit with {shlex.join(words)}"
    number = len(shapes.get("cross_attention_resolutions", ()))
    if number != len(given.get("cross_attention_windows", ())):
        text += f", and {number} {NET}.cross_attention_windows"
    return [text]


def _comparable(value):
    return tuple(value) if isinstance(value, list) else value


def _text(value) -> str:
    """As an override has it."""
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower()


def _run(given: argparse.Namespace) -> None:
    checkpoint.check(given.overrides)
    files = given.source, given.target
    if given.export:
        if given.overrides:
            raise CheckpointError(f"a checkpoint has its config: leave out {given.overrides[0]}")
        number = len(export(given.layout, *files, overwrite=given.overwrite))
        sys.stdout.write(f"{given.target}: {number} tensors, the average of {given.source}\n")
        return
    try:
        made = convert(given.layout, *files, given.overrides, overwrite=given.overwrite)
    except OtherWeights as error:  # whose lines are to stay apart
        raise SystemExit(f"error: {error}") from None
    place = f" under '{made['place']}'" if made["place"] else ""
    unused = f"; {', '.join(made['unused'])} is left out" if made["unused"] else ""
    word = f"ckpt={given.target}"
    if not re.fullmatch(r"[\w./+-]+", given.target):
        word = f'"ckpt={checkpoint.quoted(given.target)}"'
    sys.stdout.write(
        f"{made['file']}: {made['parameters'] / 1e6:.1f} M parameters, the {made['tensors']} "
        f"tensors of {given.source}{place}{unused}\n"
        f"to sample: python sample.py {word}{made['told']}\n"
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m avdiffusion.convert",
        description="A checkpoint from weights that others have published, and the reverse.",
        epilog="\n".join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("layout", choices=list(LAYOUTS), help="whose names the weights have")
    parser.add_argument("source", help="the published file, such as Landscape.pt")
    parser.add_argument("target", help="the checkpoint to write, such as landscape.ckpt")
    parser.add_argument(
        "overrides", nargs="*", help="of the config, such as exp=landscape (that of AIST++: aist)"
    )
    parser.add_argument("--overwrite", action="store_true", help="write over an existing file")
    parser.add_argument(
        "--export", action="store_true", help="write the published file of a checkpoint instead"
    )
    checkpoint.guarded(_run, parser.parse_intermixed_args(words))


if __name__ == "__main__":
    main()
