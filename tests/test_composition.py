"""Methods together: each pair of the table works with a value that is known, or is refused in one sentence."""

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext import (
    AdditiveGaussianNoise,
    AlignConfig,
    AmbientConfig,
    AmbientRecipe,
    AmbientTextRecipe,
    AnomalyDetectionPipeline,
    Callback,
    CropForwardModel,
    DomainStudioConfig,
    DomainStudioRecipe,
    DomainStudioTextRecipe,
    ForwardModelConfig,
    ForwardModelRecipe,
    ImageClassifierFeatures,
    ImmiscibleConfig,
    ImmiscibleRecipe,
    MMDDDMConfig,
    MMDDDMRecipe,
    Noise2ScoreConfig,
    Noise2ScoreRecipe,
    NoiseDiffusionPipeline,
    OMSConfig,
    OMSPipeline,
    OMSRecipe,
    PNNPConfig,
    PNNPRecipe,
    PoissonGaussianNoise,
    QDiffConfig,
    QuantLinear,
    RawNoiseSynthesizer,
    ScoreField,
    ScoreSDEScheduler,
    SDAClassifierConfig,
    SDATTAPipeline,
    SGMSEConfig,
    SGMSERecipe,
    StableDiffusionNoiseDiffusionPipeline,
    Trainer,
    align,
    asset_path,
    mmd2,
    parse_config,
    posterior_mean,
    score_from_diffusion,
)
from tests.methods.oms.gaussian import ExactStep
from tests.methods.oms.tiny import module, stable_diffusion
from tests.methods.sgmse.tiny import SMALL, SOUND
from tests.methods.sgmse.tiny import pipeline as speech_enhancer
from tests.training.tiny import UNET

ROOT = Path(__file__).resolve().parent.parent
TABLE = []  # of (parts, what is done with them, whether it works, one sentence, the check)


def row(parts, what, outcome, sentence):
    """Adds a row to the table; the function below it checks that the sentence is true."""

    def add(check):
        TABLE.append(SimpleNamespace(parts=parts, what=what, outcome=outcome, sentence=sentence, check=check))
        return check

    return add


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Watch(Callback):
    """Keeps what is logged and the noise that was drawn, and averages the weights by hand."""

    def __init__(self, decay):
        self.decay, self.logs, self.pairs, self.average, self.steps = decay, [], [], None, 0

    def on_start(self, trainer):
        make = getattr(trainer.recipe, "noise", None)
        if make is not None:

            def kept(x0, **arguments):
                noise = make(x0, **arguments)
                self.pairs.append((x0.flatten(1), noise.flatten(1)))
                return noise

            trainer.recipe.noise = kept

    def on_step_end(self, trainer):
        network = trainer.ctx.modules.trainable
        now = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        if self.average is None:
            self.average = now
        else:
            self.average = {k: decay * self.average[k] + (1 - decay) * now[k] for k in now}
        self.steps += 1

    def on_log(self, trainer, logs):
        self.logs.append(logs)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One tiny model after the other: trained immiscibly, adapted, tuned for 3 steps, and a step in front."""
    folder, watched = tmp_path_factory.mktemp("composition"), {}
    rng = np.random.default_rng(0)
    grey = np.where(np.arange(64)[:, None, None] % 2, 200, 40) + rng.integers(-20, 20, (64, 8, 8))
    np.savez(folder / "data.npz", images=grey.astype(np.uint8))
    (folder / "unet.json").write_text(json.dumps({**UNET, "dropout": 0.0}))
    (folder / "photos").mkdir()
    for i in range(4):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    stable_diffusion().save_pretrained(folder / "text")
    common = {
        "train_data_dir": str(folder / "data.npz"),
        "resolution": 8,
        "channels": 1,
        "center_crop": True,
        "train_batch_size": 8,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "ema_decay": 0.5,
        "logging_steps": 1,
        "num_validation_images": 0,
    }

    def run(name, recipe, source=None, **changes):
        values = {**common, "output_dir": str(folder / name), **changes}
        if source is not None:
            values["pretrained_model_name_or_path"] = str(folder / source)
        config = recipe.Config(**values)
        watched[name] = Watch(config.ema_decay)
        Trainer(config, recipe(config), [watched[name]]).train()

    run("immiscible", ImmiscibleRecipe, noise="assignment", unet_config=str(folder / "unet.json"))
    noised = {"sigma": 0.3, "add_noise": True, "unet_config": str(folder / "unet.json")}
    run("ambient", AmbientRecipe, **noised, prediction_type="epsilon")
    run("domain_studio", DomainStudioRecipe, "immiscible")
    tuning = {
        "features": "pixels",
        "num_inference_steps": 3,
        "learning_rate": 2e-2,
        "max_train_steps": 25,
        "clamp": "ste",
    }
    run("mmd_ddm", MMDDDMRecipe, "immiscible", **tuning)
    run("mmd_ddm of domain_studio", MMDDDMRecipe, "domain_studio", **tuning)
    run("oms", OMSRecipe, "immiscible", module_config=str(folder / "unet.json"))
    run("noise2score", Noise2ScoreRecipe, network="conv")
    (folder / "raw").mkdir()
    np.save(folder / "raw" / "clean.npy", rng.integers(600, 9000, (128, 128), dtype=np.uint16))
    (folder / "raw.json").write_text('{"base_channels": 2}')
    names = ("max_train_steps", "learning_rate", "ema_decay", "logging_steps", "num_validation_images")
    raw = {name: common[name] for name in names}
    raw |= {"train_data_dir": str(folder / "raw"), "unet_config": str(folder / "raw.json"), "camera": "sony_a7s2"}
    config = PNNPConfig(**raw, output_dir=str(folder / "pnnp"), resolution=16, train_batch_size=2)
    watched["pnnp"] = Watch(config.ema_decay)
    Trainer(config, PNNPRecipe(config), [watched["pnnp"]]).train()
    windows = {
        **{name: common[name] for name in (*names, "train_data_dir", "resolution", "channels", "train_batch_size")},
        **{"output_dir": str(folder / "forward_models"), "unet_config": str(folder / "unet.json")},
    }
    config = ForwardModelConfig(**windows, simulated_views=5)
    watched["forward_models"] = Watch(config.ema_decay)
    recipe = ForwardModelRecipe(config, CropForwardModel(4, 8))
    Trainer(config, recipe, [watched["forward_models"]]).train()
    text = {
        "train_data_dir": str(folder / "photos"),
        "instance_prompt": "a red cat",
        "class_prompt": "a cat",
        "class_data_dir": str(folder / "class"),
        "num_class_images": 3,
        "resolution": 16,
        "channels": 3,
        "train_batch_size": 3,
        "learning_rate": 3e-2,
        "lora_rank": 2,
        "noise": "assignment",
    }
    run("lora", DomainStudioTextRecipe, "text", **text)
    for name in ("class_prompt", "class_data_dir", "num_class_images", "noise"):
        text.pop(name)
    run("ambient_lora", AmbientTextRecipe, "text", **text, sigma=0.3)
    real = torch.as_tensor(grey.astype(np.uint8)).float()[:, None] / 127.5 - 1
    return SimpleNamespace(folder=folder, watched=watched, common=common, real=real)


def load(models, name):
    pipeline = DiffusionPipeline.from_pretrained(models.folder / name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def in_front_of(pipeline, **call):
    """Compares One More Step with the same by hand: its step in front, then the base's own call."""
    base, call = pipeline.sd_pipeline, {**call, "output_type": "latent"}
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(**call, generator=seeded()).images
    generator = seeded()
    channels, size = pipeline.oms_module.config.in_channels, base.unet.config.sample_size
    pure = torch.randn(1, channels, size, size, generator=generator)
    fresh = torch.randn(pure.shape, generator=generator)
    with torch.no_grad():
        if "prompt" in call:
            prediction = pipeline.oms_module(pure, pipeline._encode([call["prompt"]])).sample
        else:
            prediction = pipeline.oms_module(pure).sample
    a = base.scheduler.alphas_cumprod[base.scheduler.timesteps[0]]
    latents = a.sqrt() * -prediction + (1 - a).sqrt() * fresh
    expected = base(**call, latents=latents, generator=generator).images
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    return found


UNCORRECTED = {"injection": 1.0, "boundary": None, "fixed_point_iterations": 20}


def ends_return(pipeline, images, **call):
    """Compares the frames at the ends, which nothing corrects, with the images themselves."""
    pipeline.set_progress_bar_config(disable=True)
    call = {**UNCORRECTED, **call, "output_type": "pt"}
    frames = pipeline(*images, weights=[0.0, 1.0], num_inference_steps=20, **call).images
    torch.testing.assert_close(frames, torch.stack(list(images)), atol=1e-3, rtol=0)


def adapts(base, **alignment):
    """Compares the pipeline over a base's network with `align` by hand."""
    settings = {"num_steps": 10, "strength": 0.3, "guidance_weight": 1.0, "factor": 2, **alignment}
    pipeline = SDATTAPipeline.from_pipe(base, classifier=classifier(), alignment=settings)
    pipeline.set_progress_bar_config(disable=True)
    images = torch.rand(2, 1, 8, 8, generator=seeded(1))
    generators = [[seeded(0), seeded(1)] for _ in range(2)]
    found = pipeline(images, generator=generators[0], output_type="pt").images
    by_hand = align(base.unet, base.scheduler, images * 2 - 1, AlignConfig(**settings), generator=generators[1])
    torch.testing.assert_close(found, (by_hand + 1) / 2, atol=1e-5, rtol=0)


def classifier():
    torch.manual_seed(0)
    return ImageClassifierFeatures(sample_size=8, block_out_channels=(4,), feature_dim=6).eval()


def not_taken(config, argument, capsys):
    """Asks for an argument that a recipe does not have."""
    with pytest.raises(SystemExit):
        parse_config(config, [f"--{argument}", "1", "--output_dir", "out", "--max_train_steps", "1"])
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"error: unknown arguments: --{argument} 1" in message


IMAGES = tuple(torch.rand(2, 1, 8, 8, generator=seeded(2)))

# ---------------------------------------------------------------- One More Step


@row(
    ("oms", "mmd_ddm"),
    "One More Step over a few-step-tuned base",
    "works",
    "It starts at the tuned grid's first timestep, and a call that names no steps takes the tuned ones.",
)
def _(models, capsys):
    base = DiffusionPipeline.from_pretrained(asset_path("digits16-5-steps"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # other timesteps than the tuned ones
        found = in_front_of(OMSPipeline(ExactStep(0.5), base))
    assert base.scheduler.timesteps.tolist() == base.config["tuned_timesteps"] == [800, 600, 400, 200, 0]
    assert found.shape == (1, 1, 16, 16)


@row(
    ("oms", "immiscible"),
    "One More Step over an immiscibly trained base",
    "works",
    "The base is sampled as before; give it a deterministic sampler, as ever after immiscible training.",
)
def _(models, capsys):
    pipeline = OMSPipeline.from_pretrained(models.folder / "oms", base=load(models, "immiscible"))
    in_front_of(pipeline, num_inference_steps=5)


@row(
    ("oms", "domain_studio"),
    "One More Step over a few-shot-adapted base",
    "works",
    "A module that was trained for the source fits: space and schedule stay; train one anew for the new images' mean.",
)
def _(models, capsys):
    pipeline = OMSPipeline.from_pretrained(models.folder / "oms", base=load(models, "domain_studio"))
    in_front_of(pipeline, num_inference_steps=5)


@row(
    ("oms", "noise_diffusion"),
    "NoiseDiffusion made from a pipeline with One More Step",
    "works",
    "`from_pipe` takes the base out: frames start from images, so there is no step to add.",
)
def _(models, capsys):
    base = load(models, "immiscible")
    call = {"num_frames": 2, "num_inference_steps": 5, "output_type": "pt"}
    frames = []
    for given in (base, OMSPipeline.from_pretrained(models.folder / "oms", base=base)):
        pipeline = NoiseDiffusionPipeline.from_pipe(given)
        pipeline.set_progress_bar_config(disable=True)
        frames.append(pipeline(*IMAGES, **call).images)
    assert torch.equal(*frames)


@row(
    ("oms", "sda"),
    "SDA made from a pipeline with One More Step",
    "works",
    "`from_pipe` takes the base out: images are noised only half way, so there is no step to add.",
)
def _(models, capsys):
    adapts(OMSPipeline.from_pretrained(models.folder / "oms", base=load(models, "immiscible")))


@row(
    ("oms", "immiscible"),
    "Immiscible noise in the training of One More Step",
    "refused",
    "The module must learn the mean image from noise that knows nothing of the image; `--noise` is no argument of it.",
)
def _(models, capsys):
    not_taken(OMSConfig, "noise", capsys)


# ---------------------------------------------------------------- NoiseDiffusion


@row(
    ("noise_diffusion", "domain_studio"),
    "NoiseDiffusion between images of a few-shot-adapted model",
    "works",
    "`NoiseDiffusionPipeline.from_pipe` or `from_pretrained` of the adapted repo; end points return.",
)
def _(models, capsys):
    ends_return(NoiseDiffusionPipeline.from_pretrained(models.folder / "domain_studio"), IMAGES)


@row(
    ("noise_diffusion", "immiscible"),
    "NoiseDiffusion with an immiscibly trained model",
    "works",
    "Inversion and decoding are deterministic, as immiscible training wants; end points return.",
)
def _(models, capsys):
    ends_return(NoiseDiffusionPipeline.from_pipe(load(models, "immiscible")), IMAGES)


@row(
    ("noise_diffusion", "ambient"),
    "NoiseDiffusion with an ambiently trained model",
    "works",
    "Of one with a schedule of betas, `--prediction_type epsilon`; end points return.",
)
def _(models, capsys):
    ends_return(NoiseDiffusionPipeline.from_pipe(load(models, "ambient")), IMAGES)


@row(
    ("ambient", "immiscible"),
    "Immiscible noise in ambient diffusion",
    "refused",
    "What is learned from noisy samples supposes noise that knows nothing of them; `--noise` is `gaussian`.",
)
def _(models, capsys):
    with pytest.raises(ValueError, match="`noise` must be 'gaussian' without `noise_offset`, got 'assignment'"):
        AmbientConfig(**models.common, sigma=0.3, noise="assignment")


@row(
    ("geometry", "immiscible"),
    "Geometry of an immiscibly trained model",
    "works",
    "`ScoreField.from_pipeline` reads its field as it is; trained on paired noise it is no score, so no likelihood.",
)
def _(models, capsys):
    base = load(models, "immiscible")
    field, x = ScoreField.from_pipeline(base), torch.randn(2, 1, 8, 8, generator=seeded(3))
    level = len(field.levels.sigma) // 2
    with torch.no_grad():
        found = field.eps(x, field.levels.sigma[level].item())
        torch.testing.assert_close(found, base.unet(x, field.levels.t[level]).sample, atol=1e-5, rtol=0)
        same = ScoreField.from_pipeline(NoiseDiffusionPipeline.from_pipe(base))
        torch.testing.assert_close(same.eps(x, field.levels.sigma[level].item()), found, atol=1e-6, rtol=0)


@row(
    ("noise2score", "immiscible"),
    "Noise2Score with an immiscibly trained model",
    "works",
    "`score_from_diffusion` reads it as it is: the formula gives the model's own estimate of the clean image.",
)
def _(models, capsys):
    base = load(models, "immiscible")
    a = base.scheduler.alphas_cumprod[100]
    sigma = ((1 - a) / a).sqrt().item()
    y = torch.stack(IMAGES) * 2 - 1
    found = posterior_mean(y, score_from_diffusion(base.unet, base.scheduler, sigma), AdditiveGaussianNoise(sigma))
    with torch.no_grad():
        noise = base.unet(a.sqrt() * y, 100).sample
    torch.testing.assert_close(found, y - sigma * noise, atol=1e-4, rtol=1e-4)


@row(
    ("score_frameworks", "immiscible"),
    "Score frameworks with an immiscibly trained model",
    "works",
    "Take `predictor='probability_flow'` without corrector: the others draw noise, for which such a model is biased.",
)
def _(models, capsys):
    base = load(models, "immiscible")
    field, x = ScoreField.from_pipeline(base), torch.randn(2, 1, 8, 8, generator=seeded(3))
    settings = {"sde": "ve", "predictor": "probability_flow", "corrector_steps": 0, "sigma_min": 0.05}
    base.scheduler = ScoreSDEScheduler.from_config(base.scheduler.config, **settings)
    found = base(latents=x, num_inference_steps=5, output_type="latent").images
    high = base.scheduler.init_noise_sigma
    sigmas, y = np.geomspace(high, 0.05, 5).tolist(), high * x
    for now, then in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        with torch.no_grad():
            y = y + (then - now) * field.eps(y / (1 + now**2) ** 0.5, now, beyond=True)
    torch.testing.assert_close(found, y, atol=1e-3, rtol=1e-3)


@row(
    ("score_frameworks", "mmd_ddm"),
    "Anomaly maps of a few-step-tuned model",
    "refused",
    "Maps begin between the tuned timesteps, and the network is good at no others: take the model before tuning.",
)
def _(models, capsys):
    with pytest.raises(ValueError, match="AnomalyDetectionPipeline must have a network that is good at every"):
        AnomalyDetectionPipeline.from_pipe(load(models, "mmd_ddm"))


@row(
    ("noise2score", "pnnp"),
    "Noise2Score of raw images that PNNP made noisy",
    "works",
    "`RawNoiseSynthesizer.corrupt`, terms shot and pixel: Poisson noise of scale K ratio / range, and read noise.",
)
def _(models, capsys):
    synthesizer = RawNoiseSynthesizer(terms=["shot", "pixel"], augment=False, iso=(800, 800), ratio=(100, 100))
    camera, clean = synthesizer.camera, torch.full((8, 4, 128, 128), 0.2)
    share = 100 / (camera.white_level - camera.black_level)
    noise = PoissonGaussianNoise(camera.gain(800) * share, synthesizer.pixel_std(800) * share)
    found, same = synthesizer.corrupt(clean, seeded()), noise.corrupt(clean, seeded(1))
    torch.testing.assert_close(found.mean(), same.mean(), atol=0, rtol=0.01)
    torch.testing.assert_close(found.std(), same.std(), atol=0, rtol=0.01)


@row(
    ("pnnp", "immiscible"),
    "Immiscible noise in the training of raw denoising",
    "refused",
    "The noise is the camera's, and knows nothing of other images; `--noise` is no argument of it.",
)
def _(models, capsys):
    not_taken(PNNPConfig, "noise", capsys)


@row(
    ("forward_models", "immiscible"),
    "Immiscible noise in training through a forward model",
    "refused",
    "What is noised is one view of a signal, and near views are of other signals; `--noise` is no argument of it.",
)
def _(models, capsys):
    not_taken(ForwardModelConfig, "noise", capsys)


@row(
    ("noise_diffusion", "mmd_ddm"),
    "NoiseDiffusion with a few-step-tuned model",
    "refused",
    "Inversion leaves the tuned timesteps, and the network is good at no others: take the model before tuning.",
)
def _(models, capsys):
    message = r"NoiseDiffusionPipeline must have a network that is good at every timestep, .*\[800, 600, 400, 200, 0\]"
    with pytest.raises(ValueError, match=message):
        NoiseDiffusionPipeline.from_pretrained(asset_path("digits16-5-steps"))
    with pytest.raises(ValueError, match="take the model that it was tuned from"):
        NoiseDiffusionPipeline.from_pipe(load(models, "mmd_ddm"))


@row(
    ("noise_diffusion", "sda"),
    "SDA's classifier on NoiseDiffusion's frames, with the same network",
    "works",
    "`from_pipe` goes both ways, and frames with `output_type='pt'` are images like any others.",
)
def _(models, capsys):
    frames = NoiseDiffusionPipeline.from_pipe(load(models, "immiscible"))
    frames.set_progress_bar_config(disable=True)
    images = frames(*IMAGES, num_frames=2, num_inference_steps=5, output_type="pt").images
    pipeline = SDATTAPipeline.from_pipe(frames, classifier=classifier())
    with torch.no_grad():
        expected = pipeline.classifier(images * 2 - 1)
    torch.testing.assert_close(pipeline(images, ensemble="source").logits, expected, atol=1e-5, rtol=0)
    assert NoiseDiffusionPipeline.from_pipe(pipeline).unet is frames.unet


# ---------------------------------------------------------------- speech


@row(
    ("noise_diffusion", "sgmse"),
    "NoiseDiffusion made from a speech enhancer",
    "refused",
    "A speech enhancer's process ends in the recording, not in pure noise; its scheduler is no DDIM.",
)
def _(models, capsys):
    with pytest.raises(ValueError, match="expected .*scheduler"):
        NoiseDiffusionPipeline.from_pipe(speech_enhancer())


@row(
    ("sgmse", "immiscible"),
    "Immiscible noise in the training of speech enhancement",
    "refused",
    "The way back starts from a recording with fresh noise, near to nothing; `--noise` is no argument of it.",
)
def _(models, capsys):
    not_taken(SGMSEConfig, "noise", capsys)


# ---------------------------------------------------------------- SDA


@row(
    ("sda", "mmd_ddm"),
    "SDA with a few-step-tuned model",
    "refused",
    "Adaptation walks through timesteps at which the tuned network is no good: take the model before tuning.",
)
def _(models, capsys):
    with pytest.raises(ValueError, match="SDATTAPipeline must have a network that is good at every timestep, got"):
        SDATTAPipeline.from_pipe(load(models, "mmd_ddm"), classifier=classifier())
    with pytest.raises(ValueError, match="take the model that it was tuned from"):
        SDATTAPipeline.from_pretrained(asset_path("digits16-5-steps"))


@row(
    ("sda", "immiscible"),
    "SDA with an immiscibly trained model",
    "works",
    "Take `alignment={'sampler': 'ddim'}`: the default draws noise at every step, for which such a model is biased.",
)
def _(models, capsys):
    adapts(load(models, "immiscible"), sampler="ddim")


@row(
    ("sda", "domain_studio"),
    "SDA with a few-shot-adapted model",
    "works",
    "`SDATTAPipeline.from_pipe`; images are then adapted to the new domain, of which the classifier must be.",
)
def _(models, capsys):
    adapts(load(models, "domain_studio"))


# ---------------------------------------------------------------- training after training


@row(
    ("domain_studio", "immiscible"),
    "DomainStudio of an immiscibly trained model",
    "works",
    "The source is any denoiser that is good at every timestep; the pair losses begin at 0.",
)
def _(models, capsys):
    first = models.watched["domain_studio"].logs[0]
    assert first["pair"] == pytest.approx(0, abs=1e-6)
    assert first["hf_pair"] == pytest.approx(0, abs=1e-6)
    assert models.watched["domain_studio"].logs[-1]["pair"] > 1e-6


@row(
    ("domain_studio", "mmd_ddm"),
    "DomainStudio of a few-step-tuned model",
    "refused",
    "The source is asked at every timestep, and a tuned one is no good there: adapt first, tune after that.",
)
def _(models, capsys):
    config = {**models.common, "output_dir": str(models.folder / "out")}
    config = DomainStudioConfig(**config, pretrained_model_name_or_path=str(models.folder / "mmd_ddm"))
    with pytest.raises(ValueError, match="must be a model that is good at every timestep, .* tune after that"):
        Trainer(config, DomainStudioRecipe(config)).train()


def comes_nearer(models, before, after):
    """Compares squared MMDs of samples from the same noise, before and after tuning."""
    found = []
    for name in (before, after):
        images = load(models, name)(batch_size=64, num_inference_steps=3, generator=seeded(), output_type="pt").images
        found.append(mmd2((images * 2 - 1).flatten(1), models.real.flatten(1), "polynomial").item())
    assert found[1] < 0.9 * found[0]


@row(
    ("mmd_ddm", "immiscible"),
    "MMD-DDM of an immiscibly trained model",
    "works",
    "The chain is deterministic, as immiscible training wants; samples come nearer to the images.",
)
def _(models, capsys):
    comes_nearer(models, "immiscible", "mmd_ddm")


@row(
    ("mmd_ddm", "domain_studio"),
    "MMD-DDM of a few-shot-adapted model",
    "works",
    "Adapt first, tune after that; a model that learns its variance is refused by name.",
)
def _(models, capsys):
    comes_nearer(models, "domain_studio", "mmd_ddm of domain_studio")


@row(
    ("mmd_ddm", "immiscible"),
    "Immiscible noise in MMD-DDM",
    "refused",
    "The loss compares sets of images, so that pairing changes nothing; `--noise` is no argument of it.",
)
def _(models, capsys):
    not_taken(MMDDDMConfig, "noise", capsys)
    generated, order = torch.randn(8, 5, generator=seeded()), torch.randperm(8, generator=seeded())
    real = torch.randn(8, 5, generator=seeded(1))
    kernel = "polynomial"
    assert mmd2(generated, real, kernel).item() == pytest.approx(mmd2(generated[order], real, kernel).item(), rel=1e-5)


def is_assigned(models, name):
    """Of all ways to pair the noise of a batch with its samples, none that swaps two of them is shorter."""
    for x0, noise in models.watched[name].pairs:
        cost = torch.cdist(x0.double(), noise.double()).square()
        own = cost.diagonal()
        assert (own[:, None] + own[None] <= cost + cost.T + 1e-3).all()
    assert len(models.watched[name].pairs) >= 4


@row(
    ("domain_studio", "immiscible"),
    "Immiscible noise in DomainStudio of text-to-image models",
    "works",
    "`--noise`, as in every recipe of text-to-image models: of all pairings in a batch the nearest.",
)
def _(models, capsys):
    is_assigned(models, "lora")
    is_assigned(models, "immiscible")


@row(
    ("domain_studio", "immiscible"),
    "Immiscible noise in DomainStudio of models of images alone",
    "refused",
    "The adapted model and its source must see noise as the source did in training; `--noise` is no argument of it.",
)
def _(models, capsys):
    not_taken(DomainStudioConfig, "noise", capsys)


# ---------------------------------------------------------------- quantized networks


def in_bits(models, name, bits):
    """Loads a pipeline whose network is quantized while it loads."""
    config = PipelineQuantizationConfig(quant_mapping={"unet": QDiffConfig(weight_bits=bits)})
    pipeline = DiffusionPipeline.from_pretrained(models.folder / name, quantization_config=config)
    assert pipeline.unet.is_quantized
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@row(
    ("q_diffusion", "oms"),
    "One More Step over a quantized base",
    "works",
    "Quantize the base alone; the module, which runs once, stays as it is. In 8 and in 4 bits.",
)
def _(models, capsys):
    for bits in (8, 4):
        pipeline = OMSPipeline.from_pretrained(models.folder / "oms", base=in_bits(models, "immiscible", bits))
        in_front_of(pipeline, num_inference_steps=5)


@row(
    ("q_diffusion", "noise_diffusion"),
    "NoiseDiffusion with a quantized network",
    "works",
    "Inversion and decoding use the same rounded network, so end points return; in 8 and in 4 bits.",
)
def _(models, capsys):
    for bits in (8, 4):
        ends_return(NoiseDiffusionPipeline.from_pipe(in_bits(models, "immiscible", bits)), IMAGES)


@row(
    ("q_diffusion", "sda"),
    "SDA with a quantized network",
    "works",
    "The same as `align` with it by hand; in 8 and in 4 bits.",
)
def _(models, capsys):
    for bits in (8, 4):
        adapts(in_bits(models, "immiscible", bits))


@row(
    ("q_diffusion", "mmd_ddm"),
    "Quantizing a few-step-tuned model",
    "works",
    "After tuning, calibrated at the tuned timesteps; the pipeline keeps its default steps. In 8 and in 4 bits.",
)
def _(models, capsys):
    plain = load(models, "mmd_ddm")
    call = {"batch_size": 4, "output_type": "pt"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # other timesteps than the tuned ones
        wanted = plain(**call, generator=seeded()).images
        found = [in_bits(models, "mmd_ddm", bits)(**call, generator=seeded()).images for bits in (8, 4)]
    errors = [(images - wanted).square().mean().item() for images in found]
    assert 0 < errors[0] < min(errors[1], 0.01 * wanted.var().item())


@row(
    ("q_diffusion", "lora"),
    "LoRA over a quantized network",
    "works",
    "`load_lora_weights` puts the layers on top of the integers; they cannot be fused, `dequantize` first.",
)
def _(models, capsys):
    config = PipelineQuantizationConfig(quant_mapping={"unet": QDiffConfig(weight_bits=8)})
    outputs = []
    for adapted in (False, True):
        pipeline = DiffusionPipeline.from_pretrained(models.folder / "text", quantization_config=config)
        pipeline.set_progress_bar_config(disable=True)
        if adapted:
            with_lora(models, pipeline)
            assert any(isinstance(getattr(m, "base_layer", None), QuantLinear) for m in pipeline.unet.modules())
        outputs.append(pipeline("a cat", num_inference_steps=2, output_type="pt", generator=seeded()).images)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="single memory location"):
        pipeline.fuse_lora()


# ---------------------------------------------------------------- LoRA


def lora_average(models, name):
    """Compares saved LoRA layers with the average of the layers after every update, by hand."""
    layers = load_file(models.folder / name / "pytorch_lora_weights.safetensors")
    for key, value in models.watched[name].average.items():
        key = key.replace("lora_A.default", "lora.down").replace("lora_B.default", "lora.up")
        saved = next(layer for end, layer in layers.items() if key.endswith(end.removeprefix("unet.")))
        torch.testing.assert_close(saved, value, atol=1e-6, rtol=1e-5)


def with_lora(models, pipeline):
    """Loads DomainStudio's LoRA, and returns what is to be undone."""
    pipeline.load_lora_weights(models.folder / "lora")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@row(
    ("oms", "lora"),
    "One More Step over a base with LoRA",
    "works",
    "`load_lora_weights` of the pipeline reaches the base; the module stays as it is.",
)
def _(models, capsys):
    plain = in_front_of(OMSPipeline(module(), stable_diffusion()), prompt="a cat", num_inference_steps=3)
    pipeline = with_lora(models, OMSPipeline(module(), stable_diffusion()))
    adapted = in_front_of(pipeline, prompt="a cat", num_inference_steps=3)
    assert (plain - adapted).abs().max() > 1e-3


@row(
    ("noise_diffusion", "lora"),
    "NoiseDiffusion with LoRA, by DomainStudio or any other",
    "works",
    "`load_lora_weights` before the call; end points return, the frames between are the adapted model's.",
)
def _(models, capsys):
    images = torch.rand(2, 3, 16, 16, generator=seeded())
    frames = []
    for adapted in (False, True):
        pipeline = StableDiffusionNoiseDiffusionPipeline.from_pipe(stable_diffusion())
        if adapted:
            with_lora(models, pipeline)
        pipeline.set_progress_bar_config(disable=True)
        call = {"prompt": "a red cat", "num_inference_steps": 15, "guidance_scale": 1.0, "output_type": "latent"}
        frames.append(pipeline(images[0], images[1], weights=[0.0, 0.5], **UNCORRECTED, **call).images)
    torch.testing.assert_close(frames[0][0], frames[1][0], atol=5e-3, rtol=0)
    assert (frames[0][1] - frames[1][1]).abs().max() > 0.01


@row(
    ("domain_studio", "lora"),
    "DomainStudio by LoRA",
    "works",
    "`train domain_studio_text --lora_rank 4`, for text-to-image models; for others `--lora_rank` is no argument.",
)
def _(models, capsys):
    lora_average(models, "lora")
    not_taken(DomainStudioConfig, "lora_rank", capsys)


@row(
    ("ambient", "lora"),
    "Ambient diffusion by LoRA",
    "works",
    "`train ambient_text --lora_rank 4`, for text-to-image models; for others `--lora_rank` is no argument.",
)
def _(models, capsys):
    lora_average(models, "ambient_lora")
    not_taken(AmbientConfig, "lora_rank", capsys)


@row(
    ("immiscible", "lora"),
    "Immiscible training by LoRA",
    "refused",
    "Its networks are trained whole; `--lora_rank` is no argument of it.",
)
def _(models, capsys):
    not_taken(ImmiscibleConfig, "lora_rank", capsys)


@row(
    ("mmd_ddm", "lora"),
    "MMD-DDM by LoRA",
    "refused",
    "Its networks are tuned whole; `--lora_rank` is no argument of it.",
)
def _(models, capsys):
    not_taken(MMDDDMConfig, "lora_rank", capsys)


@row(
    ("noise2score", "lora"),
    "Noise2Score by LoRA",
    "refused",
    "Its networks are trained whole; `--lora_rank` is no argument of it.",
)
def _(models, capsys):
    not_taken(Noise2ScoreConfig, "lora_rank", capsys)


@row(
    ("pnnp", "lora"),
    "PNNP by LoRA",
    "refused",
    "Its networks are trained whole; `--lora_rank` is no argument of it.",
)
def _(models, capsys):
    not_taken(PNNPConfig, "lora_rank", capsys)


@row(
    ("forward_models", "lora"),
    "Diffusion with forward models by LoRA",
    "refused",
    "Its networks are trained whole; `--lora_rank` is no argument of it.",
)
def _(models, capsys):
    not_taken(ForwardModelConfig, "lora_rank", capsys)


@row(
    ("sda", "lora"),
    "SDA's fine-tuning by LoRA",
    "refused",
    "Classifiers are tuned whole, or by `--head_only`; `--lora_rank` is no argument of it.",
)
def _(models, capsys):
    not_taken(SDAClassifierConfig, "lora_rank", capsys)


# ---------------------------------------------------------------- averaged weights


def averaged(models, name, part="unet"):
    """Compares saved weights with the average of the weights after every update, by hand."""
    saved = load_file(models.folder / name / part / "diffusion_pytorch_model.safetensors")
    for key, value in models.watched[name].average.items():
        torch.testing.assert_close(saved[key], value, atol=1e-6, rtol=1e-5)


@row(("immiscible", "ema"), "EMA of Immiscible Diffusion", "works", "What is saved is the average.")
def _(models, capsys):
    averaged(models, "immiscible")


@row(("ambient", "ema"), "EMA of ambient diffusion", "works", "What is saved is the average, of LoRA layers too.")
def _(models, capsys):
    averaged(models, "ambient")


@row(("domain_studio", "ema"), "EMA of DomainStudio", "works", "What is saved is the average, of LoRA layers too.")
def _(models, capsys):
    averaged(models, "domain_studio")


@row(("mmd_ddm", "ema"), "EMA of MMD-DDM", "works", "What is saved is the average.")
def _(models, capsys):
    averaged(models, "mmd_ddm")


@row(("oms", "ema"), "EMA of One More Step", "works", "What is saved is the module's average.")
def _(models, capsys):
    averaged(models, "oms", "oms_module")


@row(("noise2score", "ema"), "EMA of Noise2Score", "works", "What is saved is the average.")
def _(models, capsys):
    averaged(models, "noise2score")


@row(("sgmse", "ema"), "EMA of speech enhancement", "works", "What is saved is the average.")
def _(models, capsys):
    soundfile = pytest.importorskip("soundfile")
    for name in ("speech", "noise"):
        (models.folder / name).mkdir()
        soundfile.write(models.folder / name / "a.wav", np.random.default_rng(0).uniform(-1, 1, 800), 8000)
    (models.folder / "speech-unet.json").write_text(json.dumps(SMALL))
    config = SGMSEConfig(
        train_data_dir=str(models.folder / "speech"), noise_dir=str(models.folder / "noise"),
        output_dir=str(models.folder / "sgmse"), unet_config=str(models.folder / "speech-unet.json"), **SOUND,
        num_frames=8, train_batch_size=1, max_train_steps=4, learning_rate=1e-3, ema_decay=0.5,
        num_validation_images=0,
    )  # fmt: skip
    models.watched["sgmse"] = Watch(config.ema_decay)
    Trainer(config, SGMSERecipe(config), [models.watched["sgmse"]]).train()
    averaged(models, "sgmse")


@row(("forward_models", "ema"), "EMA of diffusion with forward models", "works", "What is saved is the average.")
def _(models, capsys):
    averaged(models, "forward_models")


@row(("pnnp", "ema"), "EMA of PNNP", "works", "What is saved is the average.")
def _(models, capsys):
    averaged(models, "pnnp")


@row(("noise_diffusion", "ema"), "NoiseDiffusion with averaged weights", "works", "A saved repo holds the average.")
def _(models, capsys):
    unet = NoiseDiffusionPipeline.from_pretrained(models.folder / "immiscible").unet
    for key, value in models.watched["immiscible"].average.items():
        torch.testing.assert_close(unet.state_dict()[key], value, atol=1e-6, rtol=1e-5)


@row(("sda", "ema"), "SDA with averaged weights", "works", "A saved repo holds the average.")
def _(models, capsys):
    unet = SDATTAPipeline.from_pretrained(models.folder / "immiscible", classifier=classifier()).unet
    for key, value in models.watched["immiscible"].average.items():
        torch.testing.assert_close(unet.state_dict()[key], value, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.what.replace(" ", "-"))
def test_a_pair(models, capsys, entry):
    entry.check(models, capsys)


def test_every_method_has_a_row():
    methods = sorted(p.name for p in (ROOT / "diffusers_ext" / "methods").iterdir() if (p / "__init__.py").is_file())
    for method in methods:
        assert any(method in entry.parts for entry in TABLE), f"{method} needs rows in this table and in the docs"
    assert {part for entry in TABLE for part in entry.parts} == {*methods, "lora", "ema"}


def test_the_table_of_the_documents_is_this_one():
    page = (ROOT / "docs" / "guides" / "composition.md").read_text()
    assert re.findall(r"^\| (?!---|together).*\|$", page, re.MULTILINE) == [
        f"| {entry.what} | {entry.outcome} | {entry.sentence} |" for entry in TABLE
    ]
