"""Run several command lines of scripts in one process, because a start takes seconds: `… several_scripts.py LINES`.

LINES is a JSON list of lists of words. Prints as JSON the status, output and errors of each, and the imported modules.
"""

import contextlib
import io
import json
import os
import runpy
import sys

sys.path[0] = os.getcwd()  # as `python -c` does: the modules of the tests are none of the scripts'
end = None
if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # a process group can be started only once
    from m2t_accel.distributed import processes

    end, processes.destroy_process_group = processes.destroy_process_group, lambda: None
answers = []
for words in json.loads(sys.argv[1]):
    sys.argv, status = words, 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as exit:
            status = exit.code or 0
    answers.append((status, out.getvalue(), err.getvalue()))
print(json.dumps({"answers": answers, "modules": list(sys.modules)}))
if end is not None:
    end()
