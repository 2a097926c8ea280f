import pytest
from datasets import ClassLabel, Dataset, Features, Image
from helpers import encoded, load, write_table
from loopback_hub import loopback_hub

from m2t_accel.config.fields import ConfigurationError

LOAD = """
import sys
from m2t_accel.config import command_line, recipes
from m2t_accel.data import decode, sources
with command_line.errors_in_one_line():
    given = {'recipe': 'digits', 'dataset': sys.argv[1], 'batch_size': 4, 'streaming': len(sys.argv) > 2}
    images = sources.load_images(recipes.build_config(given))
    if len(sys.argv) > 2:
        samples, rows = images.train.open(0)(2, 8)
        print(samples, images.train.files[0])
    else:
        rows = images.train['image']
    print(images.note, [int(decode.decode_image(row)[0, 0, 0]) for row in rows])
"""


@pytest.mark.slow
def test_a_data_set_of_the_hub_over_http(tmp_path, run_script):
    """It runs in processes of its own, because the endpoint must be set before the libraries are imported."""
    folder = tmp_path / "hub" / "someone" / "pictures" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "hub" / "someone" / "gated-pictures").mkdir()
    features = Features({"img": Image(), "label": ClassLabel(names=["a", "b"])})
    for name, number in (("train", 8), ("test", 4)):
        rows = {"img": encoded(0, number), "label": [i % 2 for i in range(number)]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    with loopback_hub(tmp_path / "hub") as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "XDG_CACHE_HOME": str(tmp_path / "new")}
        for more, first in (([], 0), (["streaming"], 2)):
            found = run_script("-c", LOAD, "someone/pictures", *more, environment=environment)
            assert found.returncode == 0, found.stderr
            assert "someone/pictures: 8 images of 2 classes; evaluation on 4 others" in found.stdout
            assert str(list(range(first, 8))) in found.stdout
        assert "[2 3 4 5 6 7] hf://datasets/someone/pictures@0123456789abcdef" in found.stdout
        for name, reason in (("gated-pictures", "hf auth login"), ("no-pictures", "Repository Not Found")):
            refused = run_script("-c", LOAD, f"someone/{name}", environment=environment)
            assert refused.returncode == 2, refused.stderr
            line = refused.stderr.splitlines()[-1]
            assert f"error: --dataset someone/{name} cannot be loaded" in line
            assert reason in line


def test_an_unreachable_hub_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match=r"--dataset nobody/nothing-at-all cannot be loaded") as caught:
        load("nobody/nothing-at-all")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("files", [{}, {"train": ["hf://a.parquet", "hf://b.jpg"]}])
def test_only_parquet_is_streamed_from_the_hub(monkeypatch, files):
    class Builder:
        def __init__(self, name):
            self.config = type("Config", (), {"data_files": files})

    monkeypatch.setattr("datasets.load_dataset_builder", Builder)
    with pytest.raises(ConfigurationError, match=r"stored as (no files|b\.jpg), .*leave out --streaming"):
        load("some/pictures", streaming=True)


def test_files_that_datasets_cannot_join_are_an_error_without_its_log(tmp_path, capfd):
    for i, label in enumerate((1, "one")):
        write_table(tmp_path / f"{i}.parquet", image=[b"image"], label=[label])
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        load(tmp_path)
    assert "Failed to read" not in "".join(capfd.readouterr())
