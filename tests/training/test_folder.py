"""What lies in a run's folder: other runs, damaged and half checkpoints, and a second run at the same time."""

import json
import os
import shutil
import signal
import warnings

import pytest
import torch

from diffusers_ext.training import checkpoint, folder

from .tiny import run, weights, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run of six steps with all its checkpoints but the first."""
    out = tmp_path_factory.mktemp("whole")
    _, record, _ = run(data, out, checkpointing_steps=2)
    return out, record.losses


def names(out):
    return sorted(path.name for path in out.glob("checkpoint-*"))


def copied(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "out")


def assert_ends_like(whole, out, losses, steps):
    assert losses == whole[1][-steps:]
    expected, found = weights(whole[0]), weights(out)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_used_folder_is_refused_with_two_ways_out(data, whole, tmp_path):
    out = copied(whole, tmp_path)
    message = "got .* with checkpoint-2, checkpoint-4, checkpoint-6: go on with --resume_from_checkpoint latest, or .*"
    with pytest.raises(ValueError, match=f"`output_dir` must be a folder without another run's .*{message}"):
        run(data, out, seed=1)
    assert names(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    _, record, _ = run(data, out, seed=1, max_train_steps=1, checkpoints_total_limit=1, overwrite_output_dir=True)
    assert names(out) == ["checkpoint-1"]  # the new run's own, not the old one's with the higher number
    assert [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()] == record.losses
    shutil.rmtree(out / "checkpoint-1")
    with pytest.raises(ValueError, match="with model_index.json, training_arguments.json: go on"):
        run(data, out)
    with pytest.raises(
        ValueError, match="`overwrite_output_dir` must be False with `resume_from_checkpoint='latest'`"
    ):
        run(data, out, overwrite_output_dir=True, resume_from_checkpoint="latest")


def test_going_back_drops_the_later_checkpoints_or_is_refused(data, whole, tmp_path):
    out = copied(whole, tmp_path)
    back = {"resume_from_checkpoint": str(out / "checkpoint-2"), "checkpointing_steps": 2}
    with pytest.raises(ValueError, match="with checkpoint-4, checkpoint-6: go on with"):
        run(data, out, **back)
    _, record, _ = run(data, out, overwrite_output_dir=True, checkpoints_total_limit=1, **back)
    assert names(out) == ["checkpoint-6"]
    assert_ends_like(whole, out, record.losses, 4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_runs_in_one_folder_are_refused_and_the_lock_of_a_killed_one_is_free(data, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "PATIENCE", 0.1)
    out = tmp_path / "out"
    out.mkdir()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with folder.claimed_folder(str(out), None, latest=True, overwrite=False):
            os.write(writer, b"x")
            signal.pause()
    os.read(reader, 1)
    with pytest.raises(
        ValueError, match="`output_dir` must be a folder into which no other run is writing, got .*out"
    ):
        run(data, out, resume_from_checkpoint="latest")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert run(data, out, max_train_steps=1, resume_from_checkpoint="latest")[0].steps == 1
    # And a run that failed gives its folder back.
    with pytest.raises(ValueError, match="`train_batch_size` must be"):
        run(data, tmp_path / "failed", train_batch_size=65)
    assert run(data, tmp_path / "failed", max_train_steps=1)[0].steps == 1


@pytest.mark.parametrize("damage", ["all", "optimizer.bin", "manifest.json"])
def test_latest_goes_on_from_the_newest_whole_checkpoint(data, whole, tmp_path, damage):
    out = copied(whole, tmp_path)
    for path in (out / "checkpoint-6").iterdir():
        if damage in ("all", path.name):
            path.write_bytes(b"")
    message = r"checkpoint-6 is damaged: it is renamed, and the run goes on from .*checkpoint-4"
    with pytest.warns(UserWarning, match=message):
        _, record, _ = run(data, out, resume_from_checkpoint="latest", checkpoints_total_limit=1)
    assert names(out) == ["checkpoint-6", "checkpoint-6.damaged"]
    assert_ends_like(whole, out, record.losses, 2)


def test_only_damaged_checkpoints_are_an_error(data, whole, tmp_path):
    out = copied(whole, tmp_path)
    for path in out.glob("checkpoint-*/engine_state.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be a whole checkpoint, got .*checkpoint-2"):
        run(data, out, resume_from_checkpoint="latest")
    assert names(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_kill_during_rotation_leaves_nothing_for_ever(data, whole, tmp_path, monkeypatch):
    class KilledError(BaseException):
        pass

    def killed(path, **_):
        if path.exists():
            (path / "model.safetensors").unlink()
            raise KilledError

    out = tmp_path / "out"
    limited = {"checkpointing_steps": 2, "checkpoints_total_limit": 1}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KilledError):
            run(data, out, **limited)
    assert names(out) == ["checkpoint-2.tmp", "checkpoint-4"]
    shutil.copytree(whole[0] / "checkpoint-2", out / "checkpoint-1")  # as earlier versions left one
    (out / "checkpoint-1" / "manifest.json").unlink()
    _, record, _ = run(data, out, resume_from_checkpoint="latest", **limited)
    assert names(out) == ["checkpoint-6"]
    assert_ends_like(whole, out, record.losses, 2)


def test_a_later_run_in_one_process_has_its_own_precision(data, whole, tmp_path):
    _, rounded, _ = run(data, tmp_path / "bf16", mixed_precision="bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, asked, _ = run(data, tmp_path / "no", mixed_precision="no")
        run(data, tmp_path / "again", mixed_precision="bf16", max_train_steps=1)
        _, silent, trainer = run(data, tmp_path / "default")
    assert trainer.accelerator.mixed_precision == "no"
    assert rounded.losses != asked.losses
    assert asked.losses == silent.losses == whole[1]
