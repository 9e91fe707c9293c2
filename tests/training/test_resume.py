"""A stopped run and its resume equal the run that was never stopped, bit for bit."""

import json
import sys
import textwrap
import warnings

import pytest
import torch

from diffusers_ext.training.checkpoint import CheckpointError
from tests import processes

from .tiny import Record, run, weights, write_data

STEPS = 17  # 40 samples in batches of 4: epochs end at 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), n=43)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    _, record, _ = run(data, folder, max_train_steps=STEPS, random_flip=True, lr_scheduler="cosine")
    return record.losses, weights(folder)


def assert_same(folder, losses, uninterrupted):
    expected_losses, expected = uninterrupted
    assert losses == expected_losses
    found = weights(folder)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("stop", "workers"), [(4, (0, 1)), (10, (2, 0)), (14, (0, 0))])
def test_stop_by_signal_and_resume(data, tmp_path, uninterrupted, stop, workers):
    common = {"max_train_steps": STEPS, "random_flip": True, "lr_scheduler": "cosine"}
    first = Record(signal_at=stop)
    result, _, _ = run(data, tmp_path, callback=first, dataloader_num_workers=workers[0], **common)
    assert (result.steps, result.stopped_by) == (stop, "SIGTERM")
    assert not (tmp_path / "model_index.json").exists()
    _, second, _ = run(data, tmp_path, resume_from_checkpoint="latest", dataloader_num_workers=workers[1], **common)
    assert_same(tmp_path, first.losses + second.losses, uninterrupted)
    logged = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, STEPS + 1))


def test_kill_during_a_save_leaves_the_previous_checkpoint(data, tmp_path, uninterrupted):
    script = f"""
        import os, signal, torch
        torch.set_num_threads(1)
        from tests.training.tiny import run
        import diffusers_ext.training.checkpoint as checkpoint
        save, calls = torch.save, []
        def dying_save(state, path):
            calls.append(path)
            if "checkpoint-12" in str(path):
                os.kill(os.getpid(), signal.SIGKILL)
            save(state, path)
        checkpoint.torch.save = dying_save
        run({str(data)!r}, {str(tmp_path)!r}, max_train_steps={STEPS}, random_flip=True, lr_scheduler="cosine",
            checkpointing_steps=6)
    """
    process = processes.run([sys.executable, "-c", textwrap.dedent(script)])
    assert process.returncode == -9, process.stderr
    assert (tmp_path / "checkpoint-12.tmp").is_dir()
    _, record, _ = run(
        data,
        tmp_path,
        max_train_steps=STEPS,
        random_flip=True,
        lr_scheduler="cosine",
        checkpointing_steps=6,
        resume_from_checkpoint="latest",
    )
    assert len(record.losses) == STEPS - 6
    assert_same(tmp_path, uninterrupted[0][:6] + record.losses, uninterrupted)


def test_a_full_disk_leaves_the_previous_checkpoint(data, tmp_path, monkeypatch):
    import diffusers_ext.training.checkpoint as checkpoint

    original = torch.save

    def full(state, path):
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        original(state, path)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device.*newest whole checkpoint is .*checkpoint-2"):
        run(data, tmp_path, checkpointing_steps=2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]


def test_rotation_keeps_the_newest(data, tmp_path):
    run(data, tmp_path, checkpointing_steps=2, checkpoints_total_limit=2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_refuses_a_checkpoint_of_another_model(data, tmp_path):
    run(data, tmp_path, max_train_steps=2)
    other = {**json.loads((data / "unet.json").read_text()), "block_out_channels": [4, 4]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be a checkpoint of this model.*shape"):
        run(data, tmp_path, resume_from_checkpoint="latest", unet_config=str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match="whole checkpoints here: .*checkpoint-2"):
        run(data, tmp_path, resume_from_checkpoint="nowhere")


def test_resume_with_another_batch_size_goes_on_from_the_samples_seen(data, tmp_path):
    run(data, tmp_path, max_train_steps=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result, record, trainer = run(
            data, tmp_path, max_train_steps=6, train_batch_size=8, resume_from_checkpoint="latest"
        )
    assert any("train_batch_size (4 -> 8)" in str(w.message) for w in caught)
    assert result.steps == 6
    assert len(record.losses) == 2
    assert trainer._micro_step == 4  # 16 samples seen = 2 batches of 8, then 2 more


def test_refuses_unfinished_and_damaged_checkpoints(data, tmp_path):
    import shutil

    run(data, tmp_path / "out", max_train_steps=2)
    whole = tmp_path / "out" / "checkpoint-2"
    for damage in ("model.safetensors", "optimizer.bin", "engine_state.pt", "manifest.json"):
        broken = tmp_path / damage / "checkpoint-2"
        shutil.copytree(whole, broken)
        content = (broken / damage).read_bytes()
        (broken / damage).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="`resume_from_checkpoint` must be a whole checkpoint"):
            run(data, tmp_path / "other", resume_from_checkpoint=str(broken))
    shutil.copytree(whole, tmp_path / "out" / "checkpoint-3.tmp")
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be 'latest' or a finished folder"):
        run(data, tmp_path / "out", resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3.tmp"))


def resume(data, folder, message, **changes):
    """Resumes and returns the recorded callback and the trainer; the changed settings are warned about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, record, trainer = run(data, folder, resume_from_checkpoint="latest", **changes)
    assert any(message in str(w.message) for w in caught)
    return record, trainer


def test_an_average_switched_on_at_a_resume_starts_from_the_loaded_weights(data, tmp_path):
    run(data, tmp_path, max_train_steps=3, use_ema=False)
    before = weights(tmp_path)
    resume(data, tmp_path, "use_ema (False -> True)", max_train_steps=3)
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path).items())
    _, trainer = resume(data, tmp_path, "use_ema (False -> True)", max_train_steps=4)
    assert trainer.ema.optimization_step == 1
    resume(data, tmp_path, "use_ema (True -> False)", max_train_steps=5, use_ema=False)


def test_a_changed_rate_and_schedule_count_from_the_resume_on(data, tmp_path):
    run(data, tmp_path, max_train_steps=4)
    record, trainer = resume(data, tmp_path, "learning_rate (0.001 -> 0.0005)", max_train_steps=6, learning_rate=5e-4)
    assert record.rates == [5e-4, 5e-4]
    record, _ = resume(
        data, tmp_path, "lr_scheduler ('constant' -> 'linear')", max_train_steps=10, lr_scheduler="linear"
    )
    assert record.rates == pytest.approx([1e-3 * (10 - step) / 10 for step in range(7, 11)])


def test_the_first_log_after_a_resume_is_that_of_the_whole_interval(data, tmp_path):
    def logged(folder):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [{name: value for name, value in line.items() if name != "samples_per_second"} for line in lines]

    common = {"max_train_steps": 8, "logging_steps": 4, "gradient_accumulation_steps": 2}
    run(data, tmp_path / "whole", **common)
    run(data, tmp_path / "cut", callback=Record(signal_at=6), **common)
    run(data, tmp_path / "cut", resume_from_checkpoint="latest", **common)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
