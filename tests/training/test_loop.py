"""The engine against a plain Diffusers loop, and the numbers it promises."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from diffusers_ext import ImmiscibleRecipe, StepRNG, Trainer
from diffusers_ext.data.sampler import PositionalBatchSampler, SeededDataset
from diffusers_ext.training.weights import Ema
from tests.conftest import reset_accelerate

from .tiny import UNET, Record, make_config, run, weights, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def test_plain_noise_equals_a_diffusers_loop_bit_for_bit(data, tmp_path):
    config = make_config(data, tmp_path, max_train_steps=20, lr_scheduler="cosine", lr_warmup_steps=3)
    trainer = Trainer(config, ImmiscibleRecipe(config))
    trainer._start()
    model, dataset = copy.deepcopy(trainer.ctx.modules.trainable), trainer.dataset
    trainer = Trainer(config, ImmiscibleRecipe(config))
    trainer.train()

    scheduler = DDIMScheduler(timestep_spacing="trailing")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=20)
    ema = EMAModel(model.parameters(), decay=0.9, foreach=True)
    rng = StepRNG(0)
    batches = PositionalBatchSampler(len(dataset), 4, total=20)
    for step, batch in enumerate(torch.utils.data.DataLoader(SeededDataset(dataset, 0), batch_sampler=batches)):
        rng.begin(step)
        x0 = batch["pixel_values"]
        noise = torch.randn(x0.shape, generator=rng.generator("noise"))
        t = torch.randint(1000, (4,), generator=rng.generator("timesteps"))
        loss = F.mse_loss(model(scheduler.add_noise(x0, noise, t), t).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
    ema.copy_to(model.parameters())
    saved = weights(tmp_path)
    assert saved.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(saved[name], value), name


@pytest.mark.parametrize("accumulation", [1, 4])
def test_cosine_ends_at_zero_and_warmup_at_its_update(data, tmp_path, accumulation):
    _, record, _ = run(
        data,
        tmp_path,
        max_train_steps=16,
        lr_scheduler="cosine",
        lr_warmup_steps=10,
        gradient_accumulation_steps=accumulation,
    )
    assert len(record.rates) == 16
    assert record.rates[9] == 1e-3  # update 10 ends the warm-up
    assert record.rates[8] == pytest.approx(9e-4)
    assert record.rates[-1] < 1e-9


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (False, {1: 0, 2: 0.1818, 3: 0.25, 10: 0.5263, 100: 0.9174, 1000: 0.9911}),
        (True, {1: 0, 2: 0.4054, 3: 0.5613, 10: 0.8222, 100: 0.9684, 1000: 0.9944}),
    ],
)
def test_ema_decay_sequence(warmup, expected):
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    ema = Ema([parameter], decay=0.9999, use_ema_warmup=warmup, inv_gamma=1.0, power=0.75)
    assert ema.shadow_params[0].dtype == torch.float32
    for update in range(1, 1001):
        ema.step([parameter])
        if update in expected:
            assert ema.cur_decay_value == pytest.approx(expected[update], abs=5e-5)


def test_validation_and_logging_do_not_disturb_training(data, tmp_path):
    _, plain, _ = run(data, tmp_path / "plain")
    _, watched, _ = run(data, tmp_path / "watched", validation_steps=2, report_to="tensorboard", checkpointing_steps=3)
    assert plain.losses == watched.losses
    first, second = weights(tmp_path / "plain"), weights(tmp_path / "watched")
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert sorted(p.name for p in (tmp_path / "watched" / "samples").iterdir()) == [
        f"step-{s:07d}.png" for s in (2, 4, 6)
    ]
    assert list((tmp_path / "watched" / "logs").rglob("events.out.tfevents.*"))


def test_accumulation_equals_one_large_batch_with_sample_scope(data, tmp_path):
    # No dropout: its mask belongs to a batch, not to a sample.
    (tmp_path / "unet.json").write_text(json.dumps({**UNET, "dropout": 0.0}))
    # Adam divides rounding errors of vanishing gradients by themselves; a larger epsilon leaves them small.
    common = {"rng_scope": "sample", "unet_config": str(tmp_path / "unet.json"), "adam_epsilon": 1e-4}
    run(data, tmp_path / "a", train_batch_size=8, **common)
    run(data, tmp_path / "b", train_batch_size=4, gradient_accumulation_steps=2, **common)
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction_type": "flow", "timestep_sampling": "logit_normal"},
        {"prediction_type": "edm", "p_mean": -0.5, "sigma_data": 0.7},
        {"prediction_type": "v_prediction", "snr_gamma": 5.0, "noise_offset": 0.1},
        {"prediction_type": "sample", "class_conditional": True, "noise": "assignment", "within_labels": True},
        {"noise": "knn", "k": 4, "image_scale": 2.0, "mixed_precision": "bf16", "use_ema": False},
        {"noise": "signflip", "num_train_epochs": 1, "max_train_steps": None, "random_flip": True},
    ],
)
def test_kinds_of_training_leave_a_repo_that_samples(data, tmp_path, changes):
    result, record, trainer = run(data, tmp_path, **changes)
    assert result.steps == trainer.total_steps == len(record.losses)
    assert result.stopped_by is None
    assert {"README.md", "model_index.json", "sample.png", "metrics.jsonl"} <= {p.name for p in tmp_path.iterdir()}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    labels = {"class_labels": [0, 2]} if changes.get("class_conditional") else {"batch_size": 2}
    images = pipeline(**labels, num_inference_steps=3, output_type="pt", generator=torch.Generator().manual_seed(0))
    assert images.images.shape == (2, 1, 8, 8)
    assert images.images.isfinite().all()
    assert pipeline.config.image_scale == changes.get("image_scale", 1.0)


def make_vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=2,
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        scaling_factor=0.5,
    )


def test_latent_training_scales_as_the_vae_says(data, tmp_path):
    vae = make_vae()
    vae.save_pretrained(tmp_path / "vae")
    _, _, trainer = run(data, tmp_path / "out", vae=str(tmp_path / "vae"))
    batch = {"pixel_values": torch.rand(400, 1, 8, 8) * 2 - 1}
    trainer.rng.begin(0)
    trainer.ctx.ids = range(400)
    encoded = trainer.recipe.encode(batch, trainer.ctx).x0
    posterior = vae.encode(batch["pixel_values"]).latent_dist
    assert encoded.shape == (400, 2, 4, 4)
    # The posterior's mean, halved; its noise averages out over 400 samples (4 standard errors).
    error = (encoded - 0.5 * posterior.mean).mean(0).abs() / (0.5 * posterior.std.mean(0) / 400**0.5)
    assert error.max() < 4.5
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.vae.config.scaling_factor == 0.5
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in pipeline.vae.state_dict().items())
    pipeline.set_progress_bar_config(disable=True)
    common = {"batch_size": 2, "num_inference_steps": 2}
    latents = pipeline(**common, output_type="latent", generator=torch.Generator().manual_seed(0)).images
    images = pipeline(**common, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert latents.shape == (2, 2, 4, 4)
    with torch.no_grad():
        decoded = vae.decode(latents / 0.5).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))


def test_bf16_keeps_trained_weights_in_fp32_and_frozen_ones_in_bf16(data, tmp_path):
    make_vae().save_pretrained(tmp_path / "vae")
    changes = {"vae": str(tmp_path / "vae"), "mixed_precision": "bf16", "validation_steps": 3}
    _, record, trainer = run(data, tmp_path / "out", **changes)
    saved = DiffusionPipeline.from_pretrained(tmp_path / "out").vae.state_dict()  # as it was, not as it was rounded
    assert all(torch.equal(saved[name], value) for name, value in make_vae().state_dict().items())
    assert {p.dtype for p in trainer.ctx.modules.frozen["vae"].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.ctx.modules.trainable.parameters()} == {torch.float32}
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.float32}
    reset_accelerate()  # its precision is set once a process
    _, plain, _ = run(data, tmp_path / "plain", vae=str(tmp_path / "vae"))
    assert record.losses != plain.losses
    assert record.losses == pytest.approx(plain.losses, rel=0.05)


def test_guidance_moves_between_the_null_class_and_the_class(data, tmp_path):
    run(data, tmp_path, class_conditional=True, label_dropout=0.5, max_train_steps=12)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.null_class_label == 3
    assert pipeline.unet.config.num_class_embeds == 4
    latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def draw(label, scale):
        return pipeline(
            class_labels=[label], guidance_scale=scale, latents=latents, num_inference_steps=1, output_type="latent"
        ).images

    # One step is linear in the prediction: null + w (class - null).
    null, conditional = draw(3, 1.0), draw(0, 1.0)
    assert not torch.equal(null, conditional)
    torch.testing.assert_close(draw(0, 3.0), null + 3 * (conditional - null), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow", "edm"])
def test_every_prediction_learns_a_single_image(tmp_path, prediction_type):
    """Of one image repeated, the loss falls far below the best constant guess."""
    data = write_data(tmp_path / "data")
    np.savez(data / "data.npz", images=np.full((64, 8, 8), 255, np.uint8))
    _, record, _ = run(
        data, tmp_path / "out", prediction_type=prediction_type, max_train_steps=50, learning_rate=1e-2,
        train_batch_size=16, num_validation_images=0,
    )  # fmt: skip
    first, last = (sum(part) / 10 for part in (record.losses[:10], record.losses[-10:]))
    assert last < 0.5 * first


@pytest.mark.parametrize("prediction_type", [None, "edm"])
def test_fine_tuning_starts_from_the_pretrained_weights(data, tmp_path, prediction_type):
    run(data, tmp_path / "first", noise="knn", image_scale=2.0, prediction_type=prediction_type)
    run(
        data,
        tmp_path / "second",
        unet_config=None,
        pretrained_model_name_or_path=str(tmp_path / "first"),
        image_scale=2.0,
        learning_rate=1e-12,
        max_train_steps=1,
    )
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-7, rtol=0)


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_no_checkpoint_is_written_of_what_is_not_finite(data, tmp_path, where):
    class Broken(ImmiscibleRecipe):
        def training_step(self, batch, ctx):
            output = super().training_step(batch, ctx)
            if ctx.step == 3 and where == "loss":
                output.loss = output.loss * float("nan")
            elif ctx.step == 3:  # the loss is finite, its gradient is not
                output.loss.register_hook(lambda gradient: gradient * float("nan"))
            return output

    config = make_config(data, tmp_path, checkpointing_steps=2, checkpoints_total_limit=1, logging_steps=100)
    with pytest.raises(FloatingPointError, match=f"{where}.* not finite at step 4|the loss is nan at step 4"):
        Trainer(config, Broken(config)).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_picture_that_cannot_be_drawn_is_a_warning(data, tmp_path):
    class Blind(ImmiscibleRecipe):
        def validate(self, pipeline, generator):
            raise RuntimeError("no memory")

    config = make_config(data, tmp_path, validation_steps=3)
    with (
        pytest.warns(UserWarning, match="no pictures at step 3: RuntimeError: no memory"),
        pytest.warns(UserWarning, match="no pictures at step 6: RuntimeError: no memory"),
    ):
        result = Trainer(config, Blind(config)).train()
    assert result.steps == 6
    assert DiffusionPipeline.from_pretrained(tmp_path).unet is not None
    assert not (tmp_path / "sample.png").exists()


@pytest.mark.parametrize("hook", ["on_log", "on_step_end"])
def test_what_was_trained_is_saved_when_a_callback_fails(data, tmp_path, hook):
    def fail(trainer, *arguments):
        if trainer.step == 4:
            raise OSError("no connection")

    _, expected, _ = run(data, tmp_path / "whole", logging_steps=2)
    callback = Record()
    setattr(callback, hook, fail)
    with pytest.raises(OSError, match="no connection"):
        run(data, tmp_path / "cut", logging_steps=2, callback=callback)
    run(data, tmp_path / "cut", logging_steps=2, resume_from_checkpoint="latest")
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut"))
    losses = [[json.loads(line)["loss"] for line in lines] for lines in (whole, cut)]
    assert losses[0] == losses[1]
