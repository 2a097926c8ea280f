"""From the bytes of an image file to its pixels, or to the reason why they cannot be had."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from m2t_accel.config.fields import one_line

# A file of these kinds that does not end so may be cut; libjpeg would fill the rest with gray in silence.
JPEG, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
ENDINGS = {JPEG: JPEG_END, b"\x89PNG": b"IEND\xaeB`\x82"}

# Markers of a JPEG: the header of a sequential frame, Exif and XMP, the start of a scan. Progressive ones are left out:
# where one is damaged, its parts would not be those of the whole.
FRAMES, EXIF, SCAN = (0xC0, 0xC1), 0xE1, 0xDA
MAX_PIXELS = 2**30  # OpenCV's
MIN_WIDTH = 16  # of a part; one column at an edge would have colours of its own
cv2.utils.logging.setLogLevel(
    cv2.utils.logging.LOG_LEVEL_SILENT
)  # it would write of every broken image each time; m2t_accel.monitor tells of each once


class DecodeError(Exception):
    """An image that cannot be read or decoded; the message says why, in short."""


def read_bytes(image: Mapping[str, object]) -> bytes:
    """The file of an image {"bytes", "path"}; with "offset" and "size" it is a part of that file, such as of a tar.

    Raises:
        DecodeError: it cannot be read.
    """
    if image.get("bytes") is not None:
        return image["bytes"]
    if image["path"] is None:
        raise DecodeError("there is no file: neither bytes nor a path")
    try:
        if image.get("offset") is None:
            return Path(image["path"]).read_bytes()
        with open(image["path"], "rb") as file:
            return os.pread(file.fileno(), image["size"], image["offset"])
    except OSError as error:
        raise DecodeError(error.strerror or one_line(error)) from None


def decode_image(image: Mapping[str, object]) -> np.ndarray:
    """An undecoded {"bytes", "path"} as (H, W, 3) uint8 RGB; as decode_bytes."""
    return decode_bytes(read_bytes(image))


def decode_bytes(content: bytes) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB, turned upright by its EXIF orientation.

    On one core, 240 photographs of ImageNet take simplejpeg 0.95 ms each (0.94 with its faster, coarser transform),
    torchvision 0.97, OpenCV 0.97, imagecodecs 0.98, PyAV 1.1 and PIL 1.16. Only OpenCV and PIL know other formats, CMYK
    and orientation. To an eighth of its size, which is little but reading the entropy code, simplejpeg takes 0.75.

    Raises:
        DecodeError: it is empty, cut, or of no known format.
    """
    if not content:
        raise DecodeError("the file is empty")
    ending = next((ending for start, ending in ENDINGS.items() if content.startswith(start)), None)
    try:
        if ending is not None and not content.endswith(ending):
            Image.open(io.BytesIO(content)).load()  # is strict about what is missing; bytes after the end are no harm
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is None:  # formats that OpenCV was built without
            picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
            if picture.mode in ("F", "I"):
                raise ValueError(f"numbers without a range, PIL's mode {picture.mode}")
            pixels = np.array(picture.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # of cv2 and PIL: OSError, ValueError, SyntaxError, struct.error, cv2.error and more
        message = "no known image format" if "cannot identify" in str(error) else one_line(error)
        if "CV_IO_MAX_IMAGE" in message:  # its size is checked before anything is read of it
            message = "larger than OpenCV reads, 2^30 pixels and 2^20 a side"
        raise DecodeError(message) from None
    return pixels


def plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Height and width, as its header says, of a sequential JPEG in gray or RGB without Exif; None of all else."""
    if not content.startswith(JPEG):
        return None
    at, size = 2, None
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in FRAMES:
            height, width = int.from_bytes(content[at + 5 : at + 7]), int.from_bytes(content[at + 7 : at + 9])
            size = (height, width) if 0 < height * width <= MAX_PIXELS and content[at + 9] in (1, 3) else None
        elif marker == EXIF:
            return None
        elif marker == SCAN:
            return size
        at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return None


def decode_part(content: bytes, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    """Rows and columns of a plain JPEG, as decode_bytes would give them, to the bit.

    Of two crops of ImageNet's photographs the part that holds both is 64 % of the area, and takes 0.93 ms of 1.04: what
    is below is not decoded at all, what is above or beside only as far as it must be. This is nvImageCodec on a CPU;
    where it is not installed the whole is decoded.

    Raises:
        DecodeError: as decode_bytes.
    """
    is_part = content.endswith(JPEG_END) and right - left >= MIN_WIDTH
    decode = part_decoder(os.getpid()) if is_part else None
    pixels = None if decode is None else decode(content, top, left, bottom, right)
    return decode_bytes(content)[top:bottom, left:right] if pixels is None else pixels


@functools.cache
def part_decoder(process: int) -> Callable[[bytes, int, int, int, int], np.ndarray | None] | None:
    """nvImageCodec's decoder for parts of JPEGs; of each process its own, as it has threads, which no fork inherits."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    try:
        with silent_stderr():  # it tells there of each library for GPUs that it has not found
            library = importlib.import_module("nvidia.nvimgcodec")
            decoder = library.Decoder(
                device_id=library.NVIMGCODEC_DEVICE_CPU_ONLY,
                max_num_cpu_threads=1,
                backends=[library.Backend(library.CPU_ONLY)],
            )
    except (ImportError, AttributeError, RuntimeError):
        return None

    def decode(content: bytes, *part: int) -> np.ndarray | None:
        try:
            image = decoder.decode(library.CodeStream(content).get_sub_code_stream(region=library.Region(*part)))
        except RuntimeError:
            return None
        # Not numpy.asarray: each look at the image's __array_interface__ loses 32 bytes (nvImageCodec 0.9).
        return None if image is None else image.cpu().__array__()

    return decode


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Nothing reaches the file of stderr, from C either."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
