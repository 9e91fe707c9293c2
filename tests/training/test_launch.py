"""The script as users start it: launchers, signals through them, the shipped configurations, and the push."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config import load_config_from_file
from accelerate.utils import DistributedType

from diffusers_ext.data.digits import DIGITS
from tests import processes
from tests.hub.server import HubServer

from .tiny import UNET, make_config, run, weights, write_data

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "diffusers_ext" / "training" / "configs"
SCRIPT = "training/train_immiscible.py"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
LOAD = """
import sys, torch, diffusers_ext
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
out = pipe(2, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
assert out.shape == (2, 1, 8, 8) and out.isfinite().all()
torch.save({name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}, sys.argv[2])
"""


def write_config(folder, **changes):
    """Writes the YAML file of a run on the shipped digits, scaled to 8x8."""
    (folder / "unet.json").write_text(json.dumps(UNET))
    values = {
        "train_data_dir": str(DIGITS),
        "unet_config": str(folder / "unet.json"),
        "output_dir": str(folder / "out"),
        "resolution": 8,
        "channels": 1,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "logging_steps": 1,
        "num_validation_images": 2,
        "validation_inference_steps": 2,
        "resume_from_checkpoint": "latest",
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
    return path


def environment(**extra):
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **extra}


def execute(command, **extra):
    """Runs a command in a fork; what a launcher starts is new and has from its start the variables that it sets."""
    return processes.run(command, env=environment(**extra))


def loaded_elsewhere(name, folder, **extra):
    """The weights that another process loads by `DiffusionPipeline.from_pretrained`."""
    result = execute([sys.executable, "-c", LOAD, name, folder / "loaded.pt"], **extra)
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "loaded.pt", weights_only=True)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- launchers on the CPU ------------------------------------------------------------------------------------


def wait_for_log(log, process):
    """Returns when a run has logged its first step, or has ended."""
    deadline = time.time() + 120
    while not (log.is_file() and log.read_text()) and time.time() < deadline and process.poll() is None:
        time.sleep(0.005)


def test_a_terminated_script_resumed_by_accelerate_launch_leaves_a_complete_repo(tmp_path):
    """SIGTERM to `python script` ends it with code 0; `accelerate launch -m` goes on, equal to an unbroken run."""
    data, out, common = write_data(tmp_path / "data"), tmp_path / "out", {"max_train_steps": 17, "random_flip": True}
    config = make_config(data, out, **common, lr_scheduler="cosine", resume_from_checkpoint="latest").to_dict()
    (tmp_path / "run.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    arguments = ["--config", tmp_path / "run.json"]
    child = processes.Popen([sys.executable, SCRIPT, *arguments], env=environment())
    wait_for_log(out / "metrics.jsonl", child)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(120)
    assert child.returncode == 0, errors
    assert re.search(r"stopped by SIGTERM after \d+ of 17 updates; go on with --resume_from_checkpoint", errors)
    single = ["--config_file", CONFIGS / "single.yaml", "-m", "diffusers_ext.train", "immiscible"]
    result = execute([*LAUNCH, *single, *arguments])
    assert result.returncode == 0, result.stderr
    assert "defaults used instead" not in result.stderr

    _, record, _ = run(data, tmp_path / "whole", **common, lr_scheduler="cosine")
    assert [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()] == record.losses
    assert_equal(weights(out), weights(tmp_path / "whole"))
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "ImageGenerationPipeline"
    assert {"README.md", "sample.png", "results.json", "training_arguments.json"} <= {p.name for p in out.iterdir()}
    published = [
        p.relative_to(out) for p in out.rglob("*") if not p.relative_to(out).parts[0].startswith("checkpoint")
    ]
    assert not [p for p in published if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    assert [str(p) for p in published if p.suffix == ".safetensors"] == ["unet/diffusion_pytorch_model.safetensors"]
    card = (out / "README.md").read_text()
    assert '"learning_rate": 0.001' in card
    assert '"max_train_steps": 17' in card
    assert json.loads((out / "results.json").read_text())["updates"] == 17
    assert_equal(loaded_elsewhere(str(out), tmp_path), weights(out))


def test_sigterm_to_torchrun_saves_on_both_ranks_and_the_same_command_resumes(tmp_path):
    def command(folder):
        folder.mkdir()
        config = write_config(folder, max_train_steps=40, lr_scheduler="cosine", lr_warmup_steps=4)
        return [SCRIPT, "--config", str(config)]

    def two(command):
        """The two processes that torchrun starts, without it."""
        for result in processes.run_ranks([sys.executable, *command], 2, env=environment()):
            assert result.returncode == 0, result.stderr

    two(command(tmp_path / "whole"))

    stopped = command(tmp_path / "stopped")
    out = tmp_path / "stopped" / "out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    agent = processes.Popen([*torchrun, *stopped], env=environment())
    wait_for_log(out / "metrics.jsonl", agent)
    agent.send_signal(signal.SIGTERM)
    _, errors = agent.communicate(120)
    assert agent.returncode == 1, errors
    (checkpoint,) = out.glob("checkpoint-*")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["world"] == 2
    assert 1 <= manifest["step"] < 40
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= {p.name for p in checkpoint.iterdir()}  # both ranks saved
    assert not (out / "model_index.json").exists()

    two(stopped)
    assert json.loads((out / "checkpoint-40" / "manifest.json").read_text())["world"] == 2
    assert_equal(weights(out), weights(tmp_path / "whole" / "out"))
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
              for run in (out, tmp_path / "whole" / "out")]  # fmt: skip
    assert losses[0] == losses[1]
    assert len(losses[0]) == 40


# -- the Hub -------------------------------------------------------------------------------------------------


def test_push_to_hub_by_the_script_and_load_from_an_empty_cache(tmp_path):
    config = write_config(tmp_path, push_to_hub=True, hub_model_id="org/name", max_train_steps=2)
    command = [sys.executable, SCRIPT, "--config", config]
    with HubServer() as hub:
        home = tmp_path / "home"
        home.mkdir()
        # The token comes from the file that `hf auth login` writes, from nowhere else.
        login = {**hub.environment(home), "HF_TOKEN": "", "HF_TOKEN_PATH": str(home / "token")}
        refused = execute(command, **login)
        assert refused.returncode != 0
        assert "error: `push_to_hub` must be False without a login" in refused.stderr
        (home / "token").write_text("test-token")

        hub.fail = ("POST", "/commit/")
        failed = execute(command, **login)
        assert failed.returncode != 0
        out = tmp_path / "out"
        assert f"The folder {out} is whole. To try again: hf upload org/name {out} ." in failed.stderr
        assert {"model_index.json", "README.md", "sample.png"} <= {p.name for p in out.iterdir()}
        assert hub.commits == {}

        hub.fail = None
        pushed = execute(command, **login)  # the run is complete: it only resumes and pushes
        assert pushed.returncode == 0, pushed.stderr
        assert hub.commits == {"org/name": 1}
        assert not [path for path in hub.repos["org/name"] if path.startswith("checkpoint")]
        reader = {**hub.environment(tmp_path / "empty"), "HF_TOKEN": ""}
        assert_equal(loaded_elsewhere("org/name", tmp_path, **reader), weights(out))


# -- shipped configurations ----------------------------------------------------------------------------------

KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
}


@pytest.mark.parametrize("name", KINDS)
def test_shipped_configurations_say_what_their_names_say(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name]
    assert config.num_machines == 1
    assert config.num_processes == 2
    assert config.mixed_precision == "bf16"
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_reshard_after_forward"] is True
        assert config.fsdp_config["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"
    if name == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2
        assert config.deepspeed_config["offload_optimizer_device"] == "none"


INSIDE = """
import sys
from diffusers_ext import Callback, ImmiscibleConfig, ImmiscibleRecipe, Trainer, parse_config

class Report(Callback):
    def on_start(self, trainer):
        accelerator = trainer.accelerator
        if accelerator.is_main_process:
            print("KIND", accelerator.distributed_type.value, accelerator.num_processes, trainer.step)

config = parse_config(ImmiscibleConfig)
Trainer(config, ImmiscibleRecipe(config), [Report()]).train()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_shipped_configurations_train_checkpoint_resume_and_save(tmp_path, name):
    count = min(2, torch.cuda.device_count())
    if name == "ddp" and count < 2:
        pytest.skip("needs two CUDA devices: with one, accelerate makes no process group")
    if name == "deepspeed_zero2":
        pytest.importorskip("deepspeed")
    config = write_config(tmp_path, checkpointing_steps=2)
    (tmp_path / "inside.py").write_text(INSIDE)
    options = ["--config_file", CONFIGS / f"{name}.yaml", "--num_processes", count, "--main_process_port", 0]
    command = [*LAUNCH, *options, tmp_path / "inside.py", "--config", config]
    gpu = {"ACCELERATE_USE_CPU": "false", "PYTHONPATH": str(ROOT)}
    for steps, start in ((2, 0), (4, 2)):
        result = execute([*command, "--max_train_steps", steps], **gpu)
        assert result.returncode == 0, result.stderr
        assert f"KIND {KINDS[name].value} {count} {start}\n" in result.stdout
    assert json.loads((tmp_path / "out" / "checkpoint-4" / "manifest.json").read_text())["world"] == count
    assert_equal(loaded_elsewhere(str(tmp_path / "out"), tmp_path, **gpu), weights(tmp_path / "out"))


def test_a_launcher_whose_processes_do_not_know_of_each_other_is_refused(tmp_path, monkeypatch):
    """As `accelerate launch --config_file ddp.yaml` does on a CPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="`num_processes` must be 1 here, got 2"):
        run(write_data(tmp_path / "data"), tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
