"""The shipped classifier reads the shipped digits; features are what the head reads."""

import importlib.util

import pytest
import torch

from diffusers_ext import (
    ImageClassifierFeatures,
    extract_features,
    feature_extractor,
    inception_features,
    load_images,
)
from diffusers_ext.data.digits import CLASSIFIER, DIGITS


@pytest.fixture(scope="module")
def classifier():
    return ImageClassifierFeatures.from_pretrained(CLASSIFIER, use_safetensors=True).eval()


@pytest.fixture(scope="module")
def digits():
    data = load_images(train_data_dir=str(DIGITS), resolution=28, channels=1)
    items = [data[i] for i in range(len(data))]
    return torch.stack([i["pixel_values"] for i in items]), torch.tensor([i["label"] for i in items])


def test_shipped_classifier_reads_held_out_digits(classifier, digits):
    images, labels = digits
    with torch.no_grad():
        accuracy = (classifier(images).argmax(1) == labels).float().mean()
    assert accuracy >= 0.97
    assert labels.bincount().tolist() == [100] * 10


def test_features_are_the_input_of_the_head(classifier, digits):
    features = extract_features(digits[0][:10], classifier.features, batch_size=3)
    with torch.no_grad():
        torch.testing.assert_close(classifier.head(features), classifier(digits[0][:10]))


def test_refuses_images_of_another_size(classifier):
    with pytest.raises(
        ValueError, match=r"`images` must have the shape \(batch, \(1, 28, 28\)\), got \(1, 1, 32, 32\)"
    ):
        classifier.features(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="`images` must hold at least one image"):
        extract_features(torch.zeros(0, 1, 28, 28), classifier.features)


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_inception_says_what_to_install():
    with pytest.raises(ImportError, match=r"pip install diffusers-ext\[metrics\]"):
        inception_features()


def test_differentiable_inception_equals_its_own_forward(monkeypatch):
    """With random weights; the real ones are a download."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=ImportError)

    def random_weights(network, state):
        torch.manual_seed(0)
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)

    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", random_weights)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *arguments, **options: {})
    plain, features = inception_features(), inception_features(differentiable=True)
    images = (torch.randint(0, 256, (2, 3, 32, 32)) / 127.5 - 1).requires_grad_()  # whole bytes
    found, expected = features(images), plain(images)
    assert expected.shape == (2, 2048)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)
    gradient = torch.autograd.grad(found.square().sum(), images)[0]
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    grey = features(images[:, :1])
    torch.testing.assert_close(grey, features(images[:, :1].expand(-1, 3, -1, -1)))


def test_clip_features_are_the_models_embedding_with_gradients(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=6,
    )  # fmt: skip
    network = CLIPVisionModelWithProjection(config).eval()
    network.save_pretrained(tmp_path)
    features = feature_extractor(f"clip:{tmp_path}")
    images = (torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    expected = network(((images + 1) / 2 - mean) / std).image_embeds
    found = features(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.autograd.grad(found.sum(), images)[0].abs().max() > 0
    assert features(torch.zeros(2, 1, 40, 24)).shape == (2, 6)  # grey, another size


def test_features_by_name(digits):
    images = digits[0][:3]
    assert torch.equal(feature_extractor("pixels")(images), images.flatten(1))
    classifier = ImageClassifierFeatures.from_pretrained(CLASSIFIER, use_safetensors=True).eval()
    torch.testing.assert_close(feature_extractor(f"classifier:{CLASSIFIER}")(images), classifier.features(images))
    with pytest.raises(ValueError, match="`features` must be 'pixels', .* got 'vgg'"):
        feature_extractor("vgg")
    with pytest.raises(ValueError, match="`features` must name a model that loads, got 'clip:/nowhere'"):
        feature_extractor("clip:/nowhere")
