"""Complete repos: written whole, pushed to a loopback Hub, loaded by another process with an empty cache."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext import ImageGenerationPipeline, RepoCard, push_repo, save_repo
from diffusers_ext.hub.card import fill_in_repo_id
from tests import processes

from .server import HubServer


def make(seed=0, num_class_embeds=None, **config):
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=num_class_embeds,
    )  # fmt: skip
    return ImageGenerationPipeline(unet, DDIMScheduler(), **config)


CARD = RepoCard(
    method="A method",
    description="A model.",
    data="Some images.",
    license="apache-2.0",
    tags=["a-tag"],
    paper="https://arxiv.org/abs/2406.12303",
    arguments={"learning_rate": 1e-3},
    results={"Frechet distance": 12.3456789, "steps": 10},
    notes=["Only deterministic samplers."],
)


def test_a_repo_is_complete(tmp_path, monkeypatch):
    save_repo(make(image_scale=2.0), tmp_path / "repo", card=CARD, sample=Image.new("L", (8, 8)))
    names = {p.relative_to(tmp_path / "repo").as_posix() for p in (tmp_path / "repo").rglob("*") if p.is_file()}
    assert names == {
        "README.md",
        "model_index.json",
        "pipeline.py",
        "results.json",
        "sample.png",
        "scheduler/scheduler_config.json",
        "training_arguments.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "repo"]  # nothing temporary is left
    card = ModelCard.load(tmp_path / "repo" / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.license == "apache-2.0"
    assert card.data.tags == ["diffusers", "a-tag"]
    for part in ("# A method", "Some images.", "| Frechet distance | 12.35 |", '"learning_rate": 0.001', "sample.png",
                 "> Only deterministic samplers.", "2406.12303"):  # fmt: skip
        assert part in card.text
    assert json.loads((tmp_path / "repo" / "results.json").read_text())["Frechet distance"] == 12.3456789
    # The card's own snippet runs.
    snippet = (
        card.text.split("```python\n")[1].split("```")[0].replace("pipeline()", "pipeline(num_inference_steps=2)")
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "snippet", "exec"), {})
    assert Image.open(tmp_path / "sample.png").size == (8, 8)


@pytest.mark.parametrize("kind", ["self_contained", "classes", "stock"])
def test_the_snippet_fits_the_pipeline(tmp_path, kind, monkeypatch):
    pipeline = make(num_class_embeds=3 if kind == "classes" else None)
    if kind == "stock":
        pipeline = DDIMPipeline(pipeline.unet, DDIMScheduler())
    folder = tmp_path / 'a "quoted" repo'
    save_repo(pipeline, folder, card=RepoCard(method="A method"), self_contained=kind == "self_contained")
    snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert ("import diffusers_ext" in snippet) is (kind != "stock")
    assert ("trust_remote_code=True" in snippet) is (kind == "self_contained")
    assert ("class_labels=0" in snippet) is (kind == "classes")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "snippet", "exec"), {})  # as printed
    assert Image.open("sample.png").size == (8, 8)


def test_a_card_holds_any_text():
    text = 'one: "two" | three\n---\nfour'
    card = RepoCard(
        method=text, license="other", tags=[text], base_model="org/base", results={text: text, "loss": 0.123456},
        notes=["first\n\nsecond"], arguments={"folder": tempfile.gettempdir, "text": text + "\n```\n"},
    ).model_card("org/name")  # fmt: skip
    assert card.data.tags == ["diffusers", text]  # the YAML is whole
    assert card.data.base_model == "org/base"
    lines = card.text.splitlines()
    assert '# one: "two" | three --- four' in lines
    assert '| one: "two" \\| three --- four | one: "two" \\| three --- four |' in lines
    assert "| loss | 0.1235 |" in lines
    assert [line for line in lines if line.startswith(">")] == ["> first", ">", "> second"]
    code = card.text.split("```json\n")[1].split("\n```")[0]
    assert json.loads(code)["text"] == text + "\n```\n"


def test_the_card_loads_the_repo_once_it_is_pushed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = 'from_pretrained("runs/model", trust_remote_code=True)\nfrom_pretrained("org/base")'
    expected = 'from_pretrained("org/name", trust_remote_code=True)\nfrom_pretrained("org/base")'
    for folder in (Path("runs/model"), tmp_path / "runs" / "model"):  # however the folder is called
        assert fill_in_repo_id(text, folder, "org/name") == expected
    assert fill_in_repo_id(text, tmp_path / "other", "org/name") == text


def test_an_interrupted_save_keeps_each_part_whole(tmp_path, monkeypatch):
    folder = save_repo(make(0), tmp_path / "repo")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    rename = Path.rename

    def stop(self, target):
        if ".save-" in str(self) and self.name == "scheduler":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        save_repo(make(1), folder)
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before  # nothing temporary either
    # What a killed process leaves behind does not disturb the next save.
    (folder / "unet").rename(folder / ".unet-old.tmp")
    save_repo(make(1), folder)
    assert {p.relative_to(folder).parts[0] for p in folder.iterdir()} == {
        "model_index.json", "pipeline.py", "scheduler", "unet",
    }  # fmt: skip


def test_a_failed_save_leaves_the_earlier_content(tmp_path, monkeypatch):
    save_repo(make(0), tmp_path / "repo", card=CARD)
    before = {p: p.read_bytes() for p in (tmp_path / "repo").rglob("*") if p.is_file()}
    monkeypatch.setattr(RepoCard, "render", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_repo(make(1), tmp_path / "repo", card=CARD)
    assert {p: p.read_bytes() for p in (tmp_path / "repo").rglob("*") if p.is_file()} == before
    monkeypatch.undo()
    (tmp_path / "repo" / "notes.txt").write_text("mine")
    save_repo(make(1), tmp_path / "repo", card=CARD)
    assert (tmp_path / "repo" / "notes.txt").read_text() == "mine"
    saved = load_file(tmp_path / "repo" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[k], v) for k, v in make(1).unet.state_dict().items())


def test_stock_pipelines_are_saved_too(tmp_path):
    save_repo(DDPMPipeline(make().unet, DDPMScheduler()), tmp_path, card=CARD)
    assert not (tmp_path / "pipeline.py").exists()
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path), DDPMPipeline)
    with pytest.raises(ValueError, match="`self_contained` must be False for a pipeline of another package"):
        save_repo(DDPMPipeline(make().unet, DDPMScheduler()), tmp_path, self_contained=True)


PUSH = "import sys; from diffusers_ext import push_repo; print(push_repo(sys.argv[1], 'org/name'))"
LOAD = """
import sys, torch, diffusers_ext
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("org/name")
pipe.set_progress_bar_config(disable=True)
with torch.no_grad():
    for tensor in [*pipe.unet.parameters(), *pipe.unet.buffers()]:
        tensor.data = tensor.data.clone()
out = pipe(2, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.save({"out": out, "weights": pipe.unet.state_dict(), "class": type(pipe).__name__}, sys.argv[1])
"""


def run(code, argument, environment):
    return processes.run([sys.executable, "-c", code, argument], env={**os.environ, **environment})


def test_push_from_one_process_and_load_in_another(tmp_path):
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(2, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    folder = save_repo(pipeline, tmp_path / "local", card=CARD, sample=Image.new("L", (8, 8)))
    (folder / "checkpoint-5" / "deep").mkdir(parents=True)
    (folder / "checkpoint-5" / "optimizer.bin").write_bytes(b"\0" * 100)
    (folder / "checkpoint-5" / "deep" / "x.bin").write_bytes(b"\0" * 100)
    with HubServer() as hub:
        pushed = run(PUSH, folder, hub.environment(tmp_path / "home1"))
        assert pushed.returncode == 0, pushed.stderr
        assert f"{hub.url}/org/name/commit/" in pushed.stdout
        assert hub.commits == {"org/name": 1}
        assert not [path for path in hub.repos["org/name"] if path.startswith("checkpoint")]
        assert len(hub.objects) >= 2  # weights and picture went through LFS
        assert b'from_pretrained("org/name")' in hub.repos["org/name"]["README.md"]
        # A new process, not a fork: all that it knows of the Hub it reads from its environment itself.
        new = [sys.executable, "-c", LOAD, tmp_path / "out.pt"]
        reader = {**os.environ, **hub.environment(tmp_path / "home2"), "OMP_NUM_THREADS": "1"}
        loaded = subprocess.run(new, env=reader, cwd=processes.ROOT, capture_output=True, text=True, check=False)
        assert loaded.returncode == 0, loaded.stderr
        asked = len(hub.requests)
        offline = run(LOAD, tmp_path / "again.pt", {**hub.environment(tmp_path / "home2"), "HF_HUB_OFFLINE": "1"})
        assert offline.returncode == 0, offline.stderr  # from the cache that the first load filled
        assert len(hub.requests) == asked
    for file in ("out.pt", "again.pt"):
        found = torch.load(tmp_path / file, weights_only=True)
        assert found["class"] == "ImageGenerationPipeline"
        assert all(torch.equal(found["weights"][k], v) for k, v in pipeline.unet.state_dict().items())
        torch.testing.assert_close(found["out"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fault", ["commit", "hash"])
def test_a_failed_upload_leaves_the_folder_whole_and_says_how_to_retry(tmp_path, fault):
    folder = save_repo(make(), tmp_path / "local", card=CARD)
    before = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    with HubServer() as hub:
        hub.corrupt = fault == "hash"
        hub.fail = ("POST", "/commit/") if fault == "commit" else None
        pushed = run(PUSH, folder, hub.environment(tmp_path / "home"))
        assert pushed.returncode != 0
        assert "RuntimeError: the upload to 'org/name' failed" in pushed.stderr
        assert f"The folder {folder} is whole. To try again: hf upload org/name {folder} ." in pushed.stderr
        assert hub.commits == {}
        hub.corrupt, hub.fail = False, None
        if fault == "commit":  # what was uploaded is not sent again, and the retry succeeds
            again = run(PUSH, folder, hub.environment(tmp_path / "home"))
            assert again.returncode == 0, again.stderr
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert DiffusionPipeline.from_pretrained(folder) is not None


def test_refuses_bad_names_before_any_upload(tmp_path):
    save_repo(make(), tmp_path)
    with pytest.raises(ValueError, match=r"`repo_id` must be 'organisation/name', got 'a/b/c'"):
        push_repo(tmp_path, "a/b/c")
    with pytest.raises(ValueError, match=r"`save_directory` must be a folder with model_index\.json"):
        push_repo(tmp_path / "nowhere", "org/name")
