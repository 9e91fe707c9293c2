"""The pipeline against its parts, for every kind of image, and its refusals."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image

from diffusers_ext import AlignConfig, ImageClassifierFeatures, SDATTAPipeline, align, ensemble_logits

from .tiny import unet

SETTINGS = {"num_steps": 10, "strength": 0.3, "guidance_weight": 1.0, "factor": 2}


def classifier(seed=0, **config):
    torch.manual_seed(seed)
    return ImageClassifierFeatures(sample_size=8, block_out_channels=(4,), feature_dim=6, **config).eval()


def make(**changes):
    parts = {"classifier": classifier(0), "adapted_classifier": classifier(1), "alignment": SETTINGS, **changes}
    pipeline = SDATTAPipeline(unet(), DDPMScheduler(), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", ["sum", "entropy", "confidence_sum", "adapted"])
def test_it_is_its_parts_put_together(mode):
    pipeline = make()
    adapted = align(pipeline.unet, pipeline.scheduler, IMAGES * 2 - 1, AlignConfig(**SETTINGS), generator=seeded(3))
    with torch.no_grad():
        first, second = pipeline.classifier(IMAGES * 2 - 1), pipeline.adapted_classifier(adapted)
    output = pipeline(IMAGES, ensemble=mode, generator=seeded(3), output_type="pt")
    expected = ensemble_logits(first, second, mode)
    assert torch.allclose(output.logits, expected, atol=1e-5)
    assert torch.allclose(output.probabilities, expected.softmax(1), atol=1e-5)
    assert output.labels == [str(i) for i in expected.argmax(1).tolist()]
    assert torch.allclose(output.images, (adapted + 1) / 2, atol=1e-5)


def test_source_alone_calls_no_diffusion_model():
    pipeline = make()
    pipeline.unet.forward = None
    output = pipeline(IMAGES, ensemble="source")
    assert output.images is None
    with torch.no_grad():
        assert torch.equal(output.logits, pipeline.classifier(IMAGES * 2 - 1))


def test_without_a_second_classifier_it_is_dda():
    same = make(adapted_classifier=classifier(0))(IMAGES, generator=seeded(3)).logits
    assert torch.equal(make(adapted_classifier=None)(IMAGES, generator=seeded(3)).logits, same)


def test_any_order_and_any_batch_give_the_same():
    pipeline, generators = make(), seeded(3)
    whole = pipeline(IMAGES, generator=seeded(3)).logits
    parts = pipeline(IMAGES, generator=seeded(3), batch_size=2).logits
    turned = pipeline(IMAGES.flip(0), generator=generators[::-1]).logits.flip(0)
    assert torch.allclose(whole, parts, atol=1e-5)
    assert torch.allclose(whole, turned, atol=1e-5)


def test_kinds_of_images_agree():
    pixels = (IMAGES * 255).round().byte()
    array = pixels.permute(0, 2, 3, 1).numpy()
    pil = [Image.fromarray(a[..., 0]) for a in array]
    expected = make()(pixels, generator=seeded(3))
    for same in (pixels / 255, array, array / 255, pil, list(array[..., 0]), list(pixels)):
        output = make()(same, generator=seeded(3))
        assert torch.allclose(output.logits, expected.logits, atol=1e-5)
    one = make()(pil[0], generator=seeded(1))
    assert torch.allclose(one.logits, expected.logits[:1], atol=1e-5)
    values = make()(pil, generator=seeded(3), return_dict=False)
    assert torch.equal(values[3], make()(pil, generator=seeded(3)).logits)
    assert make()(pil, generator=seeded(3), output_type="np").images.shape == (3, 8, 8, 1)


def test_resizing_is_explicit():
    wide = Image.fromarray(np.tile(np.arange(0, 256, 16, np.uint8), (8, 1)))
    cropped = make()(wide, generator=seeded(1), alignment={"strength": 0.0}, output_type="pt").images
    assert torch.allclose(cropped[0, 0], torch.arange(4, 12).expand(8, 8) * 16 / 255, atol=1e-5)
    squashed = make()(wide, generator=seeded(1), alignment={"strength": 0.0}, resize="squash", output_type="pt").images
    assert squashed[0, 0, 0, 7] > cropped[0, 0, 0, 7]
    with pytest.raises(ValueError, match="must be 8 x 8 with `resize='none'`, got 8 x 16"):
        make()(wide, resize="none")


def test_any_callable_classifies():
    def bright(images):
        light = images.mean((1, 2, 3))
        return torch.stack([light, -light], 1)

    pipeline = make(classifier=bright, adapted_classifier=None)
    assert pipeline(torch.stack([torch.ones(1, 8, 8), torch.zeros(1, 8, 8)]), ensemble="source").labels == ["0", "1"]


class Plain(torch.nn.Module):
    """A classifier as timm and torchvision make them: no config, no device, no dtype."""

    def __init__(self, seed=0):
        super().__init__()
        self.inner = classifier(seed)
        self.num_classes, self.default_cfg = 10, {"input_size": (1, 8, 8)}

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("wrap", [lambda model: Plain(), lambda model: lambda x: model(x)])
def test_a_plain_module_or_function_classifies_as_the_model_within(wrap, tmp_path):
    expected = make(adapted_classifier=None)(IMAGES, generator=seeded(3)).logits
    pipeline = make(classifier=wrap(classifier(0)), adapted_classifier=None)
    assert torch.equal(pipeline(IMAGES, generator=seeded(3)).logits, expected)
    again = SDATTAPipeline.from_pipe(pipeline)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(IMAGES, generator=seeded(3)).logits, expected)
    later = make(adapted_classifier=None, classifier=classifier(5))
    later.classifier = wrap(classifier(0))
    assert torch.equal(later(IMAGES, generator=seeded(3)).logits, expected)
    later.classifier = classifier(5)  # takes the place of the plain one
    assert not torch.equal(later(IMAGES, generator=seeded(3)).logits, expected)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`classifier` must be given to the pipeline: this one has none"):
        SDATTAPipeline.from_pretrained(tmp_path)(IMAGES)


def test_a_plain_module_moves_with_the_pipeline():
    plain = Plain()
    pipeline = make(classifier=plain, adapted_classifier=None).to(torch.bfloat16)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    full = make(adapted_classifier=None)(IMAGES, generator=seeded(3), ensemble="source").logits
    half = pipeline(IMAGES, generator=seeded(3), ensemble="source").logits
    assert half.dtype == torch.float32
    assert torch.allclose(half, full, atol=0.05)
    assert not torch.equal(half, full)


def test_a_transformers_classifier_is_restored_with_its_labels(tmp_path):
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic",
        id2label={0: "cat", 1: "dog", 2: "owl"},
    )  # fmt: skip
    model = ResNetForImageClassification(config).eval()
    processor = ConvNextImageProcessorPil(
        size={"shortest_edge": 16}, image_mean=[0.2, 0.3, 0.4], image_std=[0.5, 0.6, 0.7]
    )
    pipeline = make(classifier=model, adapted_classifier=None, image_processor=processor)
    output = pipeline(IMAGES, generator=seeded(3))
    assert set(output.labels) <= {"cat", "dog", "owl"}
    big = torch.nn.functional.interpolate(IMAGES.expand(-1, 3, -1, -1), (16, 16), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    with torch.no_grad():
        logits = model((big.clamp(0, 1) - mean) / std).logits
    assert torch.allclose(pipeline(IMAGES, ensemble="source").logits, logits, atol=1e-4)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is SDATTAPipeline
    assert torch.allclose(loaded(IMAGES, generator=seeded(3)).logits, output.logits, atol=1e-5)


def test_callback_sees_every_step_and_changes_it():
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, timestep))
        return {"latents": torch.zeros_like(tensors["latents"])}

    output = make()(IMAGES, generator=seeded(3), callback_on_step_end=callback, output_type="pt")
    assert seen == [(0, 222), (1, 111), (2, 0)]
    assert (output.images == 0.5).all()


def test_a_callback_stops_the_call():
    """What is not adapted by then stays: images of a later batch as they came."""
    seen = []

    def stop(pipeline, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipeline._interrupt = step == 1
        return {}

    pipeline = make()
    output = pipeline(IMAGES, batch_size=2, generator=seeded(3), callback_on_step_end=stop, output_type="pt")
    assert len(seen) == 2
    torch.testing.assert_close(output.images[:2], (seen[-1].clamp(-1, 1) + 1) / 2)
    torch.testing.assert_close(output.images[2:], IMAGES[2:])
    assert pipeline.interrupt
    pipeline(IMAGES[:1], generator=seeded(1))
    assert not pipeline.interrupt


class Halving(PipelineCallback):
    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        return {"latents": callback_kwargs["latents"] / 2}


class WithoutTensors(PipelineCallback):
    tensor_inputs = []

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        return callback_kwargs


def test_callbacks_of_diffusers():
    """They say themselves which tensors they want."""
    call = {"generator": seeded(3), "output_type": "pt"}
    expected = make()(IMAGES, **call, callback_on_step_end=lambda p, i, t, given: {"latents": given["latents"] / 2})
    for callback in (Halving(), MultiPipelineCallbacks([WithoutTensors(), Halving()])):
        found = make()(IMAGES, **{**call, "generator": seeded(3)}, callback_on_step_end=callback)
        torch.testing.assert_close(found.images, expected.images)
    seen = []
    without = WithoutTensors()
    without.callback_fn = lambda pipeline, step, timestep, given: seen.append(given) or {}
    make()(IMAGES, callback_on_step_end=without)
    assert seen == [{}] * 3


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ensemble": "mean"}, "`ensemble` must be one of"),
        ({"resize": "pad"}, "`resize` must be one of"),
        ({"output_type": "jpg"}, "`output_type` must be one of"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1"),
        ({"images": []}, "`images` must hold at least one image"),
        ({"images": ["photo.png"]}, "`images` must hold PIL images, arrays or tensors, got str"),
        ({"images": torch.zeros(1, 3, 8, 8)}, "`images` must hold images of 1 channels"),
        ({"images": torch.full((1, 1, 8, 8), -0.5)}, r"`images` must lie in \[0, 1\]"),
        ({"images": torch.zeros(1, 1, 8, 8, dtype=torch.int64)}, "`images` must hold uint8 or floats"),
        ({"generator": seeded(2)}, "`generator` must be one generator or a list of 3"),
        ({"alignment": {"steps": 3}}, "`alignment` must be settings of `AlignConfig`"),
        ({"alignment": {"strength": 1.5}}, "`strength` must be in"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs` must be"),
    ],
)
def test_bad_calls(changes, match):
    with pytest.raises(ValueError, match=match):
        make()(**{"images": IMAGES, **changes})


@pytest.mark.parametrize("ensemble", ["sum", "adapted", "source"])
def test_without_classifiers_a_sentence(ensemble):
    with pytest.raises(ValueError, match="`classifier` must be given to the pipeline: this one has none"):
        make(classifier=None, adapted_classifier=None)(IMAGES, ensemble=ensemble)
    if ensemble == "adapted":
        assert make(classifier=None)(IMAGES, ensemble=ensemble).logits.shape == (3, 10)


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match="`classifier` must take 1 channels like `unet`, got one for 3"):
        make(classifier=classifier(in_channels=3))
    big = ImageClassifierFeatures(sample_size=16, block_out_channels=(4,), feature_dim=6)
    with pytest.raises(ValueError, match="`adapted_classifier` must take images of 8 pixels"):
        make(adapted_classifier=big)
    with pytest.raises(ValueError, match="`adapted_classifier` must have the labels of `classifier`"):
        make(adapted_classifier=classifier(num_classes=4))
    with pytest.raises(ValueError, match="`classifier` must be callable"):
        make(classifier=3)
    with pytest.raises(ValueError, match="`unet` must be unconditional"):
        SDATTAPipeline(unet(num_class_embeds=3), DDPMScheduler(), classifier())
    with pytest.raises(ValueError, match="`classifier` must return logits"):
        make(classifier=lambda images: images)(IMAGES)
