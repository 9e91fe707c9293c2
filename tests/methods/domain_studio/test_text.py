"""DomainStudio for text-to-image pipelines: known answers by hand, the plain recipe at weight 0, LoRA, refusals."""

import dataclasses

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig

from diffusers_ext import (
    DomainStudioTextConfig,
    DomainStudioTextRecipe,
    ImageGenerationPipeline,
    StepRNG,
    TextToImageConfig,
    TextToImageRecipe,
    Trainer,
    haar_high_frequency,
    pairwise_similarity_loss,
    save_repo,
)
from diffusers_ext.training.lora import adapters_off
from diffusers_ext.training.prior import class_images
from diffusers_ext.training.recipe import Context
from tests import tiny_pipelines
from tests.methods.oms.tiny import stable_diffusion
from tests.training.tiny import Record

from .test_training import COMMON, PLAIN, network, weights

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
WEIGHTS = {"pair_weight": 3.0, "hf_pair_weight": 2.0, "hf_mse_weight": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Untrained pipelines, six images, and three of the class for those tests that draw none."""
    folder = tmp_path_factory.mktemp("domain")
    rng = np.random.default_rng(0)
    for name, n, size in (("photos", 6, 32), ("class", 3, 32)):
        (folder / name).mkdir()
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    stable_diffusion().save_pretrained(folder / "text")
    for name in ("stable_diffusion_3", "flux"):
        tiny_pipelines.seeded(getattr(tiny_pipelines, name)).save_pretrained(folder / name)
    save_repo(ImageGenerationPipeline(network(), DDPMScheduler()), folder / "base")
    return folder


def arguments(folder, output_dir, **changes):
    values = {
        **COMMON,
        "pretrained_model_name_or_path": str(folder / "text"),
        "train_data_dir": str(folder / "photos"),
        "output_dir": str(output_dir),
        "instance_prompt": "a red cat",
        "class_prompt": "a cat",
        "class_data_dir": str(folder / "class"),
        "num_class_images": 3,
        "resolution": 16,
        "num_validation_images": 0,
    }
    return {**values, **changes}


def config(folder, output_dir, **changes):
    return DomainStudioTextConfig(**arguments(folder, output_dir, **changes))


def train(config, recipe=DomainStudioTextRecipe):
    record = Record()
    trainer = Trainer(config, recipe(config), [record])
    trainer.train()
    return record, trainer


def ready(config):
    """A recipe that is set up, a batch of it, and what the engine shows it."""
    recipe, n = DomainStudioTextRecipe(config), config.train_batch_size
    ctx = Context(config, Accelerator(cpu=True), StepRNG(0), torch.float32)
    ctx.rng.begin(0)
    ctx.ids = range(n)
    recipe.dataset(ctx)
    ctx.modules = recipe.setup(ctx)
    ctx.model = ctx.modules.trainable
    return recipe, torch.utils.data.default_collate([recipe.data.get(i) for i in range(n)]), ctx


def moved(network):
    """Moves LoRA layers away from no change at all."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))


# -- known answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, 2])
def test_at_weight_zero_it_is_the_plain_recipe(folder, tmp_path, lora):
    changes = {"lora_rank": lora, "prior_loss_weight": 0.7, "max_train_steps": 2}
    ours, _ = train(config(folder, tmp_path / "ours", **PLAIN, **changes))
    same = {"adam_weight_decay": 0.0, "caption_dropout": 0.0}
    values = TextToImageConfig(**arguments(folder, tmp_path / "plain", **changes, **same))
    plain, _ = train(values, TextToImageRecipe)
    assert ours.losses == plain.losses
    file = "pytorch_lora_weights.safetensors" if lora else "unet/diffusion_pytorch_model.safetensors"
    a, b = weights(tmp_path / "ours", file), weights(tmp_path / "plain", file)
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("lora", [None, 2])
def test_the_loss_of_stable_diffusion_by_hand(folder, tmp_path, lora):
    """From the same noisy latents, by calls of the UNet, the VAE and the functions of the losses."""
    values = config(folder, tmp_path, **WEIGHTS, lora_rank=lora, prior_loss_weight=0.7, max_pair_timestep=999)
    recipe, batch, ctx = ready(values)
    network = recipe.model.network.eval()
    if lora:
        moved(network)
    else:
        with torch.no_grad():
            network.conv_out.weight.mul_(1.3)
    seen, predict = {}, recipe.predict
    recipe.predict = lambda *args: seen.setdefault("made", predict(*args))
    output = recipe.training_step(batch, ctx)

    made, pipe = seen["made"], DiffusionPipeline.from_pretrained(folder / "text")
    noising = DDPMScheduler.from_config(pipe.scheduler.config)
    alpha = noising.alphas_cumprod[made.t].view(-1, 1, 1, 1)
    text = {prompt: pipe.encode_prompt(prompt, "cpu", 4, False)[0] for prompt in ("a red cat", "a cat")}
    with torch.no_grad():
        predicted = network(made.noisy, made.t, torch.cat([text["a red cat"], text["a cat"]])).sample
        before = pipe.unet.eval()(made.noisy[:4], made.t[:4], text["a cat"]).sample
    images = []
    for eps in (predicted[:4], before):
        x0 = (made.noisy[:4] - (1 - alpha[:4]).sqrt() * eps) / alpha[:4].sqrt()
        with torch.no_grad():
            images.append(pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample)
    adapted, source = images
    noise = (made.noisy - alpha.sqrt() * recipe.encode(batch, ctx).x0) / (1 - alpha).sqrt()
    error = haar_high_frequency(adapted) - haar_high_frequency(batch["pixel_values"])
    snr = (alpha / (1 - alpha)).flatten()[:4].clamp(max=1)
    expected = {
        "denoising": (predicted - noise)[:4].square().mean(),
        "prior": (predicted - noise)[4:].square().mean(),
        "pair": 3 * pairwise_similarity_loss(adapted, source),
        "hf_pair": 2 * pairwise_similarity_loss(haar_high_frequency(adapted), haar_high_frequency(source)),
        "hf_mse": 0.5 * (snr * error.square().flatten(1).mean(1)).mean(),
    }
    assert set(output.logs) == set(expected)
    for name, value in expected.items():
        assert value > 1e-7, name
        torch.testing.assert_close(output.logs[name].detach(), value, rtol=1e-3, atol=1e-7)
    weighted = sum(expected.values()) - 0.3 * expected["prior"]
    torch.testing.assert_close(output.loss.detach(), weighted, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux"])
def test_flow_models_learn_a_lora_whose_base_stays(folder, tmp_path, name):
    changes = {"pretrained_model_name_or_path": str(folder / name), "resolution": 32, "use_ema": False}
    values = config(folder, tmp_path, **changes, lora_rank=2, max_train_steps=1, learning_rate=1e-2)
    record, trainer = train(values)
    assert record.logs[0]["hf_mse"] > 0
    recipe, network = trainer.recipe, trainer.recipe.model.network
    assert "source" not in trainer.ctx.modules.frozen
    # The base of the adapted network is the stock one, and the saved layers are found by the stock loader.
    pipe = DiffusionPipeline.from_pretrained(folder / name)
    ours = recipe.model.whole(network.eval())
    with adapters_off(network):
        assert torch.equal(drawn(ours), drawn(pipe))
    pipe.load_lora_weights(tmp_path)
    adapted = drawn(ours)
    assert torch.equal(adapted, drawn(pipe))
    pipe.unload_lora_weights()
    assert not torch.equal(adapted, drawn(pipe))
    # Clean latents from the velocity, decoded as the pipeline does.
    moved(network)
    sample = recipe.encode(batch := first_batch(recipe), trainer.ctx)
    seen, compared = [], recipe._compared
    recipe._compared = lambda *args: seen.append(compared(*args)) or seen[-1]
    trainer.ctx.model = trainer.ctx.modules.trainable
    made = recipe.predict(sample, trainer.ctx)
    recipe.further_terms(batch, sample, made, trainer.ctx)
    sigma = made.t.view(-1, *[1] * (made.noisy.ndim - 1))
    x0 = (made.noisy - sigma * made.output)[:4].detach()
    if name == "flux":
        x0 = pipe._unpack_latents(x0, 32, 32, pipe.vae_scale_factor)
    z = x0 / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with torch.no_grad():
        expected = pipe.vae.decode(z).sample
    adapted = next(images for images in seen if images.requires_grad)
    torch.testing.assert_close(adapted.detach(), expected, rtol=1e-3, atol=1e-4)


def first_batch(recipe):
    return torch.utils.data.default_collate([recipe.data.get(i) for i in range(4)])


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    return pipe("a red cat", generator=torch.Generator().manual_seed(0), **call).images


# -- the source ------------------------------------------------------------------------------------------------------


def test_the_source_stays_and_the_pair_loss_begins_at_zero(folder, tmp_path):
    # Adapted and source are the same network at first; under one prompt they see the same.
    values = config(folder, tmp_path, learning_rate=1e-2, class_prompt="a red cat")
    record, trainer = train(values)
    assert abs(record.logs[0]["pair"]) < 1e-5
    assert abs(record.logs[0]["hf_pair"]) < 1e-5
    assert record.logs[-1]["pair"] > 0
    source = trainer.ctx.modules.frozen["source"].denoiser
    before = weights(folder / "text")
    assert all(torch.equal(before[name], value) for name, value in source.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in source.parameters())
    assert not source.training


def test_a_turned_off_lora_is_the_source(folder, tmp_path):
    """The terms of a step with LoRA equal those with a copy of the network."""
    first = {}
    for rank in (None, 2):
        values = config(folder, tmp_path / str(rank), lora_rank=rank, max_train_steps=1)
        record, trainer = train(values)
        first[rank] = record.logs[0]
    for name in ("denoising", "prior", "pair", "hf_pair", "hf_mse"):
        assert first[2][name] == pytest.approx(first[None][name], rel=1e-4, abs=1e-6)
    trained = {name for name, p in trainer.ctx.modules.trainable.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    card = (tmp_path / "2" / "README.md").read_text()
    assert f'load_lora_weights("{tmp_path / "2"}")' in card
    assert "2306.14153" in card
    assert "pipeline_tag: text-to-image" in card


@pytest.mark.parametrize("changes", [
    {"source": "self"}, {"similarity_space": "latent", "cache_latents": True, "center_crop": True},
    {"prior_loss_weight": 0.0, "class_data_dir": None, "cache_prompts": True},
    {"hf_mse_weighting": "x0", "max_pair_timestep": 500},
])  # fmt: skip
def test_other_settings_train(folder, tmp_path, changes):
    record, _ = train(config(folder, tmp_path, max_train_steps=2, **changes))
    assert np.isfinite(record.losses).all()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    before, after = weights(folder / "text"), dict(pipeline.unet.state_dict())
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("lora", [None, 2])
def test_half_precision_leaves_the_rest_of_the_pipeline_as_it_was(folder, tmp_path, lora):
    values = config(
        folder, tmp_path, mixed_precision="bf16", lora_rank=lora, num_validation_images=2, validation_steps=2
    )
    record, trainer = train(values)
    assert np.isfinite(record.losses).all()
    assert trainer.recipe.denoiser.at().pipe.vae.dtype == torch.bfloat16
    assert (tmp_path / "sample.png").is_file()
    for part in () if lora else ("vae", "text_encoder"):
        file = next((folder / "text" / part).glob("*.safetensors")).name
        before, after = (weights(path / part, file) for path in (folder / "text", tmp_path))
        assert all(torch.equal(before[name], after[name]) for name in before)


# -- images of the class ---------------------------------------------------------------------------------------------


def test_missing_images_of_the_class_are_generated_once(folder, tmp_path):
    changes = {"class_data_dir": str(tmp_path / "class"), "num_class_images": 5}
    values = config(folder, tmp_path / "out", max_train_steps=1, **changes)
    train(values)
    files = sorted((tmp_path / "class").glob("*.png"))
    assert [file.name for file in files] == [f"{i:05d}.png" for i in range(5)]
    kept = {file.name: file.read_bytes() for file in files}
    (tmp_path / "class" / "notes.txt").write_text("no image")
    (tmp_path / "class" / "00003.png").unlink()
    values = dataclasses.replace(values, overwrite_output_dir=True)
    train(values)
    assert (tmp_path / "class" / "00003.png").read_bytes() == kept["00003.png"]
    assert len(list((tmp_path / "class").glob("*.png"))) == 5
    with pytest.raises(ValueError, match="`class_data_dir` must be a folder without images of another class.*'a cat'"):
        train(dataclasses.replace(values, class_prompt="a dog"))


def test_a_half_precision_repo_and_its_safety_checker(folder, tmp_path):
    """Class images are drawn in fp32 and pass no checker, which would make them black."""
    stable_diffusion().to(torch.float16).save_pretrained(tmp_path / "half")
    values = config(
        folder,
        tmp_path / "out",
        pretrained_model_name_or_path=str(tmp_path / "half"),
        class_data_dir=str(tmp_path / "class"),
        max_train_steps=1,
    )
    record, trainer = train(values)
    assert np.isfinite(record.losses).all()
    pipeline = trainer.recipe.model.pipe
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=SMALL, text_config=SMALL, projection_dim=4))
    checker.forward = None  # not callable
    pipeline.register_modules(safety_checker=checker)
    class_images(pipeline, "a cat", tmp_path / "again", 1, 1, 0)
    assert pipeline.safety_checker is checker
    assert pipeline.config["safety_checker"][1] == "StableDiffusionSafetyChecker"  # and it is saved


def test_nothing_is_generated_for_a_run_that_cannot_be(folder, tmp_path):
    flux = {"pretrained_model_name_or_path": str(folder / "flux"), "resolution": 32}
    for changes, message in (
        ({"train_batch_size": 7}, "`train_batch_size` must be small"),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 9}, "`lr_warmup_steps` must be at most"),
        ({"max_pair_timestep": 1000}, r"`max_pair_timestep` must be in 0\.\.999, the model's timesteps.* got 1000"),
        (
            {**flux, "similarity_space": "latent"},
            r"`similarity_space` must be 'pixel' for FluxPipeline, whose latents",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(config(folder, tmp_path / "out", class_data_dir=str(tmp_path / "class"), **changes))
    assert not (tmp_path / "class").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size": 2}, "`train_batch_size` must be an integer >= 3 with a pair loss"),
        ({"pair_weight": -1.0}, "`pair_weight` must be a number >= 0, got -1.0"),
        ({"prior_loss_weight": -1.0}, "`prior_loss_weight` must be a number >= 0, got -1.0"),
        ({"instance_prompt": None}, "`instance_prompt` must be given"),
        ({"class_prompt": None}, "`class_prompt` must be given"),
        ({"class_data_dir": None}, "`class_data_dir` must be given with `prior_loss_weight`"),
        ({"class_data_dir": None, "prior_loss_weight": 0.0, "source": "self"}, "`class_data_dir` must be given"),
        ({"class_data_dir": "photos/class"}, "`class_data_dir` must be apart from `train_data_dir`"),
        ({"class_data_dir": ""}, "`class_data_dir` must be apart from `train_data_dir`"),
        (
            {"class_data_dir": "photos/0.png", "train_data_dir": "class"},
            "`class_data_dir` must be a folder",
        ),
        ({"output_dir": "photos/out"}, "`output_dir` must be outside of `train_data_dir`"),
        ({"output_dir": "class"}, "`class_data_dir` must be apart from `output_dir`"),
        ({"cache_latents": True}, "`cache_latents` must be False with `similarity_space='pixel'`"),
        (
            {"pretrained_model_name_or_path": None, "pipeline_config": "text"},
            "`pretrained_model_name_or_path` must be given: the source model",
        ),
        ({"pretrained_model_name_or_path": "base"}, "must be a text-to-image pipeline, got ImageGenerationPipeline"),
    ],
)
def test_bad_arguments(folder, tmp_path, changes, message):
    paths = ("class_data_dir", "train_data_dir", "output_dir", "pipeline_config", "pretrained_model_name_or_path")
    values = {k: str(folder / v) if k in paths and v is not None else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        train(config(folder, **{"output_dir": tmp_path, **values}))


def test_pipelines_that_want_an_image_are_refused(folder, tmp_path):
    img2img = StableDiffusionImg2ImgPipeline(**stable_diffusion().components, requires_safety_checker=False)
    img2img.save_pretrained(tmp_path / "img2img")
    with pytest.raises(ValueError, match="StableDiffusionImg2ImgPipeline"):
        train(config(folder, tmp_path / "out", pretrained_model_name_or_path=str(tmp_path / "img2img")))
