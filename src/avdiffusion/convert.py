"""Checkpoints from the weights that others have published.

python -m avdiffusion.convert mm_diffusion Landscape.pt landscape.ckpt exp=landscape
python -m avdiffusion.convert mm_diffusion AIST++.pt aist.ckpt exp=aist
python -m avdiffusion.convert mm_diffusion ema_0.9999_100000.pt own.ckpt exp=folder data.root=DIR
python -m avdiffusion.convert guided_diffusion Landscape_SR.pt landscape_sr.ckpt exp=landscape_sr
python -m avdiffusion.convert guided_diffusion 64_256_upsampler.pt upsampler.ckpt exp=landscape_sr

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

from avdiffusion import checkpoint, published, published_unet
from avdiffusion.checkpoint import CheckpointError
from avdiffusion.nn.coupled_unet import CoupledUNet
from avdiffusion.nn.unet import UNet
from avdiffusion.published import OtherWeights, bare, differences

# Where files keep weights among other things, the average before what is trained.
PLACES = ("ema", "ema_state_dict", "model_ema", "state_dict", "model_state_dict", "model")
NET = "model.diffusion.net"


@dataclass(frozen=True)
class Layout:
    """How others name the weights of a network.

    `keys`: the module that knows these names; `first`: what the name of its first convolution
    begins with; `unused`: tensors that ours has no use for; `sample`: how it is sampled from.
    """

    net: type[nn.Module]
    keys: ModuleType
    first: str
    experiments: str
    unused: tuple[str, ...] = ()
    sample: str = ""


LAYOUTS = {
    "mm_diffusion": Layout(
        CoupledUNet, published, "input_blocks.0.0.video_conv.", "exp=landscape or exp=aist"
    ),
    "guided_diffusion": Layout(
        UNet,
        published_unet,
        "input_blocks.0.0.weight",
        "exp=landscape_sr or exp=aist_sr",
        unused=("label_emb.weight",),
        sample=" given=DIR",
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
    source, target = Path(source), Path(target)
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder: name the file to write")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target} cannot be written: there is no folder {target.parent}")
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} is there already: give another name, or --overwrite")
    if target.exists() and source.exists() and target.samefile(source):
        raise CheckpointError(f"{target} is the file to read: give another name")
    found, place = weights(source, layout)
    unused = [key for key in LAYOUTS[layout].unused if key in found]
    used = {key: value for key, value in found.items() if key not in unused}
    where = "paths.run=${paths.runs}/${name}"  # there is no run whose folder it could be
    config = checkpoint.plain(checkpoint.compose([where, *overrides]))
    system = checkpoint.build(config["model"])
    fill(system, used, config, source, LAYOUTS[layout])
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
    }


def fill(
    system: nn.Module,
    found: Mapping[str, Tensor],
    config: dict,
    source: str | Path,
    layout: Layout,
) -> None:
    """Puts published weights into a system's network and its averages, if they are of that network.

    All of them then share their memory, and so does what is saved of them.
    """
    net = system.model.net
    if not isinstance(net, layout.net):
        raise CheckpointError(
            f"{NET} is a {type(net).__name__}, the weights are of a {layout.net.__name__}: "
            f"give {layout.experiments}"
        )
    try:
        state = layout.keys.from_published(net, found)
    except OtherWeights as error:
        text = f"{source} does not hold the network of this config\n{error}"
        raise OtherWeights("\n".join([text, *advice(found, config, layout)])) from None
    if isinstance(net, CoupledUNet):  # the other takes frames of any size
        net.check(*system.latent(1).values(), None)
    broken = [key for key, value in found.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{source} holds NaN or infinity in {len(broken)} tensors, such as {broken[0]}"
        )
    for each in (*system.model.modules(), *system.ema.modules()):
        if isinstance(each, layout.net):
            each.load_state_dict(state, assign=True)


def weights(path: Path, layout: str) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a file that may be weights in this layout, and where in it they are."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    content, place = checkpoint.content(path, mmap=True), None
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
        if name != layout and any(key.startswith(other.first) for key in found):
            raise CheckpointError(f"{path} holds {_what(found)}: convert it as {name}")
    return found, place


def _what(found: Mapping[str, Tensor]) -> str:
    """The kind of network, in words."""
    first = found.get("input_blocks.0.0.weight")
    if first is None:
        return "a network of video and sound together"
    what = "a super-resolution" if first.shape[1] == 6 else "an image"
    return f"{what} network ({first.shape[1]} channels in, {first.shape[0]} wide)"


def advice(found: Mapping[str, Tensor], config: dict, layout: Layout) -> list[str]:
    """What to change in a config for these weights, where their shapes tell."""
    if "input_blocks.1.0.video_in_layers.2.video_conv.weight" in found:
        return ["its convolutions of video are 3-D (video_type=3d), those of this network are not"]
    shapes = layout.keys.settings(found)
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
        f"to sample: python sample.py {word}{LAYOUTS[given.layout].sample}\n"
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m avdiffusion.convert",
        description="A checkpoint from weights that others have published.",
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
    checkpoint.guarded(_run, parser.parse_intermixed_args(words))


if __name__ == "__main__":
    main()
