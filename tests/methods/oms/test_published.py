"""Repos as the paper's authors published them, with tiny shapes, and repos of this package."""

import json
import os
import re
import shutil
import sys

import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusers_ext import OMSPipeline, OMSUNet2DConditionModel, save_repo
from tests import processes
from tests.hub.server import HubServer
from tests.test_loading import align

from .tiny import (
    WIDTH,
    case,
    module,
    pixel_module,
    pixels,
    quiet,
    stable_diffusion,
    stable_diffusion_xl,
    text_encoder,
    tokenizer,
)

LIBRARIES = ["diffusers_patch.models.unet_2d_condition_woct", "diffusers_patch", "somewhere.else"]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def write_encoders(folder):
    """Writes a repo with a text encoder and a tokenizer."""
    text_encoder(seed=20).save_pretrained(folder / "text_encoder")
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def write_sdxl(folder):
    write_encoders(folder)
    text_encoder(seed=21, projection=True).save_pretrained(folder / "text_encoder_2")
    tokenizer().save_pretrained(folder / "tokenizer_2")
    return folder


def write_published(folder, target, library=LIBRARIES[0], dual=False):
    """Writes a module's repo whose encoders are in `target`."""
    network = module(2 * WIDTH if dual else WIDTH, seed=22)
    network.save_pretrained(folder / "oms_module")
    network.half().save_pretrained(folder / "oms_module", variant="fp16")
    config = json.loads((folder / "oms_module" / "config.json").read_text())
    write(folder / "oms_module" / "config.json", {**config, "_class_name": "UNet2DConditionWoCTModel"})
    encoder, words = ("SDXLTextEncoder", "SDXLTokenizer") if dual else ("CLIPTextModel", "CLIPTokenizer")
    index = {
        "_class_name": "OMSPipeline",
        "_diffusers_version": "0.23.0",
        "oms_module": [library, "UNet2DConditionWoCTModel"],
        "oms_text_encoder": [library if dual else "transformers", encoder],
        "oms_tokenizer": [library if dual else "transformers", words],
        "sd_pipeline": [None, None],
    }
    write(folder / "model_index.json", index)
    for name, part, cls in (("oms_text_encoder", "text_encoder", encoder), ("oms_tokenizer", "tokenizer", words)):
        entry = {"_class_name": cls} if dual else {"subfolder": part}
        write(folder / name / "config.json", {**entry, "_name_or_path": str(target)})
    return folder


@pytest.fixture
def repos(tmp_path):
    return write_published(tmp_path / "module", write_encoders(tmp_path / "encoders")), tmp_path / "encoders"


def assert_weights(network, path):
    expected, found = load_file(path), network.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value.to(found[key].dtype)), key


CALL = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}


def draw(pipeline, **call):
    return quiet(pipeline)(**{**CALL, **call}, generator=torch.Generator().manual_seed(0)).images


# ---------------------------------------------------------------- the published format


@pytest.mark.parametrize("library", LIBRARIES)
def test_published_repo(tmp_path, library):
    encoders = write_encoders(tmp_path / "encoders")
    repo, base = write_published(tmp_path / "module", encoders, library), stable_diffusion()
    pipeline = OMSPipeline.from_pretrained(repo, base=base)
    assert type(pipeline.oms_module) is OMSUNet2DConditionModel
    assert pipeline.sd_pipeline is base
    assert_weights(pipeline.oms_module, repo / "oms_module" / "diffusion_pytorch_model.safetensors")
    assert_weights(pipeline.oms_text_encoder, encoders / "text_encoder" / "model.safetensors")
    assert pipeline.oms_tokenizer("a cat").input_ids == tokenizer()("a cat").input_ids
    by_hand = OMSPipeline(module(seed=22), base, text_encoder(seed=20), tokenizer())
    torch.testing.assert_close(draw(pipeline), draw(by_hand), atol=1e-5, rtol=1e-5)


def test_variant_and_dtype(repos):
    repo, encoders = repos
    path = repo / "oms_module" / "diffusion_pytorch_model.fp16.safetensors"
    changed = {key: value + 1 for key, value in load_file(path).items()}
    save_file(changed, path, metadata={"format": "pt"})  # so that it can be told from the other
    pipeline = OMSPipeline.from_pretrained(repo, base=stable_diffusion(), variant="fp16", dtype=torch.float16)
    assert pipeline.oms_module.dtype == pipeline.oms_text_encoder.dtype == torch.float16
    assert_weights(pipeline.oms_module, path)
    assert_weights(pipeline.oms_text_encoder, encoders / "text_encoder" / "model.safetensors")  # has no variant
    full = OMSPipeline.from_pretrained(repo, variant="fp16")
    assert full.oms_module.dtype == full.oms_text_encoder.dtype == torch.float32
    assert_weights(full.oms_module, path)


def test_joined_encoders(tmp_path):
    sdxl, base = write_sdxl(tmp_path / "sdxl"), stable_diffusion_xl()
    repo = write_published(tmp_path / "module", sdxl, dual=True)
    pipeline = OMSPipeline.from_pretrained(repo, base=base)
    assert_weights(pipeline.oms_text_encoder, sdxl / "text_encoder" / "model.safetensors")
    assert_weights(pipeline.oms_text_encoder_2, sdxl / "text_encoder_2" / "model.safetensors")
    first, second = text_encoder(seed=20), text_encoder(seed=21, projection=True)
    by_hand = OMSPipeline(module(2 * WIDTH, seed=22), base, first, tokenizer(), second, tokenizer())
    torch.testing.assert_close(draw(pipeline), draw(by_hand), atol=1e-5, rtol=1e-5)
    pipeline = OMSPipeline.from_pretrained(repo, base=base, oms_text_encoder=None, oms_tokenizer=None)
    assert pipeline.oms_text_encoder is pipeline.oms_text_encoder_2 is pipeline.oms_tokenizer_2 is None
    by_hand = OMSPipeline(module(2 * WIDTH, seed=22), base)
    torch.testing.assert_close(draw(pipeline), draw(by_hand), atol=1e-5, rtol=1e-5)


def test_every_component_can_be_brought_along(repos):
    repo, encoders = repos
    shutil.rmtree(encoders)  # nothing is looked for that is given
    own = {"oms_module": module(), "oms_text_encoder": text_encoder(), "oms_tokenizer": tokenizer()}
    base = stable_diffusion()
    pipeline = OMSPipeline.from_pretrained(repo, sd_pipeline=base, **own, vae_scaling_factor=0.18215, vae_id="org/vae")
    assert all(getattr(pipeline, name) is part for name, part in own.items())
    assert pipeline.sd_pipeline is base
    assert pipeline.config["vae_id"] == "org/vae"
    with pytest.raises(ValueError, match="scaling factor 0.5"):
        OMSPipeline.from_pretrained(repo, base=base, **own, vae_scaling_factor=0.5)
    pipeline = OMSPipeline.from_pretrained(repo, base=base, oms_text_encoder=None, oms_tokenizer=None)
    by_hand = OMSPipeline(module(seed=22), base)
    torch.testing.assert_close(draw(pipeline), draw(by_hand), atol=1e-5, rtol=1e-5)


def test_encoders_within_the_repo(tmp_path):
    repo = write_published(tmp_path / "module", tmp_path / "nowhere")
    for name, part in (("oms_text_encoder", text_encoder(seed=20)), ("oms_tokenizer", tokenizer())):
        (repo / name / "config.json").unlink()
        part.save_pretrained(repo / name)
    pipeline = OMSPipeline.from_pretrained(repo)
    assert_weights(pipeline.oms_text_encoder, repo / "oms_text_encoder" / "model.safetensors")
    assert pipeline.oms_tokenizer("a cat").input_ids == tokenizer()("a cat").input_ids


def test_saved_again_it_is_of_this_package(repos, tmp_path):
    pipeline = OMSPipeline.from_pretrained(repos[0], base=stable_diffusion())
    save_repo(pipeline, tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["oms_module"] == ["diffusers_ext", "OMSUNet2DConditionModel"]
    shutil.rmtree(repos[1])  # the encoders are in the repo now
    torch.testing.assert_close(
        draw(DiffusionPipeline.from_pretrained(tmp_path / "ours")), draw(pipeline), atol=1e-5, rtol=0
    )


HOSTILE = "open({canary!r}, 'w').close()\n"


def test_indirection_never_runs_code(tmp_path):
    canary = tmp_path / "canary"
    encoders = write_encoders(tmp_path / "encoders")
    hostile = HOSTILE.format(canary=str(canary))
    repo = write_published(tmp_path / "module", encoders)
    for folder in (encoders, encoders / "text_encoder", encoders / "tokenizer", repo, repo / "oms_module"):
        for name in ("pipeline.py", "modeling_evil.py", "tokenization_evil.py", "__init__.py"):
            (folder / name).write_text(hostile + "class Evil: pass\n")
    config = json.loads((encoders / "text_encoder" / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
    write(encoders / "text_encoder" / "config.json", config)
    config = json.loads((encoders / "tokenizer" / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    write(encoders / "tokenizer" / "tokenizer_config.json", config)
    pipeline = OMSPipeline.from_pretrained(repo, base=stable_diffusion())
    assert_weights(pipeline.oms_text_encoder, encoders / "text_encoder" / "model.safetensors")
    draw(pipeline)
    assert not canary.exists()


def pickle_weights(folder):
    """Puts pickled weights in the place of all safetensors under a folder, as their libraries name them."""
    for path in folder.rglob("*.safetensors"):
        name = "pytorch_model.bin" if path.name.startswith("model.") else f"{path.stem}.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    return folder


@pytest.mark.parametrize("part", ["module", "encoder"])
def test_pickled_weights_are_refused(repos, part):
    repo, encoders = repos
    folder = repo / "oms_module" if part == "module" else encoders / "text_encoder"
    name = "diffusion_pytorch_model.bin" if part == "module" else "pytorch_model.bin"
    for path in folder.glob("*.safetensors"):
        torch.save(load_file(path), folder / name)
        path.unlink()
    component = "oms_module" if part == "module" else "oms_text_encoder"
    with pytest.raises(OSError, match=rf"`{component}` could not be loaded(.|\n)*safetensors"):
        OMSPipeline.from_pretrained(repo)
    pipeline = OMSPipeline.from_pretrained(repo, use_safetensors=False, **{"oms_module": module()} if part != "module"
                                           else {"oms_text_encoder": None})  # fmt: skip
    network = getattr(pipeline, component)
    for key, value in torch.load(folder / name, weights_only=True).items():
        assert torch.equal(network.state_dict()[key], value.to(network.dtype))


def test_what_is_not_found_is_named(repos, tmp_path):
    repo, encoders = repos
    place = re.escape(str(encoders))
    with pytest.raises(ValueError, match="`device_map` must be left out for a repo in the format of the published"):
        OMSPipeline.from_pretrained(repo, device_map="cuda")
    shutil.rmtree(encoders / "tokenizer")
    with pytest.raises(OSError, match=rf"`oms_tokenizer` could not be loaded from 'tokenizer' of '{place}'; pass"):
        OMSPipeline.from_pretrained(repo)
    shutil.rmtree(encoders)
    with pytest.raises(OSError, match=rf"`oms_text_encoder` could not be loaded from 'text_encoder' of '{place}'"):
        OMSPipeline.from_pretrained(repo)
    shutil.rmtree(repo / "oms_text_encoder")
    with pytest.raises(OSError, match="`oms_text_encoder` could not be loaded from 'oms_text_encoder'"):
        OMSPipeline.from_pretrained(repo)
    shutil.rmtree(repo / "oms_tokenizer")
    with pytest.raises(OSError, match="`oms_tokenizer` could not be loaded from 'oms_tokenizer'"):
        OMSPipeline.from_pretrained(repo, oms_text_encoder=None)
    (repo / "oms_module" / "config.json").unlink()
    with pytest.raises(OSError, match="`oms_module` could not be loaded from 'oms_module'"):
        OMSPipeline.from_pretrained(repo)
    with pytest.raises(OSError, match=r"model_index\.json"):
        OMSPipeline.from_pretrained(tmp_path)


# ---------------------------------------------------------------- the Hub


def serve(hub, repo_id, folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    hub.repos[repo_id] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
from diffusers_ext import OMSPipeline
base = DiffusionPipeline.from_pretrained(sys.argv[1])
more = {"local_files_only": True} if sys.argv[3] == "offline" else {}
found = {}
for name, variant in (("org/oms", None), ("org/oms", "fp16"), ("org/mix", None)):
    pipeline = OMSPipeline.from_pretrained(name, base=base, variant=variant, revision="main", **more)
    parts = [pipeline.oms_module, pipeline.oms_text_encoder, pipeline.oms_text_encoder_2]
    found[f"{name}-{variant}"] = [part.state_dict() for part in parts if part is not None]
for key, cls in (("ours", DiffusionPipeline), ("own", OMSPipeline)):
    whole = cls.from_pretrained("org/ours", **more)
    assert whole.config["_name_or_path"] == "org/ours"
    whole.set_progress_bar_config(disable=True)
    found[key] = whole("a cat", num_inference_steps=2, output_type="latent",
                       generator=torch.Generator().manual_seed(0)).images
for repo in [] if more else ["half", "pickled"]:
    try:
        OMSPipeline.from_pretrained(f"org/{repo}")
    except OSError as error:
        found[repo] = str(error)
torch.save(found, sys.argv[2])
"""


def test_from_the_hub_and_its_cache(tmp_path):
    """Module and encoders from three repos, then again without a server; and a repo of ours, with its base."""
    encoders, sdxl = write_encoders(tmp_path / "encoders"), write_sdxl(tmp_path / "sdxl")
    base = stable_diffusion()
    base.save_pretrained(tmp_path / "base")
    ours = save_repo(OMSPipeline(module(), base), tmp_path / "ours")
    with HubServer() as hub:
        serve(hub, "org/oms", write_published(tmp_path / "oms", "org/encoders"))
        serve(hub, "org/mix", write_published(tmp_path / "mix", "org/sdxl", dual=True))
        serve(hub, "org/encoders", encoders)
        serve(hub, "org/sdxl", sdxl)
        serve(hub, "org/ours", ours)
        OMSPipeline(module(), base).save_pretrained(tmp_path / "half", variant="fp16")
        serve(hub, "org/half", tmp_path / "half")
        serve(hub, "org/pickled", pickle_weights(save_repo(OMSPipeline(module(), base), tmp_path / "pickled")))
        environment = {**os.environ, **hub.environment(tmp_path / "home")}

        def load(mode):
            run = processes.run(
                [sys.executable, "-c", LOAD, tmp_path / "base", tmp_path / mode, mode], env=environment
            )
            assert run.returncode == 0, run.stderr[-3000:]
            return torch.load(tmp_path / mode, weights_only=True)

        online = load("online")
        foreign = [path for _, path in hub.requests if path.endswith((".py", ".bin"))]
        assert [path for path in foreign if "ours" not in path and "pickled/resolve" not in path] == []
        assert 'pass variant="fp16"' in online["half"]
        assert "pickled ones are refused because they can run code" in online["pickled"]
    offline = load("offline")
    for found in (online, offline):
        for repo, name in (("oms", "org/oms-None"), ("mix", "org/mix-None"), ("oms", "org/oms-fp16")):
            variant = ".fp16" if "fp16" in name else ""
            files = [tmp_path / repo / "oms_module" / f"diffusion_pytorch_model{variant}.safetensors"]
            source = encoders if repo == "oms" else sdxl
            folders = ["text_encoder", "text_encoder_2"] if repo == "mix" else ["text_encoder"]
            files += [source / folder / "model.safetensors" for folder in folders]
            assert len(found[name]) == len(files)
            for weights, path in zip(found[name], files, strict=True):
                expected = load_file(path)
                assert weights.keys() == expected.keys()
                assert all(torch.equal(weights[key], value.float()) for key, value in expected.items())
        for key in ("ours", "own"):
            torch.testing.assert_close(found[key], draw(OMSPipeline(module(), base)), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- this package's own format


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "control_net", "classes"])
@pytest.mark.parametrize("save", [save_repo, lambda pipeline, path: pipeline.save_pretrained(path)])
def test_saved_with_its_base(tmp_path, name, save):
    """The pipeline holds the base, and that its networks: three deep."""
    base, pipeline, call = case(name)
    if "prompt" in call:
        width = pipeline.oms_module.config.cross_attention_dim
        pipeline = OMSPipeline(pipeline.oms_module, base, text_encoder(width, seed=30), tokenizer(), vae_id="org/vae")
    save(pipeline, tmp_path)
    network = "sd_pipeline/unet/diffusion_pytorch_model.safetensors"
    assert_weights(base.unet, tmp_path / network)
    for cls in (DiffusionPipeline, OMSPipeline):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is OMSPipeline
        assert type(loaded.sd_pipeline) is type(base)
        assert loaded.config["vae_id"] == pipeline.config["vae_id"]
        outputs = []
        for it in (loaded, pipeline):
            align(it)
            outputs.append(quiet(it)(**call, generator=torch.Generator().manual_seed(0)).images)
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", [DiffusionPipeline, OMSPipeline])
def test_saved_without_its_base(tmp_path, cls):
    base, network = stable_diffusion(), module()
    pipeline = OMSPipeline(network, None, text_encoder(seed=30), tokenizer(), vae_scaling_factor=0.18215)
    save_repo(pipeline, tmp_path)
    assert not (tmp_path / "sd_pipeline").exists()
    key = "sd_pipeline" if cls is DiffusionPipeline else "base"
    loaded = cls.from_pretrained(tmp_path, **{key: base})
    assert loaded.sd_pipeline is base
    assert_weights(loaded.oms_module, tmp_path / "oms_module" / "diffusion_pytorch_model.safetensors")
    by_hand = OMSPipeline(network, base, text_encoder(seed=30), tokenizer())
    torch.testing.assert_close(draw(loaded), draw(by_hand), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="scaling factor 0.18215 that the module was trained on, got 0.13025"):
        cls.from_pretrained(tmp_path, **{key: stable_diffusion_xl()})
    without = cls.from_pretrained(tmp_path)
    assert without.sd_pipeline is None
    with pytest.raises(ValueError, match="`sd_pipeline` must be given"):
        without("a cat")


def test_a_repo_with_a_base_takes_another(tmp_path):
    other = pixels(4)
    for parameter in other.unet.parameters():
        parameter.data.mul_(0.5)
    network = pixel_module(4)
    save_repo(OMSPipeline(network, pixels(4)), tmp_path)
    loaded = OMSPipeline.from_pretrained(tmp_path, base=other)
    assert loaded.sd_pipeline is other
    call = {"class_labels": [1], "num_inference_steps": 2, "output_type": "latent"}
    call["latents"] = torch.randn(1, 1, 8, 8)
    outputs = [quiet(it)(**call, oms_step="ddim").images for it in (loaded, OMSPipeline(network, other))]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-5)
    swapped = OMSPipeline.from_pipe(loaded, sd_pipeline=None)
    assert swapped.sd_pipeline is None
    assert swapped.oms_module is loaded.oms_module


def test_pickled_modules_of_this_package_are_refused(tmp_path):
    OMSPipeline(module()).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="pickled ones are refused"):
        OMSPipeline.from_pretrained(tmp_path)


WHOLE = ["oms_module", "oms_text_encoder", "sd_pipeline/unet", "sd_pipeline/vae", "sd_pipeline/text_encoder"]


@pytest.fixture(scope="module")
def whole():
    """A pipeline with an encoder of its own and a base."""
    return OMSPipeline(module(), stable_diffusion(), text_encoder(seed=9), tokenizer())


@pytest.mark.parametrize("part", WHOLE)
def test_one_pickled_component_is_refused_before_any_is_read(tmp_path, whole, part):
    save_repo(whole, tmp_path)
    pickle_weights(tmp_path / part)
    given = {"sd_pipeline": stable_diffusion()} if part.startswith("sd") else {part: getattr(whole, part)}
    assert draw(OMSPipeline.from_pretrained(tmp_path, **given)).isfinite().all()  # what is given is not looked for
    for path in tmp_path.rglob("config.json"):
        path.write_text("{")  # could not be read
    with pytest.raises(
        OSError,
        match=rf"{re.escape(str(tmp_path / part))} holds no safetensors weights, .*refused because they can run",
    ):
        OMSPipeline.from_pretrained(tmp_path)


def test_a_pickled_encoder_of_a_published_module_is_refused_before_any_is_read(repos):
    repo, encoders = repos
    pickle_weights(encoders)
    (repo / "oms_module" / "config.json").write_text("{")
    with pytest.raises(
        OSError, match="`oms_text_encoder` could not be loaded(.|\n)*refused because they can run code"
    ):
        OMSPipeline.from_pretrained(repo)


@pytest.mark.parametrize("cls", [OMSPipeline, DiffusionPipeline, AutoPipelineForText2Image])
def test_dtype_and_variant_reach_the_base(tmp_path, whole, cls):
    save_repo(whole, tmp_path)
    save_repo(whole, tmp_path / "half", variant="fp16")
    for path, more in ((tmp_path, {}), (tmp_path / "half", {"variant": "fp16"})):
        loaded = cls.from_pretrained(path, dtype=torch.bfloat16, **more)
        names = ("oms_module", "oms_text_encoder", "unet", "vae", "text_encoder")
        assert {name: getattr(loaded, name).dtype for name in names} == dict.fromkeys(names, torch.bfloat16)
        assert torch.equal(loaded.unet.conv_in.weight, whole.unet.conv_in.weight.bfloat16())


@pytest.mark.parametrize("part", WHOLE)
def test_a_repo_of_one_variant_says_which(tmp_path, whole, part):
    save_repo(whole, tmp_path)
    for path in (tmp_path / part).glob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    with pytest.raises(
        OSError, match=rf'{re.escape(str(tmp_path / part))} has weights of a variant only: pass variant="fp16"'
    ):
        OMSPipeline.from_pretrained(tmp_path)
    loaded = OMSPipeline.from_pretrained(tmp_path, variant="fp16")  # where the others are taken without
    assert torch.equal(loaded.unet.conv_in.weight, whole.unet.conv_in.weight)
    with pytest.raises(OSError, match=r'pass variant="fp16"\. Got variant=.bf16.'):
        OMSPipeline.from_pretrained(tmp_path, variant="bf16")
    if part == "oms_module":
        with pytest.raises(OSError, match='pass variant="fp16"'):
            OMSUNet2DConditionModel.from_pretrained(tmp_path, subfolder=part)


def test_a_published_module_of_one_variant_says_which(repos):
    (repos[0] / "oms_module" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match='`oms_module` could not be loaded(.|\n)* pass variant="fp16"'):
        OMSPipeline.from_pretrained(repos[0])
