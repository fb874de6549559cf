"""Uploaded pictures: recognised by content, fully decoded before they are believed, always 8-bit RGB afterwards."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from typing import Final

from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from shared.datasets.structure import check_scans, check_structure
from shared.errors import InvalidInput

# Pillow warns of each oddity of a file in words of its own, and Python keeps every such text for ever.
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_PIXELS: Final = 100_000_000
_LARGE: Final = 16_000_000  # pixels; hundreds of MiB while they are decoded, which threads that inspect do by turns
_one_at_a_time: Final = threading.Lock()
ACCEPTED: Final = "JPEG, PNG, WebP, BMP, GIF (one frame), TIFF (one page) or PPM"

_ORIENTATION_TAG: Final = 0x0112
_ORIENTATIONS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MODES: Final = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
_MAX_EXIF_BYTES: Final = 2**20  # real ones have at most 64 KiB


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """Width and height in pixels as displayed, that is after the EXIF orientation."""

    width: int
    height: int
    format: str
    media_type: str


@dataclass(frozen=True, slots=True)
class _Format:
    name: str
    media_type: str
    opener: Callable[[BytesIO], ImageFile.ImageFile]


# The plugin classes are called directly: Pillow's own front door tries every installed format and turns a phone's
# JPEG with a second embedded picture (MPO) into an "animation".
_JPEG = _Format("JPEG", "image/jpeg", JpegImageFile)
_PNG = _Format("PNG", "image/png", PngImageFile)
_WEBP = _Format("WEBP", "image/webp", WebPImageFile)
_BMP = _Format("BMP", "image/bmp", BmpImageFile)
_GIF = _Format("GIF", "image/gif", GifImageFile)
_TIFF = _Format("TIFF", "image/tiff", TiffImageFile)
_PPM = _Format("PPM", "image/x-portable-anymap", PpmImageFile)
MEDIA_TYPES: Final = tuple(kind.media_type for kind in (_JPEG, _PNG, _WEBP, _BMP, _GIF, _TIFF, _PPM))


def inspect(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """Decodes the whole picture to verify it (a JPEG at 1/8 of its size: all of its data is read, three times faster).
    Whatever passes here also passes `decode`. Raises InvalidInput as `decode` does."""
    kind, image = _load(data, max_pixels, reduced=True)
    width, height = image.info.get("full_size", image.size)
    if _orientation(image) >= 5:
        width, height = height, width
    return ImageInfo(width, height, kind.name, kind.media_type)


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An upright 8-bit RGB picture: EXIF orientation applied, CMYK converted, 16 bits scaled down, alpha over white.

    Raises InvalidInput with one of these codes: empty_file, unsupported_format, image_too_large, animated_image,
    multi_page_image, truncated_image, unreadable_image. Messages say nothing of the decoder's internals.
    """
    _, image = _load(data, max_pixels, reduced=False)
    orientation = _orientation(image)
    with _decoder_errors():
        rgb = _to_rgb(image)
    upright = rgb.transpose(_ORIENTATIONS[orientation]) if orientation in _ORIENTATIONS else rgb
    upright.info = {}  # an EXIF orientation left behind would turn the picture a second time
    return upright


def _load(data: bytes, max_pixels: int, *, reduced: bool) -> tuple[_Format, ImageFile.ImageFile]:
    kind = _recognise(data)
    check_structure(kind.name, data)
    if kind is _WEBP and len(data) < int.from_bytes(data[4:8], "little") + 8:
        raise _truncated()  # its decoder would only say that something is wrong
    with _decoder_errors():
        image = kind.opener(BytesIO(data))
    width, height = image.size
    if width < 1 or height < 1:
        raise InvalidInput("The picture has no pixels.", code="unreadable_image")
    if width * height > max_pixels:  # before any pixel is decoded or allocated
        raise InvalidInput(
            f"The picture is {width} x {height} pixels; at most {max_pixels:,} pixels are accepted. Scale it down.",
            code="image_too_large",
        )
    if kind is _JPEG:
        check_scans(data, width * height)
    with _decoder_errors():
        several = kind is not _JPEG and bool(getattr(image, "is_animated", False))
    if several and kind is _TIFF:
        raise InvalidInput("The TIFF has several pages; upload one picture per file.", code="multi_page_image")
    if several:
        raise InvalidInput("The picture is animated; upload single frames instead.", code="animated_image")
    if not (image.mode in _MODES or image.mode.startswith("I;16") or (kind is _PPM and image.mode == "I")):
        raise InvalidInput(
            "The pixels are floating-point, 32-bit or Lab values; convert the picture to 8-bit RGB.",
            code="unsupported_format",
        )
    if reduced and isinstance(image, JpegImageFile):
        image.info["full_size"] = image.size
        image.draft(None, (max(1, width // 8), max(1, height // 8)))
    with _decoder_errors(), _one_at_a_time if reduced and width * height > _LARGE else nullcontext():
        image.load()
    return kind, image


def _recognise(data: bytes) -> _Format:
    if not data:
        raise InvalidInput("The file is empty (0 bytes).", code="empty_file")
    head = data[:16]
    if head.startswith(b"\xff\xd8\xff"):
        return _JPEG
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _PNG
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _WEBP
    if head.startswith((b"GIF87a", b"GIF89a")):
        return _GIF
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return _TIFF
    if len(head) >= 3 and head[:1] == b"P" and head[1] in b"123456" and head[2] in b" \t\r\n\v\f#":
        return _PPM
    if head.startswith(b"BM") and data[14:18] in _BMP_HEADER_SIZES:
        return _BMP
    found = next((name for magic, name in _KNOWN_OTHERS if magic in head), "not a picture in a known format")
    raise InvalidInput(f"The file is {found}; accepted are {ACCEPTED}.", code="unsupported_format")


_BMP_HEADER_SIZES: Final = frozenset(size.to_bytes(4, "little") for size in (12, 16, 40, 52, 56, 64, 108, 124))
_KNOWN_OTHERS: Final = (
    (b"ftypheic", "a HEIC picture"),
    (b"ftypmif1", "a HEIF picture"),
    (b"ftypavif", "an AVIF picture"),
    (b"ftyp", "a video or another media file"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML document or SVG drawing"),
    (b"%PDF", "a PDF document"),
    (b"8BPS", "a Photoshop document"),
    (b"PK\x03\x04", "an archive, and archives inside the archive are not opened"),
    (b"\x1f\x8b", "a compressed file, and archives inside the archive are not opened"),
)


@contextmanager
def _decoder_errors() -> Iterator[None]:
    """Turns whatever a decoder raises on hostile bytes into one clear error."""
    try:
        yield
    except (MemoryError, InvalidInput):
        raise
    except Image.DecompressionBombError as error:
        raise InvalidInput("The picture has too many pixels. Scale it down.", code="image_too_large") from error
    except Exception as error:  # damaged bytes make decoders raise nearly anything: struct.error, KeyError, ...
        if "truncated" in str(error).lower():
            raise _truncated() from error
        raise InvalidInput(
            "The picture is damaged and cannot be read; save it again.", code="unreadable_image"
        ) from error


def _truncated() -> InvalidInput:
    return InvalidInput("The picture ends too early; copy or save it again.", code="truncated_image")


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation 1-8. Damaged EXIF means upright: the pixels are still good. (Pillow turns TIFFs by itself.)"""
    if len(image.info.get("exif", b"")) > _MAX_EXIF_BYTES:
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except MemoryError:
        raise
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    # Pillow has already undone Adobe's inversion of CMYK JPEGs.
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _from_16_bit(image: Image.Image) -> Image.Image:
    # Pillow's own conversion cuts everything above 255 off instead of scaling.
    import numpy as np

    values = np.asarray(image).astype(np.uint32)
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey, mode="L").convert("RGB")
