"""The measured rate: of a made-up batch first, then of what the engine did while it had work."""

from collections.abc import Sequence

import pytest

from services.captioner.engines.base import CaptionRequest, Generation
from services.captioner.serving import rate
from services.captioner.serving.rate import Meter, warm_up
from shared.errors import CaptuneError, InvalidInput, Unavailable
from tests.unit.captioner.serving.echo import Echo


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> Meter:
    return Meter(clock)


def work(meter: Meter, clock: Clock, captions: int, seconds: float, idle: float = 0.0) -> None:
    meter.begin()
    clock.now += seconds
    meter.end(captions)
    clock.now += idle


def captions_per_second(meter: Meter) -> float:
    measured = meter.rate()
    assert measured is not None
    return measured.captions_per_second


def test_nothing_measured_is_none(meter: Meter, clock: Clock) -> None:
    assert meter.rate() is None
    work(meter, clock, 1, 0.5)
    assert meter.rate() is None  # too little to tell


def test_idle_time_does_not_count_and_lanes_that_overlap_count_once(meter: Meter, clock: Clock) -> None:
    work(meter, clock, 8, 2.0, idle=1000.0)
    assert captions_per_second(meter) == 4.0
    for _ in range(2):
        meter.begin()
    clock.now += 2.0
    meter.end(4)
    meter.end(4)  # 8 captions in 2 s of two lanes: still 4 per second; the last falls into the window to come
    clock.now += 50.0
    work(meter, clock, 4, 2.0)
    assert captions_per_second(meter) == pytest.approx((8 * 4 + 4 * 2 + 8 * 4) / 20)


def test_lone_requests_hardly_move_the_average_of_full_batches(meter: Meter, clock: Clock) -> None:
    for _ in range(20):
        work(meter, clock, 16, 2.0)
    for _ in range(5):
        work(meter, clock, 1, 2.0)
    assert 7.5 < captions_per_second(meter) < 8.0


def test_it_follows_when_the_work_changes(meter: Meter, clock: Clock) -> None:
    meter.measured(16, 1.0)
    for _ in range(100):
        work(meter, clock, 16, 4.0)
        meter.count(Generation("x", "stop", prompt_tokens=300, completion_tokens=60))
    measured = meter.rate()
    assert measured is not None
    assert measured.captions_per_second == pytest.approx(4.0, rel=0.02)
    assert measured.completion_tokens_per_second == pytest.approx(240.0, rel=0.02)
    assert (measured.prompt_tokens_per_caption, measured.completion_tokens_per_caption) == (300, 60)


class Recording(Echo):
    def __init__(self, max_batch: int) -> None:
        super().__init__(max_batch)
        self.requests: list[CaptionRequest] = []
        self.error: Exception | None = None

    def generate(self, prepared: Sequence[CaptionRequest]) -> list[str]:
        self.requests += prepared
        if self.error:
            raise self.error
        return super().generate(prepared)


def test_warm_up_asks_what_a_caption_job_asks_in_growing_batches(meter: Meter) -> None:
    engine = Recording(max_batch=20)
    warm_up(engine, meter)
    assert [len(batch) for batch in engine.batches] == [1, 1, 4, 16, 20]
    for request in engine.requests:
        (picture,) = request.images
        assert (picture.mode, picture.size, request.max_tokens) == ("RGB", (480, 360), 32)
        assert "characteristics based on the photo in 50 words" in request.prompt
    pictures = {request.images[0].tobytes() for request in engine.requests}
    assert len(pictures) == len(engine.requests) // 3  # three prompts each, as a job has; none comes again


def test_warm_up_stays_short_on_a_slow_machine(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "_PATIENCE_S", -1.0)  # every batch is a slow one
    engine = Recording(max_batch=20)
    warm_up(engine, meter)
    assert [len(batch) for batch in engine.batches] == [1, 1]
    assert meter.rate() is not None


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RuntimeError("no kernel"), CaptuneError, "RuntimeError: no kernel"),
        (InvalidInput("takes no pictures"), CaptuneError, "takes no pictures"),
        (Unavailable("the server is down"), Unavailable, "the server is down"),
    ],
)
def test_warm_up_that_fails_says_why(meter: Meter, error: Exception, kind: type[CaptuneError], words: str) -> None:
    engine = Recording(max_batch=4)
    engine.error = error
    with pytest.raises(CaptuneError, match=words) as caught:
        warm_up(engine, meter)
    assert type(caught.value) is kind
    assert meter.rate() is None
