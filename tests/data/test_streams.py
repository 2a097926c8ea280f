import dataclasses
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from datasets import Features, Image, IterableDataset
from helpers import encoded, load, settings, write_parquet, write_tar

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data import order, shards
from m2t_accel.data.decode import decode_image
from m2t_accel.data.loader import create_loader, read
from m2t_accel.data.requests import DeviceBatches
from m2t_accel.data.streams import MAX_ROWS, HubStream, StreamedOrder, StreamReader
from m2t_accel.data.views import TwoViews


@pytest.fixture(autouse=True)
def small_pools(monkeypatch):
    """Pools of two steps of 8 images."""
    monkeypatch.setattr(order, "POOL_SIZE", 16)
    monkeypatch.setattr(order, "MIN_POOL_BATCHES", 2)


class Source:
    """Rows of shards; reading fails at the rows in `broken` so many times."""

    def __init__(self, sizes):
        self.sizes = sizes
        self.broken = Counter()
        self.read = []

    def rows(self, shard):
        for number in shard:
            for row in range(self.sizes[number]):
                if self.broken[number, row] > 0:
                    self.broken[number, row] -= 1
                    raise ConnectionError("the server is gone")
                self.read.append((number, row))
                yield {"image": encoded(20 * number + row, 1)[0]}

    def stream(self, num_images=None):
        kwargs = {"shard": list(range(len(self.sizes)))}
        rows = IterableDataset.from_generator(self.rows, Features({"image": Image()}), gen_kwargs=kwargs)
        files = [f"hf://pictures/{i}.tar" for i in range(len(self.sizes))]
        return HubStream(rows, files, num_images or sum(self.sizes), configuration(), [])


def configuration(**others):
    return settings("digits", streaming=True, **{"batch_size": 8, "device_batch_size": 4, "epochs": 2, **others})


def samples_of(requests):
    return [request.samples.tolist() for request in requests]


def joined(shares):
    """Return the sub-batches of several processes in the order of the virtual devices."""
    return list(chain(*zip(*shares, strict=True)))


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_an_epoch_shows_every_image_once_for_any_number_of_processes(num_processes):
    config, images = configuration(batch_size=16), Source([12] * 8).stream()
    shares = [list(DeviceBatches(images, config, num_processes, process)) for process in range(num_processes)]
    shown = joined([samples_of(share) for share in shares])
    assert shown == samples_of(DeviceBatches(images, config, 1, 0))
    numbers = [shard * MAX_ROWS + row for shard in range(8) for row in range(12)]
    for epoch in range(2):
        assert sorted(chain(*shown[epoch * 24 : (epoch + 1) * 24])) == numbers
    assert shown[:24] != shown[24:]
    for request in chain(*shares):
        pixels = [decode_image(image)[0, 0, 0] for image in request.images]
        assert pixels == [20 * (sample // MAX_ROWS) + sample % MAX_ROWS for sample in request.samples]


@pytest.mark.parametrize(
    ("sizes", "num_images", "remark", "most"),
    [
        ([8, 8, 8, 8], 32, None, 1),
        ([1, 13, 11, 7], 32, None, 2),  # what differs between shards is not known
        ([8, 8, 8], 24, "3 shards do not divide among 2 devices: an epoch shows about 16.7% of the images twice", 2),
        ([32], 32, "1 shard for 2 virtual devices: 2 devices read the same shards, and each shows a part", 1),
        ([1] * 32, 32, None, 1),
        ([4, 4, 4, 4], 64, None, 4),  # --images_per_epoch may be larger than their number
    ],
)
def test_shards_of_any_number_and_size(sizes, num_images, remark, most):
    images = Source(sizes).stream(num_images)
    config = configuration(epochs=1, warmup_epochs=0)
    remarks = list(StreamedOrder(images, config).describe())
    assert [remark in line for line in remarks] == ([] if remark is None else [True])
    shown = list(chain(*samples_of(DeviceBatches(images, config, 1, 0))))
    assert len(shown) == num_images
    assert len(set(shown)) == num_images  # an image that is shown again has another number, and so other views
    places = Counter((sample // MAX_ROWS % len(sizes), sample % MAX_ROWS) for sample in shown)
    assert max(places.values()) == most
    assert all(row < sizes[shard] for shard, row in places)


def parts_of_a_run(images, config, cuts, plans, knows_positions=True):
    """Return the samples of a run that is stopped at the cuts, with so many processes and workers in each part."""
    shown, positions = [], None
    for (first, last), (num_processes, num_workers) in zip(pairwise(cuts), plans, strict=True):
        config = dataclasses.replace(config, num_workers=num_workers)
        shares, ends = [], []
        for process in range(num_processes):
            requests = DeviceBatches(images, config, num_processes, process, first, positions)
            share, batches = [], read(create_loader(TwoViews(images, config), requests, config))
            for _ in range((last - first) * len(requests.devices)):
                share.append(next(batches).samples.tolist())
            assert requests.failure(last) is None  # as before each save
            ends.append(requests.positions(last))
            batches.close()
            shares.append(share)
        shown += joined(shares)
        positions = np.stack(ends, axis=1).reshape(-1, 2) if knows_positions else None
    return shown


@pytest.mark.parametrize("knows_positions", [True, False])
@pytest.mark.parametrize("plans", [((1, 0), (2, 2), (1, 0)), ((2, 0), (1, 1), (2, 0))])
def test_a_run_resumes_exactly_twice_on_other_numbers_of_processes_and_workers(plans, knows_positions):
    source, config = Source([10, 14, 11, 13, 12, 20]), configuration()
    images = source.stream()
    whole = parts_of_a_run(images, config, (0, 20), ((1, 0),))
    assert whole == samples_of(DeviceBatches(images, config, 1, 0))
    source.read.clear()
    assert parts_of_a_run(images, config, (0, 5, 13, 20), plans, knows_positions) == whole


def test_a_resume_reads_its_shards_from_their_start_and_no_others():
    source = Source([10] * 8)
    images, config = source.stream(), configuration(epochs=1, warmup_epochs=0)
    requests = DeviceBatches(images, config, 1, 0)
    for number, _ in enumerate(requests):
        if number == 13:
            break
    positions = requests.positions(7)
    source.read.clear()
    list(DeviceBatches(images, config, 1, 0, 7, positions))
    streamed = StreamedOrder(images, config)
    before = {streamed.shards(0, device)[i] for device in range(2) for i in range(2)}  # 24 rows of 40 each were shown
    assert not before & {shard for shard, _ in source.read}


def test_a_resume_at_an_unknown_place_holds_one_skipped_pool_at_a_time(monkeypatch):
    asked, take = [], StreamReader.take
    monkeypatch.setattr(StreamReader, "take", lambda reader, number: asked.append(number) or take(reader, number))
    images, config = Source([10] * 8).stream(), configuration(epochs=1, warmup_epochs=0)
    whole, rest = (samples_of(DeviceBatches(images, config, 1, 0, first_step)) for first_step in (0, 8))
    assert rest == whole[16:]
    assert set(asked) == {8}  # a pool of a virtual device: two sub-batches of four images


def test_an_image_is_named_by_its_key_and_its_shard():
    images = Source([10] * 8).stream()
    for path, expected in (("7.jpg", "7.jpg, row 5 of hf://pictures/2.tar"), (None, "row 5 of hf://pictures/2.tar")):
        assert images.image({"image": {"bytes": b"no image", "path": path}}, 2, 5)["path"] == expected


@pytest.fixture
def no_delays(monkeypatch):
    monkeypatch.setattr(shards, "RETRY_DELAYS", (0, 0, 0, 0))


def test_a_row_that_fails_is_read_again(no_delays):
    source = Source([10] * 8)
    images, config = source.stream(), configuration()
    whole = samples_of(DeviceBatches(images, config, 1, 0))
    source.broken = Counter({(3, 0): 4, (3, 5): 4, (6, 9): 2})
    assert samples_of(DeviceBatches(images, config, 1, 0)) == whole


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["stream", "parquet", "tars"])
def test_requests_end_before_the_step_that_cannot_be_read(tmp_path, monkeypatch, no_delays, kind, num_workers):
    config = configuration(num_workers=num_workers, epochs=1, warmup_epochs=0)
    if kind == "stream":
        source = Source([10] * 8)
        images = source.stream()
        device = StreamedOrder(images, config).shards(0, 1)
        source.broken[device[1], 6] = 1000  # the 17th row of device 1, in the second pool of 8 rows each
    else:
        write = {"parquet": lambda file: write_parquet(file, 0, 80, 80), "tars": lambda file: write_tar(file, 0, 80)}
        write[kind](tmp_path / f"train-0.{'parquet' if kind == 'parquet' else 'tar'}")
        images = load(tmp_path, streaming=True, validation_fraction=0).train
        positions = order.PooledOrder(images.piece_sizes, config)
        lost = positions.pool(0, 1, 2).segments[0]
        open_piece = type(images).open

        def broken(self, piece, *limit):
            inner = open_piece(self, piece, *limit)

            def read_segment(first, stop):
                if piece == lost.piece and stop > lost.first:
                    raise shards.unreadable_shard("a", OSError("the disk is gone"))
                return inner(first, stop)

            return read_segment

        monkeypatch.setattr(type(images), "open", broken)
    requests = DeviceBatches(images, config, 1, 0)
    batches, steps = read(create_loader(TwoViews(images, config), requests, config)), 0
    while requests.failure(steps) is None:
        assert len([next(batches), next(batches)]) == 2
        steps += 1
    assert steps == 4
    assert "is gone" in requests.failure(4)
    assert requests.failure(3) is None
    with pytest.raises(ConfigurationError, match="is gone"):
        next(batches)


def test_shards_without_rows_are_an_error():
    with pytest.raises(ConfigurationError, match="hold no row"):
        Source([0, 0]).stream(16)
    requests = DeviceBatches(Source([0, 20]).stream(), configuration(), 1, 0)  # one of two devices has no row
    assert list(requests) == []
    assert "hold no row" in requests.failure(0)


def test_a_part_for_a_short_try_is_the_same_in_all_epochs_and_reads_few_shards():
    source = Source([8] * 6)
    images = source.stream().spread(16)
    assert (len(images), images.num_shards) == (16, 2)
    assert images.files == ["hf://pictures/0.tar", "hf://pictures/3.tar"]
    requests = list(DeviceBatches(images, configuration(), 1, 0))
    expected = sorted([*range(8), *range(60, 68)])
    shown = [int(decode_image(image)[0, 0, 0]) for request in requests for image in request.images]
    assert sorted(shown[:16]) == sorted(shown[16:]) == expected
    assert {shard for shard, _ in source.read[1:]} <= {0, 3}
    cut = source.stream().spread(10)
    assert (cut.num_shards, cut.max_rows, [len(list(cut.rows(shard))) for shard in range(2)]) == (2, 5, [5, 5])
    assert [int(decode_image(cut.image(row, 1, 0))[0, 0, 0]) for row in cut.rows(1)] == [60, 61, 62, 63, 64]
