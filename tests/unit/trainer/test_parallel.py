"""Runs on two processes, started as they really are, by torchrun with gloo."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from services.trainer.methods import build
from services.trainer.processes import parallel, rank
from services.trainer.processes.handover import (
    Events,
    Job,
    MappedImages,
    _write_images,
    read_job,
    read_result,
    write_job,
    write_result,
)
from services.trainer.training.loop import Diverged, StepReport, TrainResult, train
from shared.classifier.head import Head
from shared.errors import InvalidInput, Unavailable
from tests.unit.trainer.fine_tuning import (
    HP,
    Classes,
    Pairs,
    Stop,
    assert_same_result,
    features_of,
    make,
    saved,
    tune,
)


def assert_gradients_agree(single: Path, double: Path) -> None:
    """After one step AdamW's first moment is a tenth of the gradient."""
    alone, together = saved("optimizer/exp_avg/", single), saved("optimizer/exp_avg/", double)
    assert alone.keys() == together.keys()
    assert alone
    for name, value in alone.items():
        scale = float(value.abs().max()) + 1e-3
        torch.testing.assert_close(together[name] / scale, value / scale, rtol=0, atol=1e-6, msg=name)


def test_two_processes_give_the_loss_and_the_gradients_of_one(tiny, balls, tmp_path):
    """10 images are 5 for each. A callback that raises ends the run."""
    method = build("mmft", {**HP, "epochs": 1, "batch_size": 10})
    seen: dict[int, tuple[StepReport, float]] = {}
    for processes in (1, 2):

        def on_step(report: StepReport, processes=processes) -> None:
            seen[processes] = report, report.grad_norm
            report.snapshot(tmp_path / str(processes))
            raise Stop

        with pytest.raises(Stop):
            tune(tiny, method, balls, processes=processes, on_step=on_step)
    (single, norm), (double, norm_of_two) = seen[1], seen[2]
    assert double.loss == pytest.approx(single.loss, abs=1e-6)
    assert double.parts == pytest.approx(single.parts, abs=1e-6)
    assert norm_of_two == pytest.approx(norm, rel=1e-5)
    assert_gradients_agree(tmp_path / "1", tmp_path / "2")
    assert ranks_of(os.getpid()) == []


def test_killed_and_resumed_on_two_processes(tiny, balls, tmp_path):
    """A killed process ends the run with an error, the others do not wait for it for ever; the resumed run has the
    weights, average, head and kept epoch of an undisturbed one to the bit. 3 class texts are 1 and 2."""
    method = make(Classes, ema=0.8, micro_batch=2, epochs=30)
    alone: list[float] = []
    together: list[float] = []
    epochs: list[tuple[int, int]] = []
    single = tune(tiny, method, balls, on_step=lambda r: alone.append(r.loss))
    undisturbed = tune(
        tiny,
        method,
        balls,
        processes=2,
        keep_last=True,
        on_step=lambda r: together.append(r.loss),
        on_epoch=lambda r: epochs.append((r.epoch, r.step)),
    )
    assert epochs == [(i, 3 * i) for i in range(1, 31)]
    assert together[0] == pytest.approx(alone[0], abs=1e-6)
    assert together[:6] == pytest.approx(alone[:6], rel=1e-3)  # AdamW makes steps of rounding where gradients are 0
    assert undisturbed.trainable_parameters == single.trainable_parameters
    killed: list[int] = []

    def kill_one(report: StepReport) -> None:
        if report.step == 4:
            report.snapshot(tmp_path)
            killed.extend(ranks_of(os.getpid()))
            os.kill(killed[-1], signal.SIGKILL)

    with pytest.raises(Unavailable, match="One of the 2 processes of the run died") as caught:
        tune(tiny, method, balls, processes=2, on_step=kill_one, keep_last=True)
    assert caught.value.code == "process_died"
    assert len(killed) == 2
    assert ranks_of(os.getpid()) == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in killed)
    again: list[int] = []
    resumed = tune(
        tiny, method, balls, processes=2, resume=tmp_path, on_step=lambda r: again.append(r.step), keep_last=True
    )
    assert again[0] > 4
    assert again == list(range(again[0], 91))  # from the step that the processes were at when asked
    assert_same_result(undisturbed, resumed)


def ranks_of(pid: int) -> list[int]:
    """Process ids of the run's processes below `pid`: torchrun's children."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            command = (status.parent / "cmdline").read_bytes()
            if b"services.trainer.processes.rank" in command and b"torch.distributed.run" not in command:
                torchrun = Path(f"/proc/{_parent(status)}/stat")
                if _parent(torchrun) == pid:
                    found.append(int(status.parent.name))
        except OSError:
            continue  # ended meanwhile
    return found


def _parent(status: Path) -> int:
    return int(status.read_text().rpartition(")")[2].split()[1])


def test_an_error_of_the_run_is_the_parents(tmp_path, monkeypatch):
    """With what the epochs before had given."""
    error = Diverged.at("The loss is nan at step 5 of 12", make(Pairs))
    head = Head(torch.ones(3, 16), torch.zeros(3))
    error.last_good = TrainResult({"a": torch.arange(3.0)}, head, 1, None, [], 4, 1.0, 9.0, 3)
    monkeypatch.setattr(rank.time, "sleep", lambda seconds: None)
    rank._Post(tmp_path, every_step=True).fail(error)
    relay = parallel._Relay(tmp_path, lambda: None, lambda report: None, lambda report: None)
    with pytest.raises(Diverged, match="nan at step 5 of 12") as caught:
        relay.run()
    assert (caught.value.code, caught.value.param) == (error.code, error.param)
    assert caught.value.last_good is not None
    assert_same_result(caught.value.last_good, error.last_good)


def test_more_processes_than_gpus_are_refused(tiny, balls, monkeypatch):
    method = make(Pairs)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InvalidInput, match="2 processes need as many GPUs; this machine has 1"):
        train(tiny, method, balls, features=features_of(tiny, method, balls), seed=0, device="cuda", processes=2)


def test_a_job_and_a_result_survive_as_files(tiny, balls, tmp_path):
    method = make(Classes, ema=0.5)
    given = Job(tiny, method, balls, features_of(tiny, method, balls), 7, tmp_path / "x", "cpu", keep_last=True)
    write_job(tmp_path, given)
    job = read_job(tmp_path)
    assert (job.clip.name, job.clip.revision) == (tiny.name, tiny.revision)
    assert isinstance(job.method, Classes)
    assert job.method.hyperparameters == method.hyperparameters
    rows = torch.tensor([3, 1])
    assert torch.equal(job.data.images[rows], balls.images[rows])
    assert torch.equal(job.data.labels, balls.labels)
    assert job.data.captions == balls.captions
    assert torch.equal(job.features.prototypes, given.features.prototypes)
    assert (job.seed, job.resume, job.keep_last) == (7, (tmp_path / "x").resolve(), True)

    assert read_result(tmp_path) is None
    head = Head(torch.ones(3, 16), torch.zeros(3))
    numbers = {"best_epoch": 2, "val_top1": 0.5, "val_history": [0.1, 0.5], "steps": 6, "seconds": 1.0}
    result = TrainResult(
        model_state={"a": torch.arange(3.0)},
        head=head,
        **numbers,
        images_per_s=9.0,
        trainable_parameters=4,
        chosen={"wise_ft": {"curve": [[0.0, 0.1]]}},
        last_state={"a": torch.zeros(3)},
        last_head=head,
    )
    write_result(tmp_path, result)
    again = read_result(tmp_path)
    assert again is not None
    assert_same_result(again, result)


def test_no_images_are_a_file_too(tmp_path):
    _write_images(tmp_path / "none.npy", torch.empty(0, 3, 8, 8, dtype=torch.uint8))
    images = MappedImages(tmp_path / "none.npy")
    assert (len(images), images.shape) == (0, (0, 3, 8, 8))


def test_half_a_line_is_read_when_it_is_whole(tmp_path):
    events = Events(tmp_path)
    events.send({"kind": "step", "report": {"step": 1}})
    with events.path.open("a") as file:
        file.write('{"kind": "st')
        file.flush()
        assert [event["kind"] for event in events.new()] == ["step"]
        assert list(events.new()) == []
        file.write('ep", "report": {"step": 2}}\n')
    assert [json.dumps(event["report"]) for event in events.new()] == ['{"step": 2}']
