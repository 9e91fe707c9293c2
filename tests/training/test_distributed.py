"""Two gloo processes on the CPU, forked by accelerate; every run asserts that there are two."""

import errno
import json

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import PartialState

from tests.conftest import reset_accelerate

from .tiny import Record, run, weights, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("data"))
    unet = {**json.loads((folder / "unet.json").read_text()), "dropout": 0.0}
    (folder / "unet.json").write_text(json.dumps(unet))
    return folder


def two_process_state():
    """Forgets the parent's accelerate state, which a forked process inherits, and joins the group."""
    torch.set_num_threads(1)
    reset_accelerate()
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    return state


def _train(data, folder, changes, signal_rank, signal_at):
    """Runs in each process; writes what the parent checks."""
    state = two_process_state()
    record = Record(signal_at if state.process_index == signal_rank else None)
    result, record, _ = run(data, folder, callback=record, **changes)
    report = {"losses": record.losses, "rates": record.rates, "stopped_by": result.stopped_by, "steps": result.steps}
    (folder / f"rank{state.process_index}.json").write_text(json.dumps(report))


def two(data, folder, *, signal_rank=None, signal_at=None, **changes):
    folder.mkdir(exist_ok=True)
    debug_launcher(_train, args=(data, folder, changes, signal_rank, signal_at), num_processes=2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def assert_weights(first, second, **tolerance):
    first, second = weights(first), weights(second)
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance)


@pytest.mark.parametrize("noise", ["gaussian", "knn", "assignment"])
def test_two_processes_equal_one_with_sample_scope(data, tmp_path, noise):
    # Adam divides rounding errors of vanishing gradients by themselves; a larger epsilon leaves them small.
    common = {"rng_scope": "sample", "noise": noise, "max_train_steps": 4, "adam_epsilon": 1e-4}
    run(data, tmp_path / "one", train_batch_size=8, **common)
    reports = two(data, tmp_path / "two", train_batch_size=4, **common)
    assert reports[0]["losses"] == reports[1]["losses"]  # the logged loss is the mean over processes
    assert_weights(tmp_path / "one", tmp_path / "two", atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_learning_rate_counts_updates_not_processes(data, tmp_path, accumulation):
    reports = two(
        data,
        tmp_path / "run",
        max_train_steps=8,
        train_batch_size=2,
        lr_scheduler="cosine",
        lr_warmup_steps=4,
        gradient_accumulation_steps=accumulation,
    )
    for report in reports:
        assert report["rates"][3] == 1e-3
        assert report["rates"][-1] < 1e-9


def test_a_signal_to_one_process_stops_both_and_the_resume_is_exact(data, tmp_path):
    common = {"max_train_steps": 9, "lr_scheduler": "cosine"}
    whole = two(data, tmp_path / "whole", **common)
    first = two(data, tmp_path / "run", signal_rank=1, signal_at=4, **common)
    assert [report["steps"] for report in first] == [4, 4]
    assert first[1]["stopped_by"] == "SIGTERM"
    assert first[0]["stopped_by"] == "another process's signal"
    second = two(data, tmp_path / "run", resume_from_checkpoint="latest", **common)
    assert first[0]["losses"] + second[0]["losses"] == whole[0]["losses"]
    assert_weights(tmp_path / "whole", tmp_path / "run", atol=0, rtol=0)


def _sharded(folder):
    """EMA and full weights of a module that torch's own `fully_shard` has split over two processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from diffusers_ext.training.weights import Ema, copy_full_, full_tensor

    state = two_process_state()
    torch.manual_seed(0)
    plain = torch.nn.Linear(6, 4)
    sharded = torch.nn.Linear(6, 4)
    sharded.load_state_dict(plain.state_dict())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    emas = [Ema(module.parameters(), decay=0.5) for module in (plain, sharded)]
    for _ in range(3):
        for module, ema in zip((plain, sharded), emas, strict=True):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(1.0)
            ema.step(module.parameters())
    expected, found = (ema.state_dict() for ema in emas)
    assert found["optimization_step"] == 3
    for a, b in zip(expected["shadow_params"], found["shadow_params"], strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)
    # A fresh sharded average takes the whole tensors back, each process its own shard.
    fresh = Ema(sharded.parameters(), decay=0.5)
    fresh.load_state_dict(found)
    for a, b in zip(fresh.shadow_params, expected["shadow_params"], strict=True):
        assert a.to_local().shape != b.shape
        assert torch.equal(full_tensor(a), b)
    copy_full_(next(iter(sharded.parameters())).data, torch.ones(4, 6))
    assert torch.equal(full_tensor(next(iter(sharded.parameters()))), torch.ones(4, 6))
    (folder / f"ok{state.process_index}").touch()


def test_sharded_average_saves_and_loads_whole_tensors(tmp_path):
    debug_launcher(_sharded, args=(tmp_path,), num_processes=2)
    assert {p.name for p in tmp_path.iterdir()} == {"ok0", "ok1"}


def _disk_full_on_one(data, folder, rank):
    """Two processes, of which one cannot write its part of checkpoint 4."""
    from diffusers_ext.training.checkpoint import CheckpointError

    state = two_process_state()
    from accelerate import Accelerator

    original = Accelerator.save_state

    def save_state(self, path):
        if path.endswith("checkpoint-4.tmp") and self.process_index == rank:
            (folder / "checkpoint-4.tmp" / "half").write_bytes(b"0")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, path)

    Accelerator.save_state = save_state
    with pytest.raises(CheckpointError, match="newest whole checkpoint is .*checkpoint-2") as caught:
        run(data, folder, checkpointing_steps=2)
    said = "No space left on device" if state.process_index == rank else "another process failed"
    assert said in str(caught.value)
    (folder / f"refused{state.process_index}").touch()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of two processes that nothing stopped: its folder and losses."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, two(data, folder)[0]["losses"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_process_fails_both_and_the_previous_checkpoint_resumes(data, tmp_path, rank, whole):
    folder = tmp_path / "run"
    folder.mkdir()
    debug_launcher(_disk_full_on_one, args=(data, folder, rank), num_processes=2)
    assert {p.name for p in folder.glob("refused*")} == {"refused0", "refused1"}
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = two(data, folder, resume_from_checkpoint="latest")
    assert resumed[0]["losses"] == whole[1][2:]
    assert_weights(whole[0], folder, atol=0, rtol=0)
