"""What is settled before Hydra starts: which run goes on, and what other processes leave alone."""

import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from avdiffusion import run_folder
from avdiffusion.checkpoint import TYPED, CheckpointError, compose, plain, quoted, read

log = logging.getLogger("avdiffusion")

# What may differ when a run goes on: where and on how many devices, and what is printed.
FREE = ("ckpt", "paths", "logger", "strategy", "callbacks.progress", "trainer.devices")
FREE += ("trainer.num_nodes", "trainer.strategy", "trainer.accelerator", "trainer.default_root_dir")
FREE += ("data.num_workers", "data.micro_batch", "compile")
FREE += ("model.codec.system", "trust")  # which init.codec.system brings

SWEEP = {"-m", "--multirun"}
TELLING = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i"}
TELLING |= {"--shell-completion", "-sc"}
CHILD = "hydra.job.name=train_ddp_process_"  # as Lightning names those that it starts


def words(given: Sequence[str], configs: Path) -> list[str]:
    """A command line with the folder that `ckpt=auto` goes on in, as Hydra is to see it.

    Processes that a launcher starts beside the first one get no folder and no log file.
    """
    flags = {word.partition("=")[0] for word in given if word.startswith("-")}
    overrides = [word for word in given if not word.startswith("-")]
    if flags & TELLING or any(word.startswith(CHILD) for word in given):
        return list(given)  # runs nothing, or was started by the first process with all it needs
    parsed = [OverridesParser.create().parse_override(word) for word in overrides if "=" in word]
    auto = any(o.key_or_group == "ckpt" and o.value() == "auto" for o in parsed)
    if flags - SWEEP:
        if auto:
            raise ValueError(f"ckpt=auto cannot be together with {min(flags - SWEEP)}")
        return list(given)
    if flags and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("a sweep cannot run under torchrun: one torchrun command for each point")
    mode, extra = "sweep" if flags else "run", []
    placed = any(word.startswith(f"hydra.{mode}.dir=") for word in overrides)
    if auto and not placed:
        folder = (sweep if flags else unfinished)(overrides, configs)
        if folder:
            extra, placed = [f"hydra.{mode}.dir={quoted(str(folder))}"], True
    if flags:
        return [*given, *extra, named_by_swept(overrides)]
    if rank_zero_only.rank > 0:
        if not placed:
            extra = ["hydra.run.dir=.", *(["ckpt=null"] if auto else [])]
        log_file = "hydra.job_logging.handlers.file.filename"
        extra += ["hydra.output_subdir=null", f"{log_file}={os.devnull}"]
    return [*given, *extra, *started(overrides)]


def started(overrides: Sequence[str]) -> list[str]:
    """The devices that torchrun has started processes for, as overrides, where none are given."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    wanted = {"trainer.devices": here, "trainer.num_nodes": everywhere // here, "strategy": "ddp"}
    known = {word.partition("=")[0] for word in overrides}
    return [f"{key}={value}" for key, value in wanted.items() if key not in known]


def named_by_swept(overrides: Sequence[str]) -> str:
    """The word that makes Hydra name the points of a sweep by what differs between them."""
    parsed = [OverridesParser.create().parse_override(word) for word in overrides]
    fixed = ",".join(quoted(o.key_or_group) for o in parsed if not o.is_sweep_override())
    return f"hydra.job.config.override_dirname.exclude_keys=[{fixed}]"


def unfinished(overrides: Sequence[str], configs: Path) -> Path | None:
    """The newest run of the name and config that these overrides give which has more to do."""
    config = compose([word for word in overrides if not word.startswith("hydra")], configs=configs)
    for folder in _newest(Path(config.paths.runs, config.name), "config.yaml"):
        if run_folder.status(folder).get("status") == "finished":
            continue
        if difference(config, folder) is not None:
            continue
        # the first process of this very run may hold it by the time another one looks
        if rank_zero_only.rank > 0 or not run_folder.held(folder):
            return folder
    return None


def sweep(overrides: Sequence[str], configs: Path) -> Path | None:
    """The newest sweep that was started with the same overrides."""
    parsed = [OverridesParser.create().parse_override(word) for word in overrides]
    fixed = [o.input_line for o in parsed if not o.is_sweep_override() and not _hydra(o)]
    config = compose(fixed, configs=configs)
    asked = {o.input_line for o in parsed if not _free(o.key_or_group) and not _hydra(o)}
    for folder in _newest(Path(config.paths.runs, config.name, "multirun"), "multirun.yaml"):
        stored = OmegaConf.load(folder / "multirun.yaml").hydra.overrides.task
        if {word for word in stored if not _free(word.lstrip("+").partition("=")[0])} == asked:
            return folder
    return None


def difference(config: DictConfig, folder: Path) -> str | None:
    """The first setting in which `config` is another than that of the run in `folder`, if any."""
    stored, config = run_folder.config(folder), config.copy()
    if "paths" not in stored:
        return f"{folder / run_folder.CONFIG} cannot be read"
    OmegaConf.update(config, "paths.run", stored["paths"]["run"])
    here, there = dict(_leaves(plain(config))), dict(_leaves(stored))
    for key in sorted(here.keys() | there.keys()):
        if not _free(key) and (key not in here or key not in there or here[key] != there[key]):
            return f"{key} was {there.get(key, 'not there')}, is {here.get(key, 'not there')}"
    return None


def again() -> str:
    """The command that goes on with the run of this process."""
    words = [word for word in TYPED if not word.lstrip("+").startswith("ckpt=")]
    if not words:  # a worker of a sweep
        return "the command of the sweep with ckpt=auto"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "the same torchrun command with ckpt=auto"
    return shlex.join(["python", *words, "ckpt=auto"])


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run that can be read; None if it has none."""
    for file in [*run_folder.checkpoints(folder).values(), folder / "checkpoints" / "last.ckpt"]:
        if file.is_file():
            try:
                read(file, mmap=True)
            except CheckpointError as error:
                log.warning("%s; the one before it is tried", error)
            else:
                return file
    return None


def _newest(root: Path, name: str) -> Iterator[Path]:
    """Folders in `root` that hold a file of this name, the one written to last first."""
    folders = [file.parent for file in root.glob(f"*/{name}")]
    yield from sorted(folders, key=lambda f: max(x.stat().st_mtime for x in f.iterdir()))[::-1]


def _leaves(node, key=""):
    if not isinstance(node, dict) or not node:
        return [(key, node)]
    return [leaf for k, v in node.items() for leaf in _leaves(v, f"{key}.{k}" if key else str(k))]


def _free(key):
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _hydra(override):
    return override.key_or_group.split(".")[0].split("/")[0] == "hydra"
