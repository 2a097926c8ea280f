import io

import cv2
import numpy as np
import pytest
from conftest import natural_image
from PIL import Image

from m2t_accel import decode
from m2t_accel.decode import DecodeError


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
