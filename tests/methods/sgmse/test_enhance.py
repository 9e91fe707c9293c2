"""The commands `diffusers-ext enhance` and `convert`."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusers_ext import EnhanceConfig, enhance_files, save_repo
from diffusers_ext.cli import main
from diffusers_ext.methods.sgmse import enhance

from .ncsnpp import NCSNpp
from .test_published import checkpoint
from .tiny import pipeline

soundfile = pytest.importorskip("soundfile")


@pytest.fixture
def folder(tmp_path):
    save_repo(pipeline(), tmp_path / "model")
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "b").mkdir(parents=True)
    soundfile.write(tmp_path / "in" / "a.wav", 0.1 * rng.standard_normal(600), 8000, subtype="PCM_24")
    soundfile.write(tmp_path / "in" / "b" / "c.flac", 0.1 * rng.standard_normal((700, 2)), 16000)
    return tmp_path


def command(folder, output, *words):
    main(
        ["enhance", str(folder / "in"), "--model", str(folder / "model"), "--output_dir", str(folder / output)]
        + ["--num_inference_steps", "1", *words]
    )


def read(folder, output):
    return [(folder / output / name).read_bytes() for name in ("a.wav", "b/c.flac")]


def test_a_folder_is_enhanced_and_finished(folder, capsys, monkeypatch):
    command(folder, "out")
    assert f"2 files in {folder / 'out'}" in capsys.readouterr().out
    info = [soundfile.info(folder / "out" / name) for name in ("a.wav", "b/c.flac")]
    assert [(i.frames, i.samplerate, i.channels, i.subtype) for i in info] == [
        (600, 8000, 1, "PCM_24"),
        (700, 16000, 2, "PCM_16"),
    ]
    whole = read(folder, "out")
    # What is there stays; what is missing becomes the same again.
    (folder / "out" / "a.wav").write_bytes(b"kept")
    (folder / "out" / "b" / "c.flac").unlink()
    command(folder, "out")
    assert read(folder, "out") == [b"kept", whole[1]]
    # Two processes share the files, whichever comes first, and make the same.
    for rank in (1, 0):
        state = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0, device="cpu")
        state.wait_for_everyone = lambda: None
        monkeypatch.setattr(enhance, "process_state", lambda state=state: state)
        command(folder, "two")
        assert [(folder / "two" / name).is_file() for name in ("a.wav", "b/c.flac")] == [rank == 0, True]
    assert read(folder, "two") == whole
    monkeypatch.undo()
    # One file by itself is the same, under the same name.
    enhance_files(
        EnhanceConfig(
            [str(folder / "in" / "a.wav")], str(folder / "model"), str(folder / "one"), num_inference_steps=1
        )
    )
    assert (folder / "one" / "a.wav").read_bytes() == whole[0]
    assert [path.name for path in folder.glob("out/**/*") if path.name.startswith(".")] == []
    with pytest.raises(SystemExit, match="`seed` must be 0 as in the results in .*, or `output_dir` another folder"):
        command(folder, "out", "--seed", "1")


def test_results_within_the_folder_are_no_recordings(folder):
    for _ in range(2):
        command(folder, "in/out")
    found = [path.relative_to(folder / "in").as_posix() for path in (folder / "in").rglob("*.*a*")]
    assert sorted(found) == ["a.wav", "b/c.flac", "out/a.wav", "out/b/c.flac"]


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_done(folder):
    (folder / "in" / "bad.wav").write_bytes(b"no sound")
    with pytest.raises(SystemExit, match=r"1 of 3 files could not be enhanced: .*bad\.wav"):
        command(folder, "out")
    assert all(read(folder, "out"))


def test_wrong_arguments(folder):
    model, out = str(folder / "model"), str(folder / "out")
    (folder / "in" / "b" / "a.wav").write_bytes(b"")
    (folder / "in" / "text.txt").write_bytes(b"")
    for files, message in (
        ([], "`files` must be at least one file or folder"),
        ([str(folder / "none")], "`files` must be files or folders that exist"),
        ([model], "`files` must be a folder with sound files"),
        ([str(folder / "in" / "text.txt")], "`files` must be of one of the kinds"),
        ([str(folder / "in" / "a.wav"), str(folder / "in" / "b" / "a.wav")], "`files` must be of different names"),
    ):
        with pytest.raises(ValueError, match=message):
            enhance_files(EnhanceConfig(files, model, out))
    with pytest.raises(ValueError, match="`output_dir` must be another folder than theirs"):
        enhance_files(EnhanceConfig([str(folder / "in")], model, str(folder / "in")))
    with pytest.raises(ValueError, match="`model` must be the repo or folder of a SpeechEnhancementPipeline"):
        enhance_files(EnhanceConfig([str(folder / "in")], str(folder / "in"), out))
    for name, value in (("num_inference_steps", 0), ("batch_size", 0), ("seed", -1), ("overlap_seconds", 10.0)):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            EnhanceConfig([str(folder / "in")], model, out, **{name: value})


def test_convert(tmp_path, capsys):
    torch.manual_seed(0)
    net = NCSNpp(32, (1, 2, 2), 1, (1,), divide="before")
    path = checkpoint(tmp_path / "tiny.ckpt", {"backbone": "ncsnpp", "n_fft": 30, "hop_length": 8}, net)
    main(["convert", str(path), str(tmp_path / "repo")])
    assert str(tmp_path / "repo") in capsys.readouterr().out
    index = json.loads((tmp_path / "repo" / "model_index.json").read_text())
    assert index["_class_name"] == "SpeechEnhancementPipeline"
    assert list((tmp_path / "repo" / "unet").glob("*.safetensors"))
    with pytest.raises(SystemExit, match="`checkpoint` must be a file"):
        main(["convert", str(tmp_path / "no.ckpt"), str(tmp_path / "repo")])
