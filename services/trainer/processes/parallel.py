"""A run on several processes of this machine, one to a GPU. torchrun starts and watches them; rank.py is what they do.

The parent hands the run over as files and passes on what the first process tells: callbacks are called here, and one
that raises ends the run. `snapshot` asks the first process to save its state, which it does after its next step. A
process that dies takes the others with it and raises Unavailable; if this one dies, they leave by themselves.
"""

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from services.trainer.features import Features
from services.trainer.methods.base import FineTune
from services.trainer.processes.handover import Events, Job, ask_for_snapshot, read_result, write_job
from services.trainer.training.data import TrainData
from services.trainer.training.reports import Diverged, EpochReport, Figures, StepReport, TrainResult
from shared.clip.loading import LoadedClip
from shared.errors import InvalidInput, Unavailable

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.02
_LEAVE_SECONDS = 20.0  # for the processes to end when told to
_LOG_BYTES = 2000  # of what a process that died had said


def train_in_processes(
    clip: LoadedClip,
    method: FineTune,
    data: TrainData,
    *,
    features: Features,
    seed: int,
    resume: Path | None,
    on_step: Callable[[StepReport], None],
    on_epoch: Callable[[EpochReport], None],
    device: str,
    keep_last: bool,
    processes: int,
) -> TrainResult:
    """`training.loop.train` on `processes` of them. Of a step that is not due on a GPU, the report has the figures of
    the last one that was. Needs disk space for the pixels in the temporary directory."""
    kind = _kind(device, processes)
    with tempfile.TemporaryDirectory(prefix="captune-run-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_job(folder, Job(clip, method, data, features, seed, resume, kind, keep_last))
        with _running(folder, processes) as alive:
            return _Relay(folder, alive, on_step, on_epoch).run()


def _kind(device: str, processes: int) -> str:
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device.partition(":")[0]
    if kind == "cuda" and torch.cuda.device_count() < processes:
        raise InvalidInput(
            f"{processes} processes need as many GPUs; this machine has {torch.cuda.device_count()}.",
            code="too_many_processes",
        )
    return kind


@contextmanager
def _running(folder: Path, processes: int) -> Iterator[Callable[[], None]]:
    """The processes, while inside. Yields a function that raises Unavailable unless they run."""
    launch = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes), "--max-restarts", "0"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *launch,
        "-m",
        "services.trainer.processes.rank",
        str(folder),
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes)),
    }
    said = folder / "log.txt"
    with said.open("wb") as out:
        # Their standard input stays open as long as this process lives: that is how they know.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, env=environment
        )

    def alive() -> None:
        if (code := process.poll()) is not None:
            tail = said.read_bytes()[-_LOG_BYTES:].decode(errors="replace")
            raise Unavailable(
                f"One of the {processes} processes of the run died (exit code {code}), so it was stopped; it can go on "
                f"from its last saved state. They last said:\n{tail}",
                code="process_died",
            )

    try:
        yield alive
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("the run's processes did not leave within %g s and are killed", _LEAVE_SECONDS)
            process.terminate()  # torchrun ends its own
            try:
                process.wait(_LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class _Relay:
    def __init__(
        self,
        folder: Path,
        alive: Callable[[], None],
        on_step: Callable[[StepReport], None],
        on_epoch: Callable[[EpochReport], None],
    ) -> None:
        self.folder, self.alive, self.on_step, self.on_epoch = folder, alive, on_step, on_epoch
        self.events = Events(folder)
        self.waiting: deque[dict[str, Any]] = deque()
        self.figures: dict[str, Any] = {}

    def run(self) -> TrainResult:
        while True:
            event = self.waiting.popleft() if self.waiting else self._next()
            if event["kind"] == "step":
                self.on_step(self._step_report(event))
            elif event["kind"] == "epoch":
                self.on_epoch(EpochReport(**event["report"], snapshot=self.snapshot))
            elif event["kind"] == "result":
                result = read_result(self.folder)
                assert result is not None
                return result

    def _next(self) -> dict[str, Any]:
        """The next event, once there is one; others that came with it wait. Raises what the run raised."""
        while True:
            self.waiting.extend(self.events.new())
            if not self.waiting:
                self.alive()
                self.waiting.extend(self.events.new())  # it may have told more before it ended
            if self.waiting:
                event = self.waiting.popleft()
                if event["kind"] == "error":
                    raise self._error(event)
                return event
            time.sleep(_POLL_SECONDS)

    def _step_report(self, event: dict[str, Any]) -> StepReport:
        self.figures = event["figures"] or self.figures
        figures = dict(self.figures)
        grad_norm: float = figures.pop("grad_norm")
        return StepReport(
            **event["report"],
            snapshot=self.snapshot,
            fetch=lambda: Figures(**figures),
            fetch_grad_norm=lambda: grad_norm,
        )

    def snapshot(self, directory: Path) -> None:
        """The state after the step that the processes are at by now."""
        ask_for_snapshot(self.folder, directory)
        later = []
        while (event := self._next())["kind"] != "snapshot":
            later.append(event)
        self.waiting.extendleft(reversed(later))

    def _error(self, event: dict[str, Any]) -> InvalidInput:
        kind = Diverged if event["diverged"] else InvalidInput
        error = kind(event["message"], code=event["code"], param=event["param"])
        if isinstance(error, Diverged):
            error.last_good = read_result(self.folder)
        return error
