import json

USERS_SHELL = {
    **{"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "TORCHELASTIC_RUN_ID": "none"},
    **{"SLURM_JOB_ID": "7", "ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_CPU": "false"},
    **{"HF_HOME": "/proc/home", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x", "https_proxy": "http://127.0.0.1:9"},
    **{"TQDM_DISABLE": "1", "COLUMNS": "30", "CUDA_VISIBLE_DEVICES": "-1"},
}
LIST = """
import json, os, conftest
from huggingface_hub import constants
kept = {name: os.environ[name] for name in json.loads(os.environ["NAMES"]) if name in os.environ}
print(json.dumps([kept, constants.HF_HOME.startswith(os.environ["XDG_CACHE_HOME"])]))
"""


def test_the_tests_do_not_follow_the_users_shell(run_script):
    given = {"NAMES": json.dumps(list(USERS_SHELL)), "PYTHONPATH": "tests"}
    done = run_script("-c", LIST, environment={**USERS_SHELL, **given})
    kept, caches_are_temporary = json.loads(done.stdout)
    assert kept == {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    assert caches_are_temporary
