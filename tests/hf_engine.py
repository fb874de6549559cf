"""The Hugging Face engine on a checkpoint of tests/tiny_mllm, loaded and ready."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.captioner.engines import build
from services.captioner.engines.base import CaptionRequest, Generation
from services.captioner.engines.hf import HFEngine
from services.captioner.settings import EngineSpec


def make(checkpoint: Path, **spec: Any) -> HFEngine:
    """`spec`: fields of EngineSpec; fp32 on the CPU where they say nothing else."""
    options = {"type": "hf", "device": "cpu", "precision": "fp32", **spec}
    engine = build("tiny", EngineSpec(model=str(checkpoint), **options), [checkpoint.parent])
    assert isinstance(engine, HFEngine)
    engine.load()
    return engine


def run(engine: HFEngine, requests: Sequence[CaptionRequest]) -> list[Generation]:
    """One batch through all three steps."""
    return [engine.finish(raw) for raw in engine.generate([engine.prepare(request) for request in requests])]
