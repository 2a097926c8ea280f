import io
import multiprocessing
import os
import sys
import warnings

import cv2
import numpy as np
import psutil
import pytest
from helpers import natural_image
from PIL import Image

from m2t_accel.data import decode
from m2t_accel.data.decode import DecodeError


def encoded(kind, mode="RGB", size=(60, 80), **options):
    """Return a natural image as the bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(natural_image(*size)).convert(mode).save(file, kind, **options)
    return file.getvalue()


def encoded_jpeg(mode="RGB", size=(211, 318), **options):
    return encoded("JPEG", mode, size, **options)


def rotated_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def with_size(content, height_and_width):
    """Return a JPEG with another size, four bytes, in its header."""
    header = content.index(b"\xff\xc0")
    return content[: header + 5] + height_and_width + content[header + 9 :]


def test_every_kind_of_image_becomes_rgb(tmp_path):
    color = np.zeros((8, 6, 3), np.uint8)
    color[..., 0] = 200
    picture = Image.fromarray(color)
    kinds = {
        "rgb.png": picture,
        "gray.png": picture.convert("L"),
        "palette.png": picture.convert("P"),
        "alpha.png": picture.convert("RGBA"),
        "cmyk.jpg": picture.convert("CMYK"),
        "animation.gif": picture,
        "png_named.JPEG": picture,
    }
    for name, image in kinds.items():
        path = tmp_path / name
        image.save(path, format="PNG" if name.startswith("png_") else None)
        pixels = decode.decode_image({"bytes": None, "path": str(path)})
        assert (pixels.shape, pixels.dtype) == ((8, 6, 3), np.uint8), name
        expected = [60] * 3 if name.startswith("gray") else [200, 0, 0]
        assert np.abs(pixels[4, 3].astype(int) - expected).max() <= 6, name
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((8, 6), 40_000, np.uint16))
    assert decode.decode_image({"bytes": None, "path": str(tmp_path / "deep.png")})[0, 0].tolist() == [156] * 3


def test_a_photograph_is_rotated_upright_by_its_exif_orientation():
    content = encoded("JPEG", size=(8, 6), exif=rotated_exif())
    assert decode.decode_image({"bytes": content, "path": None}).shape == (6, 8, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all\n", "no known image format"),
        (encoded("JPEG")[:1000], "truncated"),
        (encoded("PNG")[:1000], "truncated"),
        (encoded("WEBP")[:500], "Error"),
        (encoded("JPEG")[:-2], "truncated"),
        (bytes(2000), "no known image format"),
        (with_size(encoded("JPEG"), b"\x9c\x40\x9c\x40"), "larger than OpenCV"),
    ],
    ids=["empty", "text", "cut JPEG", "cut PNG", "cut WebP", "cut at the end", "zeros", "too large"],
)
def test_an_image_that_cannot_be_decoded_gives_the_reason(content, reason):
    with pytest.raises(DecodeError, match=reason):
        decode.decode_image({"bytes": content, "path": None})


def test_extra_bytes_after_the_end_are_ignored():
    for kind in ("JPEG", "PNG"):
        assert decode.decode_image({"bytes": encoded(kind) + b"\0" * 10, "path": None}).shape == (60, 80, 3)


def test_an_image_inside_a_larger_file_is_decoded(tmp_path):
    content = encoded("PNG")
    (tmp_path / "many").write_bytes(b"x" * 100 + content + b"y" * 50)
    image = {"bytes": None, "path": str(tmp_path / "many"), "offset": 100, "size": len(content)}
    assert np.array_equal(decode.decode_image(image), natural_image(60, 80))


def test_a_missing_file_gives_the_reason(tmp_path):
    with pytest.raises(DecodeError, match="No such file"):
        decode.decode_image({"bytes": None, "path": str(tmp_path / "gone.jpg")})
    with pytest.raises(DecodeError, match="no file"):
        decode.decode_image({"bytes": None, "path": None})


PLAIN = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0, "quality": 97},
    "restarts": {"restart_marker_blocks": 3},
    "optimized": {"optimize": True, "quality": 30},
}


def some_parts(height, width, number, seed=0):
    """Yield boxes, among them single rows and columns, and boxes at the edges."""
    rng = np.random.default_rng(seed)
    yield from ((0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, height, width), (5, 0, 6, width))
    yield from ((0, 0, height, 1), (0, width - 1, height, width), (3, 0, height, 16), (3, width - 16, height, width))
    for _ in range(number):
        top, bottom = sorted(rng.choice(height + 1, 2, replace=False).tolist())
        left, right = sorted(rng.choice(width + 1, 2, replace=False).tolist())
        yield top, left, bottom, right


@pytest.mark.skipif(sys.platform != "linux", reason="nvImageCodec is installed on Linux only")
def test_on_linux_only_the_part_is_decoded(monkeypatch):
    content = encoded_jpeg()
    monkeypatch.setattr(decode, "decode_bytes", None)  # decodes the whole
    assert decode.decode_part(content, 10, 20, 30, 50).shape == (20, 30, 3)


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(211, 318), (40, 50)])
def test_a_part_equals_that_of_the_whole_bit_for_bit(mode, options, size):
    content = encoded_jpeg(mode, size, **options)
    assert decode.plain_jpeg_size(content) == size
    whole = decode.decode_bytes(content)
    for top, left, bottom, right in some_parts(*size, 40):
        part = decode.decode_part(content, top, left, bottom, right)
        assert np.array_equal(part, whole[top:bottom, left:right]), (top, left, bottom, right)


def test_without_nvimagecodec_a_part_is_cut_from_the_whole(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)  # makes its import fail
    monkeypatch.setattr(decode, "part_decoder", decode.part_decoder.__wrapped__)
    content = encoded_jpeg()
    assert decode.part_decoder(os.getpid())(content, 3, 5, 100, 90) is None
    assert np.array_equal(decode.decode_part(content, 3, 5, 100, 90), decode.decode_bytes(content)[3:100, 5:90])


@pytest.mark.skipif(sys.platform != "linux", reason="nvImageCodec is installed on Linux only")
def test_parts_are_decoded_even_if_stderr_is_closed(monkeypatch):
    def dup(descriptor):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(os, "dup", dup)
    assert decode.part_decoder.__wrapped__(0)(encoded_jpeg(), 0, 0, 20, 30).shape == (20, 30, 3)


def test_parts_of_damaged_photographs(capfd):
    """Parts of garbage equal those of the whole, and a truncated file has no parts."""
    content = bytearray(encoded_jpeg(quality=90))
    content[4000:4100] = np.random.default_rng(1).integers(0, 255, 100, np.uint8).tobytes()
    whole = decode.decode_bytes(bytes(content))
    for top, left, bottom, right in some_parts(211, 318, 20):
        part = decode.decode_part(bytes(content), top, left, bottom, right)
        assert np.array_equal(part, whole[top:bottom, left:right])
    with pytest.raises(DecodeError, match="truncated"):
        decode.decode_part(encoded_jpeg()[:-500], 0, 0, 10, 100)
    gray_below = encoded_jpeg()[:2000] + decode.JPEG_END
    assert np.array_equal(decode.decode_part(gray_below, 0, 0, 200, 100), decode.decode_bytes(gray_below)[:200, :100])
    assert "nv" not in capfd.readouterr().err


PLAIN_JPEG = encoded_jpeg()
HEADER = PLAIN_JPEG.index(b"\xff\xc0")


@pytest.mark.parametrize(
    "content",
    {
        "rotated": encoded_jpeg(exif=rotated_exif()),
        "CMYK": encoded_jpeg("CMYK"),
        "progressive": encoded_jpeg(progressive=True),
        "PNG": encoded("PNG"),
        "empty": b"",
        "text": b"not an image at all\n",
        "cut in the header": PLAIN_JPEG[: HEADER + 6],
        "no scan": PLAIN_JPEG[: HEADER + 19],
        "only the first bytes": decode.JPEG,
        "no height": PLAIN_JPEG[: HEADER + 5] + b"\0\0" + PLAIN_JPEG[HEADER + 7 :],
        "more pixels than OpenCV allows": with_size(PLAIN_JPEG, b"\xff\xff\xff\xff"),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_file_whose_header_may_not_give_its_decoded_size_is_decoded_whole(content):
    assert decode.plain_jpeg_size(content[1]) is None


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_decoded_parts():
    content, process = encoded_jpeg(), psutil.Process()

    def own_memory_after(count):
        for _ in range(count):
            decode.decode_part(content, 0, 0, 20, 30)
        return process.memory_full_info().uss

    own_memory_after(5_000)
    growth = np.diff([own_memory_after(10_000) for _ in range(4)])
    # A leak of 32 bytes each would add 320 000 every time. Memory of other tests may also grow, but only once.
    assert growth.min() < 100_000


def test_a_forked_process_decodes_parts(capfd):
    content = encoded_jpeg()
    decode.decode_part(content, 0, 0, 10, 20)  # this process now has a decoder with threads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn about a fork beside threads
        child = multiprocessing.get_context("fork").Process(target=decode.decode_part, args=(content, 10, 20, 30, 50))
        child.start()
    child.join(30)
    assert child.exitcode == 0
    assert capfd.readouterr().err == ""
