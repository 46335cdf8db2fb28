"""Weights & Biases without an account, without questions, and without a run that stops for it."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from avdiffusion.callbacks.loggers import Once

log = logging.getLogger("avdiffusion")
CLOUD = "https://api.wandb.ai"
FINISH = 300  # seconds that the end of a run waits for its upload at most


class Wandb(WandbLogger):
    """W&B in the mode that works: without its server offline, and if that fails too, not at all.

    Each change of mode is said in one line. The run is closed when training ends, so that the next
    point of a sweep gets its own.
    """

    once, gone = None, False

    @property
    @rank_zero_experiment
    def experiment(self) -> object:
        if self._experiment is None:
            self._wandb_init.pop("anonymous", None)  # Lightning passes it on, W&B warns of it
            with self.tolerant(f"{self.save_dir} cannot hold W&B's files"):
                Path(self.save_dir).mkdir(parents=True, exist_ok=True)
            for mode in dict.fromkeys((self._wandb_init["mode"], "offline", "disabled")):
                self._wandb_init["mode"] = mode
                with self.tolerant(f"W&B cannot start in mode {mode}"):
                    self._experiment = super().experiment
                    self._experiment.define_metric(
                        "val/loss", step_metric="trainer/global_step", summary="min,last"
                    )
                    break
            self.gone = False
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
        """What W&B, the network or the disk raises inside becomes one line, said once.

        Once W&B's own process is gone nothing more is sent to it.
        """
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        self.once = self.once or Once()
        with self.once(what, wandb.Error, HandleAbandonedError, MailboxClosedError):
            try:
                yield
            except (ConnectionError, HandleAbandonedError, MailboxClosedError):
                self.gone = True
                raise

    @rank_zero_only
    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        if not self.gone:
            with self.tolerant():
                super().log_metrics(metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict) -> None:
        if not self.gone:
            with self.tolerant():
                super().log_hyperparams(params)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        if not self.gone:
            with self.tolerant("W&B did not take a checkpoint"):
                super().after_save_checkpoint(checkpoint_callback)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._experiment is None:
            return
        self._id = self._wandb_init["id"] = self._experiment.id
        if not self.gone:
            rest = f"what is missing uploads: wandb sync --include-online {self.folder}"
            with self.tolerant(f"W&B did not close its run; {rest}"):
                super().finalize(status)
                self._experiment.finish(exit_code=int(status != "success"))
        if self.gone:
            import wandb

            with self.tolerant():
                wandb.teardown()  # now and unheard, not at exit with a traceback
            wandb.run = None  # else the next run of this process would go on with it
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

    `WANDB_MODE` overrides that. A `save_dir` that holds a W&B run goes on with it. `name` and
    `group` are those of `labels` unless given. Without the wandb package there is no logger, which
    one line says.
    """
    if find_spec("wandb") is None:
        if rank_zero_only.rank == 0:
            log.warning("W&B is not installed, the other loggers go on (pip install wandb)")
        return None
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # warns of every byte W&B does not take
    settings = {"silent": True, "init_timeout": 30}
    settings |= {"finish_timeout": FINISH, "finish_timeout_raises": True}
    known = wandb.Settings.model_fields  # older versions cannot limit the end
    return Wandb(
        save_dir=save_dir,
        project=project,
        name=name or labels(save_dir)[0],
        group=group or labels(save_dir)[1],
        job_type="train",
        tags=list(tags),
        entity=entity,
        log_model=log_model and mode == "online",
        mode=mode,
        id=earlier(save_dir),
        settings=wandb.Settings(**{k: v for k, v in settings.items() if k in known}),
    )


def labels(folder: str | Path) -> tuple[str, str]:
    """(name, group) of the run in a folder: a sweep's points form a group, else an experiment's.

    `runs/quickstart/2030-01-31_12-00-00`: that run, in the group quickstart.
    `runs/quickstart/multirun/2030-01-31_12-00-00/seed-0`: seed-0 in quickstart/2030-01-31_12-00-00.
    """
    parts = Path(folder).absolute().parts
    if parts[-3:-2] == ("multirun",):
        return parts[-1], f"{parts[-4]}/{parts[-2]}"
    return "/".join(parts[-2:]), parts[-2]


def earlier(folder: str | Path) -> str | None:
    """The id of the newest W&B run in a run folder, online or offline."""
    found = Path(folder).glob("wandb/*run-*_*-*/run-*.wandb")
    newest = max(found, key=lambda file: file.parent.name.partition("run-")[2], default=None)
    return newest and newest.stem.removeprefix("run-")


def logged_in() -> bool:
    """Whether W&B would find a key without asking: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    default = wandb.Settings.model_fields["base_url"].default
    hosts = [os.environ["WANDB_BASE_URL"]] if "WANDB_BASE_URL" in os.environ else [default, CLOUD]
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return any(netrc(file).authenticators(urlsplit(host).netloc) for host in hosts)
    except (OSError, NetrcParseError):
        return False
