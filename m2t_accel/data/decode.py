"""Decode image files: the whole image, or the part of a JPEG that the crops need."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from m2t_accel.config.fields import one_line

# A JPEG or PNG without its end marker may be truncated; libjpeg would silently fill the rest with gray.
JPEG, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
ENDINGS = {JPEG: JPEG_END, b"\x89PNG": b"IEND\xaeB`\x82"}

# Markers of a JPEG: the header of a sequential frame, Exif or XMP, and the start of a scan. Progressive frames are left
# out, because a part of a damaged one would differ from the same part of the whole.
FRAMES, EXIF, SCAN = (0xC0, 0xC1), 0xE1, 0xDA
MAX_PIXELS = 2**30  # limit of OpenCV
MIN_WIDTH = 16  # of a part; the colours of a single column at an edge would differ
# OpenCV would report a broken image each time; m2t_accel.run.report reports it once.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


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
        if image.get("offset") is None:
            return Path(image["path"]).read_bytes()
        with open(image["path"], "rb") as file:
            return os.pread(file.fileno(), image["size"], image["offset"])
    except OSError as error:
        raise DecodeError(error.strerror or one_line(error)) from None


def decode_image(image: Mapping[str, object]) -> np.ndarray:
    """Decode an image {"bytes", "path"} to (H, W, 3) uint8 RGB, as `decode_bytes` does."""
    return decode_bytes(read_bytes(image))


def decode_bytes(content: bytes) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 RGB, rotated upright by its EXIF orientation.

    Per ImageNet photograph and core, simplejpeg takes 0.95 ms, torchvision and OpenCV 0.97, imagecodecs 0.98, PyAV 1.1
    and PIL 1.16. Only OpenCV and PIL support other formats, CMYK and the orientation.

    Raises:
        DecodeError: the file is empty, truncated, or has no known format.
    """
    if not content:
        raise DecodeError("the file is empty")
    ending = next((ending for start, ending in ENDINGS.items() if content.startswith(start)), None)
    try:
        if ending is not None and not content.endswith(ending):
            Image.open(io.BytesIO(content)).load()  # raises if data is missing; extra bytes after the end are harmless
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is None:  # a format that OpenCV was built without
            picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
            if picture.mode in ("F", "I"):
                raise ValueError(f"pixels without a known range, mode {picture.mode} of PIL")
            pixels = np.array(picture.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # OSError, ValueError, SyntaxError, struct.error, cv2.error and more
        message = "no known image format" if "cannot identify" in str(error) else one_line(error)
        if "CV_IO_MAX_IMAGE" in message:  # checked before OpenCV reads the pixels
            message = "larger than OpenCV allows: 2^30 pixels, 2^20 per side"
        raise DecodeError(message) from None
    return pixels


def plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Return height and width from the header of a sequential JPEG in gray or RGB without Exif, else None."""
    if not content.startswith(JPEG):
        return None
    start, size = 2, None
    while start + 10 <= len(content) and content[start] == 0xFF:
        # The last three values have a meaning only in the header of a frame.
        marker, length, height, width, channels = struct.unpack_from(">xBHxHHB", content, start)
        if marker in FRAMES:
            size = (height, width) if 0 < height * width <= MAX_PIXELS and channels in (1, 3) else None
        elif marker == EXIF:
            return None
        elif marker == SCAN:
            return size
        start += 2 + length
    return None


def decode_part(content: bytes, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    """Decode some rows and columns of a plain JPEG, bit for bit as `decode_bytes` decodes them.

    nvImageCodec on the CPU decodes nothing below the part, and as little as possible above and beside it. For two crops
    this saves 6 % of the time to decode photographs of 500 pixels, 10 % at 1000 and 18 % at 2000 pixels. If
    nvImageCodec is not installed, the whole image is decoded and the part is cut out.

    Raises:
        DecodeError: as `decode_bytes`.
    """
    if content.endswith(JPEG_END) and right - left >= MIN_WIDTH:
        pixels = part_decoder(os.getpid())(content, top, left, bottom, right)
        if pixels is not None:
            return pixels
    return decode_bytes(content)[top:bottom, left:right]


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
