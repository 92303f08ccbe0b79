"""Images are decoded once: upright, RGB, no larger than training needs."""

import io

import numpy as np
import pytest
from PIL import Image

from lanistr.transforms import ImageSpec, encode_image

UPRIGHT = {  # EXIF orientation -> how a camera stored an upright image
    1: None,
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


def encoded(image: Image.Image, size: int, kind: str = "png", **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(encode_image(buffer.getvalue(), ImageSpec(size=size, quality=95))["jpg"]))


def quadrants(width: int, height: int) -> Image.Image:
    """Four grey quadrants, all different."""
    pixels = np.zeros((height, width), dtype=np.uint8)
    for i, (y, x) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        pixels[y * height // 2 : (y + 1) * height // 2, x * width // 2 : (x + 1) * width // 2] = 40 + 60 * i
    return Image.fromarray(pixels).convert("RGB")


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_what_a_camera_turned_is_upright_and_says_so_no_longer(orientation: int) -> None:
    upright, turn = quadrants(640, 480), UPRIGHT[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    made = encoded(upright if turn is None else upright.transpose(turn), 120, "jpeg", exif=exif, quality=95)
    assert made.size == (160, 120)
    assert made.getexif().get(0x0112, 1) == 1
    expected = np.asarray(upright.resize((160, 120), Image.Resampling.BILINEAR), dtype=int)
    assert np.abs(np.asarray(made, dtype=int) - expected).mean() < 2


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("I;16", (30, 20), 77) if mode == "I;16" else quadrants(30, 20).convert(mode)
    assert encoded(image, 16, "tiff").mode == "RGB"


@pytest.mark.parametrize("width, height, expected", [(500, 500, (64, 64)), (1000, 100, (640, 64)), (30, 50, (30, 50))])
def test_the_shorter_side_shrinks_to_size_and_never_grows(width: int, height: int, expected: tuple[int, int]) -> None:
    assert encoded(quadrants(width, height), 64).size == expected


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"<html>not found</html>", bytes(1000)])
def test_what_is_no_image_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a readable image"):
        encode_image(data, ImageSpec(size=32))
