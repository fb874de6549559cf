"""The true Qwen2.5-VL architectures with random weights on a GPU: precision x batch size, and what bounds each.

    python benchmarks/captioner_gpu.py [--models 3b,7b] [--precisions bf16,nf4,int8] [--batches 1,32,96,192]

480 x 360 pictures, three prompts each, 64 new tokens. Batch 1 is the loop of one caption per `generate`. `read_ms` is
what one decoding step needs to read the weights once at the device's measured copy bandwidth; `step_ms` is what a step
took. Prints a table per model, then one JSON line; without a GPU it says so and ends (`--device cpu --models 135m` runs
the same code anywhere)."""

import argparse
import gc
import io
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from random_mllm import SHAPES, write

from captune.tables import table
from services.captioner.engines import build
from services.captioner.engines.base import CaptionRequest
from services.captioner.prompts import render
from services.captioner.settings import EngineSpec
from shared.schemas.captions import BuiltIn

TOKENS = 64
CHARACTERISTICS: tuple[BuiltIn, ...] = ("visual", "shape", "texture")
COLUMNS = (
    "precision",
    "batch",
    "captions_per_second",
    "tokens_per_second",
    "times_batch_1",
    "peak_gib",
    "prepare_ms",
    "prepare_share",
    "step_ms",
    "read_ms",
)


def requests(count: int) -> list[CaptionRequest]:
    rng = np.random.default_rng(0)
    made: list[CaptionRequest] = []
    while len(made) < count:
        out = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((480, 360), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        image = Image.open(out).convert("RGB")
        for characteristic in CHARACTERISTICS:
            prompt = render(characteristic, class_name="labrador", domain="pets", words=22)
            made.append(CaptionRequest((image,), prompt, max_tokens=TOKENS, seed=len(made)))
    return made[:count]


def bandwidth(device: torch.device) -> float:
    """Bytes per second read by a large copy (which reads and writes as much)."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        began = _now(device)
        target.copy_(source)
        seconds.append(_now(device) - began)
    return 2 * source.nbytes / min(seconds)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(engine: Any, batch: int, device: torch.device, rounds: int) -> dict[str, Any]:
    asked = requests(batch)
    began = _now(device)
    prepared = [engine.prepare(request) for request in asked]
    prepare = (_now(device) - began) / batch
    engine.generate(prepared)  # warm-up: kernels are chosen, the allocator grows
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = _now(device)
    for _ in range(rounds):
        raw = engine.generate(prepared)
    whole = (_now(device) - began) / rounds
    short = [engine.prepare(CaptionRequest(r.images, r.prompt, max_tokens=1, seed=r.seed)) for r in asked]
    began = _now(device)
    engine.generate(short)
    prefill = _now(device) - began
    tokens = sum(engine.finish(each).completion_tokens for each in raw)
    return {
        "captions_per_second": batch / whole,
        "tokens_per_second": tokens / whole,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "prepare_ms": 1000 * prepare,
        "prepare_share": prepare * batch / (prepare * batch + whole),
        "step_ms": 1000 * (whole - prefill) / (TOKENS - 1),
    }


def run(model: str, folder: Path, precision: str, batches: list[int], device: torch.device) -> list[dict[str, Any]]:
    spec = EngineSpec.model_validate(
        {
            "type": "hf",
            "model": str(folder),
            "precision": precision,
            "device": device.type,
            "max_batch": max(batches),
        }
    )
    engine: Any = build("bench", spec, [folder.parent])
    engine.load()
    weights = sum(p.nbytes for p in engine._model.parameters()) + sum(b.nbytes for b in engine._model.buffers())
    read_ms = 1000 * weights / bandwidth(device)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        found = measure(engine, batch, device, rounds=1 if device.type == "cpu" else 2)
        first = rows[0]["captions_per_second"] if rows else found["captions_per_second"]
        more = {"times_batch_1": found["captions_per_second"] / first, "read_ms": read_ms}
        rows.append({"model": model, "precision": precision, "batch": batch, **found, **more})
    del engine
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="3b,7b")
    parser.add_argument("--precisions", default="bf16,nf4,int8")
    parser.add_argument("--batches", default="1,32,96,192")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        print(json.dumps({"captioner_gpu": None}))
        return
    logging.getLogger("transformers").setLevel(logging.ERROR)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    batches = [int(part) for part in args.batches.split(",")]
    rows = []
    for model in args.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            parameters = write(SHAPES[model], Path(folder) / "mllm", device=device.type)
            print(f"\n{model}: {parameters / 1e9:.2f} G parameters on {name}")
            for precision in args.precisions.split(","):
                rows += run(model, Path(folder) / "mllm", precision, batches, device)
        mine = [row for row in rows if row["model"] == model]
        print(table(COLUMNS, ([_short(row[column]) for column in COLUMNS] for row in mine)))
    print(json.dumps({"captioner_gpu": {"device": name, "tokens": TOKENS, "rows": rows}}))


def _short(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
