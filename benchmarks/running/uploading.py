"""Uploads of a given size, made while they are sent: a tar of distinct noise pictures, at a network's pace."""

import asyncio
import io
import os
import random
import tarfile
import time
from collections.abc import AsyncIterator, Iterator

from PIL import Image

SIDE, CLASSES = 400, 10  # pixels; about 200 kB a picture
PIECE = 64 * 1024
BOUNDARY = "captune-load"


def noise_picture() -> bytes:
    out = io.BytesIO()
    Image.frombytes("RGB", (SIDE, SIDE), os.urandom(3 * SIDE * SIDE)).save(out, "JPEG", quality=90)
    return out.getvalue()


def marked(picture: bytes) -> bytes:
    """The same picture with bytes and a hash of its own, by a JPEG comment."""
    comment = os.urandom(16)
    return picture[:2] + b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment + picture[2:]


def tar(picture: bytes, size: int) -> Iterator[bytes]:
    """`class/file` entries until `size` bytes are passed."""
    sent = number = 0
    while sent < size:
        data = marked(picture)
        header = tarfile.TarInfo(f"class_{number % CLASSES}/{number:06d}.jpg")
        header.size = len(data)
        entry = header.tobuf() + data + b"\0" * (-len(data) % tarfile.BLOCKSIZE)
        yield entry
        sent, number = sent + len(entry), number + 1
    yield b"\0" * 2 * tarfile.BLOCKSIZE


async def form(picture: bytes, size: int, bytes_per_second: float) -> AsyncIterator[bytes]:
    """A multipart body with the data set's fields and its archive."""
    fields = {"name": f"load {random.getrandbits(32):08x}", "domain": "noise"}
    for name, value in fields.items():
        yield f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
    yield (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="images.tar"\r\n'
        "Content-Type: application/x-tar\r\n\r\n"
    ).encode()
    began, sent = time.monotonic(), 0
    for entry in tar(picture, size):
        for first in range(0, len(entry), PIECE):
            yield entry[first : first + PIECE]
        sent += len(entry)
        await asyncio.sleep(max(0.0, began + sent / bytes_per_second - time.monotonic()))
    yield f"\r\n--{BOUNDARY}--\r\n".encode()
