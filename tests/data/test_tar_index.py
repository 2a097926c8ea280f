import io
import re
import tarfile
import tracemalloc

import pytest
from helpers import add_member, encoded, write_tar

from m2t_accel import progress
from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data import tar_index
from m2t_accel.data.tar_index import Contents, LabelMembers, Samples


def test_damaged_truncated_and_joined_tars_are_errors(tmp_path):
    write_tar(tmp_path / "a.tar", 0, 20)
    content = (tmp_path / "a.tar").read_bytes()
    half = len(content) // 2
    for bad in (
        content + content,
        content[:10240] + b"x" * 512 + content[10752:],
        content + bytes(tar_index.TAIL_BYTES) + b"x",
        content[:half],
        content[: half + 100],
        content[: half - 300],
        b"no tar",
        b"",
    ):
        (tmp_path / "a.tar").write_bytes(bad)
        with pytest.raises(ConfigurationError, match=r"a\.tar cannot be read as a tar .*move it away"):
            tar_index.index_tars(tmp_path, ["a.tar"])
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ConfigurationError, match=r"a\.tar cannot be read"):
        tar_index.index_tars(tmp_path, ["a.tar"])


def test_a_tar_is_indexed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tar(tmp_path / "a.tar", 0, 5)
    (tmp_path / "b.tar").write_bytes(b"no tar")
    with pytest.raises(ConfigurationError, match=r"b\.tar"):
        tar_index.index_tars(tmp_path, ["a.tar", "b.tar"])
    with monkeypatch.context() as patch:  # the index of a.tar is cached, although b.tar failed
        patch.setattr(tar_index.tarfile, "open", None)
        assert tar_index.index_tars(tmp_path, ["a.tar"])[0]["label"].to_pylist() == ["0", "1", "0", "1", "0"]
    write_tar(tmp_path / "a.tar", 0, 6)
    assert len(tar_index.index_tars(tmp_path, ["a.tar"])[0]) == 6


def test_a_bar_shows_the_progress_of_indexing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.0)
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", 10 * i, 3 + i)
    tar_index.index_tars(tmp_path, [f"{i}.tar" for i in range(4)])
    shares = [int(share) for share in re.findall(r"indexing tars: +(\d+)%", capsys.readouterr().err)]
    assert shares == sorted(shares)
    assert len(set(shares)) >= 4


def test_the_memory_for_indexing_does_not_grow_with_the_members(tmp_path):
    """tarfile would keep an object with the header of each member."""
    content = encoded(0, 1)[0]["bytes"]
    for number in (100, 1100):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for i in range(number):
                add_member(tar, f"{i:06}.png", content)
                add_member(tar, f"{i:06}.cls", b"1")
        tracemalloc.start()
        tar_index.index_tar(str(tmp_path / f"{number}.tar"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2.5e6  # 4.7 MB with the headers


LABELS = [  # bytes of a .cls, the label
    (b"cat", "cat"),
    (b" tabby cat\n", "tabby cat"),
    ("\ufeffkočka".encode(), "kočka"),
    (b" 007\n", "7"),
    (b"9" * 18, "9" * 18),
    (b"9" * 19, None),
    (b"9" * 5000, None),
    (b"-1", None),
    (b"", None),
    (b"cat\ndog", None),
    (b"\x80\x04K\x01.", None),
    (b"x" * 201, None),
]


@pytest.mark.parametrize(("content", "label"), LABELS)
def test_the_label_in_a_cls_member(tmp_path, content, label):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, part in (("0.png", b"image"), ("0.cls", content), ("1.png", b"image"), ("1.cls", b"7")):
            add_member(tar, name, part)
    assert tar_index.index_tars(tmp_path, ["a.tar"])[0]["label"].to_pylist() == [label, "7"]


JSON_LABELS = [  # bytes of a .json, the label under the key
    (b'{"k": "cat"}', "cat"),
    (b'{"k": 3}', "3"),
    (b'{"k": 3.0}', "3"),
    (b'{"k": true}', "True"),
    (b'{"k": -1}', None),
    (b'{"k": 0.5}', None),
    (b'{"k": NaN}', None),
    (b'{"k": null}', None),
    (b'{"k": [1]}', None),
    (b'{"other": 1}', None),
    (b"[1]", None),
    (b"{", None),
    (b"\xff", None),
    (b"[" * 100_000, None),
]


@pytest.mark.parametrize(("content", "label"), JSON_LABELS)
def test_the_label_in_a_json_member(tmp_path, content, label):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, part in (("0.png", b"image"), ("0.json", content)):
            add_member(tar, name, part)
    (table,) = tar_index.index_tars(tmp_path, ["a.tar"], LabelMembers(".json", "k"))
    assert table["label"].to_pylist() == [label]
    assert tar_index.index_tars(tmp_path, ["a.tar"])[0]["label"].to_pylist() == [None]  # cached apart
    assert ("k" in Contents([table]).json) == (b'"k"' in content)


SAMPLES = {  # names of the members: images by their keys, more images
    "000.jpg 000.depth.png 000.seg.png 000.cls": (["000"], 2),
    "0.rgb.png 0.depth.png 0.seg.png 1.rgb.png 1.depth.png 1.seg.png 2.rgb.png 2.depth.png 2.seg.png": ("0 1 2", 6),
    "0.cam0.jpg 0.cam1.jpg 0.cam2.jpg 0.json 1.cam0.jpg 1.cam1.jpg 1.cam2.jpg 1.json": ("0 1", 4),
    "DSC.0001.jpg DSC.0002.jpg DSC.0003.jpg DSC.0003.png": ("DSC.0001 DSC.0002 DSC.0003", 1),
    "a.1.jpg a.2.jpg a.3.jpg b.1.jpg b.2.jpg b.3.jpg c.1.jpg c.2.jpg c.3.jpg d.1.jpg d.2.jpg d.3.jpg": (None, 0),
    "2021.05.03_1.jpg 2021.05.03_2.jpg 2021.06.01_7.JPG": ("2021.05.03_1 2021.05.03_2 2021.06.01_7", 0),
    "Mr.Smith.jpg Mr.Jones.jpg Mr.Brown.jpg": ("Mr.Smith Mr.Jones Mr.Brown", 0),
    "x/a.b.jpg y/a.b.jpg x.y/c.jpg": (["x/a", "y/a", "x.y/c"], 0),
}


@pytest.mark.parametrize("names", SAMPLES)
def test_a_name_ends_at_the_first_dot_unless_that_drops_most_images(names):
    keys, more = SAMPLES[names]
    keys = [name.rpartition(".")[0] for name in names.split()] if keys is None else keys
    samples = Samples({name: (0, 0) for name in names.split()})
    assert [key.lstrip("/") for key in samples.images] == (keys.split() if isinstance(keys, str) else keys)
    assert samples.more_images.total() == more


def test_labels_belong_to_names_with_dots(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(5):
            add_member(tar, f"DSC.{i:04}.png", b"image")
            add_member(tar, f"DSC.{i:04}.cls", str(i).encode())
    assert tar_index.index_tars(tmp_path, ["a.tar"])[0]["label"].to_pylist() == ["0", "1", "2", "3", "4"]


def test_other_members_are_counted_beside_images_and_alone(tmp_path):
    names = "0.png 0.cls 0.seg.npy 1.heic 2.HEIC x/0.CR2 README ._1.png .x/2.heic 3.tar.gz 4.dng.0001"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names.split():
            add_member(tar, name, b"x")
    contents = Contents(tar_index.index_tars(tmp_path, ["a.tar"]))
    assert contents.beside == {".cls": 1, ".seg.npy": 1}
    assert contents.alone == {".heic": 2, ".cr2": 1, "": 2, ".gz": 1}


NAMES = ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "d/" * 500 + "x.jpg", "x" * 5000 + ".jpg", "a\udcff/\udcff.jpg"]
NAMES += ["a\x1b[31m/x.jpg", "a\nb/x.jpg", ".../x.jpg", "a b/ü.JPG", "x.jpg" + "." * 2000 + "jpg"]


@pytest.mark.parametrize("name", [*NAMES, "a\0b/x.jpg"])
def test_hostile_names(tmp_path, name):
    """Nothing is unpacked, so a name cannot do harm. What is shown of it can be printed."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("short.jpg" if "\0" in name else name)
        member.pax_headers = {"path": name} if "\0" in name else {}
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    (table,) = tar_index.index_tars(tmp_path, ["a.tar"])
    assert table["size"].to_pylist() == ([] if name.startswith("...") else [3])
    assert all(folder.isprintable() for folder in table["folder"].to_pylist())


def test_a_sparse_image_is_refused_and_another_sparse_file_is_not_read(tmp_path):
    def add_sparse(tar, name):
        member = tarfile.TarInfo(name)
        content = b"1\n0\n3\n".ljust(512, b"\0") + b"abc"
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        member.pax_headers |= {"GNU.sparse.name": name, "GNU.sparse.realsize": "100000"}
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))

    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add_member(tar, "0.jpg", b"image")
        add_sparse(tar, "0.cls")
        add_sparse(tar, "0.json")
    assert tar_index.index_tars(tmp_path, ["a.tar"])[0]["label"].to_pylist() == [None]
    with tarfile.open(tmp_path / "a.tar", "a", format=tarfile.PAX_FORMAT) as tar:
        add_sparse(tar, "x/1.jpg")
    with pytest.raises(ConfigurationError, match=r"a\.tar holds the image x/1 as a sparse file: pack the tar without"):
        tar_index.index_tars(tmp_path, ["a.tar"])
