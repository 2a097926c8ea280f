"""The house: each module imports only from those before it, and what must be quick imports nothing heavy."""

import ast

import pytest
from conftest import ROOT

# From the foundation up. settings comes first: it imports nothing of the house, and everyone may say what a
# user did wrong.
# fmt: off
ROOMS = (
    "settings", "progress", "data_settings", "recipes", "protocols", "command_line", "launch", "interruption",
    "splitmix", "schedules", "momentum_norm", "model", "optim", "keys", "encoders",
    "augment", "photometry", "decode", "order", "index", "tars", "shards", "columns", "held_out", "sources",
    "buffers", "data", "loader", "pictures", "features", "checkpoint", "run_folder", "run_state", "saving", "monitor",
    "hub", "completion", "pretrain", "evaluation", "heads", "metrics", "probe", "finetune", "embedding",
    "publish", "export", "reference", "benchmark", "preview",
)
# fmt: on


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("m2t_accel"):
            names = [node.module.removeprefix("m2t_accel").lstrip(".")] if "." in node.module else []
            yield from names or [alias.name for alias in node.names if alias.name in ROOMS]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("m2t_accel."):
                    yield alias.name.removeprefix("m2t_accel.")


@pytest.mark.parametrize("path", sorted((ROOT / "m2t_accel").glob("*.py")), ids=lambda path: path.stem)
def test_imports_go_downward(path):
    if path.stem == "__init__":
        assert list(imported_rooms(path)) == []
        return
    below = ROOMS[: ROOMS.index(path.stem)]
    assert [room for room in imported_rooms(path) if room not in below] == []


def test_there_is_a_test_file_for_each_module():
    for path in (ROOT / "m2t_accel").glob("[!_]*.py"):
        assert (ROOT / "tests" / f"test_{path.stem}.py").exists(), path.stem


@pytest.mark.parametrize("arguments", [["--help"], ["--recipe", "list"], ["--epoch", "3"], ["--epochs", "0"]])
def test_quick_answers_import_nothing_heavy(run_script, arguments):
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['scripts/pretrain.py', *{arguments!r}]\n"
        "try:\n    runpy.run_path('scripts/pretrain.py', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print('heavy:', sorted({'torch', 'transformers', 'datasets', 'numpy', 'accelerate'} & set(sys.modules)))"
    )
    done = run_script("-c", script)
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stderr
