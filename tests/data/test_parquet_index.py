import pyarrow
import pytest
from helpers import load, write_parquet, write_table
from pyarrow import parquet

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.data import parquet_index
from m2t_accel.data.parquet import ParquetShards


def test_class_names_are_compared_with_those_of_the_first_file_that_has_some():
    files = [("0", {}), ("1", {"label": ["a", "b"], "kind": ["x"]}), ("2", {"label": ["a", "b"]})]
    assert parquet_index.class_conflicts(files) == {}
    conflicts = parquet_index.class_conflicts(
        [*files, ("3", {"label": ["a", "c"]}), ("4", {"label": [], "kind": ["x", "missing"]})]
    )
    assert conflicts.keys() == {"label", "kind"}
    assert conflicts["label"].startswith("the class 1 of the column label is b in 1 and c in 3: ")
    assert conflicts["kind"].startswith("the class 1 of the column kind is missing in 1 and missing in 4: ")


@pytest.mark.parametrize(
    "metadata",
    [b"{not json", b"", b"\xff\xfe", b"null", b"3", b"[]", b"{}", b'{"info": {"features": []}}']
    + [b'{"info": {"features": {"label": %s}}}' % kind for kind in (b"3", b"{}", b'{"_type": "ClassLabel"}')]
    + [b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": null}}}}']
    + [b'{"info": {"features": {"label": {"_type": "Value", "names": ["a"]}}}}'],
)
def test_other_metadata_names_no_classes(metadata):
    assert parquet_index.class_names(metadata) == {}


def test_distinct_values_are_read_again_when_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = {"a/../b": ["x", "y", "x", None], "label": [3, 1, 1, 3]}
    files = [tmp_path / "1.parquet", tmp_path / "2.parquet"]
    for file in files:
        write_table(file, row_group_size=1, **rows)

    def values(column, kind):
        return parquet_index.distinct_values([str(file) for file in files], column, kind).to_pylist()

    read, read_table = [], parquet.read_table
    monkeypatch.setattr(parquet, "read_table", lambda *a, **k: read.append(k["columns"]) or read_table(*a, **k))
    for _ in range(2):
        assert values("label", pyarrow.int64()) == [3, 1]
        assert values("a/../b", pyarrow.string()) == ["x", "y", None]
    assert read == [["label"]] * 2 + [["a/../b"]] * 2
    write_table(files[0], **rows | {"label": [7, 1, 1, 3]})
    assert values("label", pyarrow.int64()) == [7, 1, 3]
    write_table(files[1], **rows | {"label": list("abcd")})
    with pytest.raises(ConfigurationError, match=r"the columns label of .*2\.parquet differ"):
        values("label", pyarrow.int64())


def test_values_of_files_without_rows_are_not_read(tmp_path):
    write_table(tmp_path / "a.parquet", other=pyarrow.array([], "int8"))
    write_parquet(tmp_path / "b.parquet", 0, 10, row_group_size=4)
    found = ParquetShards([str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")])
    assert found.distinct_values("label").to_pylist() == [0, 1]


def test_all_files_need_the_same_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 10, row_group_size=4)
    write_parquet(tmp_path / "b.parquet", 0, 10, row_group_size=4, labels=False)
    with pytest.raises(ConfigurationError, match=r"b\.parquet has the columns image, .*a\.parquet has image, label"):
        ParquetShards([str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")])


def test_column_names_must_differ(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], ["label", "label"])
    parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ConfigurationError, match="two columns of the same name: label, label"):
        load(tmp_path, streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("metadata", [b"{not json", b"3", b'{"info": {"features": {"image": 3}}}'])
def test_damaged_metadata_is_an_error(tmp_path, streaming, metadata):
    write_parquet(tmp_path / "a.parquet", 0, 8, row_group_size=4)
    table = parquet.read_table(tmp_path / "a.parquet").replace_schema_metadata({"huggingface": metadata})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigurationError):
        load(tmp_path, streaming=streaming)
