"""How fast an engine writes: measured once on made-up requests after loading, then on all that it does."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image

from services.captioner import prompts
from services.captioner.engines.base import CaptionRequest, Engine, Generation
from shared.errors import CaptuneError, Unavailable

logger = logging.getLogger(__name__)

_MEMORY = 256  # captions that a moving average remembers
_WINDOW_S = 1.0  # of work, before it says something about the rate
_SIZE = (480, 360)
_MAX_TOKENS = 32
_PATIENCE_S = 2.0  # warm-up tries a larger batch only where the last took less


@dataclass(frozen=True)
class Rate:
    """Moving averages: the rate that a caption met while the engine had work, and the tokens it came to."""

    captions_per_second: float
    completion_tokens_per_second: float
    prompt_tokens_per_caption: float
    completion_tokens_per_caption: float


class _Average:
    """The mean of what was seen, and of about the last `_MEMORY` captions once there are more."""

    def __init__(self) -> None:
        self.value = 0.0
        self._weight = 0

    def add(self, value: float, captions: int) -> None:
        self._weight = min(self._weight + captions, _MEMORY)
        self.value += (value - self.value) * min(1.0, captions / self._weight)


class Meter:
    """Counts what all threads of one batcher do. A caption's rate is that of the window it fell in, a second or more
    of work: so a few lone requests between large batches hardly move the average."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._captions_per_second = _Average()
        self._prompt_tokens, self._completion_tokens = _Average(), _Average()
        self._active = 0  # lanes at work
        self._since = 0.0  # until when `_worked` has been added up
        self._worked, self._captions = 0.0, 0  # of the current window; time when several lanes work counts once

    def begin(self) -> None:
        """A lane starts on a batch."""
        with self._lock:
            self._advance()
            self._active += 1

    def end(self, captions: int) -> None:
        """A lane is done with a batch, of which it made this many captions (0 where it failed)."""
        with self._lock:
            self._advance()
            self._active -= 1
            self._captions += captions
            if self._worked >= _WINDOW_S and self._captions:
                self._captions_per_second.add(self._captions / self._worked, self._captions)
                self._worked, self._captions = 0.0, 0

    def count(self, generation: Generation) -> None:
        """The tokens of one finished caption."""
        with self._lock:
            self._prompt_tokens.add(generation.prompt_tokens, 1)
            self._completion_tokens.add(generation.completion_tokens, 1)

    def measured(self, captions: int, seconds: float) -> None:
        """A window that was timed elsewhere."""
        with self._lock:
            self._captions_per_second.add(captions / max(seconds, 1e-9), captions)

    def rate(self) -> Rate | None:
        """None before anything was measured."""
        with self._lock:
            captions = self._captions_per_second.value
            if not captions:
                return None
            tokens = self._completion_tokens.value
            return Rate(captions, captions * tokens, self._prompt_tokens.value, tokens)

    def _advance(self) -> None:
        now = self._clock()
        if self._active:
            self._worked += now - self._since
        self._since = now


def warm_up(engine: Engine, meter: Meter) -> None:
    """Writes made-up captions through all three steps, in batches that grow as long as they are quick, and has `meter`
    keep the last one's figures. Raises a `CaptuneError` that says so where the engine cannot: it will serve nobody."""
    requests = _made_up()
    try:
        _write(engine, [next(requests)])  # the first pays for what is set up once, and is not measured
        size, seconds = 1, 0.0
        while True:
            batch = [next(requests) for _ in range(size)]
            began = time.monotonic()
            generations = _write(engine, batch)
            seconds = time.monotonic() - began
            if size >= engine.max_batch or seconds > _PATIENCE_S:
                break
            size = min(4 * size, engine.max_batch)
    except Exception as error:
        kind = Unavailable if isinstance(error, Unavailable) else CaptuneError
        reason = error.message if isinstance(error, CaptuneError) else f"{type(error).__name__}: {error}"
        raise kind(
            f"The model is loaded, but a first made-up caption failed: {reason}. Does it take pictures, and does it "
            "fit the device with max_batch and max_pixels as set? The server's log has the details.",
            code="warm_up_failed",
        ) from error
    meter.measured(size, seconds)
    for generation in generations:
        meter.count(generation)
    rate = meter.rate()
    assert rate is not None
    logger.info(
        "engine %s: warmed up, %.2f captions/s and %.1f tokens/s in a made-up batch of %d",
        engine.name,
        rate.captions_per_second,
        rate.completion_tokens_per_second,
        size,
    )


def _write(engine: Engine, requests: list[CaptionRequest]) -> list[Generation]:
    outputs = engine.generate([engine.prepare(request) for request in requests])
    if len(outputs) != len(requests):
        raise RuntimeError(f"the engine returned {len(outputs)} outputs for {len(requests)} requests")
    return [engine.finish(raw) for raw in outputs]


def _made_up() -> Iterator[CaptionRequest]:
    """Like a caption job's: three prompts to a picture, and no picture twice."""
    ramp = Image.linear_gradient("L").resize(_SIZE)
    disc = Image.radial_gradient("L").resize(_SIZE)
    while True:
        picture = Image.merge("RGB", (Image.effect_noise(_SIZE, 64.0), ramp, disc))
        for characteristic in ("visual", "shape", "texture"):
            prompt = prompts.render(characteristic, class_name="thing", domain="general objects", words=50)
            metadata = {"class_name": "thing", "characteristic": characteristic, "words": "50"}
            yield CaptionRequest((picture,), prompt, max_tokens=_MAX_TOKENS, metadata=metadata)
