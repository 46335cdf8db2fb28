"""An evaluation's report to a logger, in whatever form it can show."""

from collections.abc import Iterable, Mapping

from pytorch_lightning.loggers import Logger

from avdiffusion.callbacks.publish import BUDGET, players
from avdiffusion.callbacks.wandb_run import Wandb
from avdiffusion.gallery import Entry

COLUMNS = ("label", "value", "unit", "low", "high", "n", "n_reference")
COLUMNS += ("floor", "floor_n", "chance", "ceiling", "power", "extractor")


def log_report(
    loggers: Iterable[Logger], report: Mapping, entries: Mapping[str, Entry], settings: Mapping
) -> None:
    """Every figure as `eval/<key>`; to W&B also a table a heading, and clips that play with sound.

    `report` is what report.json holds, `settings` the evaluation's config.
    """
    for logger in loggers:
        logger.log_hyperparams(dict(settings))
        values = {
            f"eval/{figure['key']}{end}": figure[part]
            for group in report["groups"]
            for figure in group["figures"]
            for part, end in (
                ("value", ""),
                ("low", "_low"),
                ("high", "_high"),
                ("floor", "_floor"),
            )
            if figure.get(part) is not None
        }
        logger.log_metrics(values, 0)
        if isinstance(logger, Wandb):
            with logger.tolerant("W&B did not take the report"):
                _tables(logger, report, entries)
        logger.finalize("success")


def _tables(logger, report, entries):
    import wandb

    sent = {"eval/clips": wandb.Html(players(list(entries.values()), BUDGET), inject=False)}
    for group in report["groups"]:
        rows = [[figure.get(name) for name in COLUMNS] for figure in group["figures"]]
        sent[f"eval/{group['title'].lower()}"] = wandb.Table(columns=list(COLUMNS), data=rows)
    logger.log_metrics(sent, 0)
