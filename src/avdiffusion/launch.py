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

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes out of one run folder
    fcntl = None

log = logging.getLogger("avdiffusion")

# What may differ when a run goes on: where and on how many devices, and what is printed.
FREE = ("ckpt", "paths", "logger", "strategy", "callbacks.progress", "trainer.devices")
FREE += ("trainer.num_nodes", "trainer.strategy", "trainer.accelerator", "trainer.default_root_dir")
FREE += ("data.num_workers", "data.micro_batch")


def words(given: Sequence[str], configs: Path) -> list[str]:
    """A command line with the folder that `ckpt=auto` goes on in, as Hydra is to see it.

    Processes that a launcher starts beside the first one get no folder and no log file.
    """
    flags = {word for word in given if word.startswith("-")}
    overrides = [word for word in given if not word.startswith("-")]
    if flags - {"-m", "--multirun"}:
        return list(given)  # --help, --cfg and the like: Hydra's business
    if any(word.startswith("hydra.job.name=train_ddp_process_") for word in given):
        return list(given)  # started by the first process, with all that is needed
    mode, extra = "sweep" if flags else "run", []
    auto = "ckpt=auto" in [word.lstrip("+") for word in overrides]
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
        if difference(config, folder) is None and not (rank_zero_only.rank == 0 and _held(folder)):
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
    stored = OmegaConf.load(folder / "config.yaml")
    config = config.copy()
    OmegaConf.update(config, "paths.run", stored.paths.run)
    here, there = dict(_leaves(plain(config))), dict(_leaves(plain(stored)))
    for key in sorted(here.keys() | there.keys()):
        if not _free(key) and (key not in here or key not in there or here[key] != there[key]):
            return f"{key} was {there.get(key, 'not there')}, is {here.get(key, 'not there')}"
    return None


def again() -> str:
    """The command that goes on with the run of this process."""
    words = [word for word in TYPED if not word.lstrip("+").startswith("ckpt=")]
    if not words:  # a worker of a sweep
        return "the command of the sweep with ckpt=auto"
    return shlex.join(["python", *words, "ckpt=auto"])


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run that can be read; None if it has none."""
    files = sorted((folder / "checkpoints").glob("step*.ckpt"), reverse=True)
    for file in [folder / "checkpoints" / "last.ckpt", *files]:
        if file.is_file():
            try:
                read(file)
            except CheckpointError as error:
                log.warning("%s; the one before it is tried", error)
            else:
                return file
    return None


def hold(folder: Path) -> object:
    """Keeps other processes from training in this folder for as long as the result lives."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")  # noqa: SIM115
    if fcntl is not None:
        try:
            # a lock of the process: workers don't inherit it, and a kill releases it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process is training in {folder}") from error
    return file


def _held(folder):
    try:
        hold(folder).close()
    except ValueError:
        return True
    return False


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
