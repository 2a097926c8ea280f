"""The headers of image files: their sizes, and whether OpenCV decodes them as PIL does."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

JPEG, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG = b"\x89PNG\r\n\x1a\n"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"  # in place of a file that git-lfs has not downloaded
SIGNATURES = (JPEG, PNG, b"GIF8", b"II*\0", b"MM\0*")

# Markers of a JPEG: headers of sequential and progressive frames, Exif or XMP, the start of a scan, and markers without
# a length.
SEQUENTIAL, PROGRESSIVE, METADATA, SCAN = (0xC0, 0xC1), 0xC2, 0xE1, 0xDA
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
WITHOUT_LENGTH = frozenset((0x00, 0x01, *range(0xD0, 0xDA), 0xFF))
XMP, TURNED = b"http://ns.adobe.com/xap/1.0/", re.compile(rb'tiff:Orientation(="|>)[2-8]')
# Chunks of a PNG that OpenCV ignores or understands differently, with the start of their content.
PIL_CHUNKS = {
    b"acTL": b"",  # animation
    b"eXIf": b"",
    b"tEXt": b"Raw profile type",  # Exif of ImageMagick
    b"zTXt": b"Raw profile type",
    b"iTXt": b"XML:com.adobe.xmp",
}
ANIMATION, WEBP_METADATA = 0x02, 0x0C  # flags of a WebP; metadata is Exif or XMP
CODESTREAM = b"\xff\x4f\xff\x51"  # of a JPEG 2000


class Header(NamedTuple):
    """The header of an image file."""

    height: int
    width: int
    plain: bool = False  # a sequential JPEG in gray or RGB without metadata, which can be decoded in parts


def read_header(content: bytes) -> Header | None:
    """Return the header of a file that OpenCV decodes exactly as PIL does; None for all others, and damaged headers.

    These are JPEG (8 bits; CMYK differs by 1 of 255), PNG, WebP and BMP, without animations, unusual depths, and
    orientations that OpenCV ignores.
    """
    try:
        if content.startswith(JPEG):
            return jpeg_header(content)
        if content.startswith(PNG):
            return png_header(content)
        if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
            return webp_header(content)
        if content.startswith(b"BM"):
            size, width, height, _, bits, compression = struct.unpack_from("<IiiHHI", content, 14)
            plain = size >= 40 and bits in (1, 4, 8, 24, 32) and compression == 0
            return Header(abs(height), width) if plain and width > 0 and height else None
    except (struct.error, IndexError):  # the file ends within the header
        pass
    return None


def jpeg_header(content: bytes) -> Header | None:
    """Return the header of a JPEG; None if OpenCV may not decode it as PIL does."""
    start, size, plain = 2, None, True
    while True:
        # The last four values have a meaning only in the header of a frame.
        before, marker, length, bits, height, width, channels = struct.unpack_from(">BBHBHHB", content, start)
        if before != 0xFF or marker in WITHOUT_LENGTH:  # fill bytes or garbage
            return None
        if marker == SCAN:
            return size and Header(*size, plain)
        if marker in FRAMES:
            if bits != 8 or channels not in (1, 3, 4) or marker not in (*SEQUENTIAL, PROGRESSIVE) or not height * width:
                return None
            # Parts of a damaged progressive JPEG would differ from the same parts of the whole.
            size, plain = (height, width), plain and marker != PROGRESSIVE and channels != 4
        elif marker == METADATA:
            plain = False
            segment = content[start + 4 : start + 2 + length]
            if segment.startswith(XMP) and TURNED.search(segment):
                return None
        start += 2 + length


def png_header(content: bytes) -> Header | None:
    """Return the header of a PNG; None if OpenCV may not decode it as PIL does."""
    start, length, kind = len(PNG), 0, b""
    if content[start + 4 : start + 8] != b"IHDR":
        return None
    while kind != b"IEND" and start + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, start)
        if kind in PIL_CHUNKS and content.startswith(PIL_CHUNKS[kind], start + 8):
            return None
        start += length + 12
    width, height = struct.unpack_from(">II", content, 16)
    return Header(height, width)


def webp_header(content: bytes) -> Header | None:
    """Return the header of a WebP; None if OpenCV may not decode it as PIL does."""
    kind = content[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 26)
        return Header(height & 0x3FFF, width & 0x3FFF)
    if kind == b"VP8L":
        (sizes,) = struct.unpack_from("<I", content, 21)
        return Header((sizes >> 14 & 0x3FFF) + 1, (sizes & 0x3FFF) + 1)
    if kind == b"VP8X" and not content[20] & (ANIMATION | WEBP_METADATA):
        return Header(int.from_bytes(content[27:30], "little") + 1, int.from_bytes(content[24:27], "little") + 1)
    return None


def plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Return height and width from the header of a sequential JPEG in gray or RGB without Exif and XMP, else None."""
    header = read_header(content)
    return (header.height, header.width) if header is not None and header.plain else None


def bits_of_jpeg_2000(content: bytes) -> int:
    """Return the largest number of bits of a value of a JPEG 2000, from the header of its codestream."""
    start = content.index(CODESTREAM)
    channels = int.from_bytes(content[start + 40 : start + 42], "big")
    return max((depth & 0x7F) + 1 for depth in content[start + 42 : start + 42 + 3 * channels : 3])
