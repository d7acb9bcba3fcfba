import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from ovref import stored_images
from ovref.stored_images import REASONS, UnusableImageError, decode_image, plain_image
from ovref_inference import pictures, read_image

HEIGHT, WIDTH = 24, 40
RED, GREEN, BLUE = (230, 30, 30), (30, 200, 30), (30, 30, 230)


def quarters() -> np.ndarray:
    """(24, 40, 3): red, green above blue, white; no symmetry, so that every turn shows."""
    pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    pixels[:12, :20], pixels[:12, 20:], pixels[12:, :20] = RED, GREEN, BLUE
    return pixels


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def file_of(mode: str, file_format: str, **options) -> bytes:
    return encoded(Image.fromarray(quarters()).convert(mode), file_format, **options)


def reason_of(file: bytes) -> str:
    with pytest.raises(UnusableImageError) as caught:
        decode_image(file)
    assert str(caught.value).startswith(f"{caught.value.reason}: ")
    with pytest.raises(UnusableImageError, match=caught.value.reason):
        plain_image(file)
    assert caught.value.reason in REASONS
    return caught.value.reason


@pytest.mark.parametrize(
    ("mode", "file_format", "options"),
    [
        ("RGB", "PNG", {}),
        ("RGB", "BMP", {}),
        ("RGB", "TIFF", {}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGB", "JPEG", {"quality": 95, "subsampling": 0}),
        ("RGB", "JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
        ("CMYK", "JPEG", {"quality": 95, "subsampling": 0}),
        ("CMYK", "TIFF", {}),
        ("P", "PNG", {}),
        ("P", "GIF", {}),
        ("RGBA", "PNG", {}),
    ],
)
def test_every_kind_of_colour_file_gives_its_colours(mode, file_format, options):
    image_hwc = decode_image(file_of(mode, file_format, **options))
    assert image_hwc.shape == (HEIGHT, WIDTH, 3) and image_hwc.dtype == np.uint8
    assert image_hwc.flags.writeable and image_hwc.flags.c_contiguous
    # The web palette of mode P has steps of 51, dithered; JPEG rings at the edges.
    tolerance = 26 if mode == "P" else 8
    assert np.abs(image_hwc[2:10, 2:18].mean((0, 1)) - RED).max() <= tolerance
    assert np.abs(image_hwc.astype(int) - quarters()).mean() < tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(file_format, orientation):
    # Exif 2.32: where the stored row 0 and column 0 lie in the image as it is to be seen.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a[:, ::-1].transpose(1, 0, 2)[:, :],
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a[::-1].transpose(1, 0, 2),
    }
    # 6: stored row 0 is the visual right side, stored column 0 the visual top.
    # 8: stored row 0 is the visual left side, stored column 0 the visual bottom.
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} | ({"lossless": True} if file_format == "WEBP" else {})
    file = encoded(
        Image.fromarray(np.ascontiguousarray(stored[orientation](quarters()))),
        file_format,
        **options,
    )
    image_hwc = decode_image(file)
    assert image_hwc.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(image_hwc.astype(int) - quarters()).mean() < 8
    kept, kept_hwc = plain_image(file)
    np.testing.assert_array_equal(kept_hwc, decode_image(kept))
    assert kept_hwc.shape == image_hwc.shape
    with Image.open(io.BytesIO(kept)) as image:  # a decoder that knows nothing of EXIF
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), kept_hwc)
    assert (kept == file) == (orientation == 1 and file_format != "TIFF")


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_exif_does_not_have_turns_nothing(value):
    exif = Image.Exif()
    exif[0x0112] = value
    file = file_of("RGB", "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(file), quarters())


def test_an_image_is_turned_though_another_tag_cannot_be_written():
    turned = struct.pack("<HHIHxx", 0x0112, 3, 1, 6)
    entries = turned + struct.pack("<HHI4s", 0x011A, 2, 4, b"72x\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)
    file = file_of("RGB", "JPEG", exif=exif)
    with Image.open(io.BytesIO(file)) as image, pytest.raises(TypeError):
        ImageOps.exif_transpose(image)
    with Image.open(io.BytesIO(file)) as image:
        assert decode_image(file).shape[:2] == image.size


def test_damaged_exif_turns_nothing():
    file = file_of("RGB", "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f no directory there")
    assert decode_image(file).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_becomes_rgb(mode):
    grey = np.zeros((8, 8), np.uint8)
    grey[:, 4:] = 255
    image_hwc = decode_image(encoded(Image.fromarray(grey).convert(mode), "PNG"))
    np.testing.assert_array_equal(image_hwc, grey[..., None].repeat(3, 2))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight_over_the_full_range(file_format):
    values = np.array([[0, 128, 129, 257], [32768, 40000, 65406, 65535]], np.uint16)
    image_hwc = decode_image(encoded(Image.fromarray(values), file_format))
    expected = np.round(values / 65535 * 255).astype(np.uint8)
    np.testing.assert_array_equal(image_hwc, expected[..., None].repeat(3, 2))


def test_big_endian_sixteen_bits_are_read_too():
    values = np.array([[0, 257, 65535]], ">u2")
    image = Image.frombytes("I;16B", (3, 1), values.tobytes())
    image_hwc = decode_image(encoded(image, "TIFF"))
    assert image_hwc[0, :, 0].tolist() == [0, 1, 255]


def test_sixteen_bits_of_colour_are_read():
    # Pillow writes no such PNG: one by hand, two pixels, filter 0.
    pixels = np.array([[[65535, 0, 32896], [0, 65535, 257]]], ">u2")
    image_hwc = decode_image(_png(2, 1, depth=16, colour=2, rows=b"\0" + pixels.tobytes()))
    assert image_hwc.tolist() == [[[255, 0, 128], [0, 255, 1]]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_an_agreed_white_are_refused(mode):
    values = np.array([[0, 70000]], np.int32 if mode == "I" else np.float32)
    assert reason_of(encoded(Image.fromarray(values), "TIFF")) == "unsupported_pixels"


def test_thirty_two_bit_files_of_sixteen_bit_values_are_read():
    values = np.array([[0, 257, 65535]], np.int32)
    assert decode_image(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 1, 255]


def test_cie_lab_becomes_rgb():
    black_white_red = bytes([0, 0, 0, 255, 0, 0, 137, 80, 67])
    image_hwc = decode_image(encoded(Image.frombytes("LAB", (3, 1), black_white_red), "TIFF"))
    expected = [[[0, 0, 0], [255, 255, 255], [250, 5, 11]]]
    np.testing.assert_allclose(image_hwc, expected, atol=3)


@pytest.mark.parametrize(
    ("mode", "file_format"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF")]
)
def test_transparent_pixels_show_white(mode, file_format):
    pixels = np.zeros((8, 8, 4), np.uint8)  # black below the transparency
    pixels[:, 4:, 3] = 255
    pixels[0, 0, 3] = 51
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    file = encoded(Image.fromarray(pixels).convert(mode), file_format, **options)
    image_hwc = decode_image(file)
    assert image_hwc[0, 0].tolist() == [204] * 3  # 0.2 of black over white
    assert (image_hwc[1:, :4] == 255).all() and (image_hwc[:, 4:] == 0).all()
    kept, _ = plain_image(file)
    assert kept != file and kept.startswith(b"\xff\xd8")


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
def test_a_transparent_entry_of_a_palette_shows_white(transparency):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([*RED, *GREEN, *BLUE])
    image_hwc = decode_image(encoded(image, "PNG", transparency=transparency))
    assert image_hwc.tolist() == [[list(RED), [255, 255, 255], list(BLUE)]]


def test_a_colour_named_as_transparent_shows_white():
    image = Image.fromarray(quarters())
    file = encoded(image, "PNG", transparency=RED)
    assert decode_image(file)[0, 0].tolist() == [255] * 3
    assert plain_image(file)[0] != file


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(file_format):
    frames = [Image.new("RGB", (8, 6), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if file_format == "WEBP" else {}
    file = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    image_hwc = decode_image(file)
    assert image_hwc.shape == (6, 8, 3)
    assert np.abs(image_hwc.astype(int) - RED).max() <= 26
    kept, kept_hwc = plain_image(file)
    with Image.open(io.BytesIO(kept)) as image:
        assert getattr(image, "n_frames", 1) == 1
    assert np.abs(kept_hwc.astype(int) - RED).max() <= 26


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_cut_off_files_are_refused_and_never_half_decoded(file_format):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), file_format)
    for part in (0.35, 0.5, 0.75, 0.9):
        assert reason_of(whole[: int(len(whole) * part)]) in ("truncated_image", "corrupt_image")
    if file_format in ("JPEG", "PNG", "BMP", "GIF"):  # the header stands first
        assert reason_of(whole[: int(len(whole) * 0.9)]) == "truncated_image"
    assert reason_of(whole[:10]) == "corrupt_image"


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_files_give_pixels_or_a_reason_and_nothing_else(file_format):
    random = np.random.default_rng(1)
    noise = random.integers(0, 255, (24, 24, 3), dtype=np.uint8)
    whole = np.frombuffer(encoded(Image.fromarray(noise), file_format), np.uint8)
    refused = 0
    for _ in range(60):
        spoilt = whole.copy()
        at = random.integers(0, min(len(spoilt), 400), random.integers(1, 12))
        spoilt[at] = random.integers(0, 255, at.size)
        try:
            image_hwc = decode_image(spoilt.tobytes())
        except UnusableImageError as error:
            assert error.reason in REASONS
            refused += 1
        else:
            assert image_hwc.dtype == np.uint8 and image_hwc.shape[2] == 3
    assert refused


@pytest.mark.parametrize(
    "file", [b"no image", b"\xff\xd8\xff", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", bytes(100)]
)
def test_what_is_no_image_is_corrupt(file):
    assert reason_of(file) == "corrupt_image"


def test_what_is_refused_is_said_for_people():
    with pytest.raises(UnusableImageError, match="corrupt_image: no image of the formats JPEG"):
        decode_image(b"no image")  # Pillow's own words are an address in memory
    with pytest.raises(UnusableImageError, match="is 1 x 30; one side may be 20 times the other"):
        decode_image(_png(30, 1, depth=8, colour=2, rows=b""))


def test_formats_that_pillow_knows_and_a_build_does_not_want_are_refused():
    assert reason_of(file_of("RGB", "EPS")) == "corrupt_image"
    assert reason_of(file_of("RGB", "ICO")) == "corrupt_image"


def test_no_bytes_are_empty_and_no_pixels_are_no_image():
    assert reason_of(b"") == "empty_image"
    for width, height in [(0, 5), (5, 0), (0, 0)]:
        assert reason_of(_png(width, height, depth=8, colour=2, rows=b"")) == "corrupt_image"


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    # 200,000 x 200,000 pixels promised by a file of a few bytes, and one just above the limit.
    assert reason_of(_png(200_000, 200_000, depth=8, colour=2, rows=b"")) == "image_too_large"
    assert reason_of(_png(12_000, 9_000, depth=8, colour=2, rows=b"")) == "image_too_large"
    monkeypatch.setattr(pictures, "MAX_PIXELS", HEIGHT * WIDTH)
    assert decode_image(file_of("RGB", "PNG")).shape == (HEIGHT, WIDTH, 3)
    monkeypatch.setattr(pictures, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    assert reason_of(file_of("RGB", "PNG")) == "image_too_large"


def test_extreme_shapes_are_refused():
    assert decode_image(encoded(Image.new("RGB", (100, 5)), "PNG")).shape == (5, 100, 3)
    assert reason_of(encoded(Image.new("RGB", (101, 5)), "PNG")) == "extreme_aspect"
    assert reason_of(encoded(Image.new("RGB", (2, 41)), "PNG")) == "extreme_aspect"
    assert decode_image(encoded(Image.new("RGB", (1, 1)), "PNG")).shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("mode", "file_format"), [("RGB", "JPEG"), ("L", "JPEG"), ("RGB", "PNG"), ("RGB", "WEBP")]
)
def test_a_plain_file_is_kept_byte_for_byte(mode, file_format):
    file = file_of(mode, file_format)
    kept, image_hwc = plain_image(file)
    assert kept is file
    np.testing.assert_array_equal(image_hwc, decode_image(file))


def test_what_is_kept_of_a_large_image_is_smaller(monkeypatch):
    monkeypatch.setattr(stored_images, "MAX_SIDE", 20)
    kept, image_hwc = plain_image(file_of("RGB", "JPEG"))  # 24 x 40
    assert image_hwc.shape == (12, 20, 3)
    np.testing.assert_array_equal(image_hwc, decode_image(kept))
    # Antialiased: each pixel is about the mean of the four that it stands for.
    means = quarters().reshape(12, 2, 20, 2, 3).mean((1, 3))
    assert np.abs(image_hwc - means).mean() < 8
    assert plain_image(kept)[0] is kept
    assert plain_image(encoded(Image.new("RGB", (400, 20)), "PNG"))[1].shape == (1, 20, 3)
    monkeypatch.setattr(stored_images, "MAX_SIDE", 40)
    assert plain_image(file_of("RGB", "JPEG"))[1].shape == (24, 40, 3)


@pytest.mark.parametrize(
    ("mode", "file_format"), [("CMYK", "JPEG"), ("P", "GIF"), ("I;16", "PNG"), ("RGB", "BMP")]
)
def test_other_files_are_kept_as_jpeg_with_the_pixels_that_it_gives(mode, file_format):
    image = Image.fromarray(quarters()).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    file = encoded(image, file_format)
    kept, image_hwc = plain_image(file)
    assert kept.startswith(b"\xff\xd8")
    np.testing.assert_array_equal(image_hwc, decode_image(kept))
    assert np.abs(image_hwc.astype(int) - decode_image(file)).mean() < 3
    assert plain_image(kept)[0] is kept
    assert plain_image(file)[0] == kept  # equal input, equal bytes


def _png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "LA", "P"])
def test_the_light_half_reads_files_as_builds_do(mode, tmp_path):
    path = tmp_path / "a.png"
    grey = Image.fromarray(np.linspace(0, 65535, 24, dtype=np.uint16).reshape(4, 6))
    image = grey if mode == "I;16" else Image.fromarray(quarters()).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(0)
    image.save(path)
    found = read_image(path)
    assert np.array_equal(found, decode_image(path.read_bytes()))
    if mode in ("RGBA", "LA"):
        assert (found == 255).all()
    if mode == "I;16":
        assert found.min() == 0 and len(np.unique(found)) == 24
    with pytest.raises(OSError, match="none"):
        read_image(tmp_path / "none.png")
