"""A PNG from raw pixels, without an image library."""

import struct
import zlib


def from_planes(planes: bytes, width: int, height: int) -> bytes:
    """`planes`: all red values, then green, then blue (each height x width, uint8), as the CIFAR binaries hold them.
    Returns an 8-bit RGB PNG (ISO/IEC 15948) of exactly these pixels. Raises ValueError on any other length."""
    size = width * height
    if len(planes) != 3 * size:
        raise ValueError(f"{len(planes)} bytes are no {width} x {height} RGB image")
    pixels = bytearray(3 * size)
    for channel in range(3):
        pixels[channel::3] = planes[channel * size : (channel + 1) * size]
    stride = 3 * width
    rows = b"".join(b"\0" + pixels[at : at + stride] for at in range(0, 3 * size, stride))  # 0: no filter
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, 2: RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
