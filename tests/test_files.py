import pytest

from m2t_accel.files import atomic_write


def test_a_file_or_folder_is_replaced_whole_or_not_at_all(tmp_path):
    file, folder = tmp_path / "a.txt", tmp_path / "folder"
    for content in ("old", "new"):
        with atomic_write(file) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text(content)
        with atomic_write(folder) as temporary:
            temporary.mkdir()
            (temporary / content).touch()
    for path in (file, folder):
        with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
            temporary.mkdir() if path is folder else temporary.write_text("half")
            raise ZeroDivisionError
    assert file.read_text() == "new"
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "folder"]
