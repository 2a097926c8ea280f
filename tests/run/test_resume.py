from types import SimpleNamespace

from m2t_accel.config.recipes import build_config
from m2t_accel.run.resume import describe_changes


def test_a_change_of_deterministic_is_printed():
    accelerator = SimpleNamespace(mixed_precision="no", num_processes=1)
    for before, now in ((False, True), (True, False), (True, True)):
        saved = vars(build_config({"deterministic": str(before)}))
        manifest = {"mixed_precision": "no", "num_processes": 1, "step": 3, "config": saved}
        config = build_config({"deterministic": str(now)})
        expected = [] if before == now else [f"note: deterministic is {str(now).lower()} from this step on"]
        assert describe_changes(config, manifest, accelerator, 10) == expected
    del saved["deterministic"]  # a checkpoint of an earlier version
    manifest = {**manifest, "config": saved}
    assert describe_changes(build_config({}), manifest, accelerator, 10) == []
