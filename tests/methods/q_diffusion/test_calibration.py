"""What a hook records while pipelines sample, kept on disk and joined."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_ext import Calibration, collect_calibration
from tests.tiny_pipelines import build

from .tiny import pipeline, unet


def watched(pipe):
    """Keeps what the network is called with, apart from the hook that is tested."""
    seen, forward = [], pipe.unet.forward

    def spy(sample, timestep, **arguments):
        seen.append((sample.clone(), float(timestep)))
        return forward(sample, timestep, **arguments)

    pipe.unet.forward = spy
    return seen


def test_the_states_are_those_of_the_kept_steps():
    pipe = pipeline()
    seen = watched(pipe)
    calibration = collect_calibration(pipe, 6, 3, batch_size=4, num_inference_steps=8)
    assert len(seen) == 2 * 8
    kept = [call for start in (0, 8) for call in seen[start : start + 8 : 2]]  # every (8 // 3)-th
    assert len(calibration.calls) == len(kept) == 8
    for call, (sample, time) in zip(calibration.calls, kept, strict=True):
        assert torch.equal(call["sample"], sample)
        assert float(call["timestep"]) == time
    assert len(calibration) == 4 * 6
    assert len(calibration.timesteps) == 4
    joined = calibration.arguments()
    assert joined["sample"].shape == (24, 1, 8, 8)
    assert joined["timestep"].shape == (24,)
    assert torch.equal(joined["sample"][4:8], kept[1][0])
    assert set(joined["timestep"][4:8].tolist()) == {kept[1][1]}
    assert len(calibration.at(calibration.timesteps[:1])) == 6
    assert pipe.progress_bar is not None
    assert not pipe.unet._forward_pre_hooks


def test_a_collection_that_was_stopped_goes_on(tmp_path):
    arguments = {"batch_size": 2, "num_inference_steps": 4}
    whole = collect_calibration(pipeline(), 6, 2, output_dir=tmp_path / "whole", **arguments)
    collect_calibration(pipeline(), 6, 2, output_dir=tmp_path / "cut", **arguments)
    (tmp_path / "cut" / "000001.safetensors").unlink()
    pipe = pipeline()
    seen = watched(pipe)
    again = collect_calibration(pipe, 6, 2, output_dir=tmp_path / "cut", **arguments)
    assert len(seen) == 4  # one call of the pipeline
    loaded = Calibration.load(tmp_path / "whole")
    for other in (again, loaded):
        assert torch.equal(other.arguments()["sample"], whole.arguments()["sample"])
        assert other.model == whole.model
    with pytest.raises(ValueError, match="`output_dir` must be new or hold a collection of the same settings: seed"):
        collect_calibration(pipeline(), 6, 2, output_dir=tmp_path / "cut", seed=1, **arguments)
    with pytest.raises(ValueError, match="`calibration` must be a folder that `collect_calibration` wrote"):
        Calibration.load(tmp_path)


def test_classes_are_gone_through_in_turn_and_guidance_is_recorded():
    pipe = pipeline(unet(num_class_embeds=4))
    pipe.register_to_config(null_class_label=3)
    found = collect_calibration(
        pipe, 4, 2, batch_size=3, class_labels=[0, 1, 2], guidance_scale=2.0, num_inference_steps=2
    )
    labels = found.arguments()["class_labels"].tolist()
    assert labels[:6] == [3, 3, 3, 0, 1, 2]
    assert labels[-2:] == [3, 0]  # the fourth sample, without and with its class
    assert len(found) == 2 * 2 * 4


@pytest.mark.parametrize(
    "name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline"]
)
def test_any_pipeline_can_be_recorded(name, tmp_path):
    pipe = build(name)
    options = {"prompt": ["a cat", "a dog"], "num_inference_steps": 2, "height": 16, "width": 16}
    found = collect_calibration(pipe, 2, 2, batch_size=2, output_dir=tmp_path, **options)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    with torch.no_grad():
        output = network(**found.arguments()).sample
        each = [network(**call).sample for call in found.calls]
    torch.testing.assert_close(output, torch.cat(each), atol=1e-4, rtol=1e-3)
    assert torch.equal(network(**Calibration.load(tmp_path).arguments()).sample, output)


def test_wrong_arguments():
    pipe = pipeline()
    for arguments, message in (
        ({"num_samples": 0}, "`num_samples` must be an integer >= 1, got 0"),
        ({"num_timesteps": 1}, "`num_timesteps` must be an integer >= 2, got 1"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1, got 0"),
        ({"num_timesteps": 9, "num_inference_steps": 8}, "`num_timesteps` must be at most the 8 .*, got 9"),
        ({"num_samples": 1, "num_timesteps": 60}, "`num_timesteps` must be at most the 50 steps .*, got 60"),
        ({"generator": torch.Generator()}, "`generator` must be left out"),
    ):
        with pytest.raises(ValueError, match=message):
            collect_calibration(pipe, **arguments)
    with pytest.raises(ValueError, match="`calibration` must hold recorded calls, got none"):
        Calibration([], "UNet2DModel")
    with pytest.raises(ValueError, match="`pipeline` must have one of"):
        collect_calibration(DDIMScheduler(), 2, 2)


def test_states_of_other_shapes_are_joined_in_groups():
    sizes = ((1, 8), (2, 16), (1, 8))
    calls = [{"sample": torch.zeros(n, 1, size, size), "timestep": t} for t, (n, size) in enumerate(sizes)]
    states = Calibration(calls, "model")
    with pytest.raises(ValueError, match="`sample` must be of one shape in all calls"):
        states.arguments()
    joined = [group.arguments() for group in states.groups()]
    assert [call["timestep"].tolist() for call in joined] == [[0, 2], [1, 1]]
    assert [call["sample"].shape[-1] for call in joined] == [8, 16]
    guided = [{**call, "guidance": torch.tensor(i % 2)} for i, call in enumerate(calls[:1] * 4)]
    assert [len(group) for group in Calibration(guided, "model").groups()] == [2, 2]  # what is shared differs
    assert FlowMatchEulerDiscreteScheduler  # their times are fractions
    assert Calibration([{"x": torch.zeros(1, 2), "t": torch.tensor([0.5])}], "model").timesteps == [0.5]


def test_prompts_of_any_length_are_recorded():
    """Qwen-Image pads texts to the longest of a call, and calls its network for each side of the guidance."""
    pipe = build("QwenImagePipeline")
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "true_cfg_scale": 3.0, "negative_prompt": "bad"}
    prompts = ["a cat", "a dog that runs over a field", "a", "an owl"]
    found = collect_calibration(pipe, 4, 2, batch_size=2, prompt=prompts, **options)
    lengths = [group.arguments()["encoder_hidden_states"].shape[1] for group in found.groups()]
    assert len(set(lengths)) == len(lengths) > 1
    assert sum(len(group) for group in found.groups()) == len(found) == 2 * 2 * 4
