"""A whole running system for a benchmark, and data sets that cost it next to nothing."""

import io
import random
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from PIL import Image

from captune.client import Client
from services.embedded.stack import Stack
from shared.db.session import Database
from shared.schemas.common import JobResource

CLASSES = ("red", "green", "blue")
SIDE = 32  # pixels


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr)


@contextmanager
def running(**settings: str) -> Iterator[tuple[Stack, Client, Database]]:
    """Captune as `captune up` starts it, on a free port and in a folder that is deleted afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="captune-bench-") as folder,
        Stack(Path(folder), port=0, env=settings, say=say) as stack,
        Client(stack.url, stack.api_key) as client,
    ):
        database = Database(stack.env["DATABASE_URL"])
        try:
            yield stack, client, database
        finally:
            database.close()


def archive(per_class: int, seed: int = 0) -> bytes:
    """A zip of `class/file`, no two pictures alike."""
    rng, out = random.Random(seed), io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        for number, name in enumerate(CLASSES):
            for index in range(per_class):
                colour = [rng.randrange(0, 60)] * 3
                colour[number] += 180
                image = Image.new("RGB", (SIDE, SIDE), tuple(colour))
                image.putpixel((index % SIDE, index // SIDE), tuple(rng.randbytes(3)))
                file = io.BytesIO()
                image.save(file, "PNG")
                packed.writestr(f"{name}/{index:04d}.png", file.getvalue())
    return out.getvalue()


def upload(http: httpx.Client, content: bytes, name: str) -> httpx.Response:
    fields = {"name": name, "domain": "colours", "val_fraction": "0.2", "test_fraction": "0.2"}
    return http.post("/v1/datasets", data=fields, files={"file": ("images.zip", content, "application/zip")})


def succeeded(client: Client, job: JobResource) -> JobResource:
    done = client.wait(client.job(job.id))
    if done.status != "succeeded":
        sys.exit(f"{done.id} {done.status}: {done.error}")
    return done


def plain_http(stack: Stack) -> httpx.Client:
    headers = {"Authorization": f"Bearer {stack.api_key}"}
    return httpx.Client(base_url=stack.url, headers=headers, timeout=120, trust_env=False)
