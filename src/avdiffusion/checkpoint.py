"""Configs and checkpoints: composing, building, finding, safely loading; how commands end."""

import hashlib
import logging
import os
import pickle
import re
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from avdiffusion.sweep import Point, PointFailed, ended
from avdiffusion.systems.system import FORMAT, System
from avdiffusion.trust import objections

CONFIGS = Path(__file__).parents[2] / "configs"
FULL_ERRORS = "HYDRA_FULL_ERROR" in os.environ  # as the user set it
BUILT = ("model", "sampler", "guide")  # what of a stored config becomes objects
# What reading a damaged or forged file may end in, besides UnpicklingError.
UNREADABLE = (RuntimeError, EOFError, BadZipFile, LookupError, OSError, ValueError, TypeError)
UNREADABLE += (AttributeError, AssertionError, MemoryError, OverflowError, struct.error)
TYPED: list[str] = []  # the command line, before anything is added to it

log = logging.getLogger("avdiffusion")


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read, trusted or built; the message says which."""


def compose(
    overrides: Sequence[str] = (), *, config: str = "train", configs: Path = CONFIGS
) -> DictConfig:
    """The config a command line of these overrides would run with."""
    if GlobalHydra.instance().is_initialized():
        GlobalHydra.instance().clear()
    with initialize_config_dir(str(configs), version_base="1.3"):
        return hydra_compose(config, overrides=list(overrides))


def build(config: Any, **extra: Any) -> Any:
    """What a config node describes; the cause of a failure is raised as it was."""
    try:
        return instantiate(config, **extra)
    except InstantiationException as error:
        cause = error.__cause__
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ValueError | OSError):
            raise cause from error
        raise


def plain(config: DictConfig) -> dict:
    """A config as resolved dicts and lists, fit for a checkpoint."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def find(ckpt: str | Path, runs: str | Path = "runs") -> Path:
    """The file a path, a run folder, `RUN/best`, or `best` or `last` of the newest run means."""
    if not isinstance(ckpt, str | Path):
        raise CheckpointError(
            f"{ckpt} names no checkpoint, or several, which sample.py alone takes"
        )
    path = Path(ckpt)
    if path.is_file():
        return path
    if path.is_dir():
        names = ("last", "best")
        found = [f for n in names for f in (path / "checkpoints" / f"{n}.ckpt", path / f"{n}.ckpt")]
        found = [file for file in found if file.is_file()]
        if found:
            return found[0]
        raise CheckpointError(f"{path} holds no checkpoints/last.ckpt: it is no run folder")
    if path.name in ("best", "last"):
        if path.parent != Path("."):
            within = [path.parent / "checkpoints" / f"{path.name}.ckpt"]
        else:
            within = Path(runs).glob(f"**/checkpoints/{path.name}.ckpt")
        files = sorted((f for f in within if f.is_file()), key=lambda f: f.stat().st_mtime)
        if files:
            return files[-1]
        where = path.parent if path.parent != Path(".") else runs
        raise CheckpointError(f"no {path.name}.ckpt below {where}: train first, or give a path")
    raise CheckpointError(f"no checkpoint at {path}")


def read(ckpt: str | Path, *, mmap: bool = False) -> dict:
    """A checkpoint's content, tensors and plain values only, with its format checked.

    With `mmap`, tensors stay in the file until they are used.
    """
    path = find(ckpt)
    stored = content(path, mmap=mmap)
    mark = stored.get("avdiffusion") if isinstance(stored, dict) else None
    if not isinstance(mark, dict) or not isinstance(mark.get("format"), int):
        raise CheckpointError(
            f"{path} is no avdiffusion checkpoint: it carries no format version. Published weights "
            "have to be converted first"
        )
    if mark["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {mark['format']}, this version reads up to {FORMAT}: update "
            "avdiffusion"
        )
    config = stored.get("hyper_parameters")
    if not isinstance(config, dict) or not all(isinstance(config.get(k), dict) for k in BUILT):
        raise CheckpointError(f"{path} is damaged: its config lacks one of {', '.join(BUILT)}")
    return stored


def content(path: Path, *, mmap: bool = False) -> Any:
    """What a file of anyone's holds, tensors and plain values only."""
    if not is_zipfile(path):
        raise CheckpointError(f"{path} is no checkpoint, or only the beginning of one")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        # Torch's own words end in the advice to load it all the same.
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"it would call {named[1]}" if named else "or is damaged"
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors and plain values, {found}"
        ) from error
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint: {first_line(error)}"
        ) from error


def write(content: dict, path: Path) -> None:
    """Writes a checkpoint beside its place, then renames it."""
    part = path.with_name(f".{path.name}.part")
    try:
        torch.save(content, part)
        os.replace(part, path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"{path} could not be written: {first_line(error)}") from error
    finally:
        part.unlink(missing_ok=True)


def load(
    ckpt: str | Path,
    *,
    trust: bool = False,
    device: str | None = None,
    replace: dict[str, Any] | None = None,
) -> System:
    """The system a checkpoint describes, with its weights, ready to sample.

    The stored config may build only what `trust.objections` has nothing against; `trust=True` lifts
    that for a file whose origin is known. `replace` may hold another `sampler` and `guide`, or
    settings to put on the stored ones (`merged`). The config in force stays at `system.config`.
    """
    stored = read(ckpt)
    config = stored["hyper_parameters"]
    judge(ckpt, {part: config[part] for part in BUILT}, trust=trust)
    for name, place in (("sampler", "sampler"), ("guide", "guides")):
        before = config[name]
        if name in (replace or {}):
            config[name] = merged(before, replace[name], name)
        if place in config["model"]:
            config["model"][place] = config[name]
        elif config[name] != before:
            raise CheckpointError(f"{ckpt} makes its clips without a {name}: leave out {name}=")
    try:
        system = build(config["model"])
    except (HydraException, OmegaConfBaseException, TypeError, AttributeError) as error:
        raise CheckpointError(f"{ckpt} describes no model: {message(error)}") from error
    if not isinstance(system, System):
        raise CheckpointError(f"{ckpt} describes a {type(system).__name__}, which is no system")
    try:
        system.load_state_dict(stored["state_dict"])
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{ckpt} does not fit its own config: {first_line(error)}") from error
    system.config = config
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return system.eval().to(device)


def judge(ckpt: str | Path, config: dict, *, trust: bool) -> None:
    """Raises CheckpointError if a stored config would build what is not ours, unless trusted."""
    for objection in objections(config):
        if not trust:
            raise CheckpointError(
                f"{ckpt} is refused: {objection}. If you know where the file is from, allow that "
                "with trust=true"
            )
        log.warning("%s is trusted, although %s", ckpt, objection)


def graft(config: DictConfig, resume: str | Path | None = None) -> Path | None:
    """Puts another system's config where a latent model needs it, `model.codec.system`.

    It is that of the checkpoint `init.codec.system` names, which is returned: `pour` brings its
    weights. A run that goes on has both in its own checkpoint, `resume`.
    """
    codec = config.model.get("codec") or {}
    given = config.init.codec.system
    if "system" not in codec or codec.system is not None:
        if given is not None:
            raise CheckpointError(
                f"{config.name} diffuses no other model's latents: leave out init.codec.system=, "
                "or choose model/codec=latent or decoder"
            )
        return None
    if resume is None and given is None:
        raise CheckpointError(
            f"{config.name} works on what another model encodes: train that first, then give its "
            "checkpoint as init.codec.system=CKPT"
        )
    path = find(resume or given, config.paths.runs)
    stored = read(path, mmap=True)["hyper_parameters"]
    part = stored["model"]
    if resume is not None:
        part = (part.get("codec") or {}).get("system")
    if part is None:
        raise CheckpointError(
            f"{path} is no checkpoint of {config.name}: it diffuses no latents. To begin with what "
            f"it encodes: init.codec.system={path}"
        )
    judge(path, {"model": part}, trust=config.trust)
    for name in ("sample_rate", "channels"):
        there, here = ((each.get("data") or {}).get(name) for each in (stored, config))
        if there != here:
            raise CheckpointError(
                f"{path} was trained with data.{name}={there}, this is data.{name}={here}: give "
                f"data.{name}={there}, or another checkpoint as init.codec.system="
            )
    with open_dict(config):
        config.model.codec.system = part
    return path if resume is None else None


def clips_of(config: dict) -> dict:
    """How the clips that a stored config trains on are read: its dataset's settings, or those of
    the clips in it."""
    trained = config["data"].get("train") or {}
    return trained.get("clips") or trained


def pour(path: Path, system: System) -> None:
    """Puts the averaged weights of the checkpoint that was grafted into a system's codec."""
    weights = read(path, mmap=True)["state_dict"]

    def under(begin: str) -> dict:
        return {k.removeprefix(begin): v for k, v in weights.items() if k.startswith(begin)}

    system.codec.model.load_state_dict(under("ema.ema_model."))
    if (inner := getattr(system.codec, "inner", None)) is not None:
        inner.load_state_dict(under("codec."))


def merged(stored: dict, given: Any, name: str) -> dict:
    """`given`, or if that says `stored: true`, what is stored with the other keys set on it.

    What builds something of its own, such as another guide, is added to it.
    """
    given = plain(given) if isinstance(given, DictConfig) else dict(given)
    if not given.pop("stored", False):
        return given
    given = {key: value for key, value in given.items() if value is not None}
    added = {key for key, value in given.items() if isinstance(value, dict) and "_target_" in value}
    unknown = sorted(given.keys() - stored.keys() - added)
    if unknown:
        known = ", ".join(key for key in stored if key != "_target_")
        raise ValueError(
            f"{name}.{unknown[0]} is no setting of the stored {name}, which has {known}"
        )
    return {
        **stored,
        **{
            key: {**stored.get(key, {}), **value} if isinstance(value, dict) else value
            for key, value in given.items()
        },
    }


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def folder_name(overrides: str) -> str:
    """A sweep point's overrides as one folder name, at most 120 characters, still unique."""
    name = re.sub(r"[^\w.,+\-]+", "_", overrides) or "default"
    if len(name) <= 120:
        return name
    return f"{name[:111]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def quoted(value: str) -> str:
    """A value that Hydra takes as it is, whatever characters are in it."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def check(overrides: Sequence[str]) -> None:
    """Ends the command at a word that Hydra would not understand."""
    for word in overrides:
        try:
            OverridesParser.create().parse_override(word)
        except (OverrideParseException, HydraException):
            name, _, value = word.partition("=")
            raise SystemExit(
                f"error: {word!r} cannot be parsed; a value with = , ~ spaces or brackets is "
                f'quoted twice: "{name}={quoted(value)}"'
            ) from None


def run(
    main: Callable[[], Any],
    prepare: Callable[[Sequence[str], Path], list[str]] | None = None,
) -> None:
    """Runs an entry point; what a user can mend ends in one line on stderr and exit status 1.

    `prepare(words, configs)` gives the words of the command line that Hydra is to see.
    """
    TYPED[:] = sys.argv
    check([a for a in sys.argv[1:] if not a.startswith("-") and "=" in a])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print in many lines
    try:
        if prepare is not None:
            sys.argv[1:] = prepare(sys.argv[1:], Path(sys.argv[0]).absolute().parent / "configs")
        main()
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        if FULL_ERRORS:
            raise
        raise SystemExit(f"error: {message(error)}") from error
    except PointFailed as error:
        raise SystemExit(f"error: {ended(error)}") from error


def guarded(task: Callable[[DictConfig], Any], config: DictConfig) -> Any:
    """`task(config)`; the errors people can act on become `error: ...` and exit status 1.

    In a sweep they, and all others, end only their point (`sweep.Point`).
    """
    known = (ValueError, OSError, HydraException, OmegaConfBaseException)
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        with Point(HydraConfig.get().runtime.output_dir, known=known, message=message):
            return task(config)
    try:
        return task(config)
    except known as error:
        if FULL_ERRORS:
            raise
        raise SystemExit(f"error: {message(error)}") from error


def message(error: BaseException) -> str:
    """What to tell a user: an error's own words, in one line."""
    text = str(error).strip()
    if "Missing mandatory value" in text:
        key = re.findall(r"(?:full_key|value): (\S+)", text)[-1]
        return f"{key} is needed: give it as {key}=..."
    if "Could not load 'hydra/launcher/" in text:
        return 'this launcher is not installed: pip install -e ".[sweep]" -c constraints.txt'
    if "Original Traceback" in text:  # of a loader's worker; the error itself comes last
        text = text.splitlines()[-1].partition(": ")[2]
    text = re.split(r"\s+(?:Config search path|full_key):", text)[0]
    return " ".join(text.split()) or type(error).__name__
