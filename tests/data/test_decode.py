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


def test_a_photograph_is_turned_upright(tmp_path):
    picture = Image.fromarray(np.zeros((8, 6, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert decode.decode_image({"bytes": None, "path": str(tmp_path / "turned.jpg")}).shape == (6, 8, 3)


def encoded(kind, **options):
    file = io.BytesIO()
    Image.fromarray(natural_image(60, 80)).save(file, kind, **options)
    return file.getvalue()


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
    ],
    ids=["empty", "text", "cut JPEG", "cut PNG", "cut WebP", "cut at the end", "zeros"],
)
def test_what_cannot_be_decoded_says_why(content, reason, capfd):
    with pytest.raises(DecodeError, match=reason):
        decode.decode_image({"bytes": content, "path": None})


def test_bytes_after_the_end_are_no_harm():
    for kind in ("JPEG", "PNG"):
        assert decode.decode_image({"bytes": encoded(kind) + b"\0" * 10, "path": None}).shape == (60, 80, 3)


def test_a_part_of_a_file(tmp_path):
    content = encoded("PNG")
    (tmp_path / "many").write_bytes(b"x" * 100 + content + b"y" * 50)
    image = {"bytes": None, "path": str(tmp_path / "many"), "offset": 100, "size": len(content)}
    assert np.array_equal(decode.decode_image(image), natural_image(60, 80))


def test_a_file_that_is_gone(tmp_path):
    with pytest.raises(DecodeError, match="No such file"):
        decode.decode_image({"bytes": None, "path": str(tmp_path / "gone.jpg")})
    with pytest.raises(DecodeError, match="neither bytes nor a path"):
        decode.decode_image({"bytes": None, "path": None})


def test_a_large_photograph():
    _, content = cv2.imencode(".jpg", np.zeros((4000, 5000, 3), np.uint8))
    assert decode.decode_image({"bytes": content.tobytes(), "path": None}).shape == (4000, 5000, 3)


# --- a part of an image


PLAIN = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0, "quality": 97},
    "restarts": {"restart_marker_blocks": 3},
    "optimized": {"optimize": True, "quality": 30},
}


def encoded_jpeg(mode="RGB", size=(211, 318), **options):
    file = io.BytesIO()
    Image.fromarray(natural_image(*size)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def some_parts(height, width, number, seed=0):
    """Boxes, some of them a single row or column, and some that reach to the edges."""
    rng = np.random.default_rng(seed)
    yield from ((0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, height, width), (5, 0, 6, width))
    yield from ((0, 0, height, 1), (0, width - 1, height, width), (3, 0, height, 16), (3, width - 16, height, width))
    for _ in range(number):
        top, bottom = sorted(rng.choice(height + 1, 2, replace=False).tolist())
        left, right = sorted(rng.choice(width + 1, 2, replace=False).tolist())
        yield top, left, bottom, right


@pytest.mark.skipif(sys.platform != "linux", reason="nvImageCodec is installed on Linux only")
def test_on_linux_parts_are_decoded_as_parts(monkeypatch):
    content = encoded_jpeg()
    monkeypatch.setattr(decode, "decode_bytes", None)  # the way that takes the whole
    assert decode.decode_part(content, 10, 20, 30, 50).shape == (20, 30, 3)


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(211, 318), (40, 50)])
def test_a_part_is_that_of_the_whole_to_the_bit(mode, options, size):
    content = encoded_jpeg(mode, size, **options)
    assert decode.plain_jpeg_size(content) == size
    whole = decode.decode_bytes(content)
    for top, left, bottom, right in some_parts(*size, 40):
        part = decode.decode_part(content, top, left, bottom, right)
        assert np.array_equal(part, whole[top:bottom, left:right]), (top, left, bottom, right)


def test_without_the_library_a_part_is_cut_from_the_whole(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)  # as where it is not installed
    monkeypatch.setattr(decode, "part_decoder", decode.part_decoder.__wrapped__)
    assert decode.part_decoder(os.getpid()) is None
    content = encoded_jpeg()
    assert np.array_equal(decode.decode_part(content, 3, 5, 100, 90), decode.decode_bytes(content)[3:100, 5:90])


def test_parts_of_damaged_photographs(capfd):
    """Garbage in the middle is decoded as it was in the whole; what is cut has no part."""
    content = bytearray(encoded_jpeg(quality=90))
    content[4000:4100] = np.random.default_rng(1).integers(0, 255, 100, np.uint8).tobytes()
    whole = decode.decode_bytes(bytes(content))
    for top, left, bottom, right in some_parts(211, 318, 20):
        part = decode.decode_part(bytes(content), top, left, bottom, right)
        assert np.array_equal(part, whole[top:bottom, left:right])
    with pytest.raises(DecodeError, match="truncated"):
        decode.decode_part(encoded_jpeg()[:-500], 0, 0, 10, 100)
    decode.decode_part(encoded_jpeg()[:2000] + decode.JPEG_END, 0, 0, 200, 100)  # as the whole: the rest is gray
    assert "nv" not in capfd.readouterr().err


def test_what_may_not_be_what_its_header_says_is_decoded_whole():
    turned = Image.Exif()
    turned[0x0112] = 6
    plain = encoded_jpeg()
    header = plain.index(b"\xff\xc0")
    others = {
        "turned": encoded_jpeg(exif=turned),
        "CMYK": encoded_jpeg("CMYK"),
        "progressive": encoded_jpeg(progressive=True),
        "PNG": encoded("PNG"),
        "empty": b"",
        "text": b"not an image at all\n",
        "cut in the header": plain[: header + 6],
        "no scan": plain[: header + 19],
        "only the first bytes": decode.JPEG,
        "no height": plain[: header + 5] + b"\0\0" + plain[header + 7 :],
        "more than OpenCV takes": plain[: header + 5] + b"\xff\xff\xff\xff" + plain[header + 9 :],
    }
    assert {name: decode.plain_jpeg_size(content) for name, content in others.items()} == dict.fromkeys(others)


def test_memory_does_not_grow_with_the_parts_that_were_decoded():
    content, process = encoded_jpeg(), psutil.Process()

    def own_memory_after(number):
        for _ in range(number):
            decode.decode_part(content, 0, 0, 20, 30)
        return process.memory_full_info().uss

    own_memory_after(5_000)
    growth = np.diff([own_memory_after(10_000) for _ in range(4)])
    assert growth.min() < 100_000  # it was 32 bytes each: 320 000 every time; what other tests left may also grow, once


def test_a_process_that_was_forked_decodes_parts(capfd):
    content = encoded_jpeg()
    decode.decode_part(content, 0, 0, 10, 10)  # the decoder of this process is there, and has threads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of a fork beside threads
        child = multiprocessing.get_context("fork").Process(target=decode.decode_part, args=(content, 10, 20, 30, 50))
        child.start()
    child.join(30)
    assert child.exitcode == 0
    assert capfd.readouterr().err == ""


def test_where_stderr_is_closed_images_are_decoded(run_script):
    script = (
        "import os, sys, cv2, numpy as np\n"
        "from m2t_accel import decode\n"
        "os.close(2)\n"
        "content = cv2.imencode('.jpg', np.zeros((60, 80, 3), np.uint8))[1].tobytes()\n"
        "print(decode.decode_part(content, 0, 0, 20, 30).shape, decode.part_decoder(os.getpid()) is not None)"
    )
    done = run_script("-c", script)
    assert done.stdout == f"(20, 30, 3) {sys.platform == 'linux'}\n"
