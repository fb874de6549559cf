import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from shared.datasets.images import ImageInfo, decode, inspect
from shared.errors import InvalidInput


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Left half red-ish noise, right half blue: not compressible to nothing, and turned copies differ."""
    values = np.random.default_rng(0).integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
    values[:, : size[0] // 2, 0] += 180
    values[:, size[0] // 2 :, 2] += 180
    return Image.fromarray(values)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def code_of(data: bytes, **options: Any) -> str:
    """Both functions must agree."""
    codes = set()
    for function in (inspect, decode):
        with pytest.raises(InvalidInput) as caught:
            function(data, **options)
        assert not any(word in caught.value.message.lower() for word in ("pil", "traceback", "0x", ".py", "errno"))
        codes.add(caught.value.code)
    assert len(codes) == 1
    return str(codes.pop())


def pixel(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


LOSSLESS = [
    ("PNG", {}, "image/png"),
    ("BMP", {}, "image/bmp"),
    ("TIFF", {}, "image/tiff"),
    ("TIFF", {"compression": "tiff_lzw"}, "image/tiff"),
    ("PPM", {}, "image/x-portable-anymap"),
    ("WEBP", {"lossless": True}, "image/webp"),
]


@pytest.mark.parametrize(("kind", "options", "media_type"), LOSSLESS)
def test_lossless_formats_come_back_exactly(kind: str, options: dict[str, Any], media_type: str) -> None:
    data = saved(picture(), kind, **options)
    assert inspect(data) == ImageInfo(64, 48, kind, media_type)
    result = decode(data)
    assert result.mode == "RGB"
    assert np.array_equal(np.asarray(result), np.asarray(picture()))


@pytest.mark.parametrize("kind", ["JPEG", "GIF"])
def test_lossy_formats_come_back_nearly(kind: str) -> None:
    data = saved(picture(), kind)
    assert (inspect(data).width, inspect(data).height, inspect(data).format) == (64, 48, kind)
    assert pixel(decode(data), 4, 4)[0] > 150
    assert pixel(decode(data), 60, 4)[2] > 150


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (64, 48), (255, 255, 255))
    upright.paste((200, 0, 0), (0, 0, 32, 24))  # the top left corner
    upright.paste((0, 0, 200), (32, 0, 64, 24))  # the top right corner
    stored = {
        1: lambda: upright,
        2: lambda: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda: upright.rotate(180),
        4: lambda: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda: upright.transpose(Image.Transpose.TRANSPOSE),
        6: lambda: upright.rotate(90, expand=True),
        7: lambda: upright.transpose(Image.Transpose.TRANSVERSE),
        8: lambda: upright.rotate(-90, expand=True),
    }[orientation]()
    data = saved(stored, kind, exif=exif(orientation))
    assert (inspect(data).width, inspect(data).height) == (64, 48)
    result = decode(data)
    assert result.size == (64, 48)
    assert pixel(result, 8, 8)[0] > 150 > pixel(result, 8, 8)[2]
    assert pixel(result, 56, 8)[2] > 150 > pixel(result, 56, 8)[0]
    assert min(pixel(result, 8, 40)) > 200
    assert result.getexif().get(0x0112, 1) == 1


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = saved(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert decode(data).size == (64, 48)
    assert inspect(data).width == 64


def test_cmyk_is_converted_with_the_right_sign() -> None:
    red = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        r, g, b = pixel(decode(saved(red, kind)), 10, 10)
        assert r > 230
        assert max(g, b) < 25


def test_16_bit_grey_is_scaled_not_cut() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16)[None, :].repeat(8, axis=0)
    expected = (np.linspace(0, 255, 64)).round()
    for kind in ("PNG", "TIFF", "PPM"):
        result = np.asarray(decode(saved(Image.fromarray(ramp), kind)))
        assert np.abs(result[0, :, 0] - expected).max() <= 1
        assert result[0, 0, 0] == 0
        assert result[0, -1, 0] == 255


def test_16_bit_colour_png() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    row = b"\0" + struct.pack(">3H", 65535, 32768, 0) * 4
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 4, 4, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")
    assert pixel(decode(data), 1, 1) == (255, 128, 0)


def test_alpha_goes_over_white() -> None:
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 8, 16))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        result = decode(saved(clear, kind, **options))
        assert pixel(result, 12, 8) == (255, 255, 255)
        assert pixel(result, 2, 8) == (0, 0, 255)
    half = decode(saved(Image.new("LA", (8, 8), (0, 128)), "PNG"))
    assert 120 < pixel(half, 1, 1)[0] < 135


def test_palette_transparency_and_keyed_grey() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    for kind in ("PNG", "GIF"):
        assert pixel(decode(saved(palette, kind)), 3, 3) == (0, 255, 0)
        assert pixel(decode(saved(palette, kind, transparency=1)), 3, 3) == (255, 255, 255)
    assert pixel(decode(saved(Image.new("L", (8, 8), 7), "PNG", transparency=7)), 3, 3) == (255, 255, 255)
    deep = Image.fromarray(np.full((8, 8), 700, np.uint16))
    assert pixel(decode(saved(deep, "PNG", transparency=700)), 3, 3) == (255, 255, 255)


def test_one_bit_pictures() -> None:
    bits = Image.new("1", (9, 9), 1)
    for kind in ("PNG", "PPM", "TIFF", "BMP"):
        assert pixel(decode(saved(bits, kind)), 4, 4) == (255, 255, 255)


def test_a_phone_jpeg_with_a_second_picture_is_a_jpeg() -> None:
    data = saved(picture(), "MPO", save_all=True, append_images=[picture((32, 24))])
    assert inspect(data) == ImageInfo(64, 48, "JPEG", "image/jpeg")
    assert decode(data).size == (64, 48)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animated_is_refused(kind: str) -> None:
    frames = [picture().rotate(angle) for angle in (0, 90, 180)]
    assert code_of(saved(frames[0], kind, save_all=True, append_images=frames[1:])) == "animated_image"


def test_several_pages_are_refused() -> None:
    assert code_of(saved(picture(), "TIFF", save_all=True, append_images=[picture()])) == "multi_page_image"


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("BMP", {}), ("PPM", {}), ("WEBP", {})],
)
def test_truncated_is_refused(kind: str, options: dict[str, Any], part: float) -> None:
    data = saved(picture((200, 150)), kind, **options)
    assert code_of(data[: int(len(data) * part)]) in {"truncated_image", "unreadable_image"}
    if kind in {"JPEG", "PNG", "WEBP"} and part > 0.5:
        assert code_of(data[: int(len(data) * part)]) == "truncated_image"


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}])
def test_truncated_tiff_is_refused(options: dict[str, Any]) -> None:
    data = saved(picture((200, 150)), "TIFF", **options)
    assert code_of(data[: len(data) // 2]) in {"truncated_image", "unreadable_image"}


def test_zero_bytes() -> None:
    assert code_of(b"") == "empty_file"


def lying_png(width: int, height: int) -> bytes:
    data = bytearray(saved(picture(), "PNG"))
    data[16:24] = struct.pack(">2I", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def lying_jpeg(width: int, height: int) -> bytes:
    data = bytearray(saved(picture(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">2H", height, width)
    return bytes(data)


def lying_gif(width: int, height: int) -> bytes:
    data = bytearray(saved(picture(), "GIF"))
    data[6:10] = struct.pack("<2H", width, height)
    return bytes(data)


def lying_bmp(width: int, height: int) -> bytes:
    data = bytearray(saved(picture(), "BMP"))
    data[18:26] = struct.pack("<2i", width, height)
    return bytes(data)


@pytest.mark.parametrize("make", [lying_png, lying_jpeg, lying_gif, lying_bmp])
def test_a_header_that_claims_50000_pixels_a_side_is_refused(make: Any) -> None:
    assert code_of(make(50_000, 50_000)) == "image_too_large"


@pytest.mark.parametrize("make", [lying_png, lying_bmp])
def test_a_header_that_claims_more_than_there_is_is_refused(make: Any) -> None:
    assert code_of(make(640, 480)) in {"truncated_image", "unreadable_image"}


def test_webp_and_ppm_and_tiff_bombs() -> None:
    vp8x = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (16382).to_bytes(3, "little") * 2
    assert code_of(b"RIFF" + struct.pack("<I", len(vp8x) + 4) + b"WEBP" + vp8x) in {
        "image_too_large",
        "unreadable_image",
    }
    assert code_of(b"P6 50000 50000 255\n" + b"\0" * 100) == "image_too_large"
    tiff = Image.new("1", (20_000, 20_000))
    assert code_of(saved(tiff, "TIFF", compression="tiff_deflate")) == "image_too_large"


def test_the_pixel_limit_is_exact() -> None:
    data = saved(picture((64, 48)), "PNG")
    assert decode(data, max_pixels=64 * 48).size == (64, 48)
    assert code_of(data, max_pixels=64 * 48 - 1) == "image_too_large"


def test_giant_png_text_chunk_is_refused() -> None:
    data = saved(picture(), "PNG")
    body = b"Comment\0\0" + zlib.compress(b"a" * 200_000_000, 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    assert code_of(data[:33] + chunk + data[33:]) == "unreadable_image"


def test_repeated_jpeg_scans_are_refused() -> None:
    data = saved(picture(), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    assert code_of(data[:at] + data[at:-2] * 300 + b"\xff\xd9") == "unreadable_image"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"PK\x03\x04" + b"\0" * 40, "archive"),
        (b"%PDF-1.7\n", "PDF"),
        (b"<html><script>alert(1)</script>", "JPEG, PNG"),
        (b"just text, named cat.jpg", "JPEG, PNG"),
        (b"BMW is not a bitmap, only a word", "JPEG, PNG"),
        (b"PF\n4 4\n-1.0\n" + b"\0" * 192, "JPEG, PNG"),
    ],
)
def test_other_content_is_refused_whatever_its_name(data: bytes, words: str) -> None:
    assert code_of(data) == "unsupported_format"
    with pytest.raises(InvalidInput, match=words):
        inspect(data)


def test_float_and_lab_pixels_are_refused() -> None:
    assert code_of(saved(Image.new("F", (8, 8), 0.5), "TIFF")) == "unsupported_format"
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (8, 8)), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    assert code_of(saved(lab, "TIFF")) == "unsupported_format"


SAMPLES = [
    saved(picture(), "JPEG"),
    saved(picture(), "JPEG", progressive=True, exif=exif(6)),
    saved(picture().convert("CMYK"), "JPEG"),
    saved(picture(), "PNG"),
    saved(picture().convert("P"), "PNG"),
    saved(picture(), "GIF"),
    saved(picture(), "WEBP", exif=exif(3)),
    saved(picture(), "BMP"),
    saved(picture(), "TIFF", compression="tiff_lzw"),
    saved(picture(), "PPM"),
    b"P3 4 4 255 " + b"1 2 3 " * 16,
]


@settings(max_examples=400)
@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0.2, 1.2),
)
def test_damaged_bytes_give_a_picture_or_invalid_input(
    data: bytes, edits: list[tuple[float, int]], length: float
) -> None:
    changed = bytearray(data)
    for where, value in edits:
        changed[int(where * len(changed))] = value
    damaged = bytes(changed[: int(length * len(changed))])
    try:
        info = inspect(damaged, max_pixels=4_000_000)
    except InvalidInput:
        return
    result = decode(damaged, max_pixels=4_000_000)  # what inspect lets in must decode later
    assert result.mode == "RGB"
    assert result.size == (info.width, info.height)
