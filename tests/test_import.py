"""What `import diffusers_ext` costs, what it offers, and that it leaves Diffusers as it was."""

import copy
import importlib
import json
import os
import pickle
import re
import subprocess
import sys

import diffusers
import pytest
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

import diffusers_ext

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LOADABLE = (DiffusionPipeline, ModelMixin, SchedulerMixin)
HEAVY = ["transformers", "accelerate", "datasets", "diffusers.models", "diffusers.pipelines", "diffusers.schedulers"]

EFFECTS = """
import inspect, json, sys, time
import torch, torch._dynamo  # which dwarf everything else
start = time.process_time()
import diffusers
stock = time.process_time() - start

before, all_before, type_name = dir(diffusers), list(diffusers.__all__), type(diffusers).__name__
start = time.process_time()
import diffusers_ext
more = time.process_time() - start

loaded = sorted(name for name in sys.modules if name.startswith("diffusers_ext."))
heavy = [name for name in sys.argv[1:] if name in sys.modules]
unchanged = [dir(diffusers) == before, diffusers.__all__ == all_before, type(diffusers).__name__ == type_name]
foreign = {}
for name in diffusers.__all__:
    value = getattr(diffusers, name)
    module = value.__name__ if inspect.ismodule(value) else value.__module__
    if not module.startswith("diffusers."):
        foreign[name] = module
print(json.dumps({
    "seconds": [stock, more],
    "loaded": loaded, "heavy": heavy, "unchanged": unchanged, "foreign": foreign, "tried": len(all_before),
    "shared": sorted(set(diffusers_ext.__all__) & set(before)),
    "ours_after": sorted(name for name in sys.modules if name.startswith("diffusers_ext.")),
}))
"""


def child():
    """What a process that has loaded nothing finds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", EFFECTS, *HEAVY], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    return child()


def test_import_takes_as_long_as_that_of_diffusers(found):
    shares = []
    for attempt in range(3):  # other work on the machine may disturb a measurement
        stock, more = (child() if attempt else found)["seconds"]
        shares.append(more / stock)
        if shares[-1] <= 0.15:
            break
    assert min(shares) <= 0.15, shares


def test_import_is_light_and_leaves_diffusers_as_it_was(found):
    assert found["heavy"] == []
    assert found["loaded"] == ["diffusers_ext._diffusers_hook"]  # nothing of a method, nothing shared
    assert found["unchanged"] == [True, True, True]
    assert found["foreign"] == {}
    assert found["tried"] > 500
    assert found["shared"] == []  # no name of ours shadows one of Diffusers
    assert found["ours_after"] == found["loaded"]  # and looking at all of Diffusers loads nothing of ours


def test_every_public_name_resolves():
    assert diffusers_ext.__all__ == sorted(diffusers_ext._MODULES)
    assert sum(map(len, diffusers_ext._PUBLIC.values())) == len(diffusers_ext.__all__)  # no name stands twice
    for name in diffusers_ext.__all__:
        value = getattr(diffusers_ext, name)
        assert value is getattr(importlib.import_module("diffusers_ext." + diffusers_ext._MODULES[name]), name)
        assert value is getattr(diffusers_ext, name)
        assert name in dir(diffusers_ext)
        assert value.__name__ == name
        if isinstance(value, type) and issubclass(value, LOADABLE):
            assert value.__module__ == "diffusers_ext", name
            assert pickle.loads(pickle.dumps(value)) is value


def test_only_pipelines_are_offered_to_diffusers():
    for name in diffusers_ext.__all__:
        value = getattr(diffusers_ext, name)
        if isinstance(value, type) and issubclass(value, DiffusionPipeline):
            assert name.endswith("Pipeline")
            assert getattr(diffusers, name) is value
        else:
            assert not hasattr(diffusers, name)


def test_unknown_names_raise_as_before():
    own = re.escape("module diffusers has no attribute NoSuchPipeline")
    with pytest.raises(AttributeError, match=f"^{own}$"):
        _ = diffusers.NoSuchPipeline
    with pytest.raises(AttributeError, match="^module 'diffusers_ext' has no attribute 'NoSuchPipeline'$"):
        _ = diffusers_ext.NoSuchPipeline
    assert not hasattr(diffusers_ext, "UNet2DModel")  # base classes are offered, not all of Diffusers
    assert diffusers_ext.ModelMixin is ModelMixin


def test_reloading_is_harmless():
    before, mro = diffusers_ext.ImageGenerationPipeline, type(diffusers).__mro__
    again = importlib.reload(diffusers_ext)
    assert again is diffusers_ext
    assert type(diffusers).__mro__ == mro  # not wrapped twice
    assert diffusers_ext.ImageGenerationPipeline is before
    assert diffusers.ImageGenerationPipeline is before


def test_pickling():
    model = diffusers_ext.ImageClassifierFeatures(sample_size=8, block_out_channels=(2,), feature_dim=3)
    pipeline = diffusers_ext.ImageGenerationPipeline(
        diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8,), norm_num_groups=2, layers_per_block=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        ),
        diffusers.DDIMScheduler(num_train_timesteps=7),
        image_scale=2.0,
    )  # fmt: skip
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(copied) is type(model)
        assert dict(copied.config) == dict(model.config)
        assert all(bool((a == b).all()) for a, b in zip(copied.parameters(), model.parameters(), strict=True))
    loaded = pickle.loads(pickle.dumps(pipeline))
    assert type(loaded) is type(pipeline)
    assert dict(loaded.config) == dict(pipeline.config)
    assert loaded.scheduler.config.num_train_timesteps == 7
    # The module `diffusers` itself can still be pickled, for what little that is worth.
    assert pickle.loads(pickle.dumps(diffusers)).__all__ == diffusers.__all__
