import io
import multiprocessing
import os
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib

import cv2
import numpy as np
import psutil
import pytest
from helpers import ROOT, documented, natural_image
from PIL import EpsImagePlugin, Image

from m2t_accel.data import decode, headers
from m2t_accel.data.decode import DecodeError
from m2t_accel.data.folders import IMAGE_EXTENSIONS


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


PHOTO = natural_image(60, 80)
GRAY = PHOTO[..., 0]
ALPHA = np.arange(60 * 80, dtype=np.uint8).reshape(60, 80)  # with values of 0, where a program may drop the colours
DEEP = PHOTO.astype(np.uint16) * 256 + 77
BLACK_AND_WHITE = np.where(GRAY > 120, 255, 0).astype(np.uint8)
PALETTE = Image.fromarray(PHOTO).quantize(64)
FRAMES = [Image.fromarray(np.roll(np.asarray(PALETTE), shift, axis=1)) for shift in (0, 5, 9)]
for frame in FRAMES:
    frame.putpalette(PALETTE.getpalette())
COLOURS = np.array(PALETTE.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(PALETTE)]


def rgb(gray):
    return np.repeat(gray[..., None], 3, axis=2)


def saved(picture, kind, **options):
    """Return a picture of PIL, or an array, as the bytes of a file."""
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


def written_by_opencv(extension, pixels, *flags):
    """Return an array (RGB or RGBA in the last axis, or gray) as the bytes of a file."""
    order = {2: slice(None), 3: (..., [2, 1, 0]), 4: (..., [2, 1, 0, 3])}
    order = order[2] if pixels.ndim == 2 else order[pixels.shape[2]]
    return cv2.imencode(extension, pixels[order], flags)[1].tobytes()


def decoded_by_pil(content):
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


def chunk(kind, content):
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(png, kind, content):
    """Return a PNG with one more chunk after its header."""
    return png[:33] + chunk(kind, content) + png[33:]


def with_png_size(png, height, width):
    return png[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + png[24:29]) + png[33:]


def segment(content):
    """Return a segment of a JPEG with metadata."""
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


def exif(orientation, kind=3, endian="<"):
    """Return Exif of one entry, made by hand; kind 3 is a short integer, 4 a long one."""
    value = struct.pack(endian + "HH", orientation, 0) if kind == 3 else struct.pack(endian + "I", orientation)
    entry = struct.pack(endian + "HHHI", 1, 0x0112, kind, 1) + value + bytes(4)
    return (b"II*\0" if endian == "<" else b"MM\0*") + struct.pack(endian + "I", 8) + entry


def xmp(orientation):
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>'
    ) % orientation


def bmp(bits, compression, rows, palette=b"", masks=b"", height=4):
    """Return a BMP of 4 by 4 pixels, made by hand."""
    start = 54 + len(masks) + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, 4, height, 1, bits, compression, len(rows), 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + masks + palette + rows


def interlaced_png(gray):
    """Return a gray image of 8 by 8 pixels as an interlaced PNG, made by hand."""
    starts_and_steps = (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    )
    rows = [row for y, x, dy, dx in starts_and_steps for row in gray[y::dy, x::dx]]
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return headers.PNG + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def turned(orientation):
    """Return the upright picture of a file that stores PHOTO with this orientation, from the definition of Exif."""
    return {
        1: PHOTO,
        2: PHOTO[:, ::-1],  # row 0 is the top, column 0 the right-hand side
        3: PHOTO[::-1, ::-1],
        4: PHOTO[::-1],
        5: PHOTO.transpose(1, 0, 2),
        6: PHOTO[::-1].transpose(1, 0, 2),
        7: PHOTO[::-1, ::-1].transpose(1, 0, 2),
        8: PHOTO[:, ::-1].transpose(1, 0, 2),
    }[orientation]


RGBA, LA = np.dstack([PHOTO, ALPHA]), np.dstack([GRAY, ALPHA])
JPEG, PNG_FILE, TIFF = saved(PHOTO, "JPEG", quality=95), saved(PHOTO, "PNG"), saved(PHOTO, "TIFF")
NINE_CHANNELS = TIFF.replace(struct.pack("<HHIH", 277, 3, 1, 3), struct.pack("<HHIH", 277, 3, 1, 9))
WEBP = saved(PHOTO, "WEBP", lossless=True)
INKS = np.dstack([GRAY, GRAY // 2, GRAY // 3, GRAY // 4])
CMYK = Image.merge("CMYK", [Image.fromarray(ink) for ink in np.moveaxis(INKS, 2, 0)])
CMYK_IN_RGB = ((255 - INKS[..., :3].astype(int)) * (255 - INKS[..., 3:].astype(int)) / 255).round()
LOSSY = 8  # mean difference of the values; of another orientation or order of the channels it is above 40
CUT = "truncated|Truncated|broken data stream|could not create decoder"
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8)
BLUE = np.arange(16).reshape(4, 4, 1) * (0, 0, 255 / 31)
RUNS = bytes([4, 1, 0, 0, 4, 2, 0, 0, 4, 3, 0, 0, 4, 4, 0, 1])  # the lowest row is 1 1 1 1
GRAYS = bytes(i for i in range(256) for _ in "BGR0")
OS2_BMP = b"BM" + struct.pack("<IHHIIHHHH", 74, 0, 0, 26, 12, 4, 4, 1, 24) + bytes([1, 2, 3]) * 16
RAW_PROFILE = b"Raw profile type exif\0\nexif\n      32\n%s\n"

# For each row of the table in docs/data.md: files by name, each with its pixels and the mean difference allowed, or
# with the reason why it is a bad image. The pixels are known from making the file.
TABLE = {
    "JPEG in RGB, gray or CMYK; MPO": {
        "RGB": (JPEG, PHOTO, LOSSY),
        "RGB as by PIL": (JPEG, decoded_by_pil(JPEG), 0),
        "progressive": (saved(PHOTO, "JPEG", quality=95, progressive=True), PHOTO, LOSSY),
        "stored as RGB": (saved(PHOTO, "JPEG", quality=95, keep_rgb=True), PHOTO, LOSSY),
        "gray": (saved(GRAY, "JPEG", quality=95), rgb(GRAY), LOSSY),
        "CMYK": (saved(CMYK, "JPEG", quality=95), CMYK_IN_RGB, LOSSY),
        "MPO": (
            saved(PHOTO, "MPO", quality=95, save_all=True, append_images=[Image.fromarray(PHOTO[::-1])]),
            PHOTO,
            LOSSY,
        ),
        "fill bytes": (JPEG[:2] + b"\xff\xff" + JPEG[2:], decoded_by_pil(JPEG), 0),
        "garbage": (JPEG[:20] + b"garbage" + JPEG[20:], decoded_by_pil(JPEG), 0),
    },
    "PNG, WebP, BMP, TIFF, JPEG 2000, PPM; AVIF": {
        "PNG": (PNG_FILE, PHOTO, 0),
        "PNG with gamma": (with_chunk(PNG_FILE, b"gAMA", struct.pack(">I", 100_000)), PHOTO, 0),
        "interlaced PNG": (interlaced_png(RAMP), rgb(RAMP), 0),
        "WebP": (WEBP, PHOTO, 0),
        "lossy WebP": (saved(PHOTO, "WEBP", quality=95), PHOTO, LOSSY),
        "lossy WebP as by PIL": (saved(PHOTO, "WEBP"), decoded_by_pil(saved(PHOTO, "WEBP")), 0),
        "extended WebP": (saved(PHOTO, "WEBP", lossless=True, icc_profile=b"profile"), PHOTO, 0),
        "BMP": (saved(PHOTO, "BMP"), PHOTO, 0),
        "BMP of 16 bits": (bmp(16, 0, struct.pack("<16H", *range(16)), height=-4), BLUE, 0.2),
        "run-length encoded BMP": (bmp(8, 1, RUNS, GRAYS), rgb(np.repeat([[4], [3], [2], [1]], 4, axis=1)), 0),
        "BMP of OS/2": (OS2_BMP, np.full((4, 4, 3), (3, 2, 1)), 0),
        "TIFF": (TIFF, PHOTO, 0),
        "compressed TIFF": (saved(PHOTO, "TIFF", compression="tiff_lzw"), PHOTO, 0),
        "JPEG 2000": (saved(PHOTO, "JPEG2000"), PHOTO, 0),
        "codestream of JPEG 2000": (saved(PHOTO, "JPEG2000", no_jp2=True), PHOTO, 0),
        "PPM": (saved(PHOTO, "PPM"), PHOTO, 0),
        "PPM with a maximum of 1023": (b"P6 1 1 1023\n" + struct.pack(">3H", 1023, 512, 0), [[[255, 128, 0]]], 0),
        "AVIF": (saved(PHOTO, "AVIF", quality=95, subsampling="4:4:4"), PHOTO, LOSSY),
    },
    "gray, palette, 1 bit": {
        **{f"gray {kind}": (saved(GRAY, kind), rgb(GRAY), 0) for kind in ("PNG", "BMP", "TIFF", "JPEG2000", "PPM")},
        "gray GIF": (saved(GRAY, "GIF"), rgb(GRAY), 0),
        "gray AVIF": (saved(GRAY, "AVIF", quality=95), rgb(GRAY), LOSSY),
        **{f"palette {kind}": (saved(PALETTE, kind), COLOURS, 0) for kind in ("PNG", "BMP", "TIFF", "GIF")},
        **{
            f"1 bit {kind}": (saved(Image.fromarray(BLACK_AND_WHITE).convert("1"), kind), rgb(BLACK_AND_WHITE), 0)
            for kind in ("PNG", "BMP", "TIFF", "GIF", "PPM")
        },
        "gray TIFF, 0 is white": (saved(GRAY, "TIFF", tiffinfo={262: 0}), rgb(GRAY), 0),
        "CMYK TIFF": (saved(CMYK, "TIFF"), CMYK_IN_RGB, 2),
    },
    "alpha, transparent colours": {
        **{f"RGBA {kind}": (saved(RGBA, kind), PHOTO, 0) for kind in ("PNG", "BMP", "TIFF", "JPEG2000")},
        "RGBA WebP": (saved(RGBA, "WEBP", lossless=True, exact=True), PHOTO, 0),
        "RGBA AVIF": (saved(RGBA, "AVIF", quality=95, subsampling="4:4:4"), PHOTO, LOSSY),
        **{f"LA {kind}": (saved(LA, kind), rgb(GRAY), 0) for kind in ("PNG", "TIFF", "JPEG2000")},
        "palette PNG": (saved(PALETTE, "PNG", transparency=bytes(range(64))), COLOURS, 0),
        "palette GIF": (saved(PALETTE, "GIF", transparency=3), COLOURS, 0),
        "colour of a PNG": (saved(PHOTO, "PNG", transparency=tuple(PHOTO[3, 3].tolist())), PHOTO, 0),
    },
    "16 bits: PNG, TIFF, PPM, gray JPEG 2000": {
        **{f"RGB {kind}": (written_by_opencv(kind, DEEP), PHOTO, 0) for kind in (".png", ".tiff")},
        "RGB .ppm": (written_by_opencv(".ppm", DEEP), np.rint(DEEP / 65535 * 255), 0),
        **{f"gray {kind}": (written_by_opencv(kind, DEEP[..., 0]), rgb(GRAY), 0) for kind in (".png", ".tiff", ".pgm")},
        "gray JPEG 2000": (saved(DEEP[..., 0], "JPEG2000"), rgb(GRAY), 0),
        "RGBA PNG": (written_by_opencv(".png", np.dstack([DEEP, DEEP[..., 0]])), PHOTO, 0),
        "gray TIFF, 0 is white": (saved(DEEP[..., 0], "TIFF", tiffinfo={262: 0}), 255 - rgb(GRAY), 0),
        "gray TIFF, turned": (saved(DEEP[..., 0], "TIFF", tiffinfo={274: 6}), rgb(turned(6)[..., 0]), 0),
    },
    "orientation in Exif or XMP": {
        **{
            f"{i} in {name}": (make(i), turned(i), tolerance)
            for i in range(1, 9)
            for name, make, tolerance in (
                ("JPEG", lambda i: JPEG[:2] + segment(b"Exif\0\0" + exif(i)) + JPEG[2:], LOSSY),
                ("big-endian JPEG", lambda i: JPEG[:2] + segment(b"Exif\0\0" + exif(i, 3, ">")) + JPEG[2:], LOSSY),
                ("JPEG by XMP", lambda i: JPEG[:2] + segment(headers.XMP + b"\0" + xmp(i)) + JPEG[2:], LOSSY),
                ("PNG", lambda i: with_chunk(PNG_FILE, b"eXIf", exif(i)), 0),
                ("PNG, at its end", lambda i: PNG_FILE[:-12] + chunk(b"eXIf", exif(i)) + PNG_FILE[-12:], 0),
                (
                    "PNG by XMP",
                    lambda i: with_chunk(PNG_FILE, b"iTXt", headers.PIL_CHUNKS[b"iTXt"] + bytes(5) + xmp(i)),
                    0,
                ),
                (
                    "PNG of ImageMagick",
                    lambda i: with_chunk(PNG_FILE, b"tEXt", RAW_PROFILE % exif(i).hex().encode()),
                    0,
                ),
                ("WebP", lambda i: saved(PHOTO, "WEBP", lossless=True, exif=exif(i)), 0),
                ("WebP by XMP", lambda i: saved(PHOTO, "WEBP", lossless=True, xmp=xmp(i)), 0),
                ("TIFF", lambda i: saved(PHOTO, "TIFF", tiffinfo={274: i}), 0),
                ("AVIF", lambda i: saved(PHOTO, "AVIF", quality=95, subsampling="4:4:4", exif=exif(i)), LOSSY),
            )
        },
        "Exif before XMP": (
            JPEG[:2] + segment(b"Exif\0\0" + exif(1)) + segment(headers.XMP + b"\0" + xmp(6)) + JPEG[2:],
            *(PHOTO, LOSSY),
        ),
        "damaged Exif": (with_chunk(PNG_FILE, b"eXIf", b"no Exif at all"), PHOTO, 0),
        "an unknown orientation": (with_chunk(PNG_FILE, b"eXIf", exif(9)), PHOTO, 0),
    },
    "animation, several pages": {
        "GIF": (saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), COLOURS, 0),
        "PNG": (saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), COLOURS, 0),
        "PNG with a still image": (
            saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:], default_image=True),
            *(COLOURS, 0),
        ),
        "WebP": (saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True), COLOURS, 0),
        "AVIF": (
            saved(PHOTO, "AVIF", save_all=True, append_images=FRAMES[1:], quality=95, subsampling="4:4:4"),
            PHOTO,
            LOSSY,
        ),
        "TIFF": (saved(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), COLOURS, 0),
    },
    "float, 32-bit integers; JPEG 2000 in colour with more than 8 bits": {
        "float TIFF": (saved(GRAY.astype(np.float32), "TIFF"), "^pixels without a known range, mode F of PIL"),
        "integer TIFF": (saved(GRAY.astype(np.int32), "TIFF"), "pixels without a known range, mode I of PIL"),
        "float PFM": (written_by_opencv(".pfm", GRAY.astype(np.float32)), "pixels without a known range"),
        "colour JPEG 2000": (written_by_opencv(".jp2", DEEP), "more than 8 bits per value"),
    },
    "cut, empty or damaged": {
        "empty": (b"", "the file is empty"),
        "zeros": (bytes(2000), "no known image format"),
        **{f"cut {kind}": (saved(PHOTO, kind)[:1000], CUT) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")},
        **{f"cut {kind}": (saved(PHOTO, kind)[:-100], CUT) for kind in ("AVIF", "JPEG2000", "PPM")},
        "JPEG without its end marker": (JPEG[:-2], "truncated"),
        "JPEG cut before other data": (JPEG[:2500] + PNG_FILE, "broken data stream"),
        "damaged header": (PNG_FILE[:30] + b"x" + PNG_FILE[31:], "the header is damaged or unusual"),
        "TIFF of 9 channels": (NINE_CHANNELS, "the header is damaged or unusual"),
        "damaged pixels": (PNG_FILE[:1000] + b"damaged" + PNG_FILE[1007:], "data stream"),
    },
    "more pixels than `--max_image_pixels`": {
        "PNG": (
            with_png_size(PNG_FILE, 30_000, 30_000),
            "30,000 × 30,000 pixels, more than --max_image_pixels 89478485",
        ),
        "PNG, only by PIL": (
            with_chunk(with_png_size(PNG_FILE, 30_000, 30_000), b"eXIf", exif(1)),
            "more pixels than --max_image_pixels 89478485 allows",
        ),
        "JPEG": (with_size(JPEG, b"\x30\x00\x9c\x40"), "40,000 × 12,288 pixels, more than --max_image_pixels 89478485"),
        "JPEG without its end marker": (with_size(JPEG, b"\x30\x00\x9c\x40")[:-9], "40,000 × 12,288 pixels, more than"),
    },
    "any other format": {
        "text": (b"not an image at all\n", "no known image format"),
        "EPS": (saved(PHOTO, "EPS"), "no known image format"),
        "pointer of git-lfs": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            r"a pointer of git-lfs, .*`git lfs pull`",
        ),
        "PDF": (b"%PDF-1.4\n%%EOF\n", "no known image format"),
        "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no known image format"),
        "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "no known image format"),
        **{kind: (saved(PHOTO, kind), "no known image format") for kind in ("ICO", "TGA", "QOI", "PCX", "SGI")},
    },
}


def test_the_documentation_has_the_table():
    assert documented("file") == list(TABLE)


@pytest.mark.parametrize("row", TABLE)
def test_what_each_image_file_gives(row):
    for name, (content, expected, *tolerance) in TABLE[row].items():
        if isinstance(expected, str):
            with pytest.raises(DecodeError, match=expected):
                decode.decode_bytes(content)
            continue
        pixels = decode.decode_bytes(content)
        assert (pixels.shape, pixels.dtype) == (np.shape(expected), np.uint8), name
        assert np.abs(pixels.astype(int) - expected).mean() <= tolerance[0], name


OPENCV = {"JPEG": JPEG, "PNG": PNG_FILE, "WEBP": WEBP, "lossy WEBP": saved(PHOTO, "WEBP"), "BMP": saved(PHOTO, "BMP")}
OPENCV["extended WEBP"] = saved(RGBA, "WEBP", lossless=True, exact=True)
PIL = {kind: saved(PHOTO, kind) for kind in ("GIF", "TIFF", "AVIF", "JPEG2000", "PPM")}


@pytest.mark.parametrize("kind", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [0, slice(None)], ids=["gray", "RGB"])
def test_the_largest_value_of_a_file_of_16_bits_is_found(kind, channels):
    deep = DEEP[..., channels] >> 4
    for pixels, largest in ((deep, deep.max() >> 8), (PHOTO[..., channels], None)):
        content = written_by_opencv(kind, pixels)
        assert decode.largest_deep_value(content, decode.decode_bytes(content)) == largest


def test_other_files_have_no_deep_values():
    for kind in ("JPEG", "WEBP", "BMP", "GIF", "AVIF", "PPM"):
        content = encoded(kind)
        assert decode.largest_deep_value(content, decode.decode_bytes(content)) is None


def test_the_largest_value_of_a_tiff_in_which_0_is_white_is_the_stored_one():
    for shift in (4, 0):
        deep = DEEP[..., 0] >> shift
        content = saved(deep, "TIFF", tiffinfo={262: 0})
        pixels = decode.decode_bytes(content)
        assert (pixels[..., 0] == 255 - (deep >> 8)).all()
        assert decode.largest_deep_value(content, pixels) == deep.max() >> 8


@pytest.mark.parametrize(
    ("largest", "found"),
    [
        ([15, None, 3], "2 of 2 images of more than 8 bits have no value above 15 of 255"),
        ([15, 32], "1 of 2 images of more than 8 bits have no value above 15 of 255"),
        ([15] + 9 * [255], "1 of 10 images of more than 8 bits have no value above 15 of 255"),
        ([15] + 10 * [255], None),
        ([32, 255], None),
        ([None, None], None),
        ([], None),
    ],
)
def test_a_tenth_of_dark_images_is_described(largest, found):
    described = decode.describe_dark(largest)
    assert (described and described.partition(", because")[0]) == found


def test_opencv_decodes_only_what_it_decodes_as_pil_does():
    for name, content in OPENCV.items():
        assert headers.read_header(content)[:2] == (60, 80), name
        assert np.array_equal(decode.decode_with_opencv(content), decoded_by_pil(content)), name
    assert [name for name, content in PIL.items() if headers.read_header(content)] == []


@pytest.mark.parametrize("content", [*OPENCV.values(), *PIL.values()], ids=[*OPENCV, *PIL])
def test_a_large_image_is_refused_before_it_is_decoded(content, monkeypatch):
    assert decode.decode_bytes(content, max_pixels=60 * 80).shape == (60, 80, 3)
    monkeypatch.setattr(cv2, "imdecode", None)
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(DecodeError, match=r"80 × 60 pixels, more than --max_image_pixels 4799 allows"):
        decode.decode_bytes(content, max_pixels=60 * 80 - 1)


def test_the_header_of_a_jpeg_is_found_where_libjpeg_finds_it():
    """Fill bytes are skipped. Taken as a marker, they would lead to a second header that says less."""
    frame = JPEG.index(b"\xff\xc0")
    content = with_size(JPEG[:2] + b"\xff" + JPEG[2:], b"\x30\x00\x9c\x40")
    content = content.ljust(4 + int.from_bytes(content[4:6], "big"), b"\0") + JPEG[frame:]
    assert headers.read_header(content) is None
    with pytest.raises(DecodeError, match="more pixels than"):
        decode.decode_bytes(content)


def test_the_limit_may_be_above_that_of_pil(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode.decode_bytes(TIFF).shape == (60, 80, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DecodeError, match="more pixels than --max_image_pixels 2000 allows"):
        decode.decode_bytes(TIFF, max_pixels=2000)


def test_an_image_that_opencv_gives_in_another_shape_is_decoded_by_pil(monkeypatch):
    for wrong in (PHOTO[..., 0], PHOTO.astype(np.float32), PHOTO[:5], None):
        monkeypatch.setattr(cv2, "imdecode", lambda *arguments, wrong=wrong: wrong)
        assert np.array_equal(decode.decode_bytes(PNG_FILE), PHOTO)


def test_ghostscript_is_never_started(tmp_path, monkeypatch):
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(program))
    (tmp_path / "photo.jpg").write_bytes(saved(PHOTO, "EPS"))
    with pytest.raises(DecodeError):
        decode.decode_image({"bytes": None, "path": str(tmp_path / "photo.jpg")})
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("content", [*OPENCV.values(), *PIL.values()], ids=[*OPENCV, *PIL])
def test_a_damaged_header_gives_an_image_or_a_reason(content):
    rng = np.random.default_rng(0)
    damaged = [content[:length] for length in range(1, 60)]
    for place in rng.integers(0, min(300, len(content)), 100):
        damaged.append(content[:place] + rng.bytes(1) + content[place + 1 :])
    for file in damaged:
        try:
            pixels = decode.decode_bytes(file, max_pixels=10_000)
        except DecodeError:
            continue
        assert (pixels.ndim, pixels.shape[2], pixels.dtype, pixels.size <= 30_000) == (3, 3, np.uint8, True)


NOISY = {
    "libpng": with_chunk(PNG_FILE, b"iCCP", b"x\0\0" + zlib.compress(b"no profile")),
    "libjpeg": JPEG[:900] + b"\xff\x05" * 30 + JPEG[960:],
    "warning of PIL": with_chunk(PNG_FILE, b"eXIf", exif(6)[:19]),
    "log of PIL": NINE_CHANNELS,
}


def test_the_libraries_print_nothing(tmp_path):
    """In a process of its own, because pytest catches warnings and logs. Python may print, also meanwhile."""
    for name, content in NOISY.items():
        (tmp_path / name).write_bytes(content)
    program = """if True:
        import pathlib, sys
        from m2t_accel.data import decode
        for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):
            content = file.read_bytes()
            try:
                decode.decode_bytes(content)
                decode.decode_part(content, 0, 0, 60, 80)
            except decode.DecodeError:
                pass
        with decode.SILENT_C_LIBRARIES:
            print("Python", file=sys.stderr)
        if len(sys.argv) > 2:
            decode.cv2.imdecode(decode.np.frombuffer(decode.Path(sys.argv[2]).read_bytes(), decode.np.uint8), 1)
    """
    command = [sys.executable, "-c", program, str(tmp_path), str(tmp_path / "libpng")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.stderr == "Python\nlibpng warning: iCCP: too short\n"


@pytest.mark.parametrize("extension", sorted(IMAGE_EXTENSIONS))
def test_files_that_count_as_images_are_decoded(extension, tmp_path):
    path = tmp_path / f"image{extension}"
    picture = Image.fromarray(PHOTO).convert("1" if extension == ".pbm" else "RGB")
    picture.save(path)
    assert decode.decode_image({"bytes": None, "path": str(path)}).shape == (60, 80, 3)


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
    "RGB": {"keep_rgb": True},
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
    assert headers.plain_jpeg_size(content) == size
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
    gray_below = encoded_jpeg()[:2000] + headers.JPEG_END
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
        "only the first bytes": headers.JPEG,
        "no height": PLAIN_JPEG[: HEADER + 5] + b"\0\0" + PLAIN_JPEG[HEADER + 7 :],
        "12 bits": PLAIN_JPEG[: HEADER + 4] + b"\x0c" + PLAIN_JPEG[HEADER + 5 :],
        "fill bytes": PLAIN_JPEG[:2] + b"\xff" + PLAIN_JPEG[2:],
    }.items(),
    ids=lambda item: item[0],
)
def test_a_file_whose_header_may_not_give_its_decoded_size_is_decoded_whole(content):
    assert headers.plain_jpeg_size(content[1]) is None


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


def test_an_image_in_a_zip_is_read_where_datasets_leaves_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/1.png", encoded("PNG", size=(60, 80)))
    image = {"bytes": None, "path": f"zip://b/1.png::{tmp_path}/a.zip"}
    assert decode.decode_image(image).shape == (60, 80, 3)
    with pytest.raises(DecodeError, match="no item named"):
        decode.decode_image({**image, "path": f"zip://b/2.png::{tmp_path}/a.zip"})
    with pytest.raises(DecodeError, match="No such file"):
        decode.decode_image({**image, "path": f"zip://b/1.png::{tmp_path}/b.zip"})
