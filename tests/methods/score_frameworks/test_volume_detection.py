"""Maps of volumes: those of their slices by hand, the same wherever a run was cut, and what is refused."""

import csv
import json
import os
import zlib

import nibabel
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from diffusers_ext import AnomalyDetectionPipeline, detect_in_volumes, read_slices
from diffusers_ext.methods.score_frameworks.volume_detection import VOLUMES
from diffusers_ext.rng import mix

CALL = {"num_inference_steps": 3, "num_samples": 2, "strength": 0.5, "threshold": 0.3}
AFFINE = np.array([[0, -2.0, 0, 9], [1.5, 0, 0, -7], [0, 0, 3.0, 2], [0, 0, 0, 1]])  # 9 mm3; to the front, the left


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval()  # fmt: skip
    found = AnomalyDetectionPipeline(unet, DDIMScheduler())
    found.set_progress_bar_config(disable=True, desc="of the user")
    return found


def write(path, slices, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).random((12, 9, slices), np.float32)
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new")
    for seed, name in enumerate(("a.nii", "b.nii.gz", "ward/a.nii.gz")):
        write(folder / name, 2 + seed, seed)
    return folder


@pytest.fixture(scope="module")
def whole(pipeline, folder, tmp_path_factory):
    """A run that was not stopped."""
    results = tmp_path_factory.mktemp("found")
    return results, detect_in_volumes(pipeline, folder, results, batch_size=2, **CALL)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def test_maps_are_those_of_the_slices(pipeline, folder, whole):
    results, records = whole
    assert [record["volume"] for record in records] == ["a", "b", "ward/a"]
    names = [f"{n}{end}" for n in ("a", "b", "ward/a") for end in ("_map.nii.gz", "_mask.nii.gz", ".json")]
    assert sorted(contents(results)) == sorted([*names, "scores.csv", "settings.json"])
    slices = read_slices(folder / "b.nii.gz", 8)
    for record in records:
        found, mask = (nibabel.load(results / f"{record['volume']}_{kind}.nii.gz") for kind in ("map", "mask"))
        values = found.get_fdata()
        np.testing.assert_array_equal(found.affine, AFFINE)
        np.testing.assert_array_equal(mask.affine, AFFINE)
        assert (found.get_data_dtype(), mask.get_data_dtype()) == (np.float32, np.uint8)
        np.testing.assert_array_equal(mask.get_fdata(), values > 0.3)
        assert 0 < mask.get_fdata().mean() < 1
        assert record["mask_ml"] == pytest.approx(mask.get_fdata().sum() * 0.009)
        assert values[tuple(record["peak"])] == values.max()
        assert record["score"] == max(record["slice_scores"])
        assert json.loads((results / f"{record['volume']}.json").read_text()) == record
        # The record counts slices from the feet up, as this file does.
        assert len(record["slice_scores"]) == values.shape[2]
    # Each slice has numbers of its own, so that whatever lies beside it in a batch changes nothing.
    seed = mix(0, VOLUMES, zlib.crc32(b"b"))
    generators = [torch.Generator().manual_seed(mix(seed, i)) for i in range(3)]
    options = {k: v for k, v in CALL.items() if k != "threshold"}
    by_hand = pipeline(slices.images, generator=generators, **options)
    assert records[1]["slice_scores"] == pytest.approx(by_hand.image_score.tolist(), abs=1e-5)
    wanted = slices.restore(by_hand.anomaly_map).get_fdata()
    np.testing.assert_allclose(nibabel.load(results / "b_map.nii.gz").get_fdata(), wanted, atol=1e-5)
    scores = [float(s) for record in records for s in record["slice_scores"]]
    assert len({round(s, 6) for s in scores}) == len(scores) == 9
    rows = list(csv.DictReader((results / "scores.csv").open()))
    assert [row["volume"] for row in rows] == ["a", "b", "ward/a"]
    for row, record in zip(rows, records, strict=True):
        assert float(row["score"]) == pytest.approx(record["score"], rel=1e-5)
        assert float(row["mask_ml"]) == pytest.approx(record["mask_ml"], rel=1e-5)
        assert [int(row[k]) for k in "ijk"] == record["peak"]
        assert int(row["slices"]) == len(record["slice_scores"])
    assert pipeline._progress_bar_config == {"disable": True, "desc": "of the user"}


def test_a_stopped_run_goes_on_and_ends_alike(pipeline, folder, whole, tmp_path, monkeypatch, capsys):
    results, records = whole
    calls = []
    stock = AnomalyDetectionPipeline.__call__

    def counted(self, image, **options):
        calls.append(len(image))
        if len(calls) == 4:  # in the middle of the third volume
            raise KeyboardInterrupt
        return stock(self, image, **options)

    monkeypatch.setattr(AnomalyDetectionPipeline, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        detect_in_volumes(pipeline, folder, tmp_path / "out", batch_size=2, **CALL)
    assert calls == [2, 2, 1, 2]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.json")) == ["a.json", "b.json", "settings.json"]
    assert pipeline._progress_bar_config == {"disable": True, "desc": "of the user"}
    assert "0/9" in capsys.readouterr().err
    assert detect_in_volumes(pipeline, folder, tmp_path / "out", batch_size=2, **CALL) == records
    assert calls[4:] == [2, 2]  # the third alone
    shown = capsys.readouterr().err
    assert "5/9" in shown
    assert "9/9" in shown
    assert "0/9" not in shown
    for name, path in contents(results).items():
        again = tmp_path / "out" / name
        if name.endswith(".nii.gz"):
            np.testing.assert_array_equal(nibabel.load(again).get_fdata(), nibabel.load(path).get_fdata())
        else:
            assert again.read_bytes() == path.read_bytes()
    assert detect_in_volumes(pipeline, folder, tmp_path / "out", batch_size=5, **CALL) == records
    assert len(calls) == 6
    # A volume that has changed is done again, by its time.
    os.utime(tmp_path / "out" / "a.json", (1, 1))
    detect_in_volumes(pipeline, folder, tmp_path / "out", batch_size=2, **CALL)
    assert calls[6:] == [2]
    # And one whose record a full disk cut.
    (tmp_path / "out" / "a.json").write_text('{"volume"')
    assert detect_in_volumes(pipeline, folder, tmp_path / "out", batch_size=2, **CALL) == records
    assert calls[7:] == [2]


def test_results_of_other_settings_are_not_mixed(pipeline, folder, whole):
    for changes, message in (
        ({"seed": 1}, "`seed` must be 0 as in the results in .*, or `output_dir` another folder, got 1"),
        ({"strength": 0.6}, "`strength` must be 0.5 as in the results in .* got 0.6"),
        ({"threshold": None}, "`threshold` must be 0.3 as in the results in .* got None"),
        ({"axis": "coronal"}, "`axis` must be 'axial' as in the results in"),
        ({"noise": "simplex"}, "`noise` must be 'gaussian' as in the results in"),
    ):
        with pytest.raises(ValueError, match=message):
            detect_in_volumes(pipeline, folder, whole[0], **{**CALL, **changes})
    other = AnomalyDetectionPipeline(pipeline.unet, DDIMScheduler(beta_end=0.03))
    with pytest.raises(ValueError, match="`pipeline` must be '[0-9a-f]{8}' as in the results in"):
        detect_in_volumes(other, folder, whole[0], **CALL)


def test_without_a_threshold_and_with_a_calibrated_one(pipeline, folder, tmp_path):
    healthy = read_slices(folder / "a.nii", 8).images
    options = {k: v for k, v in CALL.items() if k != "threshold"}
    threshold = pipeline.calibrate(healthy, quantile=0.9, generator=torch.Generator().manual_seed(0), **options)
    found = detect_in_volumes(pipeline, [folder / "a.nii"], tmp_path / "some", threshold="calibrated", **options)
    values = nibabel.load(tmp_path / "some" / "a_map.nii.gz").get_fdata()
    assert found[0]["mask_ml"] == pytest.approx((values > threshold).sum() * 0.009)
    assert json.loads((tmp_path / "some" / "settings.json").read_text())["threshold"] == threshold
    bare = detect_in_volumes(pipeline, folder / "a.nii", tmp_path / "none", **options)
    assert bare == [{**found[0], "mask_ml": None}]
    assert not (tmp_path / "none" / "a_mask.nii.gz").exists()


def test_a_volume_that_cannot_be_read_is_named_and_the_others_are_done(pipeline, tmp_path):
    write(tmp_path / "a.nii", 1, 0)
    nibabel.save(nibabel.Nifti1Image(np.full((8, 8, 2), np.nan, np.float32), np.eye(4)), tmp_path / "b.nii")
    for _ in range(2):  # what lies within the folder the second time are results, not volumes
        with pytest.raises(
            ValueError, match="`volumes` must be readable, 1 of 2 were not: .*b.nii: `volume` must be f"
        ):
            detect_in_volumes(pipeline, tmp_path, tmp_path / "out", **CALL)
    assert (tmp_path / "out" / "a.json").is_file()
    assert len(list(csv.reader((tmp_path / "out" / "scores.csv").open()))) == 2


def test_bad_input_is_refused_before_any_work(pipeline, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "x.nii").write_text("")
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 2, 3), np.float32), np.eye(4)), tmp_path / "time.nii")
    write(tmp_path / "b.nii.gz", 1, 0)
    for changes, message in (
        ({"pipeline": None}, "`pipeline` must be an AnomalyDetectionPipeline, got None"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1, got 0"),
        ({"seed": -1}, "`seed` must be an integer >= 0, got -1"),
        ({"size": 7}, r"`size` must be of images of 1 channels and of sides that 2 divides, got .* \(1, 1, 7, 7\)"),
        ({"size": "8"}, "`size` must be an integer >= 1, got '8'"),
        ({"size": True}, "`size` must be an integer >= 1, got True"),
        ({"percentile": "a"}, r"`percentile` must be a number in \(0, 100\], got 'a'"),
        ({"field_of_view": 0}, "`field_of_view` must be a number > 0 of millimetres, got 0"),
        ({"volumes": None}, "`volumes` must be a file, a folder or several, got None"),
        ({"output_dir": None}, "`output_dir` must be a folder, got None"),
        ({"axis": "z"}, "`axis` must be one of .* got 'z'"),
        ({"steps": 3}, "`settings` must be among .* got 'steps'"),
        ({"strength": 2}, r"`strength` must be a number in \(0, 1\], got 2"),
        ({"num_samples": 0}, "`num_samples` must be an integer >= 1, got 0"),
        ({"num_inference_steps": 501}, "`num_inference_steps` must be at most 500, the timesteps of `strength` 0.5"),
        ({"smoothing": -1.0}, "`smoothing` must be a number >= 0 of pixels, got -1.0"),
        ({"volumes": tmp_path / "none"}, "`volumes` must be files or folders that exist, got"),
        ({"volumes": []}, r"`volumes` must be at least one file or folder, got \[\]"),
        ({"volumes": tmp_path / "empty"}, "`volumes` must be a folder with files .nii or .nii.gz, got"),
        ({"volumes": tmp_path / "x.txt"}, "`volumes` must be files .nii or .nii.gz, got"),
        ({"volumes": tmp_path / "x.nii"}, "`volume` must be a file that nibabel reads"),
        ({"volumes": tmp_path / "time.nii"}, r"`volume` must have three dimensions, got \(4, 4, 2, 3\) in .*time.nii"),
        ({"volumes": [folder / "b.nii.gz", tmp_path / "b.nii.gz"]}, "`volumes` must be of different names, as"),
        ({"output_dir": folder}, "`output_dir` must be another folder than theirs, got"),
        ({"output_dir": tmp_path / "x.txt" / "out"}, "`output_dir` must be a folder that can be written, got"),
    ):
        arguments = {"pipeline": pipeline, "volumes": folder, "output_dir": tmp_path / "out", **CALL, **changes}
        with pytest.raises(ValueError, match=message):
            detect_in_volumes(**arguments)
    assert not (tmp_path / "out").exists()
