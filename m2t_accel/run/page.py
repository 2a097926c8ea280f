"""Keep report.html up to date while a run trains, and save the pictures that it shows."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from datasets import Dataset

from m2t_accel.config.fields import one_line
from m2t_accel.config.pretrain import PretrainConfig
from m2t_accel.data.decode import decode_image, describe_dark
from m2t_accel.data.preview import ViewPair, collect_pairs, outline
from m2t_accel.data.sources import ImageData
from m2t_accel.data.streams import HubStream
from m2t_accel.data.views import read_rows
from m2t_accel.evaluation.knn import KnnResult
from m2t_accel.files import write_text
from m2t_accel.pages.record import FINISHED, PICTURES, RUNNING, STOPPED, read_json, read_run
from m2t_accel.pages.run_page import refresh_run_page, write_run_page
from m2t_accel.pictures import thumbnail
from m2t_accel.run.output_dir import COMPLETE

FIRST_AFTER, EVERY = 60.0, 120.0  # seconds until the first page, and between two pages at least
MAX_SHARE = 0.005  # of the time of a run; a page that takes longer to write is written more rarely
NUM_QUERIES, NUM_NEIGHBOURS = 8, 5
VIEW_SIDE, NEIGHBOUR_SIDE = 144, 80  # pixels; the page holds all pictures, and should stay below 6 MB
CROP_COLOURS = ((31, 95, 168), (217, 119, 6))


class RunPage:
    """The page of a run in progress, on process 0. Whatever fails is one warning: no run ends because of its page.

    Args:
        print_line: function that shows a line to the user.
    """

    def __init__(
        self, folder: Path, config: PretrainConfig, data: ImageData, print_line: Callable[[str], None]
    ) -> None:
        self.folder, self.config, self.data = folder, config, data
        self.print_line = print_line
        self.pictures = folder / PICTURES
        self.failed: set[str] = set()
        self.ended: str | None = None  # status for which `close` has been called
        self.cost = 0.0  # seconds that the last page took
        self.written = time.perf_counter() - EVERY + FIRST_AFTER

    @contextlib.contextmanager
    def only_warns(self, what: str) -> Iterator[None]:
        """Turn an exception in the block into a warning, once for each `what`."""
        try:
            yield
        except Exception as error:  # of plotly, OpenCV, the disk, or an image
            if what not in self.failed:
                self.failed.add(what)
                self.print_line(f"warning: {what} cannot be written ({one_line(error)}); the run continues without")

    def write_if_due(self) -> None:
        """Write report.html if the last one is old enough."""
        if time.perf_counter() - self.written >= max(EVERY, self.cost / MAX_SHARE):
            self.write(RUNNING)

    def close(self) -> None:
        """Write report.html of the run that ends now, finished or stopped, unless an earlier call has."""
        status = FINISHED if (self.folder / COMPLETE).exists() else STOPPED
        if status != self.ended:
            self.ended = status
            self.write(status)

    def write(self, status: str) -> None:
        """Write report.html."""
        started = time.perf_counter()
        with self.only_warns(f"{self.folder / 'report.html'}"):
            write_run_page(read_run(self.folder, status), self.folder / "report.html")
        self.written = time.perf_counter()
        self.cost = self.written - started

    def save_views(self) -> None:
        """Save images of the first epoch with their two views, unless an earlier start has. Warn if they are dark.

        Images that are streamed from the Hub would be downloaded for this alone, so they are left out.
        """
        file = self.pictures / "views.json"
        if file.exists() or isinstance(self.data.train, HubStream):
            return
        with self.only_warns(f"{file}"):
            pairs, _ = collect_pairs(self.data.train, self.config)
            if dark := describe_dark(pair.largest for pair in pairs):
                self.print_line(f"warning: {dark}")
            self.save(file, {"pairs": [describe_pair(pair) for pair in pairs]})

    def save_neighbours(self, epoch: float, bank: Dataset, queries: Dataset, found: KnnResult) -> None:
        """Save a few held-out images with their nearest neighbours, and keep those of the first evaluation.

        Args:
            bank: the images of the neighbours, with labels.
            queries: the held-out images, with labels.
            found: result of the evaluation; its images are the same at each evaluation.
        """
        file = self.pictures / "neighbours.json"
        with self.only_warns(f"{file}"):
            rows = np.unique(np.linspace(0, len(found.samples) - 1, NUM_QUERIES).astype(int)).tolist()

            def describe(images: Dataset, samples: Sequence[int]) -> list[dict[str, object]]:
                labels = images.with_format("arrow")[samples]["label"].to_pylist()
                return [
                    {
                        "image": data_uri(decode_image(row, self.config.max_image_pixels), NEIGHBOUR_SIDE),
                        "label": self.data.class_names[label],
                    }
                    for row, label in zip(read_rows(images, samples), labels, strict=True)
                ]

            described = describe(queries, found.samples[rows].tolist())
            for query, samples, cosines in zip(
                described, found.neighbours[rows], found.similarities[rows], strict=True
            ):
                nearest = describe(bank, samples[:NUM_NEIGHBOURS].tolist())
                for image, cosine in zip(nearest, cosines.tolist(), strict=False):
                    image["cosine"] = round(cosine, 4)
                query["neighbours"] = nearest
            moment = {"epoch": round(epoch, 4), "queries": described}
            first = {} if epoch == 0 else read_json(file).get("first")
            self.save(file, {"first": first, "latest": moment} if first else {"first": moment})

    def save(self, file: Path, content: dict[str, object]) -> None:
        file.parent.mkdir(exist_ok=True)
        write_text(file, json.dumps(content, ensure_ascii=False))


def refresh_old_page(folder: Path) -> None:
    """Write report.html of a complete run if it is missing, or older than the end of the run; warn if it cannot be."""
    page = folder / "report.html"
    if not page.exists() or page.stat().st_mtime_ns < (folder / COMPLETE).stat().st_mtime_ns:
        try:
            refresh_run_page(folder)
        except Exception as error:  # the page of a run is never a reason to fail
            print(f"warning: {page} cannot be made ({one_line(error)})", flush=True)


def describe_pair(pair: ViewPair) -> dict[str, object]:
    """Return the pictures of an image and its views, and their words."""
    height, width = pair.size
    original = np.ascontiguousarray(thumbnail(pair.image, VIEW_SIDE))
    scale = np.array([original.shape[1] / width, original.shape[0] / height])
    for crop, colour in zip(pair.crops, CROP_COLOURS, strict=True):
        corners = (outline(crop) + 0.5) * scale - 0.5
        cv2.polylines(original, [corners.round().astype(np.int32)], True, colour, 2, cv2.LINE_AA)
    views = [(255 * view).round().astype(np.uint8) for view in pair.views]
    return {
        "images": [data_uri(pixels, VIEW_SIDE) for pixels in (original, *views)],
        "words": [pair.name, *(words.replace("\n", ", ") for words in pair.parameters)],
    }


def data_uri(pixels: np.ndarray, side: int) -> str:
    """Return an image (H, W, 3) uint8, at most `side` pixels long, as text that a page can hold.

    An image with few pixels is stored without loss, because a reader sees each of them.
    """
    if max(pixels.shape[:2]) > side:
        pixels = thumbnail(pixels, side)
    kind, options = (".png", []) if max(pixels.shape[:2]) <= 64 else (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 85])
    content = cv2.imencode(kind, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1]
    return f"data:image/{'png' if kind == '.png' else 'jpeg'};base64,{base64.b64encode(content).decode()}"
