"""DomainStudio's recipe: plain training at weight 0, the frozen source, prior images, LoRA, repos, and refusals."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    StableDiffusionImg2ImgPipeline,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig

from diffusers_ext import (
    DenoisingConfig,
    DenoisingRecipe,
    DomainStudioConfig,
    DomainStudioRecipe,
    ImageGenerationPipeline,
    Trainer,
    push_repo,
    save_repo,
)
from diffusers_ext.methods.domain_studio.unconditional import UnconditionalModel
from diffusers_ext.training.prior import class_images
from tests import processes
from tests.methods.oms.tiny import stable_diffusion
from tests.training.tiny import UNET, Record

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def network(**options):
    torch.manual_seed(0)
    arguments = {**UNET, "dropout": 0.0, "sample_size": 8, "in_channels": 1, "out_channels": 1, **options}
    return UNet2DModel(**arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Untrained source models, and ten images."""
    folder = tmp_path_factory.mktemp("domain")
    rng = np.random.default_rng(0)
    for name, n in (("ten", 10), ("one", 1)):
        np.savez(folder / f"{name}.npz", images=rng.integers(0, 256, (n, 8, 8), dtype=np.uint8))
    (folder / "photos").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")
    save_repo(ImageGenerationPipeline(network(), DDPMScheduler(), image_scale=2.0), folder / "base")
    save_repo(ImageGenerationPipeline(network(), FlowMatchEulerDiscreteScheduler()), folder / "flow")
    save_repo(ImageGenerationPipeline(network(num_class_embeds=3), DDIMScheduler()), folder / "classes")
    stable_diffusion().save_pretrained(folder / "text")
    save_repo(ImageGenerationPipeline(network(), DDPMScheduler(rescale_betas_zero_snr=True)), folder / "blind")
    save_repo(ImageGenerationPipeline(network(), EDMEulerScheduler()), folder / "karras")
    save_repo(ImageGenerationPipeline(network(sample_size=(8, 16)), DDIMScheduler()), folder / "oblong")
    vqvae = VQModel(in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2, latent_channels=1)
    LDMPipeline(vqvae, network(), DDIMScheduler()).save_pretrained(folder / "vq")
    return folder


COMMON = {
    "train_batch_size": 4,
    "max_train_steps": 3,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "num_validation_images": 2,
    "validation_inference_steps": 2,
    "ema_decay": 0.5,
}
PLAIN = {"pair_weight": 0.0, "hf_pair_weight": 0.0, "hf_mse_weight": 0.0}


def config(folder, output_dir, **changes):
    values = {
        **COMMON,
        "pretrained_model_name_or_path": str(folder / "base"),
        "train_data_dir": str(folder / "ten.npz"),
        "output_dir": str(output_dir),
        "resolution": 8,
        "channels": 1,
    }
    return DomainStudioConfig(**{**values, **changes})


def text_config(folder, output_dir, **changes):
    values = {
        "pretrained_model_name_or_path": str(folder / "text"),
        "train_data_dir": str(folder / "photos"),
        "instance_prompt": "a red cat",
        "class_prompt": "a cat",
        "class_data_dir": str(folder / "class"),
        "num_class_images": 3,
        "resolution": 16,
        "channels": 3,
    }
    return config(folder, output_dir, **{**values, **changes})


def train(config, **record):
    record = Record(**record)
    recipe = DomainStudioRecipe(config)
    trainer = Trainer(config, recipe, [record])
    result = trainer.train()
    return result, record.losses, trainer


def weights(folder, file="unet/diffusion_pytorch_model.safetensors"):
    return load_file(Path(folder) / file)


def test_at_weight_zero_it_is_plain_training(folder, tmp_path):
    values = config(folder, tmp_path / "ours", **PLAIN)
    _, ours, _ = train(values)
    plain = DenoisingConfig(
        **COMMON,
        adam_weight_decay=0.0,
        pretrained_model_name_or_path=str(folder / "base"),
        train_data_dir=str(folder / "ten.npz"),
        output_dir=str(tmp_path / "plain"),
        resolution=8,
        channels=1,
    )
    record = Record()
    Trainer(plain, DenoisingRecipe(plain), [record]).train()
    assert ours == pytest.approx(record.losses, abs=1e-6)
    a, b = weights(tmp_path / "ours"), weights(tmp_path / "plain")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)


def test_text_at_weight_zero_is_dreambooth(folder, tmp_path):
    """The loss of the first step, computed here by hand from the same draws."""
    values = text_config(folder, tmp_path, **PLAIN, max_train_steps=1, prior_loss_weight=0.7)
    recipe, seen = DomainStudioRecipe(values), {}
    step = recipe.training_step

    def watched(batch, ctx):
        x0 = [recipe.encode(batch[key], ctx) for key in ("pixel_values", "class_pixel_values")]
        noise = [ctx.rng.randn_like(part, ctx.ids) for part in x0]
        t = [recipe.timesteps(4, ctx.rng, ctx.ids) for _ in x0]
        expected = 0.0
        for part, n, s, prompt, weight in zip(x0, noise, t, ("a red cat", "a cat"), (1, 0.7), strict=True):
            text = recipe.model.pipe.encode_prompt(prompt, "cpu", 4, False)[0]
            noisy = DDPMScheduler.from_config(recipe.model.scheduler.config).add_noise(part, n, s)
            expected += weight * (ctx.model(noisy, s, text).sample - n).square().mean()
        ctx.rng.begin(0)
        seen["ours"], seen["expected"] = (out := step(batch, ctx)).loss.item(), expected.item()
        return out

    recipe.training_step = watched
    Trainer(values, recipe).train()
    assert seen["ours"] == pytest.approx(seen["expected"], rel=1e-5)


@pytest.mark.parametrize("make", [config, text_config])
def test_the_source_stays_and_the_pair_loss_begins_at_zero(folder, tmp_path, make):
    # Adapted and source are the same network at first; under one prompt they see the same.
    prompts = {"class_prompt": "a red cat", "class_data_dir": str(tmp_path / "c")} if make is text_config else {}
    values = make(folder, tmp_path / "out", max_train_steps=3, learning_rate=1e-2, **prompts)
    record = Record()
    trainer = Trainer(values, DomainStudioRecipe(values), [record])
    trainer.train()
    logs = record.logs
    assert abs(logs[0]["pair"]) < 1e-5
    assert abs(logs[0]["hf_pair"]) < 1e-5
    assert logs[-1]["pair"] > 0
    source = trainer.ctx.modules.frozen["source"]
    before = weights(values.pretrained_model_name_or_path)
    assert all(torch.equal(before[name], value) for name, value in source.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in source.parameters())
    assert not source.training


def test_lora_takes_the_network_itself_as_source_and_saves_layers_only(folder, tmp_path):
    before = weights(folder / "text")
    _, losses, trainer = train(text_config(folder, tmp_path, use_lora=True, rank=2, learning_rate=1e-2))
    assert "source" not in trainer.ctx.modules.frozen
    unet = trainer.ctx.modules.trainable
    trained = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    held = {name.replace(".base_layer", ""): value for name, value in unet.state_dict().items() if "lora" not in name}
    assert all(torch.equal(before[name], value) for name, value in held.items())
    found = {path.name for path in tmp_path.iterdir()}
    assert {"pytorch_lora_weights.safetensors", "README.md", "sample.png"} <= found
    assert "model_index.json" not in found
    card = (tmp_path / "README.md").read_text()
    assert f'load_lora_weights("{tmp_path}")' in card
    assert "pipeline_tag: text-to-image" in card
    pipeline = DiffusionPipeline.from_pretrained(folder / "text")
    pipeline.set_progress_bar_config(disable=True)
    call = {"prompt": "a red cat", "num_inference_steps": 2, "output_type": "np"}
    plain = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
    pipeline.load_lora_weights(tmp_path)
    adapted = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
    assert np.abs(plain - adapted).max() > 1e-4
    with trainer.exported_pipeline() as exported:
        exported.set_progress_bar_config(disable=True)
        expected = exported(**call, generator=torch.Generator().manual_seed(0)).images
    np.testing.assert_allclose(adapted, expected, atol=1e-5)


def test_a_turned_off_lora_is_the_source(folder, tmp_path):
    """The pair terms of a step with LoRA equal those with a copy of the network."""
    first = {}
    for lora in (False, True):
        record = Record()
        values = text_config(folder, tmp_path / str(lora), use_lora=lora, max_train_steps=1)
        Trainer(values, DomainStudioRecipe(values), [record]).train()
        first[lora] = record.logs[0]
    for name in ("denoising", "prior", "pair", "hf_pair", "hf_mse"):
        assert first[True][name] == pytest.approx(first[False][name], rel=1e-4, abs=1e-6)


def test_missing_images_of_the_class_are_generated_once(folder, tmp_path):
    values = text_config(folder, tmp_path / "out", class_data_dir=str(tmp_path / "class"), num_class_images=5)
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


@pytest.mark.parametrize("changes", [
    {"source": "self"}, {"similarity_space": "latent"}, {"prior_loss_weight": 0.0, "class_data_dir": None},
    {"hf_mse_weighting": "x0", "max_pair_timestep": 500},
])  # fmt: skip
def test_other_settings_of_text_models_train(folder, tmp_path, changes):
    _, losses, _ = train(text_config(folder, tmp_path, **changes))
    assert np.isfinite(losses).all()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    before, after = weights(folder / "text"), dict(pipeline.unet.state_dict())
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "scheduler",
    [EulerDiscreteScheduler(), DPMSolverMultistepScheduler(), DDPMScheduler(beta_schedule="sigmoid")],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_noise_is_that_of_the_schedule_whatever_the_scheduler(tmp_path, scheduler):
    for channels in (1, 2):
        save_repo(ImageGenerationPipeline(network(out_channels=channels), scheduler), tmp_path / str(channels))
        noising = UnconditionalModel(str(tmp_path / str(channels))).training_scheduler
        t = torch.tensor([0, 100, 900])
        found = noising.add_noise(torch.zeros(3, 1), torch.ones(3, 1), t).flatten()
        torch.testing.assert_close(found, (1 - (1 - scheduler.betas).cumprod(0)[t]).sqrt(), rtol=1e-4, atol=1e-5)


def test_flow_models_train(folder, tmp_path):
    _, losses, _ = train(config(folder, tmp_path, pretrained_model_name_or_path=str(folder / "flow")))
    assert np.isfinite(losses).all()


def test_a_resumed_run_equals_the_uninterrupted_one(folder, tmp_path):
    _, expected, _ = train(config(folder, tmp_path / "whole", max_train_steps=5))
    result, first, _ = train(config(folder, tmp_path / "cut", max_train_steps=5), signal_at=2)
    assert result.stopped_by == "SIGTERM"
    _, second, _ = train(config(folder, tmp_path / "cut", max_train_steps=5, resume_from_checkpoint="latest"))
    assert first + second == expected
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_script_makes_a_repo(folder, tmp_path):
    arguments = {k: v for k, v in config(folder, tmp_path).to_dict().items() if v is not None}
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    run = processes.run([sys.executable, "training/train_domain_studio.py", "--config", tmp_path / "arguments.json"])
    assert run.returncode == 0, run.stderr
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline, ImageGenerationPipeline)
    assert pipeline.config["image_scale"] == 2.0
    assert "2306.14153" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_model_name_or_path": None}, "`pretrained_model_name_or_path` must be given"),
        ({"train_data_dir": "one"}, "`train_data_dir` must be a folder of at least 2 images, not 1"),
        ({"train_batch_size": 2}, "`train_batch_size` must be an integer >= 3 with a pair loss"),
        ({"train_batch_size": 11}, "`train_batch_size` must be small enough"),
        ({"resolution": 16}, "`resolution` must be 8, the size of the model's images, got 16"),
        ({"channels": 3}, "`channels` must be 1, as"),
        ({"pair_weight": -1.0}, "`pair_weight` must be a number >= 0, got -1.0"),
        ({"prior_loss_weight": -1.0}, "`prior_loss_weight` must be a number >= 0, got -1.0"),
        ({"source": "self"}, "`source` must be 'frozen' without `instance_prompt`, got 'self'"),
        ({"use_lora": True}, "`use_lora` must be False without `instance_prompt`, got True"),
        ({"class_prompt": "a cat"}, "`class_prompt` must be left out without `instance_prompt`"),
        ({"instance_prompt": "a red cat"}, "`class_prompt` must be given with `instance_prompt`"),
        ({"pretrained_model_name_or_path": "classes"}, "must be a model without classes, got .* with 3"),
        ({"pretrained_model_name_or_path": "text"}, "must be a pipeline with a `UNet2DModel`"),
        ({"pretrained_model_name_or_path": "blind"}, "must have a scheduler .* got .*blind.* that ends at zero SNR"),
        ({"pretrained_model_name_or_path": "karras"}, "must have a scheduler .* with EDMEulerScheduler"),
        (
            {"pretrained_model_name_or_path": "vq"},
            r"must consist of a `unet`.* got .*vq' with \['vqvae'\] beside them",
        ),
        (
            {"pretrained_model_name_or_path": "oblong"},
            r"must be a model of square images.* got `sample_size` \[8, 16\]",
        ),
        ({"max_pair_timestep": -1}, "`max_pair_timestep` must be an integer >= 0 or left out, got -1"),
        ({"max_pair_timestep": 1000}, r"`max_pair_timestep` must be in 0\.\.999, the model's timesteps.* got 1000"),
        ({"similarity_space": "latent"}, "`similarity_space` must be 'pixel' for a model of pixels, got 'latent'"),
        ({"validation_inference_steps": 1001}, "`validation_inference_steps` must be a number of steps that DDIMSch"),
    ],
)
def test_bad_arguments(folder, tmp_path, changes, message):
    named = {"train_data_dir": ".npz", "pretrained_model_name_or_path": ""}
    values = {k: f"{folder / v}{named[k]}" if k in named and v is not None else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        train(config(folder, tmp_path, **values))


def test_a_model_without_text_has_no_prompts(folder, tmp_path):
    values = text_config(folder, tmp_path, pretrained_model_name_or_path=str(folder / "base"))
    with pytest.raises(ValueError, match="must be a StableDiffusionPipeline with one text encoder"):
        train(values)
    with pytest.raises(ValueError, match="`class_data_dir` must be given with `prior_loss_weight`"):
        text_config(folder, tmp_path, class_data_dir=None)
    for inside in (folder / "photos" / "class", folder):
        with pytest.raises(ValueError, match="`class_data_dir` must be apart from `train_data_dir`"):
            text_config(folder, tmp_path, class_data_dir=str(inside))
    with pytest.raises(ValueError, match="`class_data_dir` must be apart from `output_dir`"):
        text_config(folder, tmp_path, class_data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="`class_data_dir` must be a folder, which need not exist yet"):
        text_config(folder, tmp_path, class_data_dir=str(folder / "one.npz"))
    with pytest.raises(ValueError, match="`output_dir` must be outside of `train_data_dir`"):
        text_config(folder, folder / "photos" / "out")


def test_text_models_that_want_more_are_refused(folder, tmp_path):
    img2img = StableDiffusionImg2ImgPipeline(**stable_diffusion().components, requires_safety_checker=False)
    img2img.save_pretrained(tmp_path / "img2img")
    with pytest.raises(ValueError, match="must be a StableDiffusionPipeline .* a StableDiffusionImg2ImgPipeline"):
        train(text_config(folder, tmp_path / "out", pretrained_model_name_or_path=str(tmp_path / "img2img")))


def test_a_half_precision_repo_and_its_safety_checker(folder, tmp_path):
    """Class images are drawn in fp32 and pass no checker, which would make them black."""
    half = stable_diffusion().to(torch.float16)
    half.save_pretrained(tmp_path / "half")
    values = text_config(
        folder,
        tmp_path / "out",
        pretrained_model_name_or_path=str(tmp_path / "half"),
        class_data_dir=str(tmp_path / "class"),
        max_train_steps=1,
    )
    _, losses, trainer = train(values)
    assert np.isfinite(losses).all()
    pipeline = trainer.recipe.model.pipe
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=SMALL, text_config=SMALL, projection_dim=4))
    checker.forward = None  # not callable
    pipeline.register_modules(safety_checker=checker)
    class_images(pipeline, "a cat", tmp_path / "again", 1, 1, 0)
    assert pipeline.safety_checker is checker
    assert pipeline.config["safety_checker"][1] == "StableDiffusionSafetyChecker"  # and it is saved


def test_nothing_is_generated_for_a_run_that_cannot_be(folder, tmp_path):
    for changes in ({"train_batch_size": 7}, {"lr_scheduler": "linear", "lr_warmup_steps": 9}):
        with pytest.raises(ValueError, match="`train_batch_size` must be small|`lr_warmup_steps` must be at most"):
            train(text_config(folder, tmp_path / "out", class_data_dir=str(tmp_path / "class"), **changes))
    assert not (tmp_path / "class").exists()


def test_the_source_is_not_written_over(folder):
    with pytest.raises(ValueError, match="`output_dir` must be another folder than the source model's"):
        train(config(folder, folder / "base"))


def test_the_limit_on_pairs_counts_in_the_network_s_timesteps(folder, tmp_path):
    """A flow at 100 of 1000 is at noise level 0.1: with the limit below all levels no pair is left."""
    record = Record()
    for limit in (0, 999):
        values = config(folder, tmp_path / str(limit), pretrained_model_name_or_path=str(folder / "flow"))
        values = dataclasses.replace(values, max_pair_timestep=limit, max_train_steps=2, learning_rate=1e-2)
        Trainer(values, DomainStudioRecipe(values), [record]).train()
    logs = [entry["pair"] for entry in record.logs]
    assert logs[:2] == [0, 0]
    assert logs[3] > 0


@pytest.mark.parametrize("lora", [False, True])
def test_text_in_half_precision_leaves_the_rest_of_the_pipeline_as_it_was(folder, tmp_path, lora):
    values = text_config(folder, tmp_path, mixed_precision="bf16", use_lora=lora, validation_steps=2)
    _, losses, trainer = train(values)
    assert np.isfinite(losses).all()
    assert trainer.recipe.model.vae.dtype == torch.bfloat16
    assert (tmp_path / "sample.png").is_file()
    for part in () if lora else ("vae", "text_encoder"):
        file = next((folder / "text" / part).glob("*.safetensors")).name
        before, after = (weights(path / part, file) for path in (folder / "text", tmp_path))
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_push_wants_a_repo(tmp_path):
    with pytest.raises(ValueError, match="model_index.json or pytorch_lora_weights.safetensors"):
        push_repo(tmp_path, "me/nothing")
