"""Forked processes behave as new ones do."""

import json
import signal
import subprocess
import sys
import time

import pytest

from . import processes

WHAT = """
import json, os, sys
import huggingface_hub
from diffusers.utils import constants
print(json.dumps({
    "argv": sys.argv, "cwd": os.getcwd(), "path": sys.path[0], "variable": os.environ.get("VARIABLE"),
    "home": os.environ.get("HOME"), "ours": "diffusers_ext" in sys.modules, "main": __name__,
    "mine": sys.modules["__main__"].WHO, "hub": [huggingface_hub.constants.ENDPOINT, huggingface_hub.HfApi().endpoint,
    constants.HF_MODULES_CACHE, huggingface_hub.constants.HF_HUB_OFFLINE, huggingface_hub.constants.HF_TOKEN_PATH],
}))
""".replace("import json", "WHO = 'I'\nimport json", 1)


def test_a_fork_finds_what_a_new_process_finds(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in ("what.py", "folder/script.py"):
        (tmp_path / path).write_text(WHAT)
    environment = {
        "VARIABLE": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
    }

    def found(start, words):
        run = start([sys.executable, *words, "a", "-b"], cwd=tmp_path, env=environment)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    def new(command, **options):
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)

    expected = found(new, ["-c", WHAT])
    assert expected["hub"][2] == str(tmp_path / "home" / "modules")
    assert found(processes.run, ["-c", WHAT]) == expected
    module = found(processes.run, ["-m", "what"])
    assert module == {**expected, "argv": [str(tmp_path / "what.py"), "a", "-b"], "path": str(tmp_path)}
    script = found(processes.run, ["folder/script.py"])
    assert script == {**expected, "argv": ["folder/script.py", "a", "-b"], "path": str(tmp_path / "folder")}


ENDS = {
    "pass": (0, ""),
    "raise SystemExit(7)": (7, ""),
    "raise SystemExit('error: no')": (1, "error: no\n"),
    "import atexit, sys; atexit.register(lambda: print('last', file=sys.stderr))": (0, "last\n"),
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)": (-signal.SIGTERM, ""),
    "import os; os._exit(3)": (3, ""),
}


@pytest.mark.parametrize("code", ENDS)
def test_a_fork_ends_as_a_new_process_ends(code):
    run = processes.run([sys.executable, "-c", code])
    assert (run.returncode, run.stderr) == ENDS[code]
    failed = processes.run([sys.executable, "-c", "1 / 0"])
    assert failed.returncode == 1
    assert failed.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_processes_can_be_watched_signalled_and_killed(tmp_path):
    wait = f"""
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind a shell's &
print('here', flush=True)
open({str(tmp_path / "there")!r}, 'w').close()
time.sleep(60)
"""
    for number in (signal.SIGKILL, signal.SIGINT):
        process = processes.Popen([sys.executable, "-c", wait])
        while not (tmp_path / "there").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        (tmp_path / "there").unlink()
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(number)
        assert process.communicate(20)[0] == "here\n"
        assert process.returncode == -number
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run([sys.executable, "-c", wait], timeout=0.1)


RANK = """
import os, sys, torch
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
if sys.argv[1:] == ["fail"] and rank:
    raise SystemExit(5)
total = torch.tensor(rank + 1)
torch.distributed.all_reduce(total)
print(rank, os.environ["LOCAL_RANK"], total.item())
torch.distributed.destroy_process_group()
"""


def test_ranks_find_each_other():
    runs = processes.run_ranks([sys.executable, "-c", RANK], 2)
    assert [run.stdout for run in runs] == ["0 0 3\n", "1 1 3\n"]
    failed = processes.run_ranks([sys.executable, "-c", RANK, "fail"], 2)
    assert failed[1].returncode == 5
    assert failed[0].returncode != 0  # killed, or told by the other's end
