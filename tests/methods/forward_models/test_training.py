"""The recipe: what a step deals out, exact resume, the same with any batch size, and what is refused."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext import (
    CropForwardModel,
    EpsX0V,
    ForwardModel,
    ForwardModelConfig,
    ForwardModelRecipe,
    MaskForwardModel,
    ObservationDataset,
    SimulatedObservations,
    StepRNG,
    Trainer,
    WarpForwardModel,
    load_images,
    observe,
)
from diffusers_ext.training.recipe import Context, Modules

from .tiny import UNET, Everything, OnlyNoisy, scheduler, seeded

VIEWS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six windows each of sixteen random images, which the file does not hold, and networks."""
    folder = tmp_path_factory.mktemp("windows")
    signals = torch.rand(16, 1, 8, 8, generator=seeded())
    corners = CropForwardModel(4, 8).sample_parameters(16 * VIEWS, seeded(1)).view(16, VIEWS, 2)
    seen = observe(signals, CropForwardModel(4, 8), corners)
    np.savez(folder / "views.npz", observations=seen.numpy(), parameters=corners.numpy())
    (folder / "unet.json").write_text(json.dumps(UNET))
    (folder / "mlp.json").write_text(json.dumps({"parameter_size": 2, "hidden_size": 16, "num_blocks": 1}))
    (folder / "crop.json").write_text(json.dumps({"size": 4, "sample_size": 8}))
    CropForwardModel(4, 8).save_pretrained(folder / "crop")
    return folder


def config(data, output, **changes):
    values = {
        "train_data_dir": str(data / "views.npz"),
        "output_dir": str(output),
        "forward_model": str(data / "crop"),
        "network": "mlp",
        "unet_config": str(data / "mlp.json"),
        "signal_shape": "1,8,8",
        "signal_range": "0,1",
        "max_context_views": 3,
        "max_given_views": 2,
        "num_targets": 2,
        "observation_noise": 0.3,
        "context_noise": 0.02,
        "context_dropout": 0.3,
        "train_batch_size": 8,
        "max_train_steps": 6,
        "learning_rate": 1e-2,
        "ema_decay": 0.9,
        "logging_steps": 1,
        "num_validation_images": 0,
        "validation_inference_steps": 2,
    }
    return ForwardModelConfig(**{**values, **changes})


def train(settings, forward_model=None):
    result = Trainer(settings, ForwardModelRecipe(settings, forward_model)).train()
    pipeline = DiffusionPipeline.from_pretrained(settings.output_dir)
    pipeline.set_progress_bar_config(disable=True)
    return result, pipeline


def weights(pipeline):
    return torch.cat([p.flatten() for p in pipeline.unet.parameters()])


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    settings = config(data, output, validation_steps=3, num_validation_images=2, checkpointing_steps=3)
    return settings, *train(settings)


def test_a_run_leaves_a_pipeline_that_samples(trained, data):
    settings, result, pipeline = trained
    assert result.steps == 6
    assert type(pipeline.forward_model).__name__ == "CropForwardModel"
    assert pipeline.config["observation_scale"] == 4
    assert pipeline.config["context_noise"] == 0.02
    assert pipeline.config["null_context"]
    item = ObservationDataset(data / "views.npz")[0]
    context = item["observations"][None, :1], item["parameters"][None, :1]
    found = pipeline(*context, num_views=2, num_inference_steps=2, guidance_scale=2.0, generator=seeded())
    assert found.signals.shape == (1, 1, 8, 8)
    assert 0 < found.signals.min() < found.signals.max() < 1
    assert len([*Path(settings.output_dir).rglob("*.png")]) >= 2
    assert "CropForwardModel" in (Path(settings.output_dir) / "README.md").read_text()


def test_a_resumed_run_is_the_same_bit_for_bit(trained, data, tmp_path):
    settings, _, whole = trained
    checkpoint = Path(settings.output_dir) / "checkpoint-3"
    _, resumed = train(config(data, tmp_path / "run", resume_from_checkpoint=str(checkpoint)))
    assert torch.equal(weights(resumed), weights(whole))


def test_batches_and_accumulation_trade_with_samples_own_numbers(data, tmp_path):
    runs = [
        train(config(data, tmp_path / str(n), rng_scope="sample", train_batch_size=8 // n, max_train_steps=3,
                     gradient_accumulation_steps=n))[1]
        for n in (1, 2)
    ]  # fmt: skip
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), atol=1e-5, rtol=1e-4)


def test_a_unet_reads_lifted_views_and_a_regression_none(data, tmp_path):
    settings = config(data, tmp_path / "run", network="unet", unet_config=str(data / "unet.json"), max_train_steps=2)
    _, pipeline = train(settings)
    assert pipeline.unet.config.in_channels == 6
    assert pipeline(num_views=2, num_inference_steps=2, sampling="joint").signals.shape == (1, 1, 8, 8)
    settings = config(data, tmp_path / "mean", regression=True, max_train_steps=2, num_validation_images=1)
    _, pipeline = train(settings)
    assert pipeline.config["regression"]


class Reads(torch.nn.Module):
    """A network that keeps what it is given."""

    def __init__(self, network):
        super().__init__()
        self.network, self.inputs, self.times = network, [], []

    def forward(self, sample, timestep, return_dict=False):
        self.inputs.append(sample)
        self.times.append(timestep)
        return self.network(sample, timestep, return_dict=False)


class Accelerator:
    device, is_main_process = torch.device("cpu"), True


def step(settings, forward_model=None, network=None, batch=None, scope="step"):
    """One training step outside of the engine; returns its loss, the recipe, and what the network read."""
    recipe = ForwardModelRecipe(settings, forward_model)
    ctx = Context(settings, Accelerator(), StepRNG(3, scope=scope), torch.float32)
    data = recipe.dataset(ctx)
    modules = recipe.setup(ctx)
    modules = Modules(network or modules.trainable, modules.scheduler)
    ctx.modules, ctx.model = modules, Reads(modules.trainable)
    count = settings.train_batch_size
    ctx.ids = range(count)
    ctx.rng.begin(0)
    batch = torch.utils.data.default_collate([data[i % len(data)] for i in range(count)]) if batch is None else batch
    return recipe.training_step(batch, ctx).loss, recipe, ctx.model


def test_views_are_dealt_out_without_returning(data, tmp_path):
    """One-pixel masks tell which views were shown where."""
    n, masks = 400, torch.eye(VIEWS).view(1, VIEWS, 1, 1, VIEWS).expand(400, -1, -1, -1, -1)
    np.savez(tmp_path / "masks.npz", observations=masks, parameters=masks)
    settings = config(
        data, tmp_path / "run", train_data_dir=str(tmp_path / "masks.npz"), forward_model=None, signal_shape="1,1,6",
        unet_config=None, train_batch_size=n, observation_noise=0.0, context_noise=0.0,
    )  # fmt: skip
    network = torch.nn.Linear(1, 1)
    network.lift = lambda seen, masks: (seen.flatten(1), masks.flatten(1))
    network.forward = lambda sample, t, return_dict: (torch.zeros(n, 1, 1, 6) + 0 * network.weight,)
    loss, _, read = step(settings, MaskForwardModel((1, 6)), network)
    context, covered, _, looked, sampled, none = read.inputs[0].split([6, 6, 6, 6, 6, 1], 1)
    assert torch.equal(context, covered)
    assert not bool((covered * looked).any())  # no view is both context and noised
    number = covered.sum(1)
    dropped = none.flatten() == 1
    assert torch.equal(dropped, number == 0)
    assert dropped.float().mean() == pytest.approx(0.3, abs=0.1)
    for count in (1, 2, 3):
        assert (number[~dropped] == count).float().mean() == pytest.approx(1 / 3, abs=0.12)
    given = number - sampled.sum(1)
    assert given[~dropped].min() == 1
    assert given.max() == 2
    assert (given[number == 3] == 1).float().mean() == pytest.approx(0.5, abs=0.15)
    targets = looked.sum(1)
    assert (targets == 1).float().mean() == pytest.approx(0.5, abs=0.1)
    assert set(targets.tolist()) == {1, 2}
    # The signal is 0, so each view's error is that of its one pixel among six.
    assert loss.item() == pytest.approx(2 / 6, abs=1e-6)


def test_noise_of_the_context_is_as_asked(data, tmp_path):
    """Of views of zeros: 0.3 on the first, 0.02 on those that stand for sampled ones."""
    n = 300
    seen = np.zeros((n, 4, 1, 1, 4), np.float32)
    masks = np.broadcast_to(np.eye(4, dtype=np.float32).reshape(1, 4, 1, 1, 4), seen.shape)
    np.savez(tmp_path / "zeros.npz", observations=seen, parameters=masks)
    settings = config(
        data, tmp_path / "run", train_data_dir=str(tmp_path / "zeros.npz"), forward_model=None, signal_shape="1,1,4",
        unet_config=None, train_batch_size=n, max_context_views=2, max_given_views=1, num_targets=1,
        context_dropout=0.0,
    )  # fmt: skip
    network = torch.nn.Linear(1, 1)
    network.lift = lambda seen, masks: ((seen * masks).flatten(1), masks.flatten(1))
    network.forward = lambda sample, t, return_dict: (torch.zeros(n, 1, 1, 4) + 0 * network.weight,)
    _, _, read = step(settings, MaskForwardModel((1, 4)), network)
    context, covered, noisy, looked, sampled, _ = read.inputs[0].split([4, 4, 4, 4, 4, 1], 1)
    first = (covered - sampled) > 0
    assert context[first].std() == pytest.approx(0.3, rel=0.1)
    assert context[sampled > 0].std() == pytest.approx(0.02, rel=0.1)
    # What is noised is 0, so that only the schedule's noise is left of it.
    alpha = scheduler().alphas_cumprod[read.times[0]]
    assert (noisy.sum(1) / (1 - alpha).sqrt()).std() == pytest.approx(1, rel=0.1)


def test_with_everything_seen_a_step_is_that_of_plain_diffusion(data, tmp_path):
    images = torch.rand(4, 1, 1, 8, 8, generator=seeded(4))
    np.savez(tmp_path / "all.npz", observations=images.numpy(), parameters=np.zeros((4, 1, 0), np.float32))
    settings = config(
        data, tmp_path / "run", train_data_dir=str(tmp_path / "all.npz"), forward_model=None, unet_config=None,
        max_context_views=0, max_given_views=None, num_targets=1, novel_weight=0.0, observation_scale=1.0,
        train_batch_size=4,
    )  # fmt: skip
    network = OnlyNoisy().eval()
    loss, recipe, read = step(settings, Everything(), network)
    rng = StepRNG(3)
    rng.begin(0)
    noise, t = rng.randn_like(images)[:, 0], recipe.timesteps(4, rng, range(4))
    objective = EpsX0V(recipe.objective.scheduler)
    noisy, target = objective.make(images[:, 0], noise, t)
    assert torch.equal(loss, objective.loss(network.unet(noisy, t).sample, target, t))
    # A forward model of one's own is handed over where the repo is used.
    card = recipe.card().render("you/repo")
    assert 'forward_model = Everything.from_pretrained("you/repo", subfolder="forward_model")' in card
    assert 'DiffusionPipeline.from_pretrained("you/repo", forward_model=forward_model)' in card


# ---------------------------------------------------------------- data


def test_observations_by_columns_and_by_array(data, tmp_path):
    whole = ObservationDataset(data / "views.npz")
    seen, corners = whole.observations, whole.parameters
    rows = {"observations": seen.tolist(), "parameters": [{"corner": c} for c in corners.tolist()]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    flat = {"observations": seen.tolist(), "parameters.corner": corners.tolist()}
    datasets.Dataset.from_dict(flat).to_parquet(tmp_path / "views.parquet")
    (tmp_path / "clone" / "data").mkdir(parents=True)  # as a clone of a data set's repo
    datasets.Dataset.from_dict(flat).to_parquet(tmp_path / "clone" / "data" / "train-00000-of-00001.parquet")
    for source in (tmp_path / "saved", tmp_path / "views.parquet", tmp_path / "clone"):
        item = ObservationDataset(source, max_samples=5)[3]
        torch.testing.assert_close(item["observations"], seen[3])
        assert torch.equal(item["parameters"]["corner"], corners[3])
    assert len(ObservationDataset(data / "views.npz", max_samples=5)) == 5
    with pytest.raises(IndexError):
        whole[16]


def test_simulated_observations_are_of_the_same_views_in_every_epoch(data, tmp_path):
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 256, (16, 8, 8), dtype=np.uint8))
    images = load_images(train_data_dir=str(tmp_path / "images.npz"), resolution=8, channels=1)
    views = SimulatedObservations(images, CropForwardModel(4, 8), 5, (0.0, 1.0), seed=1)
    item, again = views.get(2, seeded(0)), views.get(2, seeded(1))
    assert torch.equal(item["observations"], again["observations"])
    row, column = item["parameters"][4].tolist()
    signal = (images[2]["pixel_values"] + 1) / 2
    assert torch.equal(item["observations"][4], signal[:, row : row + 4, column : column + 4])
    assert sorted(item) == ["observations", "parameters"]
    assert not torch.equal(item["parameters"], views[3]["parameters"])
    settings = config(
        data, tmp_path / "run", train_data_dir=str(tmp_path / "images.npz"), simulated_views=6, resolution=8,
        channels=1, signal_shape=None, max_train_steps=1, forward_model="CropForwardModel",
        forward_model_config=str(data / "crop.json"),
    )  # fmt: skip
    assert train(settings)[0].steps == 1


# ---------------------------------------------------------------- what is refused


class Blind(ForwardModel):
    def forward(self, signal, parameters):
        return signal.detach()[:, :, :4, :4]


class Still(ForwardModel):
    def forward(self, signal, parameters):
        return 0 * signal[:, :, :4, :4]


class Broken(ForwardModel):
    def forward(self, signal, parameters):
        return (signal[:, :, :4, :4] - signal[:, :, :4, :4]).sqrt()


def test_forward_models_that_teach_nothing_are_named(data, tmp_path):
    settings = config(data, tmp_path / "run", forward_model=None)
    for kind, message in (
        (Blind, "forward model Blind is not differentiable"),
        (Still, "`gradient of Still` must be different from 0 somewhere"),
        (Broken, "`gradient of Broken` must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            step(settings, kind())


def test_wrong_arguments_are_named(data, tmp_path):
    for changes, message in (
        ({"signal_shape": None}, "`signal_shape` must be given"),
        ({"signal_shape": "1,x"}, "`signal_shape` must be whole numbers"),
        ({"signal_range": "1,0"}, "`signal_range` must be two numbers"),
        ({"num_targets": 0}, "`num_targets` must be an integer >= 1, got 0"),
        ({"max_given_views": 4}, r"`max_given_views` must be an integer in 1..max_context_views, 3, or left out"),
        ({"novel_weight": -1.0}, "`novel_weight` must be a number >= 0"),
        ({"observation_scale": 0.0}, "`observation_scale` must be a number > 0"),
        ({"context_dropout": 1.0}, r"`context_dropout` must be a number in \[0, 1\)"),
        ({"regression": True, "max_context_views": 0, "max_given_views": None}, "at least 1 with `regression`"),
        ({"simulated_views": 0}, "`simulated_views` must be an integer >= 1 or left out"),
    ):
        with pytest.raises(ValueError, match=message):
            config(data, tmp_path / "run", **changes)
    Blind().save_pretrained(tmp_path / "own")
    (tmp_path / "pictures").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "pictures" / "one.png")
    structs = {"observations": [[[1.0]]], "parameters": [[{"row": 1, "column": 2}]]}
    datasets.Dataset.from_dict(structs).save_to_disk(tmp_path / "structs")
    for changes, message in (
        ({"forward_model": "NoSuch"}, "`forward_model` must be the folder of a saved forward model, or a shipped one"),
        ({"forward_model": "ForwardModelRecipe"}, "`forward_model` must be the folder"),
        ({"forward_model": None}, "`forward_model` must be given once, by name or folder, or one of your own as"),
        ({"forward_model": str(tmp_path / "own")}, "`forward_model` must be of this package, or .* with Blind'"),
        ({"train_data_dir": str(tmp_path / "nowhere")}, "`train_data_dir` must be an existing file or folder"),
        ({"train_data_dir": str(tmp_path / "pictures")}, r"'observations', got .* with \['image'\]: images, which"),
        ({"train_data_dir": str(tmp_path / "structs")}, r"`parameters` must be numbers, .* columns 'parameters.NAME'"),
        ({"max_context_views": 4}, "must hold at least 7 observations of each signal, got 6: 4 for the context, 2 to"),
        ({"signal_shape": "3,8,8"}, "`observations` must be of shape .*, what CropForwardModel sees of signals"),
        ({"network": "unet", "signal_shape": "1,8,8", "unet_config": "nothing.json"}, "`unet_config` must be"),
    ):
        with pytest.raises(ValueError, match=message):
            step(config(data, tmp_path / "run", **changes))


def test_flows_coarser_than_their_images_are_for_an_mlp(data, tmp_path):
    images = np.random.default_rng(0).random((8, 2, 1, 8, 8), np.float32)
    np.savez(tmp_path / "frames.npz", observations=images, parameters=images)
    settings = config(
        data, tmp_path / "run", train_data_dir=str(tmp_path / "frames.npz"), signal_shape="2,4,4", network="unet",
        unet_config=str(data / "unet.json"), forward_model=None, max_context_views=0, max_given_views=None,
        num_targets=1, novel_weight=0.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"`network` must be 'mlp' where observations are lifted to another size"):
        step(settings, WarpForwardModel())


def test_wrong_data_is_named(data, tmp_path):
    seen, corners = np.zeros((4, 6, 1, 4, 4), np.float32), np.zeros((4, 6, 2), np.int64)
    outside, nan = corners.copy(), seen.copy()
    outside[2, 3, 1], nan[0, 0] = 5, np.nan
    for arrays, message in (
        ({"observations": seen}, "must hold either 'parameters' of each observation or several"),
        ({"parameters": corners}, "must hold 'observations', got"),
        ({"observations": seen, "parameters": corners[:, :5]}, r"`parameters` must be of shape \(4, 6\) and more"),
        ({"observations": nan, "parameters": corners}, "`observations` must be finite"),
        ({"observations": seen, "parameters": outside}, r"`parameters` must be whole numbers from \(0, 0\) to"),
        ({"observations": seen[..., :3], "parameters": corners}, "`observations` must be of shape"),
        ({"observations": seen[:, 0, 0, 0], "parameters": corners}, r"`observations` must be of shape \(n, views,"),
        ({"observations": np.array([["a"]]), "parameters": corners}, "`observations` must be numbers"),
    ):
        np.savez(tmp_path / "wrong.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            step(config(data, tmp_path / "run", train_data_dir=str(tmp_path / "wrong.npz")))
    (tmp_path / "no.npz").write_text("no")
    for name in ("no.npz", "missing.npz"):
        with pytest.raises(ValueError, match="`train_data_dir` must be"):
            ObservationDataset(tmp_path / name)
