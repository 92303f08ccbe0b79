"""Guards how images are decoded, cropped and flipped."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lanistr.data.streams import philox
from lanistr.manifest import ModalitySchema
from lanistr.modalities import pixels as pixels_module
from lanistr.modalities.image import ImageModality, cut
from lanistr.modalities.pixels import decode_jpeg, random_box
from lanistr.transforms import MEMBERS, ImageSpec


def modality(**config: Any) -> ImageModality:
    schema = ModalitySchema(kind="image", members=MEMBERS["image"], spec=ImageSpec(size=32).model_dump())
    return ImageModality("image", {"size": 32, "patch": 16, **config}, schema)


def jpeg(width: int, height: int) -> dict[str, bytes]:
    """A smooth picture whose left is darker than its right."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([255 * x / width, 255 * y / height, 128 + 60 * np.sin(x / width * 9)], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return {"jpg": buffer.getvalue()}


def test_an_image_of_the_right_size_is_decoded_pixel_by_pixel() -> None:
    members = jpeg(32, 32)
    assert np.array_equal(modality().decode(members), np.asarray(Image.open(io.BytesIO(members["jpg"]))))


def test_patches_are_squares_of_the_picture_row_by_row() -> None:
    pixels = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    patches = cut(pixels, 16)
    assert patches.shape == (2, 6, 768)
    for row in range(2):
        for column in range(3):
            square = pixels[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            assert torch.equal(patches[:, 3 * row + column], square.permute(0, 3, 1, 2).flatten(1))


@pytest.mark.parametrize("size", [(40, 33), (64, 200), (300, 257), (1024, 768)])
def test_large_images_decoded_at_a_fraction_look_like_the_whole_centre(size: tuple[int, int]) -> None:
    members = jpeg(*size)
    image = Image.open(io.BytesIO(members["jpg"])).convert("RGB")
    short = min(size)
    left, top = (size[0] - short) // 2, (size[1] - short) // 2
    whole = image.crop((left, top, left + short, top + short)).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(modality().decode(members).astype(int) - np.asarray(whole)).max() <= 12


def test_augmentations_are_off_by_default() -> None:
    assert not modality().augments
    assert modality(flip=0.5).augments
    assert modality(crop=[0.5, 1.0]).augments


def test_an_augmented_image_is_a_function_of_its_key() -> None:
    augmenting, members = modality(crop=[0.2, 0.8], flip=0.5), jpeg(48, 40)
    draws = [augmenting.decode_augmented(members, philox("augment", 0, epoch)) for epoch in (0, 0, 1)]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    assert draws[0].shape == modality().decode(members).shape


def test_half_of_the_images_are_flipped() -> None:
    flipping, members = modality(flip=0.5), jpeg(32, 32)
    plain = modality().decode(members)
    seen = [flipping.decode_augmented(members, philox(i)) for i in range(100)]
    flipped = [np.array_equal(image, plain[:, ::-1]) for image in seen]
    assert all(f or np.array_equal(image, plain) for f, image in zip(flipped, seen, strict=True))
    assert 35 <= sum(flipped) <= 65


def test_crops_lie_in_the_image_and_have_the_area_and_ratio_asked_for() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = tuple(rng.integers(20, 200, 2).tolist())
        left, top, right, bottom = random_box(size, (0.3, 0.6), *rng.random(4))
        assert 0 <= left < right <= size[0] + 1e-9
        assert 0 <= top < bottom <= size[1] + 1e-9
        clipped = right - left > size[0] - 1e-6 or bottom - top > size[1] - 1e-6
        share = (right - left) * (bottom - top) / (size[0] * size[1])
        assert share <= 0.6 + 1e-9
        if not clipped:
            assert share >= 0.3 - 1e-9
            assert 3 / 4 - 1e-9 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-9


@pytest.mark.parametrize("crop", [[0.0, 1.0], [0.5, 1.2], [0.9, 0.5]])
def test_a_crop_that_is_no_share_is_refused(crop: list[float]) -> None:
    with pytest.raises(ValueError, match="share of the area"):
        modality(crop=crop)


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: b"not a jpeg", lambda d: d[:150]])
def test_broken_images_are_value_errors(damage: Any) -> None:
    for decode in (modality().decode, lambda m: modality(flip=1.0).decode_augmented(m, philox(0))):
        with pytest.raises(ValueError, match="jpg"):
            decode({"jpg": damage(jpeg(32, 32)["jpg"])})


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}]
)
def test_pixels_do_not_depend_on_which_decoder_is_installed(
    mode: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    shape = {"RGB": (61, 83, 3), "L": (61, 83), "CMYK": (61, 83, 4)}[mode]
    buffer = io.BytesIO()
    Image.frombytes(mode, (83, 61), rng.integers(0, 256, shape, dtype=np.uint8).tobytes()).save(
        buffer, "JPEG", **options
    )
    whole = decode_jpeg(buffer.getvalue(), 32)
    monkeypatch.setattr(pixels_module, "simplejpeg_module", lambda: None)
    assert np.array_equal(whole, decode_jpeg(buffer.getvalue(), 32))
    assert whole.shape == (61, 83, 3)
