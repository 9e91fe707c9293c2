"""MMD-DDM's recipe: exact large batches, what moves and what does not, the saved pipeline, and refusals."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from safetensors.torch import load_file

from diffusers_ext import (
    FeatureSpace,
    ImageClassifierFeatures,
    ImageGenerationPipeline,
    MMDDDMConfig,
    MMDDDMRecipe,
    Trainer,
    mmd2,
    replayed_loss,
    save_repo,
)
from tests import processes
from tests.training.tiny import UNET, Record


def network(**options):
    torch.manual_seed(0)
    return UNet2DModel(**{**UNET, "sample_size": 8, "in_channels": 1, "out_channels": 1, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Untrained denoisers, and grey squares of which half are bright."""
    folder = tmp_path_factory.mktemp("mmd")
    images = np.where(np.arange(64)[:, None, None] % 2, 200, 40) + np.random.default_rng(0).integers(
        -20, 20, (64, 8, 8)
    )
    np.savez(folder / "data.npz", images=images.astype(np.uint8), labels=np.arange(64) % 2)
    np.savez(folder / "unlabelled.npz", images=images.astype(np.uint8))
    save_repo(ImageGenerationPipeline(network(), DDPMScheduler(), image_scale=2.0), folder / "base")
    classes = network(num_class_embeds=2)
    save_repo(ImageGenerationPipeline(classes, DDIMScheduler()), folder / "classes")
    save_repo(ImageGenerationPipeline(network(), FlowMatchEulerDiscreteScheduler()), folder / "flow")
    save_repo(ImageGenerationPipeline(network(out_channels=2), DDIMScheduler()), folder / "variance")
    ImageClassifierFeatures(sample_size=8, block_out_channels=(4,), feature_dim=6).save_pretrained(folder / "phi")
    return folder


def config(folder, output_dir, **changes):
    values = {
        "pretrained_model_name_or_path": str(folder / "base"),
        "train_data_dir": str(folder / "data.npz"),
        "output_dir": str(output_dir),
        "resolution": 8,
        "channels": 1,
        "num_inference_steps": 3,
        "features": "pixels",
        "train_batch_size": 8,
        "max_train_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "num_validation_images": 2,
        "ema_decay": 0.5,
    }
    return MMDDDMConfig(**{**values, **changes})


def train(config, features=None, **record):
    record = Record(**record)
    recipe = MMDDDMRecipe(config, features)
    result = Trainer(config, recipe, [record]).train()
    return result, record.losses, recipe


def weights(folder):
    return load_file(Path(folder) / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An unbroken run: its losses and weights."""
    output_dir = tmp_path_factory.mktemp("whole")
    _, losses, _ = train(config(folder, output_dir))
    return losses, weights(output_dir)


def test_the_replayed_gradient_is_that_of_the_full_batch():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    x, real = torch.randn(2, 10, 4, dtype=torch.float64)
    found = []
    for micro in (None, 4, 1, 10):
        net.zero_grad()

        def loss(features):
            return mmd2(features, real[:, :3])

        value = (
            loss(net(x))
            if micro is None
            else replayed_loss(lambda p: net(x[p]), 10, micro, loss, torch.Tensor.backward)
        )
        value.backward()
        found.append([value.detach(), *[p.grad.clone() for p in net.parameters()]])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("changes", [{"micro_batch_size": 3}, {"chain_checkpointing": "none"}])
def test_training_with_less_memory_is_the_same_training(folder, tmp_path, changes, whole):
    _, found, _ = train(config(folder, tmp_path, **changes))
    assert found == pytest.approx(whole[0], rel=1e-4)
    a, b = whole[1], weights(tmp_path)
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=1e-4, atol=2e-5
        )  # Adam enlarges rounding where gradients are 0


@pytest.mark.parametrize("micro", [None, 3])
def test_two_processes_share_a_batch_and_get_its_gradient(folder, tmp_path, micro):
    common = {"chain_checkpointing": "none", "rng_scope": "sample", "max_train_steps": 2}
    # Nearly plain gradient descent: Adam itself would hide the gradient's scale.
    common |= {"adam_epsilon": 1.0, "learning_rate": 1.0, "max_grad_norm": 1e6, "use_ema": False}
    _, expected, _ = train(config(folder, tmp_path / "one", **common))
    values = config(folder, tmp_path / "two", **common, train_batch_size=4, micro_batch_size=micro).to_dict()
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    command = [sys.executable, "training/train_mmd_ddm.py", "--config", path]
    for rank in processes.run_ranks(command, 2, env={**os.environ, "ACCELERATE_USE_CPU": "true"}):
        assert rank.returncode == 0, rank.stderr
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == pytest.approx(expected, rel=1e-4)
    before, a, b = weights(folder / "base"), weights(tmp_path / "one"), weights(tmp_path / "two")
    moved = torch.cat([(a[name] - before[name]).flatten() for name in a]).norm()
    apart = torch.cat([(a[name] - b[name]).flatten() for name in a]).norm()
    assert apart < 1e-3 * moved


def test_tuning_lowers_the_distance(folder, tmp_path):
    _, losses, _ = train(config(folder, tmp_path, max_train_steps=45, train_batch_size=32, learning_rate=1e-2))
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])


def test_a_rate_of_nothing_leaves_the_weights(folder, tmp_path):
    before = weights(folder / "base")
    train(config(folder, tmp_path, learning_rate=1e-200, max_train_steps=1))
    after = weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_extractors_get_no_gradient_and_do_not_move(folder, tmp_path):
    phi = ImageClassifierFeatures.from_pretrained(folder / "phi").requires_grad_(False).eval()
    before = {name: value.clone() for name, value in phi.state_dict().items()}
    _, losses, _ = train(config(folder, tmp_path), [phi.features, lambda images: images.flatten(1)])
    assert all(p.grad is None for p in phi.parameters())
    assert all(torch.equal(before[name], value) for name, value in phi.state_dict().items())
    _, named, _ = train(config(folder, tmp_path / "named", features=f"classifier:{folder / 'phi'}, pixels"))
    assert named == pytest.approx(losses, rel=1e-5)


def test_real_features_are_computed_once_and_alike(folder, tmp_path):
    _, cached, recipe = train(config(folder, tmp_path / "cached"))
    files = list((tmp_path / "cached").glob("precomputed-*/*.safetensors"))
    assert len(files) == 1
    written = files[0].stat().st_mtime_ns
    calls = []

    def counted(images):
        calls.append(len(images))
        return images.flatten(1)

    _, again, _ = train(
        config(folder, tmp_path / "cached", overwrite_output_dir=True), [counted]
    )  # the same features under another name
    assert files[0].stat().st_mtime_ns == written
    assert again == cached
    assert calls == [8, 1] + [8] * 3  # eight images to try the extractor on, then generated ones only
    _, direct, _ = train(config(folder, tmp_path / "each", center_crop=False))  # read at every step
    assert direct == pytest.approx(cached, rel=1e-5)
    assert not list((tmp_path / "each").glob("precomputed-*"))


def test_the_space_counts_extractors_alike():
    images = torch.randn(200, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    space = FeatureSpace([lambda x: 5 * x.flatten(1) + 3, lambda x: x.mean((2, 3))])
    space.fit(space(images))
    found = space(images)
    torch.testing.assert_close(found.mean(0), torch.zeros(51), atol=1e-5, rtol=0)
    first, second = found[:, :48].square().sum(1).mean(), found[:, 48:].square().sum(1).mean()
    assert first.item() == pytest.approx(second.item(), rel=1e-4)
    assert (first + second).item() == pytest.approx(51 * 199 / 200, rel=1e-4)  # deviation 1 on the whole
    constant = FeatureSpace([lambda x: 0 * x.flatten(1), lambda x: x.flatten(1)])
    constant.fit(constant(images))
    assert torch.isfinite(constant(images)).all()


def test_a_resumed_run_equals_the_uninterrupted_one(folder, tmp_path, whole):
    result, first, _ = train(config(folder, tmp_path), signal_at=1)
    assert result.stopped_by == "SIGTERM"
    _, second, _ = train(config(folder, tmp_path, resume_from_checkpoint="latest"))
    assert first + second == whole[0]
    a, b = whole[1], weights(tmp_path)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("changes", [
    {"pretrained_model_name_or_path": "classes"}, {"pretrained_model_name_or_path": "flow"},
    {"scheduler": "DPMSolverMultistepScheduler"}, {"kernel": "rbf", "gamma": 0.1}, {"kernel": "rational_quadratic"},
    {"chain_dropout": True}, {"clamp": "ste"}, {"standardise_features": True},
])  # fmt: skip
def test_other_models_and_settings_train(folder, tmp_path, changes):
    if "pretrained_model_name_or_path" in changes:
        changes = {"pretrained_model_name_or_path": str(folder / changes["pretrained_model_name_or_path"])}
    _, losses, _ = train(config(folder, tmp_path, **changes))
    base = Path(changes.get("pretrained_model_name_or_path", folder / "base"))
    before, after = weights(base), weights(tmp_path)
    assert np.isfinite(losses).all()
    assert any(not torch.equal(before[name], after[name]) for name in before)


LOAD = """
import sys, warnings, diffusers_ext
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
for arguments in ({}, {"num_inference_steps": 3}, {"num_inference_steps": 7}, {"eta": 0.5}, "grid"):
    if arguments == "grid":
        arguments, scheduler = {}, pipeline.scheduler
        pipeline.scheduler = scheduler.from_config(scheduler.config, timestep_spacing="trailing")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pipeline(**arguments)
    print(pipeline.num_timesteps, *[w.message for w in seen if "tuned" in str(w.message)])
"""


def test_the_script_makes_a_repo_that_remembers_its_steps(folder, tmp_path):
    arguments = {**config(folder, tmp_path).to_dict(), "max_train_steps": 1}
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps({k: v for k, v in arguments.items() if v is not None}))
    run = processes.run([sys.executable, "training/train_mmd_ddm.py", "--config", path])
    assert run.returncode == 0, run.stderr
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert list(pipeline.config["tuned_timesteps"]) == [666, 333, 0]
    assert pipeline.config["image_scale"] == 2.0
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    saved = {k: pipeline.scheduler.config[k] for k in ("clip_sample", "timestep_spacing", "set_alpha_to_one")}
    assert saved == {"clip_sample": False, "timestep_spacing": "leading", "set_alpha_to_one": True}
    card = (tmp_path / "README.md").read_text()
    assert "num_inference_steps=3" in card
    assert "2301.07969" in card
    loaded = processes.run([sys.executable, "-c", LOAD, tmp_path])
    assert loaded.returncode == 0, loaded.stderr
    lines = loaded.stdout.splitlines()
    assert lines[:2] == ["3", "3"]
    assert lines[2].startswith("7 this model was tuned for num_inference_steps=3")
    assert lines[3].startswith(
        "3 this model was tuned for num_inference_steps=3 at the timesteps [666, 333, 0] without"
    )
    assert lines[4].endswith("got [999, 666, 332] and eta=0.0.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_model_name_or_path": None}, "`pretrained_model_name_or_path` must be given"),
        ({"pretrained_model_name_or_path": "/nowhere"}, "`pretrained_model_name_or_path` must be a Hub repo or a"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer >= 1, got 0"),
        ({"num_inference_steps": 1001}, r"`num_inference_steps` must be an integer in 1\.\.1000.*got 1001"),
        ({"scheduler": "DDPMScheduler"}, "`scheduler` must be deterministic, got DDPMScheduler"),
        ({"scheduler": "HeunDiscreteScheduler"}, "`scheduler` must make one network call a step"),
        ({"scheduler": "Nothing"}, "`scheduler` must be the class of a Diffusers scheduler.*got 'Nothing'"),
        ({"train_batch_size": 1}, "`train_batch_size` must be an integer >= 2"),
        ({"micro_batch_size": 9}, r"`micro_batch_size` must be in 1\.\.8 or left out, got 9"),
        ({"micro_batch_size": 4, "chain_dropout": True}, "`chain_dropout` must be False with `micro_batch_size`"),
        ({"degree": 0}, "`degree` must be an integer >= 1, got 0"),
        ({"gamma": 0.0}, "`gamma` must be a number > 0"),
        ({"kernel": "cosine"}, "`kernel` must be one of"),
        ({"degree": 2, "kernel": "rbf"}, "`degree` must be left out with the rbf kernel, got 2"),
        ({"gamma": 0.1, "kernel": "rational_quadratic"}, "`gamma` must be left out with the rational_quadratic"),
        ({"num_inference_steps": 10**9}, r"`num_inference_steps` must be an integer in 1\.\.1000"),
        ({"scheduler": "DDIMInverseScheduler"}, "`scheduler` must bring noise to the image that an exact network pre"),
        ({"scheduler": "EDMEulerScheduler"}, "`scheduler` must be a class with a schedule of betas, got 'EDM"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "`scheduler` must be a class with a schedule of betas"),
        ({"scheduler": "VQDiffusionScheduler"}, "`scheduler` must be a class that takes the model's"),
        ({"timestep_spacing": "linspace"}, "`timestep_spacing` must be 'leading' for 3 steps of DDIMScheduler"),
        ({"features": "vgg"}, "`features` must be 'pixels', 'inception', 'clip:REPO' or 'classifier:REPO', got 'vgg'"),
        ({"features": "classifier:/nowhere"}, "`features` must name a model that loads, got 'classifier:/nowhere'"),
        ({"resolution": 16}, "`resolution` must be 8, the size of the model's images, got 16"),
        ({"channels": 3}, "`channels` must be 1, as the model takes, got 3"),
    ],
)  # fmt: skip
def test_bad_arguments(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(config(folder, tmp_path, **changes))


def test_features_that_do_not_fit_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"`features` must give \(8, features\) of 8 images, got \(8, 1, 8, 8\)"):
        train(config(folder, tmp_path), [lambda images: images])
    for bad, message in (
        (lambda images: images.flatten(1) / 0, "`features` must be finite, got NaN or infinity from extractor 1"),
        (lambda images: images.flatten(1).detach(), "`features` must be differentiable, got no gradient through extr"),
        (lambda images: images.flatten(1) + torch.rand(len(images), 1), "`features` must give an image the same"),
        (torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten()), "extractor 1; put its network into eval"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config(folder, tmp_path), [lambda images: images.flatten(1), bad])
    with pytest.raises(ValueError, match="must be a model .* does not learn its variance.* 2 output channels for 1"):
        train(config(folder, tmp_path, pretrained_model_name_or_path=str(folder / "variance")))
    with pytest.raises(ValueError, match=r"`features` must be a list of at least one function, got \[\]"):
        train(config(folder, tmp_path), [])
    wide = ImageClassifierFeatures(sample_size=16, block_out_channels=(4,), feature_dim=6).eval()
    with pytest.raises(ValueError, match="`images` must have the shape"):
        train(config(folder, tmp_path / "b"), [wide.features])


def test_a_model_with_classes_wants_labels(folder, tmp_path):
    changes = {
        "pretrained_model_name_or_path": str(folder / "classes"),
        "train_data_dir": str(folder / "unlabelled.npz"),
    }
    with pytest.raises(ValueError, match="`label_column` must be a column of class labels, at most the model's 2"):
        train(config(folder, tmp_path, **changes))
    np.savez(tmp_path / "three.npz", images=np.zeros((16, 8, 8), np.uint8), labels=np.arange(16) % 3)
    changes["train_data_dir"] = str(tmp_path / "three.npz")
    with pytest.raises(ValueError, match="`label_column` must be .* at most the model's 2; .* and 3 classes"):
        train(config(folder, tmp_path, **changes))


def test_divergence_is_no_argument_error(folder, tmp_path):
    with pytest.raises(FloatingPointError, match="features of generated images are not finite at step 1"):
        train(config(folder, tmp_path, learning_rate=1e30, max_grad_norm=1e30, checkpointing_steps=1))


def test_standardised_features_are_read_again(folder, tmp_path):
    changes = {"features": f"pixels, classifier:{folder / 'phi'}", "overwrite_output_dir": True}
    _, first, _ = train(config(folder, tmp_path, **changes))
    _, second, _ = train(config(folder, tmp_path, **changes))
    assert first == second


def test_extractors_of_another_order_have_other_features(folder, tmp_path):
    for extractor in (lambda images: images.flatten(1), lambda images: images.flip(3).flatten(1)):
        train(config(folder, tmp_path, max_train_steps=1, overwrite_output_dir=True), [extractor])
    assert len(list(tmp_path.glob("precomputed-*"))) == 2


def test_changed_data_have_other_features(folder, tmp_path):
    data = str(tmp_path / "data.npz")
    for value in (30, 60):
        np.savez(data, images=np.full((16, 8, 8), value, np.uint8))
        train(config(folder, tmp_path / "out", train_data_dir=data, max_train_steps=1, overwrite_output_dir=True))
    assert len(list((tmp_path / "out").glob("precomputed-*"))) == 2
