"""A 145 M-parameter multimodal LLM (true architecture, random weights) on the CPU: the usual loop of one `generate` per
caption, the batched engine in process, the same engine through HTTP with 64 clients, and a whole caption job.

    python benchmarks/captioner_cpu.py [--images 100] [--max-batch 30] [--precision bf16]

Every way captions the same pictures (480 x 360) with the same three prompts, 64 new tokens each; the loop does a sample
of them. All run in turn on the same machine, so that the ratios mean something. Prints a table, then one JSON line."""

import argparse
import asyncio
import base64
import io
import json
import logging
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from random_mllm import SHAPES, write

from captune.client import Client
from captune.tables import table
from services.captioner.engines import build
from services.captioner.engines.base import CaptionRequest
from services.captioner.prompts import render
from services.captioner.serving.batcher import Batcher
from services.captioner.settings import EngineSpec
from services.embedded.stack import Stack
from shared.schemas.captions import BuiltIn

WORDS, CLIENTS, LOOPED = 22, 64, 8
MAX_WAIT_MS = 250  # to fill a batch that takes 10 s here: the clients of the last one need a moment to come back
TOKENS = 2 * WORDS + 20  # what a caption job of so many words asks for
CLASSES = ("labrador", "beagle", "maine_coon")
CHARACTERISTICS: tuple[BuiltIn, ...] = ("visual", "shape", "texture")


def pictures(count: int) -> list[tuple[str, bytes]]:
    """(class, JPEG) of smooth noise, each different."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        out = io.BytesIO()
        coarse.resize((480, 360), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        made.append((CLASSES[number % len(CLASSES)], out.getvalue()))
    return made


def prompts(images: list[tuple[str, bytes]]) -> list[tuple[bytes, str]]:
    """(JPEG, prompt), the prompts of a picture together."""
    return [
        (data, render(characteristic, class_name=name.replace("_", " "), domain="pets", words=WORDS))
        for name, data in images
        for characteristic in CHARACTERISTICS
    ]


def one_at_a_time(folder: Path, asked: list[tuple[bytes, str]], precision: str) -> float:
    """Captions per second of the loop that everybody writes first."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    processor: Any = AutoProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    model.eval()
    began = 0.0
    for number, (data, prompt) in enumerate([asked[0], *asked]):
        if number == 1:  # the first was the warm-up
            began = time.perf_counter()
        content = [{"type": "image", "image": Image.open(io.BytesIO(data))}, {"type": "text", "text": prompt}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        inputs = inputs.to(dtype=dtype)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=True, temperature=0.2)
        processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return len(asked) / (time.perf_counter() - began)


def in_process(spec: EngineSpec, folder: str, asked: list[tuple[bytes, str]]) -> float:
    engine = build("bench", spec, [Path(folder)])
    batcher = Batcher(engine, queue_size=len(asked), max_wait_ms=MAX_WAIT_MS, request_timeout_s=3600)
    batcher.start()
    while batcher.state == "loading":
        time.sleep(0.1)
    assert batcher.ready, batcher.error
    requests = [
        CaptionRequest((Image.open(io.BytesIO(data)).convert("RGB"),), prompt, max_tokens=TOKENS, seed=0)
        for data, prompt in asked
    ]

    async def all_at_once() -> None:
        await asyncio.gather(*(batcher.submit(request) for request in requests))

    began = time.perf_counter()
    asyncio.run(all_at_once())
    rate = len(asked) / (time.perf_counter() - began)
    batcher.stop()
    return rate


def over_http(stack: Stack, asked: list[tuple[bytes, str]]) -> float:
    async def run() -> float:
        headers = {"Authorization": f"Bearer {stack.api_key}"}
        limit = asyncio.Semaphore(CLIENTS)
        async with httpx.AsyncClient(
            base_url=stack.url, headers=headers, timeout=3600, limits=httpx.Limits(max_connections=CLIENTS)
        ) as http:

            async def ask(data: bytes, prompt: str) -> None:
                uri = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
                content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": prompt}]
                body = {"model": "bench", "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
                async with limit:
                    answer = await http.post("/v1/chat/completions", json=body)
                answer.raise_for_status()

            began = time.perf_counter()
            await asyncio.gather(*(ask(data, prompt) for data, prompt in asked))
            return len(asked) / (time.perf_counter() - began)

    return asyncio.run(run())


def caption_job(stack: Stack, images: list[tuple[str, bytes]]) -> float:
    """From the worker's claim to the job's end: reading, prompts, captions, quality, commits."""
    with tempfile.TemporaryDirectory() as folder, Client(stack.url, stack.api_key) as client:
        path = Path(folder) / "bench.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for number, (name, data) in enumerate(images):
                archive.writestr(f"train/{name}/{number}.jpg", data)
                archive.writestr(f"test/{name}/{number}.jpg", data + b"\0")
        dataset = client.wait(client.push(path, name="bench", domain="pets", val_fraction=0))
        assert dataset.status == "succeeded", dataset.error
        began = time.perf_counter()
        job = client.wait(
            client.caption(
                dataset_id=dataset.id, engine="bench", words=WORDS, reasks=0, characteristics=CHARACTERISTICS
            )
        )
        seconds = time.perf_counter() - began
        assert job.status == "succeeded", job.error
        assert job.result is not None
        assert job.result["written"] == len(images) * len(CHARACTERISTICS), job.result
        return len(images) * len(CHARACTERISTICS) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--max-batch", type=int, default=30)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    images = pictures(args.images)
    asked = prompts(images)
    with tempfile.TemporaryDirectory() as folder:
        parameters = write(SHAPES["135m"], Path(folder) / "mllm")
        spec = {
            "type": "hf",
            "model": str(Path(folder) / "mllm"),
            "precision": args.precision,
            "device": "cpu",
            "max_batch": args.max_batch,
        }
        loop = one_at_a_time(Path(folder) / "mllm", asked[:: max(1, len(asked) // LOOPED)][:LOOPED], args.precision)
        engine = in_process(EngineSpec.model_validate(spec), folder, asked)
        env = {
            "CAPTUNE_ENGINES": json.dumps({"bench": spec}),
            "CAPTUNE_MODEL_ROOTS": folder,
            "CAPTUNE_MAX_WAIT_MS": str(MAX_WAIT_MS),
            "CAPTUNE_REQUEST_TIMEOUT_S": "3600",
            "CAPTUNE_CAPTION_CONCURRENCY": str(2 * args.max_batch),
        }
        with Stack(Path(folder) / "state", port=0, env=env) as stack:
            http = over_http(stack, asked)
            job = caption_job(stack, images)
    rows = [
        ("one generate per caption", loop, None, None),
        ("batched engine, in process", engine, engine / loop, None),
        (f"over HTTP, {CLIENTS} clients", http, http / loop, http / engine),
        ("caption job, end to end", job, job / loop, job / http),
    ]
    print(f"{parameters / 1e6:.0f} M parameters, {args.precision}, {len(asked)} captions of {TOKENS} tokens, CPU")
    cells = [(name, round(rate, 2), *(None if x is None else round(x, 2) for x in more)) for name, rate, *more in rows]
    print(table(("way", "captions_per_second", "times the loop", "of the line above"), cells))
    figures = {
        "parameters": parameters,
        "precision": args.precision,
        "max_batch": args.max_batch,
        "captions": len(asked),
        "loop": round(loop, 3),
        "engine": round(engine, 3),
        "http": round(http, 3),
        "job": round(job, 3),
        "engine_over_loop": round(engine / loop, 2),
        "http_over_engine": round(http / engine, 3),
        "job_over_http": round(job / http, 3),
    }
    print(json.dumps({"captioner_cpu": figures}))


if __name__ == "__main__":
    main()
