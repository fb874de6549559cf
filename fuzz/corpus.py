"""Seeds: small files of every kind that intake reads, and a few that it refuses."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any

from PIL import Image

FILES = {
    "cat/1.png": b"\x89PNG\r\n\x1a\n",
    "dög/ä b.jpg": b"\xff\xd8\xff" * 30,
    "metadata.csv": b"file_name,label,caption,split\ncat/1.png,cat,a cat,train\n",
    "a/metadata.jsonl": b'{"file_name": "1.png", "label": "cat"}\n',
    "empty/": b"",
    "../out.jpg": b"evil",
}


def archives() -> Iterator[bytes]:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        yield _zip(FILES, method)
    yield _zip({}, zipfile.ZIP_STORED)
    yield _zip64()
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        plain = _tar(FILES, form)
        yield plain
        yield from (pack(plain) for pack in (gzip.compress, bz2.compress, lzma.compress))
    yield _tar({"n" * 200 + "/1.jpg": b"x"}, tarfile.GNU_FORMAT)
    yield _tar({}, tarfile.PAX_FORMAT)
    yield _links()


def _zip(files: dict[str, bytes], method: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return out.getvalue()


def _zip64() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, archive.open("cat/1.png", "w", force_zip64=True) as member:
        member.write(b"x")
    return out.getvalue()


def _tar(files: dict[str, bytes], form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name.rstrip("/"))
            info.type, info.size = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE, len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _links() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE):
            info = tarfile.TarInfo(f"cat/{ord(kind)}.jpg")
            info.type, info.linkname = kind, "../../etc/passwd"
            archive.addfile(info)
    return out.getvalue()


def pictures() -> Iterator[bytes]:
    colour = Image.effect_noise((24, 16), 60).convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6
    plain: dict[str, list[dict[str, Any]]] = {
        "JPEG": [{}, {"progressive": True, "exif": turned}, {"subsampling": 0, "restart_marker_blocks": 1}],
        "PNG": [{}, {"exif": turned}, {"icc_profile": b"rubbish" * 20}],
        "WEBP": [{}, {"lossless": True}, {"exif": turned}],
        "GIF": [{}, {"interlace": 0}],
        "TIFF": [{"compression": f"tiff_{name}"} for name in ("lzw", "deflate")] + [{}, {"compression": "packbits"}],
        "BMP": [{}],
        "PPM": [{}],
    }
    for kind, choices in plain.items():
        yield from (_saved(colour, kind, **options) for options in choices)
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16", "CMYK"):
        image = Image.new("I;16", (9, 7), 40_000) if mode == "I;16" else colour.resize((9, 7)).convert(mode)
        for kind in ("PNG", "TIFF", "JPEG", "PPM", "BMP", "GIF"):
            try:
                yield _saved(image, kind)
            except (OSError, ValueError):  # the format has no such mode
                continue
    yield _saved(colour, "GIF", save_all=True, append_images=[colour.rotate(90)])
    yield _saved(colour, "PNG", save_all=True, append_images=[colour.rotate(90)])
    yield _saved(colour, "WEBP", save_all=True, append_images=[colour.rotate(90)])
    yield b"P3 2 2 9 #c\n" + b"1 2 3 " * 4
    yield b"P1 8 2\n" + b"10" * 8
    head = struct.pack("<IiiHHIIiiII", 40, 4, 2, 1, 8, 1, 0, 0, 0, 256, 0)
    yield b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078) + head + b"\0\1\2\0" * 256 + b"\4\1\0\0\0\2\1\1\0\1"


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()
