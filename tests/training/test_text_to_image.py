"""Text-to-image pipelines trained through their own call: known answers, promises of the engine, refusals."""

import json
import logging
import os
import signal
import sys
import textwrap
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image
from safetensors.torch import load_file

import diffusers_ext.data.cache as cache
from diffusers_ext import (
    ImageClassifierFeatures,
    QDiffConfig,
    StepRNG,
    TextToImageConfig,
    TextToImageRecipe,
    Trainer,
)
from diffusers_ext.data.buckets import BucketBatchSampler, bucket_sizes, nearest_bucket
from diffusers_ext.data.digits import CLASSIFIER, TEXT_TO_IMAGE
from diffusers_ext.training.lora import adapters_off
from diffusers_ext.training.pipeline_schedule import pipeline_objective, sampling_shift
from diffusers_ext.training.recipe import Context
from diffusers_ext.training.text_model import TextPipeline
from diffusers_ext.training.timesteps import ShiftedNoiseLevels
from tests import processes, tiny_pipelines
from tests.training.test_distributed import two_process_state
from tests.training.tiny import Record

CAPTIONS = ["a red cat", "a dog", "a house on a hill", "a red cat"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pipelines, each saved once, and eight captioned images of two shapes."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("stable_diffusion", "stable_diffusion_xl", "flux", "z_image", "pixart_sigma"):
        torch.manual_seed(0)
        pipe = getattr(tiny_pipelines, name)()
        pipe.save_pretrained(folder / name)
    qdiff_layers(DiffusionPipeline.from_pretrained(folder / "flux")).save_pretrained(folder / "integers")
    write_images(folder / "data", [(32, 32), (32, 48)] * 4)
    write_images(folder / "one", [(32, 32)])
    return folder


def write_images(folder, sizes, captions=CAPTIONS):
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i, size in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": captions[i % len(captions)]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def make_config(root, output_dir, pipeline="stable_diffusion", **changes):
    values = {
        "pretrained_model_name_or_path": str(root / pipeline),
        "train_data_dir": str(root / "data"),
        "output_dir": str(output_dir),
        "resolution": 32,
        "center_crop": True,
        "train_batch_size": 4,
        "max_train_steps": 3,
        "learning_rate": 1e-3,
        "lora_rank": 2,
        "logging_steps": 1,
        "num_validation_images": 0,
        "validation_inference_steps": 2,
    }
    return TextToImageConfig(**{**values, **changes})


def run(root, output_dir, *, record=None, **changes):
    config = make_config(root, output_dir, **changes)
    recipe, record = TextToImageRecipe(config), record or Record()
    Trainer(config, recipe, [record]).train()
    return recipe, record


def lora(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


def ready(config):
    """A recipe that is set up, with what the engine shows it."""
    recipe = TextToImageRecipe(config)
    ctx = Context(config, Accelerator(cpu=True), StepRNG(0), torch.float32)
    ctx.rng.begin(0)
    ctx.ids = range(config.train_batch_size)
    recipe.dataset(ctx)
    ctx.modules = recipe.setup(ctx)
    ctx.model = ctx.modules.trainable
    return recipe, ctx


def a_batch(recipe, n):
    return torch.utils.data.default_collate([recipe.data.get(i % len(recipe.data)) for i in range(n)])


# -- known answers ---------------------------------------------------------------------------------------------------


def test_the_exact_velocity_has_no_loss_and_draws_the_image(root, tmp_path):
    config = make_config(root, tmp_path, "z_image", train_data_dir=str(root / "one"), train_batch_size=1)
    recipe, ctx = ready(config)
    batch = a_batch(recipe, 1)
    one = recipe.denoiser.at()
    x0 = one.encode_images(batch["pixel_values"])

    def exact(x, t, *args, **kwargs):
        # Z-Image's network gets a list of samples and 1 - s, and its output is negated.
        velocity = [(each.squeeze(1) - x0[0]) / (1 - time) for each, time in zip(x, t, strict=True)]
        return ([-v.unsqueeze(1) for v in velocity],)

    recipe.model.network.forward = exact
    with torch.no_grad():
        assert recipe.training_step(batch, ctx).loss < 1e-5
    pipe = recipe.model.whole(recipe.model.network)
    image = pipe("a red cat", height=32, width=32, num_inference_steps=4, guidance_scale=0, output_type="pt").images
    torch.testing.assert_close(image, one.decode(x0).clamp(-1, 1) / 2 + 0.5, atol=1e-4, rtol=0)


def test_lora_is_found_by_the_stock_loader_in_another_process(root, tmp_path):
    scripts, expected = [], []
    for i, (name, layers, alpha) in enumerate([("stable_diffusion", None, None), ("flux", "to_q,net.2", 6.0)]):
        folder = tmp_path / str(i)
        recipe, _ = run(root, folder, pipeline=name, lora_targets=layers, lora_alpha=alpha, use_ema=False)
        pipe = recipe.model.whole(recipe.model.network.eval())
        pipe.set_progress_bar_config(disable=True)
        expected.append(draw(pipe))
        with adapters_off(recipe.model.network):
            off = draw(pipe)
        assert torch.equal(off, draw(DiffusionPipeline.from_pretrained(root / name)))
        assert not torch.equal(off, expected[-1])
        scripts.append((str(root / name), str(folder)))
    script = f"""
        import torch
        torch.set_num_threads(1)
        from diffusers import DiffusionPipeline
        for name, folder in {scripts!r}:
            pipe = DiffusionPipeline.from_pretrained(name)
            pipe.load_lora_weights(folder)
            generator = torch.Generator().manual_seed(0)
            images = pipe("a dog", height=32, width=32, num_inference_steps=2, generator=generator, output_type="pt")
            torch.save(images.images, folder + "/drawn.pt")
    """
    done = processes.run([sys.executable, "-c", textwrap.dedent(script)])
    assert done.returncode == 0, done.stderr
    for i, images in enumerate(expected):
        assert torch.equal(torch.load(tmp_path / str(i) / "drawn.pt"), images)


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    return pipe("a dog", generator=generator, **call).images


def test_the_loss_on_one_image_halves(root, tmp_path):
    targets = "to_q,to_k,to_v,to_out.0,w1,w2,w3,linear,adaLN_modulation.0,2-1"
    _, record = run(
        root,
        tmp_path,
        train_data_dir=str(root / "one"),
        train_batch_size=1,
        pipeline="z_image",
        lora_rank=16,
        lora_targets=targets,
        learning_rate=1e-2,
        max_train_steps=40,
        use_ema=False,
        caption_dropout=0.0,
    )
    assert np.mean(record.losses[-10:]) < 0.5 * np.mean(record.losses[:5])


def test_a_component_without_a_lora_format_is_saved_as_peft_does(root, tmp_path):
    from peft import PeftModel

    recipe, _ = run(root, tmp_path, pipeline="pixart_sigma", use_ema=False)
    pipe = DiffusionPipeline.from_pretrained(root / "pixart_sigma")
    PeftModel.from_pretrained(pipe.transformer, tmp_path)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
    call = {"encoder_hidden_states": text, "timestep": torch.tensor([7])}
    size = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        found = pipe.transformer.eval()(x, added_cond_kwargs=size, **call).sample
        assert torch.equal(found, recipe.model.network.eval()(x, added_cond_kwargs=size, **call).sample)
    assert "PeftModel" in (tmp_path / "README.md").read_text()


def test_dreambooth_adds_the_weighted_loss_on_the_class(root, tmp_path):
    config = make_config(
        root,
        tmp_path / "out",
        instance_prompt="a sks cat",
        class_prompt="a cat",
        class_data_dir=str(tmp_path / "class"),
        num_class_images=3,
        prior_loss_weight=0.25,
        train_batch_size=2,
        cache_latents=True,
        rng_scope="sample",
    )
    recipe, ctx = ready(config)
    assert len(list((tmp_path / "class").glob("*.png"))) == 3
    output = recipe.training_step(a_batch(recipe, 2), ctx)
    terms = output.logs
    torch.testing.assert_close(output.loss, terms["denoising"] + 0.25 * terms["prior"])
    assert terms["denoising"] != terms["prior"]
    assert "a sks cat" in recipe.card().render("repo")


def test_densities_are_diffusers_own_and_the_shift_is_the_schedulers():
    rng, n = StepRNG(0), 4096
    for density, options in (("mode", {"mode_scale": 1.29}), ("logit_normal", {"logit_mean": 0.0, "logit_std": 1.0})):
        rng.begin(0)
        ours = ShiftedNoiseLevels(density)(n, rng)
        theirs = compute_density_for_timestep_sampling(
            density, n, generator=torch.Generator().manual_seed(0), **options
        )
        deciles = torch.linspace(0.1, 0.9, 9)
        torch.testing.assert_close(ours.quantile(deciles), theirs.quantile(deciles), atol=0.03, rtol=0)
    s = torch.linspace(1, 0.001, 1000)
    static = FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(sampling_shift(static)(s), static.sigmas)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(sigmas=s.tolist(), mu=0.8)
    torch.testing.assert_close(sampling_shift(dynamic, 0.8)(s), dynamic.sigmas[:-1])
    assert sampling_shift(FlowMatchEulerDiscreteScheduler()) is None


def test_a_scheduler_that_steps_in_noise_levels_is_trained_on_its_betas():
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear")
    x, n, t = torch.ones(2, 1, 1, 1), torch.full((2, 1, 1, 1), 2.0), torch.tensor([10, 900])
    noisy, target = pipeline_objective(scheduler).make(x, n, t)
    alpha = scheduler.alphas_cumprod[t].view(2, 1, 1, 1)
    torch.testing.assert_close(noisy, alpha.sqrt() + 2 * (1 - alpha).sqrt())
    # The network's input in sampling: the state at noise level sigma, scaled.
    sigma = ((1 - alpha) / alpha).sqrt()
    torch.testing.assert_close(noisy, (x + sigma * n) / (sigma**2 + 1).sqrt())
    assert torch.equal(target, n)


# -- promises of the engine ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16", pytest.param("fp16", marks=pytest.mark.gpu)])
def test_resumed_lora_is_bit_equal(root, tmp_path, precision):
    common = {"mixed_precision": precision, "max_train_steps": 4, "random_flip": True}
    _, whole = run(root, tmp_path / "whole", **common)
    first = Record(signal_at=2)
    run(root, tmp_path / "parts", record=first, **common)
    _, second = run(root, tmp_path / "parts", resume_from_checkpoint="latest", **common)
    assert first.losses + second.losses == whole.losses
    a, b = lora(tmp_path / "whole"), lora(tmp_path / "parts")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(value.abs().max() > 0 for name, value in a.items() if "lora_B" in name or "lora.up" in name)
    # A checkpoint holds what is trained, not the network.
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "trained.safetensors")
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in saved.items())
    assert not list((tmp_path / "whole" / "checkpoint-4").glob("model*"))


def test_caches_checkpointing_and_validation_change_nothing(root, tmp_path):
    _, plain = run(root, tmp_path / "plain", caption_dropout=0.3)
    changes = {"cache_latents": True, "cache_prompts": True, "gradient_checkpointing": True}
    drawing = {"validation_steps": 1, "num_validation_images": 2}
    recipe, cached = run(root, tmp_path / "cached", caption_dropout=0.3, **changes, **drawing)
    assert cached.losses == plain.losses
    assert all(p.is_meta for module in recipe.model.others().values() for p in module.parameters())
    assert len(list((tmp_path / "cached" / "samples").iterdir())) == 3
    a, b = lora(tmp_path / "plain"), lora(tmp_path / "cached")
    assert all(torch.equal(a[name], b[name]) for name in a)


def bitsandbytes_layers(pipe):
    """Puts 4-bit layers in the place of some linear ones; Diffusers' loader does so on a GPU only."""
    bnb = pytest.importorskip("bitsandbytes")
    network = pipe.transformer
    for name, layer in list(network.named_modules()):
        if name.endswith("net.2"):  # its kernel for CPUs wants at least 64 inputs
            new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, True, torch.float32)
            new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            new.bias = layer.bias
            network.set_submodule(name, new.to("cpu"))
    network.eval().is_quantized = True
    return pipe


def qdiff_layers(pipe):
    network = "unet" if hasattr(pipe, "unet") else "transformer"
    bits = PipelineQuantizationConfig(quant_mapping={network: QDiffConfig(weight_bits=4)})
    return DiffusionPipeline.from_pretrained(pipe.name_or_path, quantization_config=bits)


def tuned(root, folder, pipeline="flux", **changes):
    """Tunes a pipeline to one image and returns it as it was trained."""
    changes |= {"train_data_dir": str(root / "one"), "train_batch_size": 1, "learning_rate": 1e-2, "use_ema": False}
    recipe, _ = run(root, folder, pipeline=pipeline, max_train_steps=6, **changes)
    pipe = recipe.model.whole(recipe.model.network.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("name", "quantized"), [("stable_diffusion", qdiff_layers), ("flux", bitsandbytes_layers)], ids=["qdiff", "bnb"]
)
def test_a_quantized_base_is_tuned(root, tmp_path, monkeypatch, name, quantized):
    def load(*_):
        return quantized(DiffusionPipeline.from_pretrained(root / name))

    monkeypatch.setattr(TextPipeline, "_load", load)
    pipe, stock = tuned(root, tmp_path, name, lora_targets="net.2"), load()
    network = "unet" if hasattr(pipe, "unet") else "transformer"
    with adapters_off(getattr(pipe, network)):
        assert torch.equal(draw(pipe), draw(stock))  # the base has not moved
    stock.load_lora_weights(tmp_path)
    getattr(stock, network).eval()
    assert torch.equal(draw(pipe), draw(stock))
    assert (draw(stock) - draw(load())).abs().max() > 1e-3
    # The network that is not quantized takes them too.
    plain = DiffusionPipeline.from_pretrained(root / name)
    before = draw(plain)
    plain.load_lora_weights(tmp_path)
    assert (draw(plain) - before).abs().max() > 1e-3


def test_dora_trains_magnitudes(root, tmp_path):
    pipe = tuned(root, tmp_path, use_dora=True)
    stock = DiffusionPipeline.from_pretrained(root / "flux")
    stock.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(pipe), draw(stock))
    layer = "transformer_blocks.0.attn.to_q"
    length = stock.transformer.get_submodule(layer).base_layer.weight.norm(dim=1)
    magnitudes = [value for name, value in lora(tmp_path).items() if f"{layer}.lora_magnitude" in name]
    assert 1e-4 < (magnitudes[0] - length).abs().max() < 0.5  # it starts at the lengths of the weight's rows


def test_killed_while_caching_it_goes_on(root, tmp_path):
    changes = {"cache_latents": True, "cache_prompts": True, "cache_dir": str(tmp_path / "cache")}
    child = os.fork()
    if child == 0:
        save = cache.save_file

        def dying(columns, path):
            if "precomputed-latents" in str(path):
                save(dict(list(columns.items())[:1]), path)  # half a file
                os.kill(os.getpid(), signal.SIGKILL)
            save(columns, path)

        cache.save_file = dying
        run(root, tmp_path / "killed", **changes)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (prompts,) = (tmp_path / "cache").glob("precomputed-prompts-*/*.safetensors")
    written = prompts.stat().st_mtime_ns
    assert not list((tmp_path / "cache").glob("precomputed-latents-*/*.safetensors"))
    _, second = run(root, tmp_path / "second", **changes)
    assert prompts.stat().st_mtime_ns == written
    _, plain = run(root, tmp_path / "plain")
    assert second.losses == plain.losses
    with pytest.raises(ValueError, match=r"`cache_dir` must hold latents of this model, data and size.*32"):
        run(root, tmp_path / "third", **{**changes, "resolution": 16})


def _in_two(root, folder, changes):
    state = two_process_state()
    _, record = run(root, folder, **changes)
    (folder / f"rank{state.process_index}.json").write_text(json.dumps(record.losses))


def test_two_processes_equal_one(root, tmp_path):
    options = '{"within_labels": true}'
    changes = {"rng_scope": "sample", "adam_epsilon": 1e-4, "noise": "assignment", "noise_options": options}
    changes |= {"cache_latents": True, "cache_prompts": True, "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "two").mkdir()
    debug_launcher(_in_two, args=(root, tmp_path / "two", {**changes, "train_batch_size": 2}), num_processes=2)
    _, record = run(root, tmp_path / "one", **changes)
    losses = [json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert losses[0] == losses[1]
    np.testing.assert_allclose(losses[0], record.losses, rtol=1e-5)
    a, b = lora(tmp_path / "one"), lora(tmp_path / "two")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-5)


def test_a_pipeline_from_scratch_is_saved_whole(root, tmp_path):
    changes = {"pretrained_model_name_or_path": None, "pipeline_config": str(root / "z_image"), "lora_rank": None}
    changes |= {"mixed_precision": "bf16", "use_ema": False, "noise": "assignment", "num_validation_images": 2}
    recipe, _ = run(root, tmp_path, **changes)
    assert (tmp_path / "sample.png").is_file()  # drawn in mixed precision
    saved, source = DiffusionPipeline.from_pretrained(tmp_path), DiffusionPipeline.from_pretrained(root / "z_image")
    for name in recipe.model.others():
        a, b = getattr(saved, name).state_dict(), getattr(source, name).state_dict()
        assert all(torch.equal(a[key], b[key]) for key in b)  # not rounded by the run's precision
    trained = {key: value.cpu() for key, value in recipe.model.network.state_dict().items()}
    assert all(torch.equal(value, trained[key]) for key, value in saved.transformer.state_dict().items())
    assert "hides the prompt" in (tmp_path / "README.md").read_text()


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_buckets_hold_the_number_of_pixels_and_the_shape():
    sizes = bucket_sizes(1024, 64)
    assert {(1024, 1024), (768, 1344), (1344, 768)} <= set(sizes)
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert height * width <= 1024**2
        assert 0.5 <= height / width <= 2
    assert nearest_bucket((768, 1340), sizes) == (768, 1344)
    assert nearest_bucket((10, 10), sizes) == (1024, 1024)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_image_comes_equally_often_in_batches_of_one_size(accumulation):
    buckets = [range(5), range(5, 12), range(12, 16), [16]]
    options = {"seed": 3, "accumulation": accumulation, "total": 34}
    batches = list(BucketBatchSampler(buckets, 4 // accumulation, **options))[: 17 * accumulation]
    counts = Counter(index for batch in batches for _, index in batch)
    assert counts == dict.fromkeys(range(17), 4)  # four epochs of 17 images in updates of four
    of = {index: b for b, bucket in enumerate(buckets) for index in bucket}
    assert all(len({of[index] for _, index in batch}) == 1 for batch in batches)
    for start in (1, 7, 16):
        rest = list(BucketBatchSampler(buckets, 4 // accumulation, start=start, **options))
        assert rest[: len(batches) - start] == batches[start:]
    ranks = [list(BucketBatchSampler(buckets, 2 // accumulation, rank, 2, **options)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)][: len(batches)] == batches


def test_buckets_train_in_one_size_a_batch_with_its_own_shift(root, tmp_path):
    changes = {"pipeline": "flux", "aspect_ratio_buckets": True, "cache_latents": True, "cache_prompts": True}
    recipe, record = run(root, tmp_path, resolution=32, train_batch_size=2, num_train_epochs=1, max_train_steps=None,
                         **changes)  # fmt: skip
    assert recipe.data.sizes == [(32, 32)] or len(recipe.data.sizes) == 2
    assert len(record.losses) == 4
    shift = {size: recipe.timesteps[size].shift(torch.tensor(0.5)) for size in recipe.data.sizes}
    for (height, width), half in shift.items():
        tokens = height * width // 16
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        torch.testing.assert_close(half, torch.tensor(np.exp(mu) / (np.exp(mu) + 1), dtype=half.dtype))


# -- what is said and refused ----------------------------------------------------------------------------------------


def test_coupled_noise_over_prompts_and_long_captions_are_said_once(root, tmp_path, caplog):
    write_images(tmp_path / "long", [(32, 32)] * 8, ["word " * 90, "a dog", ""])
    with caplog.at_level(logging.WARNING, logger="diffusers_ext.training"):
        run(root, tmp_path / "out", train_data_dir=str(tmp_path / "long"), noise="assignment", max_train_steps=1)
    text = caplog.text
    assert text.count("hides the prompt") == 1
    assert text.count("1 of 3 captions are longer than the 77 tokens of tokenizer") == 1


REFUSED = {
    "lora_targets=to_qq": ({"lora_targets": "to_qq"}, r"`lora_targets`.*close names are .*'to_q'"),
    # With convolutions among its keys, the stock loader takes a UNet's LoRA for one of convolutions only.
    "targets that get lost": (
        {"lora_targets": "to_q,conv1"},
        r"`lora_targets` must be layers that .* finds again.*lost",
    ),
    "lora for a full run": (
        {"lora_rank": None, "lora_alpha": 4.0},
        "`lora_alpha` must be left out without `lora_rank`",
    ),
    "magnitudes of integers": ({"pipeline": "integers", "use_dora": True}, "`use_dora` must be False for this"),
    "quantized full run": ({"lora_rank": None, "quantization": "4bit"}, "`quantization` must be left out"),
    "quantized here": ({"quantization": "4bit"}, "`quantization` must be left out without"),
    "captions": ({"caption_column": "title"}, r"`caption_column` must be one of the columns .*'text'"),
    "resolution": ({"resolution": 31}, r"`resolution` must be a multiple of 4 .* near are 28 and 32"),
    "guidance": ({"guidance_scale": 3.5}, "`guidance_scale` must be left out for StableDiffusionPipeline"),
    "density": ({"timestep_sampling": "mode"}, "`timestep_sampling` must be 'uniform' for a pipeline with DDIM"),
    "min-SNR": ({"pipeline": "z_image", "snr_gamma": 5.0}, "`snr_gamma` must be left out for a pipeline with Flow"),
    "offset": ({"pipeline": "flux", "noise_offset": 0.1}, "`noise_offset` must be 0 for FluxPipeline"),
    "small images": (
        {"aspect_ratio_buckets": True, "resolution": 64},
        r"`resolution` must leave no image smaller than its bucket.*0\.png.*32x32 for 64x64.* and 3 more",
    ),
    "call": ({"call_options": '{"gidance": 1}'}, "`gidance` is no argument"),
    "size in the call": ({"call_options": '{"height": 64}'}, "`call_options` must be a JSON object without the size"),
    "rank": ({"lora_rank": 10**9}, "`lora_rank` must be at most .*, the full rank of the largest layer"),
    "no prompts": ({"validation_prompt": " ; "}, "`validation_prompt` must be a prompt, or several, got ' ; '"),
    "steps": ({"validation_inference_steps": 10**6}, "`validation_inference_steps` must be at most 1000"),
    "flip": ({"cache_latents": True, "random_flip": True}, "`random_flip` must be False with `cache_latents`"),
    "class": ({"class_prompt": "a cat"}, "`instance_prompt`, `class_prompt` and `class_data_dir`"),
    "both": ({"pipeline_config": "."}, "exactly one of `pretrained_model_name_or_path` and `pipeline_config`"),
}


# By PEFT, of the targets that get lost.
@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters, an inconsistency was discovered:RuntimeWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_before_training(root, tmp_path, case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        run(root, tmp_path, **changes)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_a_pipeline_without_text_is_told_what_to_use(root, tmp_path):
    from diffusers import DDIMScheduler, UNet2DModel

    from diffusers_ext import ImageGenerationPipeline

    unet = UNet2DModel(8, 1, 1, block_out_channels=(4,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), norm_num_groups=2)  # fmt: skip
    ImageGenerationPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "plain")
    with pytest.raises(
        ValueError, match="must be a text-to-image pipeline, got ImageGenerationPipeline.*`immiscible`"
    ):
        run(root, tmp_path / "out", pretrained_model_name_or_path=str(tmp_path / "plain"))


def test_the_shipped_model_draws_its_prompts_by_the_stock_pipeline():
    pipe = DiffusionPipeline.from_pretrained(TEXT_TO_IMAGE)
    assert type(pipe).__module__.startswith("diffusers.pipelines.stable_diffusion_3")
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a handwritten zero", "a handwritten three", "a handwritten seven"]
    call = {"guidance_scale": 2.0, "num_inference_steps": 8, "output_type": "pt"}
    images = pipe(prompts, generator=torch.Generator().manual_seed(0), **call).images
    judge = ImageClassifierFeatures.from_pretrained(CLASSIFIER).eval()
    with torch.no_grad():
        read = judge(images.mean(1, keepdim=True)[:, :, 2:-2, 2:-2] * 2 - 1).argmax(1)
    assert read.tolist() == [0, 3, 7]
    assert sum(path.stat().st_size for path in TEXT_TO_IMAGE.rglob("*")) < 3 * 2**20
