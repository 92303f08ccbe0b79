"""JPEG bytes to pixels: decoding, and where to crop.

Shape suffixes: H height, W width, C colours.
"""

import contextlib
import io
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from lanistr.modalities.base import address


def decode_jpeg(data: bytes, size: int) -> np.ndarray:
    """(height, width, 3) uint8; a much larger image at a half, quarter or eighth, at least ``size`` on both sides.

    Whole images are decoded by simplejpeg where it is installed: the same pixels, without what Pillow does around it.

    Raises:
        ValueError: not an image.
    """
    fast = simplejpeg_module()
    if fast:
        with contextlib.suppress(ValueError):  # Pillow has the last word on what is broken
            height, width, space, _ = fast.decode_jpeg_header(data)
            if min(height, width) < 2 * size and space in ("YCbCr", "Gray"):
                return fast.decode_jpeg(data)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.draft("RGB", (size, size))
            return np.asarray(opened.convert("RGB"))
    except UnidentifiedImageError:  # its message holds an address
        raise ValueError(f"jpg: {len(data)} bytes that are no image") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"jpg: {error}") from None


def aligned_rows(count: int, size: int) -> np.ndarray:
    """(count, size, size, 3), between two multiples of 32 bytes.

    To rows that begin at a multiple libjpeg-turbo writes past the caches: a tenth slower, for bytes that are read next.
    """
    room = np.empty(count * size * size * 3 + 32, dtype=np.uint8)
    begin = (16 - address(room)) % 32
    return room[begin : room.size - 32 + begin].reshape(count, size, size, 3)


def fits_exactly(data: bytes, size: int) -> bool:
    """Whether simplejpeg is there, takes the image, and finds it ``size`` pixels wide and high."""
    fast = simplejpeg_module()
    if not fast:
        return False
    try:
        height, width, space, _ = fast.decode_jpeg_header(data)
    except ValueError:  # Pillow has the last word on what is broken
        return False
    return height == width == size and space in ("YCbCr", "Gray")


def decode_into(data: bytes, row_HWC: np.ndarray) -> bool:
    """Decode an image of just the row's size by simplejpeg; False = it is broken."""
    try:
        simplejpeg_module().decode_jpeg(data, buffer=row_HWC)
    except ValueError:  # Pillow has the last word on what is broken
        return False
    return True


@cache
def simplejpeg_module() -> Any:
    """The package, None where it is not installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def centre(image: Image.Image) -> tuple[int, int, int, int]:
    """The largest square around the centre: left, top, right, bottom."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return left, top, left + short, top + short


def random_box(
    image: tuple[int, int], crop: tuple[float, float], area: float, log_ratio: float, x: float, y: float
) -> tuple[float, float, float, float]:
    """A crop of a random share of the area and a random aspect ratio, from four draws in [0, 1)."""
    width, height = image
    pixels = width * height * (crop[0] + area * (crop[1] - crop[0]))
    ratio = np.exp((2 * log_ratio - 1) * np.log(4 / 3))
    w, h = min(width, np.sqrt(pixels * ratio)), min(height, np.sqrt(pixels / ratio))
    left, top = x * (width - w), y * (height - h)
    return left, top, left + w, top + h
