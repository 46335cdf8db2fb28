"""Loggers that need no account, ask no question and stop no run."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_only

log = logging.getLogger("avdiffusion")


class Csv(CSVLogger):
    """`metrics.csv` in the run folder, written row by row; a run that goes on appends to it."""

    def __init__(self, *, save_dir: str | Path):
        super().__init__(save_dir, name=None, version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _Appending(log_dir=self.log_dir)
        return self._experiment

    def log_hyperparams(self, *_: object) -> None:
        """Nothing: `config.yaml` lies beside `metrics.csv`."""


class _Appending(ExperimentWriter):
    """Lightning's writer deletes the file it finds; this one takes over its columns."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            self.metrics_keys = path.read_text().partition("\n")[0].strip().split(",")


class Wandb(WandbLogger):
    """W&B in the mode that works: without its server offline, and if that fails too, not at all.

    Each change of mode is said in one line. The run is closed when training ends, so that the next
    point of a sweep gets its own.
    """

    _said = frozenset()

    @property
    @rank_zero_experiment
    def experiment(self) -> object:
        if self._experiment is None:
            self._wandb_init.pop("anonymous", None)  # Lightning passes it on, W&B warns of it
            Path(self.save_dir).mkdir(parents=True, exist_ok=True)
            for mode in dict.fromkeys((self._wandb_init["mode"], "offline", "disabled")):
                self._wandb_init["mode"] = mode
                with self.tolerant(f"W&B cannot start in mode {mode}"):
                    self._experiment = super().experiment
                    break
            if mode == "offline":
                log.info("W&B: offline; to upload later: wandb sync %s", self.folder)
            elif mode == "online":
                log.info("W&B: %s", self._experiment.url)
        return self._experiment

    @property
    def folder(self) -> Path:
        """Where this run's files are."""
        return Path(self._experiment.dir).parent

    @contextmanager
    def tolerant(self, what: str = "W&B did not take a metric") -> Iterator[None]:
        """What W&B, the network or the disk raises inside becomes one line, said once."""
        import wandb

        try:
            yield
        except (wandb.Error, OSError) as error:
            reason = f"{what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            if reason not in self._said:
                log.warning("%s", reason)
            self._said |= {reason}

    @rank_zero_only
    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        with self.tolerant():
            super().log_metrics(metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict) -> None:
        with self.tolerant():
            super().log_hyperparams(params)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._experiment is None:
            return
        with self.tolerant():
            super().finalize(status)
            self._id = self._wandb_init["id"] = self._experiment.id
            self._experiment.finish(exit_code=int(status != "success"))
        self._experiment = None


def wandb_logger(
    *,
    save_dir: str | Path,
    project: str = "avdiffusion",
    name: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    entity: str | None = None,
    log_model: bool = False,
) -> Wandb | None:
    """W&B, online when there is an API key or a login, else offline in `save_dir`.

    `WANDB_MODE` overrides that. `name` is the last two parts of `save_dir` unless given. Without
    the wandb package there is no logger, which one line says.
    """
    if find_spec("wandb") is None:
        if rank_zero_only.rank == 0:
            log.warning("W&B is not installed, the other loggers go on (pip install wandb)")
        return None
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    return Wandb(
        save_dir=save_dir,
        project=project,
        name=name or "/".join(Path(save_dir).parts[-2:]),
        group=group,
        tags=list(tags),
        entity=entity,
        log_model=log_model and mode == "online",
        mode=mode,
        settings=wandb.Settings(silent=True, init_timeout=30),
    )


def logged_in() -> bool:
    """Whether W&B would find a key without asking: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return bool(netrc(file).authenticators(host))
    except (OSError, NetrcParseError):
        return False
