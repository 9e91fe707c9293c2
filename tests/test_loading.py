"""Every class that a repo can name, loaded in every way that Diffusers offers, each way in a process of its own."""

import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    UNet2DModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

import diffusers_ext
from diffusers_ext import (
    AmbientPipeline,
    AnnealedLangevinScheduler,
    AnomalyDetectionPipeline,
    BlurForwardModel,
    CameraProfile,
    CropForwardModel,
    DarkFrameModel,
    DownsampleForwardModel,
    ForwardModelPipeline,
    GeneratorForwardModel,
    ImageClassifierFeatures,
    ImageGenerationPipeline,
    MaskForwardModel,
    NativeGain,
    Noise2ScoreConvNet,
    Noise2ScorePipeline,
    Noise2ScoreUNet,
    NoiseDiffusionPipeline,
    ObservationMLP,
    OMSPipeline,
    OUVEScheduler,
    ProjectionForwardModel,
    RawDenoisePipeline,
    RawUNet,
    ReconstructionPipeline,
    SBVEScheduler,
    ScoreSDEScheduler,
    SDATTAPipeline,
    SensorNoisePipeline,
    SensorNoiseProxy,
    SGMSEUNet2DModel,
    SongUNet2DModel,
    SpeechEnhancementPipeline,
    StableDiffusionNoiseDiffusionPipeline,
    StableDiffusionXLNoiseDiffusionPipeline,
    VolumeForwardModel,
    WarpForwardModel,
    save_repo,
)
from diffusers_ext.hub.repo import pipeline_code

from . import processes
from .hub.server import HubServer
from .methods.oms.tiny import module as text_module
from .methods.oms.tiny import pixel_module, stable_diffusion, stable_diffusion_xl, text_encoder, tokenizer
from .methods.sgmse.tiny import SMALL as SPEECH

ROOT = Path(__file__).resolve().parent.parent


def unet(channels=1, **config):
    return UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 8), norm_num_groups=2,
        layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **config,
    )  # fmt: skip


def vae():
    return AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(8, 8), norm_num_groups=2, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def clean_samples():
    return DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")


def lifting_unet(channels):
    """A UNet of signals of as many channels, which reads what is lifted, its coverage, and flags."""
    return UNet2DModel(
        sample_size=8, in_channels=5 * channels + 1, out_channels=channels, block_out_channels=(8, 8),
        norm_num_groups=2, layers_per_block=1, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip


IMAGE = torch.linspace(-1, 1, 64).sin().reshape(1, 1, 8, 8)


def raw_unet():
    """A network that does not start as nothing at all."""
    network = RawUNet(base_channels=2).eval()
    torch.nn.init.normal_(network.conv10_1.weight)
    return network


def dark():
    """Dark frames of 8 x 12 pixels whose maps, deviations and residuals are numbers."""
    made = DarkFrameModel(8, 12, (400.0, 800.0), num_residuals=5, black_level=64.0).eval()
    for buffer in (b for b in made.buffers() if b.is_floating_point()):
        buffer.uniform_(0.5, 1.5)
    made.bad_pixels[2, 3] = True
    return made


def camera():
    return CameraProfile(1023, 64, (0.001, 0.0), (NativeGain(400, 800),)).to_dict()


def example(build, **call):
    return SimpleNamespace(build=build, call=call)


# Small examples of each class: how it is built, and the arguments of its call. A pipeline is called with a generator
# seeded 0 too; a model's call maps argument names to tensors; a scheduler has no call, its `set_timesteps(3)` counts.
EXAMPLES = {
    "ImageClassifierFeatures": [
        example(
            lambda: ImageClassifierFeatures(sample_size=8, block_out_channels=(4,), feature_dim=6).eval(),
            images=torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8),
        ),
    ],
    "ImageGenerationPipeline": [
        example(
            lambda: ImageGenerationPipeline(unet(), DDIMScheduler(clip_sample=False), image_scale=2.0),
            batch_size=2,
            num_inference_steps=2,
            output_type="pt",
        ),
        example(
            lambda: ImageGenerationPipeline(
                unet(num_class_embeds=4), FlowMatchEulerDiscreteScheduler(), null_class_label=3
            ),
            class_labels=torch.tensor([0, 2]),
            guidance_scale=2.0,
            num_inference_steps=2,
            output_type="pt",
        ),
        example(
            lambda: ImageGenerationPipeline(unet(2), DDIMScheduler(), vae=vae()),
            num_inference_steps=2,
            output_type="pt",
        ),
    ],
    "Noise2ScoreConvNet": [
        example(
            lambda: Noise2ScoreConvNet(base_channels=4, layers=3, sigma_conditioning=True, smoothing=0.1),
            sample=torch.linspace(0, 1, 128).reshape(2, 1, 8, 8),
        ),
    ],
    "Noise2ScorePipeline": [
        example(
            lambda: Noise2ScorePipeline(
                Noise2ScoreUNet(base_channels=3, score_scale=1e4, smoothing=0.03).eval(), noise="gaussian"
            ),
            image=torch.linspace(0, 1, 480).reshape(1, 1, 20, 24),
            blind_range=(0.02, 0.2),
            output_type="pt",
        ),
        example(
            lambda: Noise2ScorePipeline(unet(), smoothing=0.1, score_scale=3.0),
            image=torch.linspace(0, 1, 128).reshape(2, 1, 8, 8),
            noise="poisson",
            noise_parameter=0.1,
            output_type="pt",
        ),
    ],
    "Noise2ScoreUNet": [
        example(
            lambda: Noise2ScoreUNet(base_channels=3, shared_blocks=True, score_scale=1e4),
            sample=torch.linspace(0, 1, 480).reshape(1, 1, 20, 24),
        ),
    ],
    "AmbientPipeline": [
        example(
            lambda: AmbientPipeline(unet(), EDMEulerScheduler(sigma_data=0.6), image_scale=2.0),
            batch_size=2,
            num_inference_steps=3,
            stop_at_sigma=0.5,
            output_type="pt",
        ),
    ],
    "SongUNet2DModel": [
        example(
            lambda: SongUNet2DModel(8, 1, 1, base_channels=8, block_out_channels=(8, 12), layers_per_block=1),
            sample=torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8),
            timestep=torch.tensor(0.5),
        ),
    ],
    "NoiseDiffusionPipeline": [
        example(
            lambda: NoiseDiffusionPipeline(
                unet(2).eval(), DDIMScheduler(clip_sample=False), vae=vae().eval(), image_scale=2.0
            ),
            image_0=torch.linspace(0, 1, 3 * 256).reshape(3, 1, 16, 16),
            num_frames=2,
            num_inference_steps=4,
            gamma=0.2,
            output_type="pt",
        ),
    ],
    "StableDiffusionNoiseDiffusionPipeline": [
        example(
            lambda: StableDiffusionNoiseDiffusionPipeline(
                **stable_diffusion().components, requires_safety_checker=False
            ),
            image_0=torch.linspace(0, 1, 768).reshape(3, 16, 16),
            image_1=torch.linspace(1, 0, 768).reshape(3, 16, 16),
            prompt="a cat",
            prompt_1="a dog",
            guidance_scale=2.0,
            num_frames=1,
            num_inference_steps=4,
            output_type="pt",
        ),
    ],
    "StableDiffusionXLNoiseDiffusionPipeline": [
        example(
            lambda: StableDiffusionXLNoiseDiffusionPipeline(**stable_diffusion_xl().components, add_watermarker=False),
            image_0=torch.linspace(0, 1, 768).reshape(3, 16, 16),
            image_1=torch.linspace(1, 0, 768).reshape(3, 16, 16),
            guidance_scale=1.0,
            num_frames=1,
            num_inference_steps=4,
            output_type="latent",
        ),
    ],
    "OMSPipeline": [
        example(
            lambda: OMSPipeline(
                pixel_module(4),
                ImageGenerationPipeline(unet(num_class_embeds=4), DDIMScheduler(), null_class_label=3),
                image_scale=1.0,
            ),
            class_labels=[0, 2],
            oms_guidance_scale=2.0,
            num_inference_steps=2,
            output_type="pt",
        ),
        example(
            lambda: OMSPipeline(
                text_module(), stable_diffusion(), text_encoder(seed=9), tokenizer(), vae_scaling_factor=0.18215
            ),
            prompt="a cat",
            oms_prompt="dark",
            num_inference_steps=2,
            output_type="latent",
        ),
    ],
    "OMSUNet2DConditionModel": [
        example(
            lambda: text_module(),
            sample=torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8),
            encoder_hidden_states=torch.linspace(-1, 1, 24).reshape(1, 3, 8),
        ),
    ],
    "OMSUNet2DModel": [
        example(
            lambda: pixel_module(4),
            sample=torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8),
            class_labels=torch.tensor([1, 3]),
        ),
    ],
    "AnnealedLangevinScheduler": [example(lambda: AnnealedLangevinScheduler(sigma_max=20.0, steps_per_level=2))],
    "ScoreSDEScheduler": [example(lambda: ScoreSDEScheduler(sde="subvp", beta_max=15.0, corrector_steps=2))],
    "OUVEScheduler": [example(lambda: OUVEScheduler(theta=2.0, sigma_max=1.0, algorithm="transitions", eta=0.5))],
    "SBVEScheduler": [example(lambda: SBVEScheduler(k=2.5, algorithm="sde"))],
    "SGMSEUNet2DModel": [
        example(
            lambda: SGMSEUNet2DModel(**SPEECH, frequency_patch=2, residual=0.5, skip_pyramid=False),
            sample=torch.linspace(-1, 1, 512).reshape(1, 4, 16, 8),
            timestep=torch.tensor(0.5),
        ),
    ],
    "SpeechEnhancementPipeline": [
        example(
            lambda: SpeechEnhancementPipeline(
                SGMSEUNet2DModel(**SPEECH), OUVEScheduler(snr=0.4), 8000, 62, 16, frame_padding="reflection"
            ),
            audio=torch.linspace(-40, 40, 2000).sin().reshape(2, 1000),
            sample_rate=8000,
            num_inference_steps=2,
            output_type="pt",
        ),
    ],
    "DarkFrameModel": [example(dark, iso=500.0)],
    "RawDenoisePipeline": [
        example(
            lambda: RawDenoisePipeline(raw_unet(), dark(), 1023.0, 64.0, "BGGR"),
            raw=torch.linspace(60, 200, 96).reshape(8, 12),
            iso=500.0,
            ratio=2.0,
            output_type="pt",
        ),
        example(
            lambda: RawDenoisePipeline(raw_unet(), white_level=255.0, black_level=0.0),
            raw=torch.linspace(60, 200, 96).reshape(8, 12),
            output_type="pt",
        ),
    ],
    "RawUNet": [
        example(raw_unet, sample=torch.linspace(0, 1, 480).reshape(1, 4, 10, 12)),
        example(
            lambda: RawUNet(base_channels=2, residual=False), sample=torch.linspace(0, 1, 480).reshape(1, 4, 10, 12)
        ),
    ],
    "SensorNoisePipeline": [
        example(
            lambda: SensorNoisePipeline(SensorNoiseProxy(isos=(400, 800)), dark(), camera()),
            iso=500.0,
            num_frames=2,
            output_type="pt",
        ),
    ],
    "SensorNoiseProxy": [
        example(
            lambda: SensorNoiseProxy(4, 1, (0.001, 0.0), (400, 800, 1600), (400, 1600)),
            z1=torch.linspace(-2, 2, 24).reshape(2, 12),
            z2=torch.linspace(2, -2, 24).reshape(2, 12),
            iso=torch.tensor([500.0, 900.0]),
        ),
    ],
    "ForwardModelPipeline": [
        example(
            lambda: ForwardModelPipeline(
                ObservationMLP((1, 8, 8), (1, 12), angle_harmonics=2, hidden_size=8, num_blocks=1).eval(),
                clean_samples(),
                VolumeForwardModel(12, num_samples=4, output="brightness"),
                observation_scale=4.0,
                null_context=True,
            ),
            observations=torch.linspace(-1, 1, 48).sin().reshape(2, 2, 1, 12),
            parameters=torch.linspace(0, 3, 4).reshape(2, 2),
            guidance_scale=2.0,
            num_views=2,
            num_inference_steps=2,
        ),
        example(
            lambda: ForwardModelPipeline(
                lifting_unet(2), clean_samples(), GeneratorForwardModel(vae(), then=CropForwardModel(8, 16))
            ),
            observations=torch.linspace(-1, 1, 64).reshape(1, 1, 1, 8, 8),
            parameters=torch.tensor([[[3, 5]]]),
            num_views=1,
            num_inference_steps=2,
        ),
    ],
    "ObservationMLP": [
        example(
            lambda: ObservationMLP((2, 3), (4,), parameter_size=2, hidden_size=8, signal_range=(0.0, 2.0)),
            sample=torch.linspace(-3, 3, 36).reshape(2, 18),
            timestep=torch.tensor([3, 500]),
        ),
    ],
    "BlurForwardModel": [example(lambda: BlurForwardModel(1.0, 2), signal=IMAGE, parameters=torch.tensor([[0, 1]]))],
    "CropForwardModel": [
        example(lambda: CropForwardModel((2, 4), 8), signal=IMAGE, parameters=torch.tensor([[3, 1]])),
    ],
    "DownsampleForwardModel": [
        example(lambda: DownsampleForwardModel(2), signal=IMAGE, parameters=torch.zeros(1, 0)),
    ],
    "GeneratorForwardModel": [
        example(
            lambda: GeneratorForwardModel(vae(), then=CropForwardModel(8, 16)),
            signal=torch.linspace(-1, 1, 128).reshape(1, 2, 8, 8),
            parameters=torch.tensor([[3, 1]]),
        ),
    ],
    "MaskForwardModel": [
        example(lambda: MaskForwardModel(8, keep_probability=0.3), signal=IMAGE, parameters=IMAGE.gt(0).float()),
    ],
    "ProjectionForwardModel": [
        example(lambda: ProjectionForwardModel(6, extent=0.8), signal=IMAGE, parameters=torch.tensor([0.4])),
    ],
    "VolumeForwardModel": [
        example(
            lambda: VolumeForwardModel(6, num_samples=4, density_scale=2.0, output="depth"),
            signal=IMAGE + 1,
            parameters=torch.tensor([0.4]),
        ),
    ],
    "WarpForwardModel": [
        example(lambda: WarpForwardModel(2.0), signal=torch.linspace(-1, 1, 18).reshape(1, 2, 3, 3), parameters=IMAGE),
    ],
    "AnomalyDetectionPipeline": [
        example(
            lambda: AnomalyDetectionPipeline(
                unet(), DDIMScheduler(), image_scale=0.5, calibration={"threshold": 0.1, "strength": 0.5}
            ),
            image=torch.linspace(0, 1, 128).reshape(2, 1, 8, 8),
            num_inference_steps=2,
            threshold=0.1,
            output_type="pt",
        ),
    ],
    "ReconstructionPipeline": [
        example(
            lambda: ReconstructionPipeline(unet(), DDIMScheduler(timestep_spacing="trailing"), image_scale=0.5),
            measurement=torch.ones(2, 1, 8, 8, dtype=torch.complex64),
            operator=torch.ones(8),
            num_inference_steps=2,
            noise_std=0.1,
            output_type="pt",
        ),
    ],
    "SDATTAPipeline": [
        example(
            lambda: SDATTAPipeline(
                unet(),
                DDIMScheduler(),
                EXAMPLES["ImageClassifierFeatures"][0].build(),
                EXAMPLES["ImageClassifierFeatures"][0].build(),
                alignment={"num_steps": 4, "factor": 2},
            ),
            images=torch.linspace(0, 1, 128).reshape(2, 1, 8, 8),
            output_type="pt",
        ),
    ],
}

# Models and schedulers are tried as a component of a pipeline that somebody else wrote.
HOLDER = """for stale in [name for name, value in globals().items() if isinstance(value, type)]:
    del globals()[stale]

from diffusers import DiffusionPipeline

import diffusers_ext


class HolderPipeline(DiffusionPipeline):
    def __init__(self, component: diffusers_ext.NAME):
        super().__init__()
        self.register_modules(component=component)
"""

TOOLS = '''
"""What the test and the processes that it starts share."""

import json, sys
import torch


def flat(value):
    """Returns the tensors of an output, in order."""
    if isinstance(value, torch.Tensor):
        return [value.clone()]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in flat(item)] if isinstance(value, (list, tuple)) else []


def modules(thing):
    """Returns the networks of a pipeline by name, those of its pipelines too; a model's own under an empty name."""
    if isinstance(thing, torch.nn.Module):
        return {"": thing}
    found = {}
    for name, component in sorted(getattr(thing, "components", {}).items()):
        if isinstance(component, torch.nn.Module) or hasattr(component, "components"):
            found.update({f"{name}.{inner}": module for inner, module in modules(component).items()})
    return found


def weights(thing):
    return {f"{n}.{k}": v.clone() for n, m in modules(thing).items() for k, v in m.state_dict().items()}


@torch.no_grad()
def outputs(thing, call):
    if "operator" in call:  # only its mask can be handed over
        from diffusers_ext import FourierSampling

        call = {**call, "operator": FourierSampling(call["operator"])}
    if hasattr(thing, "components"):
        thing.set_progress_bar_config(disable=True)
        return flat(thing(**call, generator=torch.Generator().manual_seed(0)))
    if isinstance(thing, torch.nn.Module):
        return flat(thing(**call))
    thing.set_timesteps(3)
    return [torch.as_tensor(thing.timesteps)]


@torch.no_grad()
def align(thing):
    """Moves all weights to memory aligned as that of new tensors: CPU kernels round differently otherwise."""
    for module in modules(thing).values():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.data = tensor.data.clone()


def plain(config):
    """Returns a configuration without what loading adds, as JSON."""
    return json.dumps({k: v for k, v in config.items() if not k.startswith("_")}, sort_keys=True, default=str)


def record(thing, call):
    found = {"class": type(thing).__name__, "module": type(thing).__module__, "config": plain(thing.config)}
    found["training"] = [module.training for module in modules(thing).values()]
    found["weights"], found["outputs"] = weights(thing), outputs(thing, call)
    align(thing)
    return {**found, "aligned": outputs(thing, call)}
'''
_tools: dict = {}
exec(TOOLS, _tools)
record, weights, outputs, align = (_tools[name] for name in ("record", "weights", "outputs", "align"))

# Each way gets one case and returns what it loaded. `path` is a repo of `save_repo`, `alone` the same repo naming its
# pipeline.py, `shelf` the folder for `custom_pipeline`.
WAYS = {
    "import": """
import diffusers_ext
from diffusers import DiffusionPipeline
def load(case):
    cls = DiffusionPipeline
    if not case["pipeline"]:
        exec(case["holder"], globals())
        cls = HolderPipeline
    return cls.from_pretrained(case["path"])
""",
    "custom_pipeline": """
from diffusers import DiffusionPipeline
def load(case):
    return DiffusionPipeline.from_pretrained(case["path"], custom_pipeline=case["shelf"], trust_remote_code=True)
""",
    "self_contained": """
from diffusers import DiffusionPipeline
def load(case):
    return DiffusionPipeline.from_pretrained(case["alone"], trust_remote_code=True)
""",
    "own_class": """
import diffusers_ext
def load(case):
    cls = getattr(diffusers_ext, case["name"])
    return cls.from_pretrained(case["path"], **({} if case["pipeline"] else {"subfolder": "component"}))
""",
    "from_pipe": """
import diffusers_ext
from diffusers import DiffusionPipeline
def load(case):
    if case["pipeline"]:
        cls = getattr(diffusers_ext, case["name"])
        return cls.from_pipe(cls.from_pretrained(case["path"]))
    exec(case["holder"], globals())
    return HolderPipeline.from_pipe(HolderPipeline.from_pretrained(case["path"]))
""",
}
RUN = """
imported_before = "diffusers_ext" in sys.modules
cases = torch.load(sys.argv[1], weights_only=True)
found = {"imported_before": imported_before}
for case in cases:
    thing = load(case)
    if not case["pipeline"] and hasattr(thing, "components"):
        thing = thing.component
    found[case["id"]] = record(thing, case["call"])
torch.save(found, sys.argv[2])
"""


def process(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *arguments]
    return processes.run(command, cwd=tempfile.gettempdir(), env={**os.environ, **environment})


def loadable_classes():
    """Returns the public classes that a repo can name."""
    values = {name: getattr(diffusers_ext, name) for name in diffusers_ext._MODULES}
    bases = (DiffusionPipeline, ModelMixin, SchedulerMixin)
    found = {n: v for n, v in values.items() if isinstance(v, type) and issubclass(v, bases)}
    del found["ForwardModel"]  # a base, which has no forward of its own
    return found


def shelves():
    """Returns the class name of each folder of pipelines/ by the text of its pipeline.py."""
    texts = {folder: (folder / "pipeline.py").read_text() for folder in (ROOT / "pipelines").iterdir()}
    return {n: folder for n in loadable_classes() for folder, text in texts.items() if text == pipeline_code(n)}


def write_holder(component, path, self_contained):
    """Saves a component as an outside author's repo would hold it."""
    text, names = HOLDER.replace("NAME", type(component).__name__), {"__name__": "pipeline"}
    exec(text, names)
    names["HolderPipeline"](component).save_pretrained(path)
    (path / "pipeline.py").write_text(text)
    if self_contained:
        index = json.loads((path / "model_index.json").read_text())
        index["_class_name"] = ["pipeline", "HolderPipeline"]
        (path / "model_index.json").write_text(json.dumps(index))


def randomise_buffers(thing):
    """Gives running statistics values that a newly made network does not have."""
    for module in _tools["modules"](thing).values():
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point() and "running" in name:
                buffer.data = torch.rand_like(buffer) + 0.5


IDS = [f"{name}-{i}" for name, examples in EXAMPLES.items() for i in range(len(examples))]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """What every way found, and what it should have: `(expected, found by way)`."""
    folder, cases, expected = tmp_path_factory.mktemp("matrix"), [], {}
    classes, shelf = loadable_classes(), shelves()
    for name, examples in EXAMPLES.items():
        for i, it in enumerate(examples):
            torch.manual_seed(i)
            thing, key = it.build(), f"{name}-{i}"
            randomise_buffers(thing)
            path, alone = folder / key, folder / f"{key}-alone"
            if issubclass(classes[name], DiffusionPipeline):
                save_repo(thing, path)
                save_repo(thing, alone, self_contained=True)
            else:
                write_holder(thing, path, False)
                write_holder(thing, alone, True)
            cases.append(
                {
                    "id": key,
                    "name": name,
                    "call": it.call,
                    "pipeline": issubclass(classes[name], DiffusionPipeline),
                    "path": str(path),
                    "alone": str(alone),
                    "shelf": str(shelf.get(name, path)),
                    "holder": HOLDER.replace("NAME", name),
                }
            )
            if not issubclass(classes[name], DiffusionPipeline) and isinstance(thing, torch.nn.Module):
                thing.eval()
            expected[key] = record(thing, it.call)
    torch.save(cases, folder / "cases.pt")

    def attempt(way):
        home, out = folder / f"home-{way}", folder / f"{way}.pt"
        run = process(TOOLS + WAYS[way] + RUN, folder / "cases.pt", out, HF_HOME=str(home), HF_HUB_OFFLINE="1")
        return torch.load(out, weights_only=True) if run.returncode == 0 else run.stderr[-3000:]

    return expected, {way: attempt(way) for way in WAYS}


def same(a, b):
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_no_class_is_forgotten():
    assert set(EXAMPLES) == set(loadable_classes())
    pipelines = {n for n, v in loadable_classes().items() if issubclass(v, DiffusionPipeline)}
    assert set(shelves()) == pipelines  # every pipeline has its folder, with the text that repos get
    assert len(list((ROOT / "pipelines").iterdir())) == len(pipelines)
    for folder in shelves().values():
        assert "library_name: diffusers" in (folder / "README.md").read_text()


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("key", IDS)
def test_matrix(matrix, way, key):
    expected, found = matrix[0][key], matrix[1][way]
    assert isinstance(found, dict), found  # else what the process complained of
    assert found["imported_before"] is (way in ("import", "own_class", "from_pipe"))
    found = found[key]
    assert (found["class"], found["module"]) == (key.split("-")[0], "diffusers_ext")
    assert found["config"] == expected["config"]
    assert not any(found["training"])
    assert found["weights"].keys() == expected["weights"].keys()
    assert all(torch.equal(found["weights"][k], v) for k, v in expected["weights"].items())
    for a, b in zip(found["outputs"], expected["outputs"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert same(found["aligned"], expected["aligned"])


def test_the_examples_differ(matrix):
    """An output that did not depend on the weights would prove nothing."""
    for key, expected in matrix[0].items():
        if expected["weights"]:
            for out in filter(torch.is_floating_point, expected["outputs"]):  # labels may be alike
                assert out.std() > 1e-3, key
    assert {"vae.", "unet."} == {k[: k.index(".") + 1] for k in matrix[0]["ImageGenerationPipeline-2"]["weights"]}


# ---------------------------------------------------------------- schedulers


def check_scheduler(scheduler, folder):
    """Checks what Diffusers asks of a scheduler; `scheduler` has some setting of its own."""
    cls = type(scheduler)
    scheduler.save_pretrained(folder)
    assert _tools["plain"](cls.from_pretrained(folder).config) == _tools["plain"](scheduler.config)
    assert _tools["plain"](cls.from_config(scheduler.config).config) == _tools["plain"](scheduler.config)
    if not scheduler.compatibles:  # a process of another kind, whose settings no stock scheduler knows
        return
    # Settings that both know pass from a stock scheduler to this one and back.
    stock = DDPMScheduler(num_train_timesteps=77)
    taken = cls.from_config(stock.config)
    assert taken.config.num_train_timesteps == 77
    assert DDPMScheduler.from_config(taken.config).config.num_train_timesteps == 77
    usable = [other for other in scheduler.compatibles if ".dummy_" not in other.__module__]
    assert DDPMScheduler in usable
    for other in usable:
        assert other.from_config(scheduler.config).config.num_train_timesteps == scheduler.config.num_train_timesteps


@pytest.mark.filterwarnings(  # by those of Diffusers that give tensors to NumPy
    "ignore:__array_wrap__ must accept context and return_scalar arguments:DeprecationWarning"
)
def test_schedulers(tmp_path):
    ours = [name for name, value in loadable_classes().items() if issubclass(value, SchedulerMixin)]
    built = [it.build() for name in ours for it in EXAMPLES[name]]
    for i, scheduler in enumerate([DDIMScheduler(num_train_timesteps=55), *built]):  # the stock one proves the check
        check_scheduler(scheduler, tmp_path / str(i))


# ---------------------------------------------------------------- what a repo may not do, and the forms it may have


def test_a_repos_code_never_runs_unasked(tmp_path):
    canary = tmp_path / "canary"
    repo = save_repo(ImageGenerationPipeline(unet(), DDIMScheduler()), tmp_path / "repo", self_contained=True)
    hostile = f"open({str(canary)!r}, 'w').close()\n"
    (repo / "pipeline.py").write_text(hostile + (repo / "pipeline.py").read_text())
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(repo)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(repo, custom_pipeline=str(repo))
    assert not canary.exists()
    DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
    assert canary.exists()  # so the code would have run


@pytest.mark.parametrize("cls", [DiffusionPipeline, ImageGenerationPipeline])
def test_code_that_is_not_named_or_not_trusted_stays_unread(tmp_path, cls):
    canary, pipeline = tmp_path / "canary", ImageGenerationPipeline(unet(), DDIMScheduler())
    hostile = f"open({str(canary)!r}, 'w').close()\n"
    repo = save_repo(pipeline, tmp_path / "repo")
    (repo / "pipeline.py").write_text(hostile)  # the index names the class, not this file
    assert same(list(weights(cls.from_pretrained(repo)).values()), list(weights(pipeline).values()))
    (repo / "unet" / "evil.py").write_text(hostile + "from diffusers import UNet2DModel\n")
    index = json.loads((repo / "model_index.json").read_text())
    index["unet"] = ["evil", "UNet2DModel"]
    (repo / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="evil.py which must be executed"):
        cls.from_pretrained(repo)
    assert not canary.exists()
    cls.from_pretrained(repo, trust_remote_code=True)
    assert canary.exists()


def test_a_component_loads_from_its_subfolder(tmp_path):
    pipeline = ImageGenerationPipeline(unet(), DDIMScheduler(num_train_timesteps=33))
    save_repo(pipeline, tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path, subfolder="unet").state_dict()
    assert same(list(loaded.values()), list(pipeline.unet.state_dict().values()))
    assert DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler").config["num_train_timesteps"] == 33


def test_pickled_weights_are_refused(tmp_path):
    pipeline = ImageGenerationPipeline(unet(), DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "pipeline", safe_serialization=False)
    with pytest.raises(OSError, match="use_safetensors=False"):
        ImageGenerationPipeline.from_pretrained(tmp_path / "pipeline")
    loaded = ImageGenerationPipeline.from_pretrained(tmp_path / "pipeline", use_safetensors=False)
    assert same(list(weights(loaded).values()), list(weights(pipeline).values()))
    model = EXAMPLES["ImageClassifierFeatures"][0].build()
    model.save_pretrained(tmp_path / "model", safe_serialization=False)
    with pytest.raises(OSError, match="use_safetensors=False"):
        ImageClassifierFeatures.from_pretrained(tmp_path / "model")
    loaded = ImageClassifierFeatures.from_pretrained(tmp_path / "model", use_safetensors=False)
    assert same(list(weights(loaded).values()), list(weights(model).values()))


def test_a_variant_keeps_its_precision(tmp_path):
    pipeline = ImageGenerationPipeline(unet(), DDIMScheduler()).to(torch.float16)
    save_repo(pipeline, tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = DiffusionPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert loaded.dtype == torch.float16
    assert same(list(weights(loaded).values()), list(weights(pipeline).values()))


def test_sharded_weights_load(tmp_path):
    pipeline = ImageGenerationPipeline(unet(), DDIMScheduler())
    pipeline.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    loaded = ImageGenerationPipeline.from_pretrained(tmp_path)
    assert same(list(weights(loaded).values()), list(weights(pipeline).values()))


def test_a_cached_repo_loads_offline_at_a_revision(tmp_path):
    """The Hub's cache layout, written by the Hub client itself; a pipeline and a network of ours within it."""
    pipeline = OMSPipeline(pixel_module(), ImageGenerationPipeline(unet(), DDIMScheduler()))
    save_repo(pipeline, tmp_path / "repo")
    code = (
        "import sys, diffusers_ext, torch; from diffusers import DiffusionPipeline;"
        "p = DiffusionPipeline.from_pretrained('org/name', revision='main', "
        "local_files_only=sys.argv[2] == 'offline');"
        "torch.save({**p.oms_module.state_dict(), **p.sd_pipeline.unet.state_dict(prefix='base.')}, sys.argv[1])"
    )
    with HubServer() as hub:
        repo = tmp_path / "repo"
        files = [path for path in repo.rglob("*") if path.is_file()]
        hub.repos["org/name"] = {path.relative_to(repo).as_posix(): path.read_bytes() for path in files}
        environment = hub.environment(tmp_path / "home")
        online = process(code, tmp_path / "online.pt", "online", **environment)
        assert online.returncode == 0, online.stderr
    offline = process(code, tmp_path / "offline.pt", "offline", **environment)  # the server is gone
    assert offline.returncode == 0, offline.stderr
    found = torch.load(tmp_path / "offline.pt", weights_only=True)
    expected = {**pipeline.oms_module.state_dict(), **pipeline.sd_pipeline.unet.state_dict(prefix="base.")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], v) for k, v in expected.items())


class OuterPipeline(DiffusionPipeline):
    """A pipeline that holds one of ours and a stock one, which holds networks."""

    def __init__(self, ours, stock):
        super().__init__()
        self.register_modules(ours=ours, stock=stock)


def test_pipelines_within_pipelines(tmp_path):
    outer = OuterPipeline(
        ImageGenerationPipeline(unet(), DDIMScheduler(), image_scale=2.0), DDPMPipeline(unet(), DDPMScheduler())
    )
    outer.save_pretrained(tmp_path)
    loaded = OuterPipeline.from_pretrained(tmp_path)
    assert type(loaded.ours) is ImageGenerationPipeline
    assert loaded.ours.config["image_scale"] == 2.0
    assert type(loaded.stock) is DDPMPipeline
    before, after = weights(outer), weights(loaded)
    assert before.keys() == after.keys()
    assert {key.split(".")[0] for key in before} == {"ours", "stock"}
    assert same(list(before.values()), list(after.values()))
