"""Decode image files: the whole image, or the part of a JPEG that the crops need."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import io
import logging
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np
from PIL import AvifImagePlugin, Image, UnidentifiedImageError

from m2t_accel.config.data import MAX_IMAGE_PIXELS
from m2t_accel.config.fields import count, one_line
from m2t_accel.data.headers import JPEG, JPEG_END, LFS_POINTER, PNG, SIGNATURES, bits_of_jpeg_2000, read_header

# PIL may open these formats, and no others: EPS would start Ghostscript, and some formats have no signature.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")
ORIENTATION = 0x0112  # tag of Exif
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MIN_WIDTH = 16  # of a part; the colours of a single column at an edge would differ
DARK = 32  # of 255; values of 10 to 13 bits in 16 stay below it
DARK_SHARE = 0.1  # of the images of more than 8 bits; a few may be dark in truth
OPEN_ZIPS = 16  # of a process

# The libraries would report a broken image each time; m2t_accel.run.report reports it once.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
logging.getLogger("PIL").addHandler(logging.NullHandler())  # without any handler, errors would be printed
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a thread for each core would compete with the other workers


class SilentCLibraries:
    """A context that discards what C libraries print: libpng and libjpeg print a line for each unusual image.

    It changes only the variable `stderr` of the GNU C library, in 0.2 µs. File descriptor 2 stays as it is, so that
    lines of Python, also of other threads, are not lost. With other C libraries, it does nothing.
    """

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(None)
            library.gnu_get_libc_version  # noqa: B018 (other libraries lack it; there the variable may be constant)
            self.variable = ctypes.c_void_p.in_dll(library, "stderr")
            library.fopen.restype = ctypes.c_void_p
            self.null = library.fopen(os.fsencode(os.devnull), b"w")
        except (AttributeError, OSError, TypeError, ValueError):
            self.variable, self.null = ctypes.c_void_p(), None
        self.usual = self.variable.value

    def __enter__(self) -> None:
        self.variable.value = self.null or self.usual

    def __exit__(self, *error: object) -> None:
        self.variable.value = self.usual


SILENT_C_LIBRARIES = SilentCLibraries()


class DecodeError(Exception):
    """An image cannot be read or decoded; the message gives the reason in a few words."""


def read_bytes(image: Mapping[str, object]) -> bytes:
    """Return the file of an image {"bytes", "path"}; "offset" and "size" select a part of the file, as in a tar.

    Raises:
        DecodeError: the file cannot be read.
    """
    if image.get("bytes") is not None:
        return image["bytes"]
    if image["path"] is None:
        raise DecodeError("no file: neither bytes nor a path are given")
    try:
        if image["path"].startswith("zip://"):
            return read_member(image["path"])
        if image.get("offset") is None:
            return Path(image["path"]).read_bytes()
        with open(image["path"], "rb") as file:
            return os.pread(file.fileno(), image["size"], image["offset"])
    except OSError as error:
        raise DecodeError(error.strerror or one_line(error)) from None


def read_member(path: str) -> bytes:
    """Return a member of a local zip, in which `datasets` leaves images: `zip://MEMBER::FILE`."""
    member, _, archive = path.removeprefix("zip://").rpartition("::")
    try:
        return open_zip(archive, os.getpid()).read(member)
    except (KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
        raise DecodeError(one_line(error)) from None


@functools.lru_cache(OPEN_ZIPS)
def open_zip(path: str, process_id: int) -> zipfile.ZipFile:
    """Open a zip. Each process needs its own, because the position in a file is shared after a fork."""
    return zipfile.ZipFile(path)


def decode_image(image: Mapping[str, object], max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """Decode an image {"bytes", "path"} to (H, W, 3) uint8 RGB, as `decode_bytes` does."""
    return decode_bytes(read_bytes(image), max_pixels)


def decode_bytes(content: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 RGB, upright by the orientation in its Exif or XMP, without its alpha.

    OpenCV decodes the files that `read_header` knows, PIL the others. Per ImageNet photograph and core, simplejpeg
    takes 0.95 ms, torchvision and OpenCV 0.97, imagecodecs 0.98, PyAV 1.1 and PIL 1.16. Only OpenCV and PIL support
    other formats, CMYK and the orientation.

    Raises:
        DecodeError: the file is empty, truncated or too large, or has no known format.
    """
    if not content:
        raise DecodeError("the file is empty")
    header = read_header(content)
    try:
        if header is not None:
            check_size(header.height, header.width, max_pixels)
            if content.startswith(JPEG) and not content.endswith(JPEG_END):
                # A truncated file with other data behind it; libjpeg would silently show that, or gray. PIL raises if
                # data is missing; extra bytes after the end are harmless.
                with open_with_pil(content, max_pixels) as picture:
                    picture.load()
            pixels = decode_with_opencv(content)
            if is_rgb(pixels, header.height, header.width) or is_rgb(pixels, header.width, header.height):
                return pixels
        return decode_with_pil(content, max_pixels)
    except (MemoryError, DecodeError):
        raise
    except UnidentifiedImageError:
        if content.startswith(LFS_POINTER):
            raise DecodeError("a pointer of git-lfs, not the image: type `git lfs pull` in its repository") from None
        known = content.startswith(SIGNATURES)
        raise DecodeError("the header is damaged or unusual" if known else "no known image format") from None
    except Image.DecompressionBombError:  # PIL's own limit, which a part of the file exceeds
        raise DecodeError(f"more pixels than --max_image_pixels {max_pixels} allows") from None
    except Exception as error:  # OSError, ValueError, SyntaxError, struct.error and more
        raise DecodeError(one_line(error)) from None


def is_rgb(pixels: np.ndarray | None, height: int, width: int) -> bool:
    """Return whether an array is (height, width, 3) uint8."""
    return pixels is not None and pixels.shape == (height, width, 3) and pixels.dtype == np.uint8


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Check the size of an image before it is decoded.

    Raises:
        DecodeError: the image has more pixels than are allowed.
    """
    if height * width > max_pixels:
        raise DecodeError(f"{width:,} × {height:,} pixels, more than --max_image_pixels {max_pixels} allows")


def decode_with_opencv(content: bytes) -> np.ndarray | None:
    """Decode an image file with OpenCV; return None if it cannot."""
    try:
        with SILENT_C_LIBRARIES:
            return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:
        return None


def decode_with_pil(content: bytes, max_pixels: int) -> np.ndarray:
    """Decode an image file of any of the FORMATS with PIL, as `decode_bytes` does; of an animation, the first frame.

    Raises:
        DecodeError: the image is too large, or the range of its values is not known.
        Exception: one of many types: the file cannot be decoded.
    """
    with open_with_pil(content, max_pixels) as picture:
        kind, inverted = picture.format, False
        if kind == "JPEG2000" and picture.mode in ("RGB", "RGBA") and bits_of_jpeg_2000(content) > 8:
            raise DecodeError("a JPEG 2000 in colour with more than 8 bits per value, which PIL decodes wrongly")
        if kind == "TIFF" and picture.mode.startswith("I;16"):
            inverted = picture.tag_v2.get(262) == 0  # 0 is white; PIL inverts 8 bits, but not 16
        picture.load()
        orientation = 1
        with contextlib.suppress(Exception):  # damaged metadata does not spoil the pixels
            orientation = picture.getexif().get(ORIENTATION)
        if orientation in UPRIGHT:
            picture = picture.transpose(UPRIGHT[orientation])
        if picture.mode.startswith("I;16") or (picture.mode == "I" and kind == "PPM"):  # PIL scales a PPM to 16 bits
            high = (np.asarray(picture) >> 8).astype(np.uint8)
            return np.repeat((255 - high if inverted else high)[..., None], 3, axis=2)
        if picture.mode in ("F", "I"):
            raise DecodeError(f"pixels without a known range, mode {picture.mode} of PIL")
        return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def largest_deep_value(content: bytes, pixels: np.ndarray) -> int | None:
    """Return the largest value of an image file with more than 8 bits per value; None for other files.

    The values are those of the decoded image, 0 to 255; if 0 is white in a TIFF, those before it is inverted.

    Args:
        content: the file.
        pixels: the result of `decode_bytes`.
    """
    bits: tuple[int, ...] = ()
    if content.startswith(PNG):
        bits = (content[24],)
    elif not content.startswith(JPEG):
        with contextlib.suppress(Exception), open_with_pil(content, pixels.size) as picture:
            tags = getattr(picture, "tag_v2", {})
            # PIL opens a TIFF in colour as 8 bits, whatever its tag 258 says.
            bits = (16,) if picture.mode.startswith("I") else tags.get(258, ())
            pixels = 255 - pixels if tags.get(262) == 0 else pixels
    return int(pixels.max()) if max(bits, default=8) > 8 else None


def describe_dark(largest: Iterable[int | None]) -> str | None:
    """Return what to do if many images with more than 8 bits are nearly black; None if they are not.

    Args:
        largest: results of `largest_deep_value` for some images.
    """
    values = [value for value in largest if value is not None]
    dark = [value for value in values if value < DARK]
    if not dark or len(dark) < DARK_SHARE * len(values):
        return None
    return (
        f"{len(dark):,} of {count(len(values), 'image')} of more than 8 bits have no value above {max(dark)} of 255, "
        "because only the upper 8 of 16 bits are used: convert them as in docs/data.md, Images of more than 8 bits"
    )


@contextlib.contextmanager
def open_with_pil(content: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image file without decoding it, check its size, and silence PIL's warnings within the context.

    Raises:
        DecodeError: the image has more pixels than are allowed.
        Exception: one of many types: the header cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = max_pixels  # PIL would refuse twice its own limit
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            check_size(picture.height, picture.width, max_pixels)
            yield picture


def decode_part(
    content: bytes, top: int, left: int, bottom: int, right: int, max_pixels: int = MAX_IMAGE_PIXELS
) -> np.ndarray:
    """Decode some rows and columns of a plain JPEG, bit for bit as `decode_bytes` decodes them.

    The caller checks the size of the whole, which it knows from `plain_jpeg_size`.

    nvImageCodec on the CPU decodes nothing below the part, and as little as possible above and beside it. For two crops
    this saves 6 % of the time to decode photographs of 500 pixels, 10 % at 1000 and 18 % at 2000 pixels. If
    nvImageCodec is not installed, the whole image is decoded and the part is cut out.

    Raises:
        DecodeError: as `decode_bytes`.
    """
    if content.endswith(JPEG_END) and right - left >= MIN_WIDTH:
        pixels = part_decoder(os.getpid())(content, top, left, bottom, right)
        if is_rgb(pixels, bottom - top, right - left):
            return pixels
    return decode_bytes(content, max_pixels)[top:bottom, left:right]


@functools.cache
def part_decoder(process_id: int) -> Callable[[bytes, int, int, int, int], np.ndarray | None]:
    """Return a function that decodes parts of JPEGs with nvImageCodec, and returns None where that is impossible.

    Each process needs its own decoder, because a decoder has threads, and a fork does not inherit threads.
    """
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    try:
        with silent_stderr():  # it reports every GPU library that it does not find
            library = importlib.import_module("nvidia.nvimgcodec")
            decoder = library.Decoder(
                device_id=library.NVIMGCODEC_DEVICE_CPU_ONLY,
                max_num_cpu_threads=1,
                backends=[library.Backend(library.CPU_ONLY)],
            )
    except (ImportError, AttributeError, RuntimeError):
        return lambda content, *part: None

    def decode(content: bytes, *part: int) -> np.ndarray | None:
        try:
            with SILENT_C_LIBRARIES:
                image = decoder.decode(library.CodeStream(content).get_sub_code_stream(region=library.Region(*part)))
        except RuntimeError:
            return None
        # numpy.asarray would read the image's __array_interface__, which leaks 32 bytes each time (nvImageCodec 0.9).
        return None if image is None else image.cpu().__array__()

    return decode


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Discard everything that is written to file descriptor 2, also by C libraries."""
    try:
        kept = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
