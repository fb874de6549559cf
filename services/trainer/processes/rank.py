"""One process of a run on several, as torchrun starts it: `python -m services.trainer.processes.rank FOLDER`."""

import os
import shutil
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from services.trainer.processes.handover import Events, asked_for_snapshot, read_job, write_result
from services.trainer.processes.peers import Ranks
from services.trainer.training.loop import Run
from services.trainer.training.reports import Diverged, EpochReport, StepReport
from shared.errors import InvalidInput

_POLL_SECONDS = 0.02
_TELLING_SECONDS = 60.0  # for the first process to tell the parent of an error that all of them have


def main(folder: Path) -> None:
    threading.Thread(target=_leave_with_the_parent, args=[folder], daemon=True).start()
    job = read_job(folder)
    device = torch.device(job.device)
    if job.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if job.device == "cuda" else "gloo")
    peers = Ranks()
    post = _Post(folder, every_step=job.device == "cpu") if peers.rank == 0 else None
    try:
        with Run(
            job.clip, job.method, job.data, job.features, job.seed, device, keep_last=job.keep_last, peers=peers
        ) as run:
            if job.resume is not None:
                run.restore(job.resume)
            result = run.run(post.on_step if post else _ignore, post.on_epoch if post else _ignore)
            if post is not None:
                write_result(folder, result)
                post.events.send({"kind": "result"})
            while True:  # the parent may still want the last step's state; it ends this
                if post is not None:
                    post.answer(run.save)
                time.sleep(_POLL_SECONDS)
    except InvalidInput as error:
        if post is None:
            time.sleep(_TELLING_SECONDS)  # ending now would take the first process along
            raise
        post.fail(error)


def _ignore(report: object) -> None:
    return None


def _leave_with_the_parent(folder: Path) -> None:
    """Standard input ends when the parent is done, or dead: then nobody else would remove the files."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


class _Post:
    """What the first process tells the parent. every_step: fetch figures at each step, which costs nothing on a CPU."""

    def __init__(self, folder: Path, *, every_step: bool) -> None:
        self.folder, self.every_step, self.events = folder, every_step, Events(folder)

    def on_step(self, report: StepReport) -> None:
        figures: dict[str, Any] | None = None
        if report.due or self.every_step:
            figures = asdict(report.figures) | {"grad_norm": report.grad_norm}
        names = ("step", "total_steps", "epoch", "epochs", "due", "micro_batch")
        told = {name: getattr(report, name) for name in names}
        self.events.send({"kind": "step", "report": told, "figures": figures})
        self.answer(report.snapshot)

    def on_epoch(self, report: EpochReport) -> None:
        told = {name: value for name, value in vars(report).items() if name != "snapshot"}
        self.events.send({"kind": "epoch", "report": told})
        self.answer(report.snapshot)

    def answer(self, save: Any) -> None:
        if (directory := asked_for_snapshot(self.folder)) is not None:
            save(directory)
            self.events.send({"kind": "snapshot"})

    def fail(self, error: InvalidInput) -> None:
        diverged = isinstance(error, Diverged)
        if isinstance(error, Diverged) and error.last_good is not None:
            write_result(self.folder, error.last_good)
        told = {"message": error.message, "code": error.code, "param": error.param, "diverged": diverged}
        self.events.send({"kind": "error", **told})
        time.sleep(_TELLING_SECONDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
