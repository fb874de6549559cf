"""Pictures made to cost much, to lie, or to be something else. What intake verifies (`inspect`) and what training, chat
and predictions unpack (`decode`) refuse the same, each in bounded time. (Headers that lie about the size, truncation,
CMYK, 16 bits, palettes and transparency: tests/unit/datasets/test_images.py.)"""

import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.datasets.images import decode, inspect
from shared.datasets.structure import MAX_PARTS
from shared.errors import InvalidInput

ROOT = Path(__file__).resolve().parents[2]
MIB = 1024 * 1024
SECONDS = 4.0  # of CPU, for either function; without limits these took 10 s to an hour
# pytest has warnings filters of its own; what production filters is tested below.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
SMALL = Image.new("RGB", (64, 48), (200, 10, 10))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refusal(data: bytes) -> str:
    """The code by which both functions refuse, quickly and in words of ours."""
    codes = set()
    for function in (inspect, decode):
        began = time.process_time()
        with pytest.raises(InvalidInput) as caught:
            function(data)
        assert time.process_time() - began < SECONDS
        assert not any(word in caught.value.message.lower() for word in ("pil", "traceback", "0x", ".py", "errno"))
        codes.add(caught.value.code)
    assert len(codes) == 1
    return str(codes.pop())


def read_quickly(data: bytes) -> Image.Image:
    began = time.process_time()
    inspect(data)
    image = decode(data)
    assert time.process_time() - began < SECONDS
    return image


JPEG, PNG, GIF, WEBP = (saved(SMALL, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP"))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def in_png(*chunks: bytes, times: int = 1) -> bytes:
    return PNG[:33] + b"".join(chunks) * times + PNG[33:]


def in_jpeg(segments: bytes) -> bytes:
    return JPEG[:2] + segments + JPEG[2:]


def in_gif(blocks: bytes) -> bytes:
    head = 13 + 3 * (2 << (GIF[10] & 7))
    return GIF[:head] + blocks + GIF[head:]


def tiff(*tags: tuple[int, int, int, int | None], tail: bytes = b"") -> bytes:
    """(tag, type, count, value): a value of None points behind the directory, at `tail`."""
    tags = tuple(sorted(tags, key=lambda tag: tag[0]))
    behind = 8 + 2 + 12 * len(tags) + 4
    entries = (struct.pack("<HHII", *tag[:3], behind if tag[3] is None else tag[3]) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + tail


def grey(width: int, height: int, *more: tuple[int, int, int, int | None], tail: bytes) -> bytes:
    plain = ((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1))
    return tiff(*plain, *more, tail=tail)


def run_length_bmp(width: int, height: int, bits: int, runs: bytes) -> bytes:
    colours = b"\0\1\2\0" * (1 << bits)
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 1 if bits == 8 else 2, 0, 0, 0, 1 << bits, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + len(colours)) + head + colours + runs


def repeated_scans(side: int, times: int) -> bytes:
    data = saved(Image.new("RGB", (side, side)), "JPEG", progressive=True, subsampling=0)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * times + b"\xff\xd9"


# Each cost Pillow 13 a few seconds to an hour for the 64 MiB that a file may have; a zip packs them 1,000 to 1.
DEAR: dict[str, Callable[[], bytes]] = {
    "JPEG with millions of segments": lambda: in_jpeg(b"\xff\xe5\0\2" * 2_000_000),
    "JPEG with millions of fill bytes": lambda: in_jpeg(b"\xff" * 8 * MIB),
    "JPEG with junk before its scan": lambda: in_jpeg(b"\xff\xe5\0\2" + bytes(8 * MIB)),
    "JPEG with EXIF in many pieces": lambda: in_jpeg((b"\xff\xe1\0\x28Exif\0\0" + b"x" * 32) * 200_000),
    "JPEG with 300 scans": lambda: repeated_scans(64, 300),
    "JPEG of 49 megapixels with 70 scans": lambda: repeated_scans(7000, 70),
    "PNG with millions of chunks": lambda: in_png(chunk(b"prVt", b""), times=700_000),
    "PNG with millions of texts": lambda: in_png(chunk(b"tEXt", b"a\0b"), times=700_000),
    "PNG with millions of empty data chunks": lambda: PNG.replace(
        struct.pack(">I", PNG.index(b"IEND") - PNG.index(b"IDAT") - 12) + b"IDAT",
        chunk(b"IDAT", b"") * 700_000 + struct.pack(">I", PNG.index(b"IEND") - PNG.index(b"IDAT") - 12) + b"IDAT",
    ),
    "TIFF with a million strips": lambda: grey(
        1, 10**6, (273, 4, 10**6, None), (278, 3, 1, 1), (279, 4, 10**6, None), tail=b"\1\0\0\0" * 10**6
    ),
    "TIFF with 390,625 tiles": lambda: grey(
        *(10_000, 10_000), (322, 3, 1, 16), (323, 3, 1, 16), (324, 4, 390_625, None), (325, 4, 390_625, None),
        tail=b"\1\0\0\0" * 390_625,
    ),
    "TIFF with 60,000 tags": lambda: tiff(*((tag, 1, 700_000, 8) for tag in range(1, 60_000))),
    "BigTIFF with 400,000 tags": lambda: (
        b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 400_000) + struct.pack("<HHQQ", 1, 1, 1, 0) * 400_000 + bytes(8)
    ),
    "BMP of runs, one line of 100 million pixels": lambda: run_length_bmp(100_000_000, 1, 8, b"\1\5\0\0"),
    "BMP of four million runs": lambda: run_length_bmp(4000, 4000, 8, b"\1\5" * 4_000_000),
    "BMP of runs in 4 bits": lambda: run_length_bmp(10_000, 10_000, 4, b"\xff\x12" * 400_000),
    "PPM of comments": lambda: b"P3 1000 1000 9 " + b"#\n" * 4 * MIB,
    "PPM with a header of comments": lambda: b"P6 " + b"#\n" * 4 * MIB + b"1 1 255\n",
    "PPM with one endless comment": lambda: b"P6 #" + b"a" * 8 * MIB + b"\n1 1 255\n1 1",
    "PPM with endless numbers": lambda: b"P3 " + b"1" * 8 * MIB,
}  # fmt: skip


@pytest.mark.parametrize("name", DEAR)
def test_a_file_that_is_dear_to_read_is_refused_at_once(name: str) -> None:
    assert refusal(DEAR[name]()) in {"unreadable_image", "unsupported_format"}


def test_as_many_parts_as_are_let_in_are_read_quickly() -> None:
    many = MAX_PARTS - 100
    read_quickly(in_jpeg(b"\xff\xe5\0\2" * many))
    read_quickly(in_jpeg((b"\xff\xe1\xff\xffExif\0\0" + b"x" * 65527) * 15))
    read_quickly(in_png(chunk(b"prVt", b""), times=many))
    rows = struct.pack("<I", 8) * many
    assert read_quickly(grey(1, many, (273, 4, many, None), (278, 3, 1, 1), (279, 3, 1, 1), tail=rows)).size == (
        1,
        many,
    )
    read_quickly(repeated_scans(1000, 200))


FRAMES = 100_000


def many_frames_webp() -> bytes:
    data = saved(SMALL, "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    at = data.index(b"ANMF")
    frame = data[at : at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")]
    body = data[12:at] + frame * FRAMES
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def many_frames_png() -> bytes:
    data = saved(SMALL, "PNG", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    at = data.index(b"acTL")
    return data[: at - 4] + chunk(b"acTL", struct.pack(">2I", FRAMES, 0)) + data[at + 16 :]


@pytest.mark.parametrize(
    "make",
    [lambda: GIF[:-1] + GIF[GIF.rindex(b",") : -1] * FRAMES + b";", many_frames_webp, many_frames_png],
    ids=["GIF", "WebP", "APNG"],
)
def test_100000_frames_are_refused_without_reading_them(make: Callable[[], bytes]) -> None:
    assert refusal(make()) == "animated_image"


ZEROS = zlib.compress(bytes(100_000_000), 9)
CHUNKS: dict[str, tuple[bytes, str]] = {
    "zTXt": (chunk(b"zTXt", b"a\0\0" + ZEROS), "unreadable_image"),
    "iTXt": (chunk(b"iTXt", b"a\0\1\0\0\0" + ZEROS), "unreadable_image"),
    "iCCP": (chunk(b"iCCP", b"a\0\0" + ZEROS), "unreadable_image"),
    "many zTXt": (chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000), 9)) * 100, "unreadable_image"),
    "tEXt of 2 GiB": (struct.pack(">I", 0x7FFFFFFF) + b"tEXt", "truncated_image"),
    "eXIf of 4 GiB": (struct.pack(">I", 0xFFFFFFFF) + b"eXIf", "truncated_image"),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_that_inflate_or_lie_about_their_length(name: str) -> None:
    chunks, code = CHUNKS[name]
    assert refusal(in_png(chunks)) == code


def test_pixels_that_inflate_past_the_limit_are_not_inflated() -> None:
    """1 MB of deflated zeros, honest about its 50,000 x 50,000 pixels."""
    head = chunk(b"IHDR", struct.pack(">2I5B", 50_000, 50_000, 8, 0, 0, 0, 0))
    data = PNG[:8] + head + chunk(b"IDAT", zlib.compress(bytes(10**8), 9)) + chunk(b"IEND", b"")
    assert refusal(data) == "image_too_large"


def test_pixels_that_inflate_to_more_than_the_header_says_are_left() -> None:
    data = PNG[:33] + chunk(b"IDAT", zlib.compress(bytes(10**8), 9)) + chunk(b"IEND", b"")
    assert read_quickly(data).size == (64, 48)


EXIF = {
    "orientation 99": b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x63\0\0\0\0\0\0\0",
    "orientation as text": b"II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0abc\0\0\0\0\0",
    "orientation of 4 GiB": b"II*\0\x08\0\0\0\1\0\x12\1\3\0\xff\xff\xff\xff\0\0\0\0\0\0\0\0",
    "a directory that is its own next": b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\1\0\0\0\x08\0\0\0",
    "a directory inside itself": b"II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\0\0\0\0",
    "tags that share their data": tiff(*((tag, 1, 30_000, 8) for tag in range(1, 5_000))),
    "two megabytes": tiff((1, 1, 2 * MIB, None), tail=bytes(2 * MIB)),
    "a directory past the end": b"MM\0*\x7f\xff\xff\xff",
    "no TIFF": b"\xff" * 40,
}


@pytest.mark.parametrize("exif", EXIF.values(), ids=EXIF)
def test_exif_that_lies_costs_neither_the_picture_nor_the_time(exif: bytes) -> None:
    body = b"VP8X" + struct.pack("<I", 10) + b"\x08\0\0\0" + b"\x3f\0\0\x2f\0\0" + WEBP[12:]
    body += b"EXIF" + struct.pack("<I", len(exif)) + exif + b"\0" * (len(exif) % 2)
    in_webp = b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    hexed = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%d\n" % len(exif) + exif.hex().encode())
    files = [in_png(chunk(b"eXIf", exif)), in_webp]
    if len(exif) < 65_000:
        files.append(in_jpeg(b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif))
        files.append(in_png(chunk(b"zTXt", hexed)))
    for data in files:
        assert read_quickly(data).size == (64, 48)


def test_icc_profiles_of_rubbish_are_not_used() -> None:
    rubbish = bytes(range(256)) * 200
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        assert read_quickly(saved(SMALL, kind, icc_profile=rubbish)).size == (64, 48)


def test_restart_markers_everywhere() -> None:
    noisy = Image.effect_noise((800, 800), 90).convert("RGB")
    assert read_quickly(saved(noisy, "JPEG", restart_marker_blocks=1)).size == (800, 800)
    data = saved(noisy, "JPEG")
    at = data.index(b"\xff\xda") + 20
    assert read_quickly(data[:at] + b"\xff\xd0\xff\xd7" * 500_000 + data[at:]).size == (800, 800)


def test_segments_of_a_phone_s_second_picture_are_not_followed() -> None:
    data = saved(SMALL, "MPO", save_all=True, append_images=[SMALL] * 20)
    at = data.index(b"MPF\0")
    for end in range(at + 4, at + 40, 4):
        assert read_quickly(data[:end] + b"\xff\xff\xff\xff" + data[end + 4 :]).size == (64, 48)


def test_oddities_do_not_fill_the_memory_with_warnings() -> None:
    """Python keeps each text that is warned of, and for ever; Pillow puts a file's numbers into them. In a process of
    its own, as pytest has other filters."""
    program = (
        "import sys; from PIL import TiffImagePlugin; from shared.datasets.images import decode\n"
        "decode(sys.stdin.buffer.read()); print(len(getattr(TiffImagePlugin, '__warningregistry__', {})))"
    )
    data = in_png(chunk(b"eXIf", tiff(*((tag, 1, 10**6 + tag, 8) for tag in range(1, 300)))))
    ran = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, cwd=ROOT, check=True)
    assert int(ran.stdout) <= 1, "besides the registry's own version"
    assert ran.stderr == b""


# -- something else ----------------------------------------------------------------------------------------------------

OTHERS = {
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "SVG with a prolog": b"<?xml version='1.0'?><!DOCTYPE svg [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><svg>&x;</svg>",
    "SVG after white space": b"\n\n  <svg onload='alert(1)'/>",
    "HTML": b"<!DOCTYPE html><script>alert(1)</script>",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "PDF": b"%PDF-1.7\n1 0 obj<</S/JavaScript/JS(app.alert(1))>>",
    "PSD": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x09\0\0\0\x09\0\x08\0\3" + bytes(20),
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(60),
    "ICNS": b"icns\0\0\1\0" + bytes(60),
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "JPEG XL": b"\xff\x0a" + bytes(40),
    "JPEG XL, boxed": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40),
    "FITS": b"SIMPLE  =                    T" + b" " * 50,
    "XPM": b'/* XPM */ static char *x[] = {"1 1 1 1","a c #000000","a"};',
    "ImageMagick script": b"push graphic-context\nimage over 0,0 0,0 'https://example.com/x.png'\npop",
    "ELF": b"\x7fELF\2\1\1" + bytes(60),
    "pickle": b"\x80\x04\x95\x1f\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "float PFM": b"PF\n4 4\n-1.0\n" + bytes(192),
    "PAM": b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 3\nMAXVAL 255\nENDHDR\nabc",
    "RIFF that is no WebP": b"RIFF\x24\0\0\0WAVEfmt " + bytes(40),
}
WRITTEN = ("ICO", "EPS", "PCX", "TGA", "JPEG2000", "DDS", "SGI", "IM", "AVIF", "ICNS", "QOI", "PDF")


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS)
def test_other_formats_are_refused_by_content(data: bytes) -> None:
    assert refusal(data) == "unsupported_format"


@pytest.mark.parametrize("kind", WRITTEN)
def test_formats_that_pillow_knows_and_we_do_not_take(kind: str) -> None:
    assert refusal(saved(SMALL.resize((64, 64)), kind)) == "unsupported_format"


def test_two_things_at_once_are_what_they_begin_with() -> None:
    """Served with that type, `nosniff` and a policy that runs nothing (test_markup.py has the route)."""
    script = b"*/=1;alert(1)/*<script>alert(1)</script>"
    comment = b"\xff\xfe" + struct.pack(">H", len(script) + 2) + script
    assert inspect(in_jpeg(comment)).media_type == "image/jpeg"
    assert inspect(in_png(chunk(b"tEXt", b"Comment\0" + script))).media_type == "image/png"
    assert inspect(in_gif(b"!\xfe" + bytes([len(script)]) + script + b"\0")).media_type == "image/gif"
    assert inspect(JPEG + b"<html>" + script).media_type == "image/jpeg"
    assert inspect(GIF + b"PK\x03\x04" + script).media_type == "image/gif"
    assert refusal(b"GIF89a/*" + script) in {"unreadable_image", "image_too_large", "truncated_image"}


@settings(max_examples=150, deadline=2000)
@given(
    st.sampled_from(
        [
            b"\xff\xd8\xff",
            PNG[:33],
            b"GIF89a",
            WEBP[:30],
            b"II*\0\x08\0\0\0",
            b"MM\0+",
            b"P3 ",
            b"P6 4 4 255\n",
            b"BM" + bytes(12) + b"\x28\0\0\0",
        ]
    ),
    st.binary(max_size=400),
)
def test_any_bytes_behind_a_beginning_are_a_picture_or_invalid_input(head: bytes, tail: bytes) -> None:
    try:
        info = inspect(head + tail, max_pixels=1_000_000)
    except InvalidInput:
        return
    assert decode(head + tail, max_pixels=1_000_000).size == (info.width, info.height)
