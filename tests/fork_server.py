"""The process that `tests.processes` forks from: `python -m tests.fork_server SOCKET`.

A request is a command's words, its folder and environment, with three open files: where the fork's standard output and
errors go, and a pipe that gets its pid and, at its end, its status.
"""

import atexit
import gc
import importlib
import json
import logging
import os
import random
import runpy
import signal
import socket
import struct
import sys
import threading
import types
from pathlib import Path

from tests.processes import HUB

# What the package and its scripts import of others, at once or when it is used.
PRELOAD = [
    "accelerate.commands.launch", "datasets", "diffusers.optimization", "diffusers.training_utils",
    "matplotlib.pyplot", "peft", "scipy.optimize", "torch._dynamo", "torch.distributed.fsdp",
    "torch.utils.tensorboard", "transformers.hf_argparser",
]  # fmt: skip
CLASSES = {
    "diffusers": [
        "AutoencoderKL", "DDIMScheduler", "DDPMScheduler", "FlowMatchEulerDiscreteScheduler",
        "StableDiffusionPipeline", "StableDiffusionXLPipeline", "UNet2DConditionModel", "UNet2DModel",
    ],
    "transformers": ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer"],
}  # fmt: skip
LIBRARIES = ("huggingface_hub", "diffusers", "transformers", "datasets", "accelerate", "peft")


def preload():
    logging.disable()  # what libraries say of each other when they load
    for name in PRELOAD:
        importlib.import_module(name)
    for library, names in CLASSES.items():
        for name in names:
            getattr(sys.modules[library], name)
    logging.disable(logging.NOTSET)
    assert not any(name.split(".")[0] == "diffusers_ext" for name in sys.modules)
    threads = {(Path("/proc/self/task") / it / "comm").read_text().strip() for it in os.listdir("/proc/self/task")}
    # Arrow's allocator has handlers of its own for forks.
    assert len(threads - {"jemalloc_bg_thd"}) == 1, threads
    gc.collect()
    gc.freeze()


def serve(channel):
    """Answers requests until the tests end; returns a fork's request in that fork."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, *_ = socket.recv_fds(channel, 2**20, 3)
        if not message:
            os._exit(0)
        if not os.fork():
            break
        for file in files:
            os.close(file)
    # This fork waits for the one that runs the command, for only a parent learns how a process ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    channel.close()
    status = files.pop()
    if child := os.fork():
        os.write(status, struct.pack("i", child))
        os.write(status, struct.pack("i", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
        os._exit(0)
    os.close(status)
    for target, file in enumerate(files, 1):
        os.dup2(file, target)
        os.close(file)
    return json.loads(message)


def follow_hub():
    """Puts this process's Hub, cache and switches in the place of those that the libraries read when they loaded."""
    from huggingface_hub import constants, hf_api

    before = dict(vars(constants))
    importlib.reload(constants)
    after = vars(constants)
    changed = {name: value for name, value in before.items() if name.isupper() and value != after[name]}
    texts = {HUB["HF_ENDPOINT"]: constants.ENDPOINT, HUB["HF_HOME"]: constants.HF_HOME}
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] in LIBRARIES]:
        for name, value in list(vars(module).items()):
            if name in changed and value == changed[name]:
                setattr(module, name, after[name])
            elif isinstance(value, (str, Path)):
                for old, new in texts.items():
                    if old in str(value):
                        setattr(module, name, type(value)(str(value).replace(old, new)))
    hf_api.api.endpoint = constants.ENDPOINT


def become(words, cwd, environment):
    """Runs a command's words as Python does."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    sys.modules["numpy"].random.seed()
    follow_hub()
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(main))
    elif words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], cwd
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def end(code):
    """Ends this process in the order of the interpreter, which then would free every object: that takes longest."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    connection = socket.socket(fileno=int(sys.argv[1]))
    preload()
    command = serve(connection)
    try:
        become(**command)
    except SystemExit as error:
        if not (error.code is None or isinstance(error.code, int)):
            sys.stderr.write(f"{error.code}\n")
            end(1)
        end(error.code or 0)
    except Exception:
        sys.excepthook(*sys.exc_info())
        end(1)
    end(0)
