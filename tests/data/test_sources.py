"""Every source gives the same pixels, and every bad one is refused by name."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_ext import load_images
from diffusers_ext.data.sampler import StreamingBatches

N = 9


@pytest.fixture(scope="module")
def arrays():
    return np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def sources(arrays, tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for i, pixels in enumerate(arrays):
        folder = root / "folder" / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    order = sorted(range(N), key=lambda i: (i % 3, i))  # as imagefolder lists them
    labels = np.array([i % 3 for i in order])
    np.savez(root / "data.npz", images=arrays[order], labels=labels)
    np.savez(root / "float.npz", images=(arrays[order] / 255).astype(np.float32), labels=labels)
    rows = load_dataset("imagefolder", data_dir=str(root / "folder"), split="train", cache_dir=str(root / "cache"))
    rows.save_to_disk(str(root / "saved"))
    (root / "parquet").mkdir()
    rows.to_parquet(str(root / "parquet" / "data.parquet"))
    return root


@pytest.mark.parametrize("name", ["folder", "data.npz", "float.npz", "saved", "parquet", "parquet/data.parquet"])
def test_all_sources_agree(sources, arrays, name):
    data = load_images(train_data_dir=str(sources / name), resolution=8)
    data.verify()
    assert len(data) == N
    assert data.num_classes == 3
    found = {data[i]["label"]: [] for i in range(N)}
    for i in range(N):
        item = data[i]
        assert item["pixel_values"].dtype == torch.float32
        found[item["label"]].append(item["pixel_values"])
    for label, images in found.items():
        expected = torch.from_numpy(arrays[label::3].copy()).permute(0, 3, 1, 2) / 127.5 - 1
        torch.testing.assert_close(torch.stack(images), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["folder", "saved", "parquet"])
def test_streams_give_the_same_samples_at_any_world_size_and_start(sources, name, monkeypatch):
    # `datasets` sleeps this long whenever a parquet stream ends.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    stream = load_images(train_data_dir=str(sources / name), resolution=8, streaming=True, random_flip=True)

    def read(**kwargs):
        return list(DataLoader(StreamingBatches(stream, seed=2, total=6, **kwargs), batch_size=None))

    whole = read(batch_size=4)
    assert len({tuple(b["pixel_values"].flatten().tolist()) for b in whole}) == 6
    halves = [read(batch_size=2, rank=rank, world=2) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        both = torch.cat([halves[rank][step]["pixel_values"] for rank in (0, 1)])
        assert torch.equal(batch["pixel_values"], both)
    tail = read(batch_size=4, start=3)
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(whole[3:], tail, strict=True))
    with pytest.raises(ValueError, match="at most the stream's 9 samples"):
        read(batch_size=10)


def test_metadata_gives_captions(sources, arrays, tmp_path):
    for i in range(3):
        Image.fromarray(arrays[i]).save(tmp_path / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    data = load_images(train_data_dir=str(tmp_path), resolution=8, caption_column="text")
    assert [data[i]["caption"] for i in range(3)] == ["picture 0", "picture 1", "picture 2"]


def folder_of(tmp_path, arrays, *names):
    """Writes the first images under these names; returns the folder."""
    for pixels, name in zip(arrays, names, strict=False):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    return str(tmp_path)


def found(path, **options):
    """Returns the pixels of all images of a folder, and their labels."""
    data = load_images(train_data_dir=path, resolution=8, **options)
    pixels = [
        ((data[i]["pixel_values"].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy() for i in range(len(data))
    ]
    return pixels, [data[i].get("label") for i in range(len(data))], data


@pytest.mark.parametrize("streaming", [False, True])
def test_a_class_called_like_a_split_is_a_class(tmp_path, arrays, streaming):
    path = folder_of(tmp_path, arrays, "bus/0.png", "bus/test_1.png", "train/2.png", "train/validation-3.png")
    if streaming:
        stream = load_images(train_data_dir=path, resolution=8, streaming=True)
        assert sorted(stream.decode(row)["label"] for row in stream.epoch(0, 10)) == [0, 0, 1, 1]
        return
    pixels, labels, data = found(path)
    assert data.class_names == ["bus", "train"]
    assert labels == [0, 0, 1, 1]
    assert all(np.array_equal(a, b) for a, b in zip(pixels, arrays, strict=False))
    with pytest.raises(ValueError, match=r"`split` must be one of \['train'\], got 'test'"):
        load_images(train_data_dir=path, resolution=8, split="test")


def test_names_of_files_make_no_splits(tmp_path, arrays):
    names = ["a[1].png", "b?.png", "sub/test_2.png", "sub/val/3.png", "train-4.png", "ünï 5.png"]
    pixels, _, data = found(folder_of(tmp_path, arrays, *names))
    assert len(data) == 6
    assert all(np.array_equal(a, b) for a, b in zip(pixels, arrays, strict=False))  # in the order of their names


def test_folders_of_splits_alone_are_splits(tmp_path, arrays, caplog):
    path = folder_of(tmp_path, arrays, "train/a/0.png", "train/b/1.png", "val/a/2.png", "val/b/3.png", "test/a/4.png")
    (tmp_path / "README.md").write_text("about")
    assert found(path)[1] == [0, 1]
    assert "nothing stands beside the splits" in caplog.text
    pixels, labels, _ = found(path, split="validation")
    assert np.array_equal(pixels[0], arrays[2])
    assert labels == [0, 1]
    Image.fromarray(arrays[5]).save(tmp_path / "more.png")
    caplog.clear()
    assert len(found(path)[0]) == 6
    assert "lie at different depths and are not read as classes" in caplog.text


def test_parquet_files_are_listed(sources, tmp_path):
    data = (sources / "parquet" / "data.parquet").read_bytes()
    for name in ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "mixed/test_1.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert len(load_images(train_data_dir=str(tmp_path / "mixed"), resolution=8)) == N
    assert len(load_images(train_data_dir=str(tmp_path / "data"), resolution=8)) == N
    assert len(load_images(train_data_dir=str(tmp_path / "data"), resolution=8, split="test")) == N
    assert len(load_images(train_data_dir=str(tmp_path), resolution=8)) == 3 * N


def test_classes_beside_metadata_are_said(tmp_path, arrays, caplog):
    path = folder_of(tmp_path, arrays, "cat/0.png", "dog/1.png")
    rows = [{"file_name": name, "text": "a photo"} for name in ("cat/0.png", "dog/1.png")]
    for labels, said in (({}, True), ({"label": 1}, False)):
        lines = [json.dumps({**row, **labels}) for row in rows]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
        caplog.clear()
        assert load_images(train_data_dir=path, resolution=8).num_classes == 0
        message = "its 2 folders of images are not read as classes, because there is a metadata.jsonl"
        assert (message in caplog.text) == said


@pytest.mark.parametrize("streaming", [False, True])
def test_what_the_metadata_leaves_out_is_counted(tmp_path, arrays, caplog, streaming):
    path = folder_of(tmp_path, arrays, "0.png", "1.png", "2.png", "sub/3.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(("one", "", "three"))]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    options = {"train_data_dir": path, "resolution": 8, "caption_column": "text", "streaming": streaming}
    data = load_images(**options)
    assert "1 of 4 images have no line in the metadata and are left out: sub/3.png" in caplog.text.replace("\\", "/")
    assert "(1 more without a line in the metadata)" in data.description
    rows = [data.decode(row) for row in data.epoch(0, 10)] if streaming else list(data)
    assert sorted(row["caption"] for row in rows) == ["", "one", "three"]
    assert ("so far: 1, the last is" if streaming else "1 of 3 images have no caption in 'text'") in caplog.text
    with pytest.raises(
        ValueError, match="`require_captions` is set and 1 of 4 images .* no line in the metadata: sub"
    ):
        load_images(**options, require_captions=True)
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file_name": "sub/3.png", "text": "four"}))

    def strict():
        data = load_images(**options, require_captions=True)
        return [data.decode(row) for row in data.epoch(0, 10)]

    with pytest.raises(ValueError, match="`require_captions` is set and (1 of 4 images have no|image .* no) caption"):
        strict()
    with pytest.raises(ValueError, match="`require_captions` must be False where no captions are read"):
        load_images(train_data_dir=path, resolution=8, require_captions=True)


def test_transparency_is_put_on_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 3] = 102  # 40 % black on white: 0.6 * 255 = 153
    Image.fromarray(pixels).save(tmp_path / "a.png")
    value = load_images(train_data_dir=str(tmp_path), resolution=4)[0]["pixel_values"]
    torch.testing.assert_close(value, torch.full((3, 4, 4), 153 / 127.5 - 1), atol=1e-6, rtol=0)


def test_crop_flip_and_resize(tmp_path):
    ramp = np.tile(np.arange(12, dtype=np.uint8) * 20, (6, 1))
    np.save(tmp_path / "ramp.npy", ramp[None])
    path = str(tmp_path / "ramp.npy")
    centre = load_images(train_data_dir=path, resolution=6, channels=1, center_crop=True)[0]["pixel_values"]
    expected = torch.arange(3, 9) * 20 / 127.5 - 1
    torch.testing.assert_close(centre, expected.expand(1, 6, 6), atol=1e-6, rtol=0)
    data = load_images(train_data_dir=path, resolution=6, channels=1, random_flip=True)
    seen = {
        (round(float(v[0, 0, 0] + 1) * 127.5 / 20), bool(v[0, 0, 0] > v[0, 0, 1]))
        for v in (data.get(0, torch.Generator().manual_seed(s))["pixel_values"] for s in range(200))
    }
    assert seen == {(left, False) for left in range(7)} | {(left + 5, True) for left in range(7)}
    half = load_images(train_data_dir=path, resolution=3, channels=3, center_crop=True)[0]["pixel_values"]
    assert half.shape == (3, 3, 3)
    assert (half.diff(dim=2) > 0).all()


def test_integer_labels_become_classes(tmp_path, arrays):
    features = Features({"image": ImageFeature(), "kind": Value("int64")})
    rows = {"image": [Image.fromarray(a) for a in arrays], "kind": [i % 4 for i in range(N)]}
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    data = load_images(train_data_dir=str(tmp_path / "saved"), resolution=8, label_column="kind", max_train_samples=6)
    assert (len(data), data.num_classes) == (6, 4)
    assert load_images(train_data_dir=str(tmp_path / "saved"), resolution=8).num_classes == 0
    rows["kind"][2] = -1
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(ValueError, match="`label_column` must hold labels >= 0, got 'kind' with -1"):
        load_images(train_data_dir=str(tmp_path / "bad"), resolution=8, label_column="kind")
    rows["label"] = rows.pop("kind")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b", "c", "d"])})
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "unlabelled"))
    data = load_images(train_data_dir=str(tmp_path / "unlabelled"), resolution=8)  # nobody asked for labels
    assert data.num_classes == 0
    assert "label" not in data[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data_dir": None}, "exactly one of `dataset_name` and `train_data_dir`"),
        ({"dataset_name": "a/b"}, "exactly one of `dataset_name` and `train_data_dir`"),
        ({"train_data_dir": "/nowhere"}, "`train_data_dir` must be an existing folder or file, got '/nowhere'"),
        (
            {"image_column": "picture"},
            r"`image_column` must be one of the columns \['image', 'label'\], got 'picture'",
        ),
        ({"caption_column": "text"}, "`caption_column` must be one of the columns"),
        ({"resolution": 0}, "`resolution` must be an integer >= 1, got 0"),
        ({"channels": 4}, "`channels` must be 1 or 3, got 4"),
        ({"max_train_samples": 0}, "`max_train_samples` must be an integer >= 1 or left out, got 0"),
        ({"streaming": True}, "`streaming` must be False for a NumPy file"),
    ],
)
def test_refuses_bad_arguments(sources, changes, message):
    with pytest.raises(ValueError, match=message):
        load_images(**{"train_data_dir": str(sources / "data.npz"), "resolution": 8, **changes})


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((2, 4, 4), np.uint8)}, "must hold an array 'images'"),
        ({"images": np.zeros((2, 4), np.uint8)}, "`images` must have the shape"),
        ({"images": np.zeros((2, 4, 4), np.int64)}, "`images` must hold uint8 or floats .*, got int64"),
        ({"images": np.full((2, 4, 4), 2.0)}, r"`images` must lie in \[0, 1\], got values from 2 to 2"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "`labels` must be 2 integers"),
        ({"images": np.array([None, None])}, "no pickled objects"),
    ],
)
def test_refuses_bad_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_images(train_data_dir=str(tmp_path / "bad.npz"))


def test_names_corrupt_images(tmp_path, arrays):
    Image.fromarray(arrays[0]).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    data = load_images(train_data_dir=str(tmp_path), resolution=8)
    with pytest.raises(ValueError, match=r"1 of 2 images cannot be read: .*bad\.png"):
        data.verify()
    with pytest.raises(ValueError, match=r"image .*bad\.png.* cannot be read"):
        data[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`train_data_dir` must hold images"):
        load_images(train_data_dir=str(tmp_path / "empty"))
