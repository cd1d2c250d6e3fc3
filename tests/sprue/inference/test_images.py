"""Images of every mode become the same 8-bit RGB; damage is reported, never guessed at."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageColor

from sprue.inference.calibration import Calibration
from sprue.inference.heatmap import OUTLINE, heat, overlay
from sprue.inference.images import (
    ImageTooLargeError,
    NotAnImageError,
    UnreadableImageError,
    deep_peak,
    model_input,
    open_image,
)

GREY_HW = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)
RGB_HWC = np.stack([GREY_HW, GREY_HW[::-1], 255 - GREY_HW], axis=2)
ALPHA_HW = np.full((12, 20), 255, np.uint8)


def encoded(image, file_format="PNG", **arguments):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **arguments)
    return buffer.getvalue()


def chunk(kind, body):
    """Of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def grey(values_HW):
    return np.repeat(np.asarray(values_HW, np.uint8)[:, :, None], 3, axis=2)


def palette(transparent=False):
    image = Image.new("P", (20, 12))
    image.putpalette([value for index in range(256) for value in (index, 255 - index, index // 2)])
    image.putdata(GREY_HW.ravel())
    if transparent:
        image.info["transparency"] = 7
    return image


PALETTE_HWC = np.stack([GREY_HW, 255 - GREY_HW, GREY_HW // 2], axis=2)
CMYK_HWC = np.concatenate([255 - RGB_HWC, np.zeros((12, 20, 1), np.uint8)], axis=2)
DEEP_HW = (np.arange(240, dtype=np.uint16) * 257).reshape(12, 20)

MODES = {
    "1": (encoded(Image.fromarray(GREY_HW > 99)), grey(255 * (GREY_HW > 99))),
    "L": (encoded(Image.fromarray(GREY_HW)), grey(GREY_HW)),
    "LA": (encoded(Image.merge("LA", [Image.fromarray(GREY_HW), Image.fromarray(ALPHA_HW)])), grey(GREY_HW)),
    "P": (encoded(palette()), PALETTE_HWC),
    "P with a transparent colour": (encoded(palette(True), transparency=7), PALETTE_HWC),
    "RGB": (encoded(Image.fromarray(RGB_HWC)), RGB_HWC),
    "RGBA": (encoded(Image.fromarray(np.dstack([RGB_HWC, ALPHA_HW]))), RGB_HWC),
    "CMYK": (encoded(Image.fromarray(CMYK_HWC, "CMYK"), "TIFF"), RGB_HWC),
    "I;16": (encoded(Image.fromarray(DEEP_HW)), grey(GREY_HW)),
    "I;16 in a TIFF": (encoded(Image.fromarray(DEEP_HW), "TIFF"), grey(GREY_HW)),
    "I": (encoded(Image.fromarray(DEEP_HW.astype(np.int32)), "TIFF"), grey(GREY_HW)),
    "F of 0 to 1": (encoded(Image.fromarray((GREY_HW / 255).astype(np.float32)), "TIFF"), grey(GREY_HW)),
}


@pytest.mark.parametrize("mode", MODES)
def test_images_of_every_mode_keep_their_values(mode):
    data, expected_HWC = MODES[mode]
    assert Image.open(io.BytesIO(data)).mode == mode.split(" ")[0]
    image = open_image(data, "part")
    assert (image.mode, image.size) == ("RGB", (20, 12))
    tolerance = 1 if mode.startswith("F") else 0
    np.testing.assert_allclose(np.asarray(image).astype(int), expected_HWC.astype(int), atol=tolerance)
    assert model_input(image, 64).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("values_HW", "full"),
    [(GREY_HW.astype(np.float32), 1), (GREY_HW + np.float32("inf"), 1), (DEEP_HW.astype(np.int32) * 2, 65535)],
)
def test_values_above_the_full_scale_are_refused_and_not_scaled_otherwise(values_HW, full):
    with pytest.raises(UnreadableImageError, match=rf"part has values above {full}, .*: scale them to 0\.\.{full}"):
        open_image(encoded(Image.fromarray(values_HW), "TIFF"), "part")


def test_dark_images_are_not_brightened():
    for dark_HW, expected in ((DEEP_HW // 16, 14), (GREY_HW / np.float32(255 * 16), 14)):
        assert np.asarray(open_image(encoded(Image.fromarray(dark_HW), "TIFF"), "part")).max() == expected


def png_of_16_bits(values_HWC):
    height, width, channels = values_HWC.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    pixels = b"".join(b"\0" + row_WC.astype(">u2").tobytes() for row_WC in values_HWC)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, *zip(*chunks, strict=True)))


@pytest.mark.parametrize("mode", MODES)
def test_only_deep_images_have_a_deep_peak(mode):
    assert (deep_peak(MODES[mode][0]) is not None) == (mode[0] in "IF")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_deep_colours_have_a_peak_though_they_are_decoded_to_8_bits(channels):
    data = png_of_16_bits(np.full((4, 5, channels), 4095))
    assert deep_peak(data) == pytest.approx(4095 / 65535, abs=1 / 255)
    assert np.asarray(open_image(data, "part")).max() == 15


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF"])
def test_every_format_is_read(file_format):
    image = open_image(encoded(Image.new("RGB", (30, 10), (200, 30, 90)), file_format), "part")
    assert image.size == (30, 10)
    np.testing.assert_allclose(np.asarray(image).mean((0, 1)), (200, 30, 90), atol=3)


def test_a_cameras_rotation_tag_is_not_followed():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(encoded(Image.fromarray(RGB_HWC), "JPEG", exif=exif), "part").size == (20, 12)


@pytest.mark.parametrize("data", [b"", b"text", b"%PDF-1.4 " + bytes(100), b"\x89PNG"])
def test_other_files_are_no_images(data):
    with pytest.raises(NotAnImageError, match=r"part\.png is not an image \(PNG, JPEG"):
        open_image(data, "part.png")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_truncated_image_is_damaged(file_format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), file_format)
    with pytest.raises(UnreadableImageError, match=r"part is (damaged|not an image)"):
        open_image(data[: len(data) // 2], "part")


def test_a_flipped_bit_in_a_png_is_damage():
    data = bytearray(encoded(Image.fromarray(RGB_HWC)))
    data[len(data) // 2] ^= 1
    with pytest.raises(UnreadableImageError, match="part is damaged"):
        open_image(bytes(data), "part")


def test_an_image_that_claims_too_many_pixels_is_refused_before_it_is_decoded():
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
    with pytest.raises(ImageTooLargeError, match="part"):
        open_image(bomb, "part")
    data = encoded(Image.new("L", (40, 30)))
    assert open_image(data, "part", max_pixels=1200).size == (40, 30)
    with pytest.raises(ImageTooLargeError, match="40 x 30 pixels; at most 1,199"):
        open_image(data, "part", max_pixels=1199)


def test_a_models_input_is_the_complete_image_as_a_square():
    image = Image.new("RGB", (400, 100))
    image.paste((255, 255, 255), (200, 0, 400, 100))
    input_SS3 = model_input(image, 64)
    assert (input_SS3.shape, input_SS3.dtype) == ((64, 64, 3), np.uint8)
    assert (input_SS3[:, :28] == 0).all()
    assert (input_SS3[:, 36:] == 255).all()


def test_heat_is_one_scale_for_all_images_of_a_class():
    calibration = Calibration((0.0,), alpha=0.5, low=1.0, high=3.0, pixel_threshold=3.0)
    position_scores_HW = np.array([[-5.0, 1.0, 3.0, 5.0, 99.0]], np.float32)
    np.testing.assert_allclose(heat(position_scores_HW, calibration), [[0, 0, 0.5, 1, 1]])
    flat = heat(position_scores_HW, Calibration((0.0,), alpha=0.5, low=1.0, high=1.0, pixel_threshold=1.0))
    assert np.isfinite(flat).all()


def test_an_overlay_shows_the_image_where_it_is_cold_and_heat_where_it_is_hot():
    image = Image.new("L", (20, 10), 80)
    heat_HW = np.zeros((10, 20), np.float32)
    heat_HW[:, 10:] = 1.0
    nothing_HW = np.zeros((10, 20), bool)
    pixels_HWC = np.asarray(overlay(image, heat_HW, nothing_HW)).astype(int)
    assert (pixels_HWC[:, :10] == 80).all()
    assert (np.abs(pixels_HWC[:, 10:] - 80).max(2) > 50).all()


def test_an_overlay_outlines_the_predicted_mask_from_within():
    image, cold_HW = Image.new("L", (20, 10), 80), np.zeros((10, 20), np.float32)
    predicted_mask_HW = np.zeros((10, 20), bool)
    predicted_mask_HW[2:8, 3:15] = True
    border_HW = predicted_mask_HW.copy()
    border_HW[3:7, 4:14] = False
    pixels_HWC = np.asarray(overlay(image, cold_HW, predicted_mask_HW))
    assert np.array_equal((pixels_HWC == ImageColor.getrgb(OUTLINE)).all(2), border_HW)
    assert (pixels_HWC[~border_HW] == 80).all()

    everything_HW = np.ones((10, 20), bool)
    pixels_HWC = np.asarray(overlay(image, cold_HW, everything_HW))
    assert (pixels_HWC[[0, -1]] == ImageColor.getrgb(OUTLINE)).all() and (pixels_HWC[1:-1, 1:-1] == 80).all()
