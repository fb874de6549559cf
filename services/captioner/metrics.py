"""What Prometheus sees of the caption models. Every series is labelled with the engine's name in the settings."""

from collections.abc import Callable
from functools import partial
from math import nan

from prometheus_client import Counter, Gauge, Histogram

from services.captioner.engines.base import Engine, Generation

QUEUE_DEPTH = Gauge("captune_captioner_queue_depth", "requests admitted and not yet on the device", ["engine"])
BATCH_SIZE = Histogram(
    "captune_captioner_batch_size", "requests per device batch", ["engine"], buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256)
)
LATENCY = Histogram(
    "captune_captioner_seconds",
    "from admission to the answer",
    ["engine"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)
CAPTIONS = Counter("captune_captioner_captions", "answers given", ["engine"])
FAILURES = Counter("captune_captioner_failures", "requests answered with an error", ["engine", "code"])
PROMPT_TOKENS = Counter("captune_captioner_prompt_tokens", "tokens read, those of images included", ["engine"])
IMAGE_TOKENS = Counter("captune_captioner_image_tokens", "tokens read that stand for images", ["engine"])
COMPLETION_TOKENS = Counter("captune_captioner_completion_tokens", "tokens written", ["engine"])
RETRIES = Counter("captune_captioner_retries", "requests tried once more", ["engine", "reason"])
OUT_OF_MEMORY = Counter("captune_captioner_out_of_memory", "batches halved for lack of device memory", ["engine"])
DEVICE_MEMORY = Gauge("captune_captioner_device_memory_bytes", "memory of the device", ["engine", "state"])

_MEMORY_STATES = ("used", "total")  # in the order of Engine.device_memory


def watch_queue(engine: str, waiting: Callable[[], float]) -> None:
    """The depth is looked up whenever the metrics are read."""
    QUEUE_DEPTH.labels(engine).set_function(waiting)


def watch_memory(engine: Engine) -> None:
    """The same for the device's memory; nothing for an engine that knows of none. To be called once it is loaded."""
    if engine.device_memory() is None:
        return
    for position, state in enumerate(_MEMORY_STATES):
        DEVICE_MEMORY.labels(engine.name, state).set_function(partial(_memory, engine, position))


def unwatch(engine: str) -> None:
    """For an engine that was stopped; counters stay as they are."""
    QUEUE_DEPTH.remove(engine)
    for state in _MEMORY_STATES:
        DEVICE_MEMORY.remove(engine, state)


def count_tokens(engine: str, generation: Generation) -> None:
    PROMPT_TOKENS.labels(engine).inc(generation.prompt_tokens)
    IMAGE_TOKENS.labels(engine).inc(generation.image_tokens)
    COMPLETION_TOKENS.labels(engine).inc(generation.completion_tokens)


def _memory(engine: Engine, position: int) -> float:
    memory = engine.device_memory()
    return nan if memory is None else float(memory[position])
