"""A run's progress, and the states it goes on from."""

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import select

from services.trainer.training.reports import EpochReport, StepReport
from shared.db.models import Checkpoint
from shared.errors import InvalidInput, NotFound
from shared.ids import new_id
from shared.jobs import HandedBack, Paused, ledger
from shared.jobs.claim import Claim


class Saver:
    """Reports how a run goes and saves its state: every so often, and when it must stop but will go on."""

    def __init__(self, claim: Claim, every_seconds: float, micro_batch: int | None = None) -> None:
        """micro_batch: as the run asks for it."""
        self.claim, self.every_seconds, self.micro_batch = claim, every_seconds, micro_batch
        self.began = self.saved_at = time.monotonic()
        self.seconds_before = 0.0  # of the attempts that this one goes on from
        self.figures: dict[str, Any] = {}  # of the last step that was reported: an epoch's last always is
        self.first_step = 0  # done when training began in this attempt
        self.training_since = 0.0

    @property
    def seconds(self) -> float:
        """Time spent on the run so far, what an interrupted attempt did after its last save left out."""
        return round(self.seconds_before + time.monotonic() - self.began, 2)

    @contextmanager
    def newest(self) -> Iterator[Path | None]:
        """The newest saved state of the job as a local folder, if there is one."""
        query = select(Checkpoint).where(Checkpoint.job_id == self.claim.id, Checkpoint.kind == "resume")
        with self.claim.core.transaction() as session:
            row = session.scalar(query.order_by(Checkpoint.step.desc()).limit(1))
        if row is None:
            yield None
            return
        with ExitStack() as opened:
            try:
                folder = opened.enter_context(self.claim.core.store.local_folder(row.storage_key))
            except NotFound as gone:
                self.begin_anew(gone)
                yield None
                return
            self.seconds_before, self.first_step = float(row.metrics["seconds"]), row.step
            data = {"step": row.step, "epoch": row.epoch}
            self.claim.event("training.resumed", f"going on from step {row.step}", data)
            yield folder

    def begin_anew(self, reason: InvalidInput | NotFound) -> None:
        """The saved state is of no use: captions or class names were edited since, or the file is damaged or gone (the
        store was restored from a copy of another moment than the database)."""
        self.seconds_before, self.first_step = 0.0, 0
        message = (
            "training begins anew: its saved state is of other captions, class names or weights than there are now"
            if reason.code == "state_of_another_run"
            else "training begins anew: its saved state cannot be read"
        )
        self.claim.event("warning.begun_anew", message, {"code": reason.code}, level="warning")

    def on_step(self, report: StepReport) -> None:
        now = time.monotonic()
        self.training_since = self.training_since or now
        if report.due:
            self._report(report)
        try:
            self.claim.check()
        except (Paused, HandedBack):
            self._save(report)
            raise
        if now - self.saved_at >= self.every_seconds and report.step < report.total_steps:
            self._save(report)

    def _report(self, report: StepReport) -> None:
        self.figures = _figures(report)
        epochs = {"epoch": report.epoch, "epochs": report.epochs}
        self.claim.progress("training", report.step, report.total_steps, **epochs, **self.figures)
        if report.micro_batch != self.micro_batch:
            self.micro_batch = report.micro_batch
            message = f"memory ran out: images are encoded {report.micro_batch} at a time; the loss sees the same batch"
            self.claim.event("warning.out_of_memory", message, {"micro_batch": report.micro_batch}, level="warning")

    def on_epoch(self, report: EpochReport) -> None:
        best = "" if report.best_val_top1 is None else f", best {report.best_val_top1:.3f} at {report.best_epoch}"
        shown = "" if report.val_top1 is None else f": val top-1 {report.val_top1:.3f}{best}"
        data = {
            "epoch": report.epoch,
            "epochs": report.epochs,
            "step": report.step,
            "val_top1": report.val_top1,
            "best_val_top1": report.best_val_top1,
            "best_epoch": report.best_epoch,
            "eta_seconds": self._eta(report),
            **self.figures,
        }
        self.claim.event("training.epoch", f"epoch {report.epoch} of {report.epochs}{shown}", data)

    def _eta(self, report: EpochReport) -> float | None:
        """Seconds left at this attempt's pace, validation included."""
        done = report.step - self.first_step
        if not done or not self.training_since:
            return None
        return round((time.monotonic() - self.training_since) / done * (report.total_steps - report.step), 1)

    def _save(self, report: StepReport) -> None:
        key = f"training/{self.claim.id}-{self.claim.attempt}-{report.step}"
        with tempfile.TemporaryDirectory(prefix="captune-") as folder:
            report.snapshot(Path(folder))
            self.claim.core.store.put_folder(key, Path(folder))
        with self.claim.transaction() as session:
            ledger.drop_saved_states(session, self.claim.id)
            self.claim.advanced(session)
            session.add(
                Checkpoint(
                    id=new_id("ckpt"),
                    job_id=self.claim.id,
                    kind="resume",
                    step=report.step,
                    epoch=report.epoch,
                    storage_key=key,
                    metrics={"loss": _finite(report.loss), "seconds": self.seconds},
                )
            )
        self.saved_at = time.monotonic()


def _figures(report: StepReport) -> dict[str, Any]:
    """Of the step, in numbers a person reads; `parts` are the loss's, unweighted."""
    return {
        "loss": _finite(round(report.loss, 4)),
        "parts": {name: _finite(round(value, 4)) for name, value in report.parts.items()},
        "learning_rate": float(f"{report.lr:.4g}"),
        "logit_scale": _finite(round(report.logit_scale, 3)),
        "grad_norm": _finite(float(f"{report.grad_norm:.4g}")),
        "images_per_second": round(report.images_per_s, 1),
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: the gradients' norm in a float16 step that was skipped, or a loss about to be refused."""
    return value if math.isfinite(value) else None
