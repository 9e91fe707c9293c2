"""What would go wrong silently if a pipeline's call were taken over carelessly, and what must stay untouched."""

import copy
import threading

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext import Conditions, PipelineDenoiser
from diffusers_ext.generation.latent_map import LatentMap
from tests.tiny_pipelines import build

PROMPTS = ["a cat", "a red dog on the beach, eating a burger"]
TIMESTEPS = torch.tensor([900, 100])


def noise(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def denoiser_of(name, **arguments):
    return PipelineDenoiser(build(name), height=32, width=64, **arguments)


class LoopPipeline(DiffusionPipeline):
    """A pipeline as short as one can be, with faults to choose from in its loop."""

    def __init__(self, unet, text_encoder, tokenizer, scheduler, fault=""):
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
        self.fault = fault

    def encode_prompt(self, prompt, device):
        tokens = self.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        return self.text_encoder(tokens.to(device))[0]

    def prepare_latents(self, batch, generator, device):
        return randn_tensor((batch, 4, 8, 8), generator=generator, device=device)

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="pil", return_dict=True):
        text = self.encode_prompt(prompt, self._execution_device)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = self.prepare_latents(len(text), generator, self._execution_device)
        if self.fault == "scales once":
            latents = latents * 1.01
        for t in self.scheduler.timesteps:
            if self.fault == "scales":
                latents = latents * 1.01
            time = torch.tensor([float(t)]).expand(len(text)) if self.fault == "one timestep" else t.expand(len(text))
            if self.fault == "turns the gradient off":
                with torch.no_grad():
                    output = self.unet(latents, time, text).sample
            else:
                output = self.unet(latents, time, text).sample
            if self.fault == "broadcasts":  # a row of timesteps meets the columns
                output = (
                    output + (t / 1000).reshape(-1).repeat_interleave(8 // t.numel()) if t.ndim else output + t / 1000
                )
            if self.fault == "never steps":
                continue
            latents = self.scheduler.step(output, t, latents).prev_sample
        return ImagePipelineOutput(images=latents) if return_dict else (latents,)


@pytest.fixture
def loop():
    def make(fault=""):
        parts = build("StableDiffusionPipeline").components
        parts = {name: parts[name] for name in ("unet", "text_encoder", "tokenizer", "scheduler")}
        return PipelineDenoiser(LoopPipeline(**parts, fault=fault))

    return make


def test_a_pipeline_of_ones_own(loop):
    denoiser = loop()
    assert denoiser.check(PROMPTS) == 0.0
    with pytest.raises(ValueError, match="LoopPipeline has no autoencoder: its latents are images"):
        denoiser.encode_images(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("fault", ["scales", "scales once"])
def test_a_loop_that_scales_its_latents_is_refused(loop, fault):
    denoiser = loop(fault)
    with pytest.raises(ValueError, match="`scheduler.step` got another sample"):
        denoiser(noise((1, 4, 8, 8)), 500, denoiser.encode_prompts(["a"]))
    with pytest.raises(ValueError, match="`scheduler.step` got another sample"):
        denoiser.check(PROMPTS)


def test_a_loop_without_steps_or_gradient_is_refused(loop):
    denoiser = loop("never steps")
    x = noise((1, 4, 8, 8)).requires_grad_()
    with pytest.raises(ValueError, match="did not reach `scheduler.step`"):
        denoiser(x, 500, denoiser.encode_prompts(["a"]))
    denoiser = loop("turns the gradient off")
    with pytest.raises(ValueError, match="no gradient reaches the output"):
        denoiser(x, 500, denoiser.encode_prompts(["a"]))
    with torch.no_grad():
        assert denoiser(x, 500, denoiser.encode_prompts(["a"])).shape == x.shape


@pytest.mark.parametrize("fault", ["one timestep", "broadcasts"])
def test_loops_that_take_one_timestep_are_called_one_by_one(loop, fault, caplog):
    """Whether the loop stops at two timesteps, or silently spreads them over the columns."""
    denoiser = loop(fault)
    conditions, x = denoiser.encode_prompts(PROMPTS), noise((2, 4, 8, 8))
    with torch.no_grad(), caplog.at_level("WARNING"):
        both = denoiser(x, TIMESTEPS, conditions)
        single = [denoiser(x[i : i + 1], TIMESTEPS[i], conditions[i]) for i in range(2)]
        assert torch.equal(both, torch.cat(single))
        shared = denoiser(x, torch.tensor([500, 500]), conditions)
        assert torch.equal(shared, denoiser(x, 500, conditions))  # one call
    assert denoiser.one_timestep
    assert caplog.text.count("takes one timestep a call") == 1


def test_masks_are_made_where_lengths_differ():
    denoiser = denoiser_of("QwenImagePipeline")
    short, long = (denoiser.encode_prompts([prompt]) for prompt in PROMPTS)
    joined = denoiser.join([short, long])
    text, mask = joined.joined(torch.device("cpu"), torch.float32)[0]
    lengths = [r[0][0].shape[1] for r in joined.recordings]
    assert mask.sum(1).tolist() == lengths
    assert text.shape[1] == max(lengths) > min(lengths)
    assert all(recording[0][1] is None for recording in joined.recordings)
    x = noise(denoiser.latents_shape(2))
    with torch.no_grad():
        single = torch.cat([denoiser(x[i : i + 1], 500, c) for i, c in enumerate([short, long])])
        torch.testing.assert_close(denoiser(x, 500, joined), single, rtol=0, atol=1e-5)
        joined._joined = {("cpu", torch.float32, 1): [(text, None)]}
        assert (denoiser(x, 500, joined) - single).abs().max() > 1e-3  # what a missing mask does
    _, mask = joined[:1].joined(torch.device("cpu"), torch.float32, 64)[0]
    assert (mask.shape[1] % 64, mask.sum()) == (0, lengths[0])


def test_unmasked_texts_of_unequal_length_do_not_share_a_call():
    calls = []

    def recording(length):
        return [(torch.ones(1, length, 4), None)]

    conditions = Conditions(["a", "b", "c"], [recording(3), recording(5), recording(3)], masked=False)
    assert conditions.lengths == [(3,), (5,), (3,)]
    denoiser = denoiser_of("StableDiffusionPipeline")
    denoiser.latents_shape(1)
    denoiser._one_timestep = False
    denoiser._output = lambda x, t, c: calls.append((len(x), t.tolist(), c.prompts)) or x
    x = noise((3, 4, 16, 32))
    assert torch.equal(denoiser(x, torch.tensor([1, 2, 3]), conditions), x)  # in the order that was given
    assert calls == [(2, [1, 3], ["a", "c"]), (1, [2], ["b"])]


def test_joining_recordings_of_every_kind():
    def recording(length, value):
        return [
            (
                torch.full((1, length, 2), value),
                torch.ones(1, length, dtype=torch.long),
                torch.full((1, 3), value),  # pooled
                torch.arange(6).view(3, 2),  # ids of positions
                torch.full((4, 1, length, 2), value),  # a layer each
                [torch.full((length, 2), value)],  # a prompt each
                [torch.full((1, length, 2), value)] * 2,  # a layer each, too
                torch.tensor([0, length], dtype=torch.int32),  # cumulative lengths
                None,
            )
        ]

    conditions = Conditions(["a", "b"], [recording(2, 1.0), recording(3, 2.0)])
    text, mask, pooled, ids, layers, texts, more, ends, nothing = conditions.joined(torch.device("cpu"), torch.half)[0]
    assert (text.shape, text.dtype) == ((2, 3, 2), torch.float16)
    assert text[:, :, 0].tolist() == [[1, 1, 0], [2, 2, 2]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert pooled[:, 0].tolist() == [1, 2]
    assert torch.equal(ids, torch.arange(6).view(3, 2))
    assert layers.shape == (4, 2, 3, 2)
    assert [len(item) for item in texts] == [2, 3]
    assert [item.shape for item in more] == [(2, 3, 2)] * 2
    assert ends.tolist() == [0, 2, 5]
    assert nothing is None
    other = [(torch.full((7, 2), 1.0),)], [(torch.full((7, 2), 2.0),)]
    with pytest.raises(ValueError, match="no axis is that of the prompts"):
        Conditions(["a", "b"], other).joined(torch.device("cpu"), torch.float32)


def test_lists_of_prompts_are_not_written_into():
    denoiser = denoiser_of("ZImagePipeline")  # writes its chat template into the list it gets
    prompts = list(PROMPTS)
    first, second = denoiser.encode_prompts(prompts), denoiser.encode_prompts(prompts)
    assert prompts == first.prompts == PROMPTS
    for a, b in zip(first.recordings, second.recordings, strict=True):
        assert torch.equal(a[0][0][0], b[0][0][0])
    x = noise(denoiser.latents_shape(2))
    with torch.no_grad():
        assert torch.equal(denoiser(x, TIMESTEPS, first), denoiser(x, TIMESTEPS, first))
    assert first.prompts == PROMPTS


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline", "ZImagePipeline"])
def test_bf16(name):
    pipe = build(name).to(torch.bfloat16)
    denoiser = PipelineDenoiser(pipe, height=32, width=64)
    conditions = denoiser.encode_prompts(PROMPTS)
    x = noise(denoiser.latents_shape(2))
    output = denoiser(x.requires_grad_(), TIMESTEPS, conditions)
    assert output.dtype == torch.float32
    assert torch.equal(output, output.bfloat16().float())  # computed in bf16
    assert denoiser.check(PROMPTS) == 0.0
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert gradient.isfinite().all()


def test_recordings_in_fp32_meet_a_network_in_bf16():
    pipe = build("StableDiffusion3Pipeline")
    denoiser = PipelineDenoiser(pipe, height=32, width=64)
    conditions = denoiser.encode_prompts(PROMPTS)
    pipe.transformer.to(torch.bfloat16)
    with torch.no_grad():
        assert denoiser(noise(denoiser.latents_shape(2)), TIMESTEPS, conditions).isfinite().all()


def test_text_encoders_are_needed_once():
    pipe = build("StableDiffusionXLPipeline")
    denoiser = PipelineDenoiser(pipe, height=32, width=64)
    conditions = denoiser.encode_prompts(PROMPTS)
    images = noise((1, 3, 32, 64)).clamp(-1, 1)
    x = noise((2, 4, 16, 32))
    with torch.no_grad():
        wanted = denoiser(x, TIMESTEPS, conditions), denoiser.encode_images(images)
        pipe.text_encoder = pipe.text_encoder_2 = pipe.tokenizer = pipe.tokenizer_2 = None
        fresh = PipelineDenoiser(pipe, height=32, width=64)
        assert torch.equal(fresh(x, TIMESTEPS, conditions), wanted[0])
        assert torch.equal(fresh.encode_images(images), wanted[1])


def state_of(pipe):
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    return (
        dict(pipe.__dict__),
        dict(pipe.config),
        copy.deepcopy({k: v for k, v in pipe.scheduler.__dict__.items() if k != "_internal_dict"}),
        {
            f"{n}.{name}": (module.training, dict(module._forward_hooks), dict(module._forward_pre_hooks))
            for n, m in modules.items()
            for name, module in m.named_modules()
        },
        {
            f"{n}.{name}": (p.dtype, p.requires_grad, p.sum().item())
            for n, m in modules.items()
            for name, p in m.named_parameters()
        },
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxPipeline"])
def test_nothing_stays_behind_even_after_an_error(name, monkeypatch):
    pipe = build(name)
    pipe.vae.to(torch.float16)  # SDXL decodes in fp32 then, and casts the autoencoder for it
    arguments = {"height": 32, "width": 64, "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 1.0}
    drawn = pipe("a", generator=torch.Generator().manual_seed(0), **arguments).images
    before = state_of(pipe)
    denoiser = PipelineDenoiser(pipe, height=32, width=64)
    conditions = denoiser.encode_prompts(PROMPTS)
    x = noise(denoiser.latents_shape(2))
    denoiser(x, TIMESTEPS, conditions)
    denoiser.check(PROMPTS)
    denoiser.decode(denoiser.encode_images(noise((1, 3, 32, 64)).clamp(-1, 1)))
    assert_same(state_of(pipe), before)
    with monkeypatch.context() as patch:
        patch.setattr(type(denoiser.denoiser), "forward", lambda *args, **kwargs: 1 / 0)
        for call in (lambda: denoiser(x, TIMESTEPS, conditions), lambda: denoiser.check(PROMPTS)):
            with pytest.raises(ZeroDivisionError):
                call()
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.vae.encoder), "forward", lambda *args, **kwargs: 1 / 0)
        patch.setattr(type(pipe.vae.decoder), "forward", lambda *args, **kwargs: 1 / 0)
        for call in (lambda: denoiser.decode(x[:1]), lambda: denoiser.encode_images(torch.zeros(1, 3, 32, 64))):
            with pytest.raises(ZeroDivisionError):
                call()
    assert_same(state_of(pipe), before)
    assert torch.equal(pipe("a", generator=torch.Generator().manual_seed(0), **arguments).images, drawn)


def assert_same(after, before):
    for a, b in zip(after, before, strict=True):
        if isinstance(b, dict):
            assert a.keys() == b.keys()
            for key in b:
                same = torch.equal(a[key], b[key]) if isinstance(b[key], torch.Tensor) else a[key] == b[key]
                assert same, key
        else:
            assert a == b


def test_two_threads_do_not_meet():
    denoiser = denoiser_of("FluxPipeline")
    conditions = [denoiser.encode_prompts([prompt]) for prompt in PROMPTS]
    inputs = [noise(denoiser.latents_shape(1), seed) for seed in range(2)]
    with torch.no_grad():
        wanted = [denoiser(inputs[i], TIMESTEPS[i], conditions[i]) for i in range(2)]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(15):
                if not torch.equal(denoiser(inputs[i], TIMESTEPS[i], conditions[i]), wanted[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_exchanged_parts_are_said():
    pipe = build("StableDiffusionPipeline")
    denoiser = PipelineDenoiser(pipe, height=32, width=64)
    conditions, x = denoiser.encode_prompts(["a"]), noise((1, 4, 16, 32))
    scheduler = pipe.scheduler
    pipe.scheduler = DDIMScheduler.from_config(scheduler.config)
    with pytest.raises(ValueError, match="`pipe.scheduler` was exchanged"):
        denoiser(x, 5, conditions)
    pipe.scheduler = scheduler
    denoiser(x, 5, conditions)
    pipe.unet = copy.deepcopy(pipe.unet)
    with pytest.raises(ValueError, match="`pipe.unet` was exchanged"):
        denoiser(x, 5, conditions)


def test_the_network_may_be_wrapped_in_the_denoiser():
    """As accelerate and FSDP do."""
    denoiser = denoiser_of("StableDiffusion3Pipeline")
    conditions, x = denoiser.encode_prompts(PROMPTS), noise((2, 4, 16, 32))

    class Doubled(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.config = module, module.config

        def forward(self, *args, **kwargs):
            return (2 * self.module(*args, **kwargs)[0],)

    with torch.no_grad():
        wanted = denoiser(x, TIMESTEPS, conditions)
        denoiser.denoiser = Doubled(denoiser.denoiser)
        assert torch.equal(denoiser(x, TIMESTEPS, conditions), 2 * wanted)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 cannot trace Qwen-Image's positions")
def test_compiled_networks_meet_few_lengths():
    denoiser = denoiser_of("QwenImagePipeline")
    conditions, x = denoiser.encode_prompts(PROMPTS), noise((1, 128, 16))
    del denoiser.denoiser.transformer_blocks[1]  # one is compiled sooner
    graphs = []
    with torch.no_grad():
        wanted = [denoiser(x, 500, conditions[i]) for i in range(2)]
        torch._dynamo.reset()
        denoiser.denoiser.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
        found = [denoiser(x, 500, conditions[i]) for i in range(2)]
    once = len(graphs)
    torch._dynamo.reset()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    lengths = {r[0][0].shape[1] for r in conditions.recordings}
    assert len(lengths) == 2
    assert once == 1


def test_quantized_base():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    denoiser = denoiser_of("StableDiffusion3Pipeline")
    conditions, x = denoiser.encode_prompts(PROMPTS), noise((2, 4, 16, 32))
    network = denoiser.denoiser
    with torch.no_grad():
        wanted = denoiser(x, TIMESTEPS, conditions)
    for block in network.transformer_blocks:
        old = block.attn.to_q
        new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, compute_dtype=torch.float32)
        new.load_state_dict(old.state_dict())
        block.attn.to_q = new.to("cpu")
    x.requires_grad_()
    output = denoiser(x, TIMESTEPS, conditions)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert gradient.isfinite().all()
    difference = (output - wanted).abs().max()
    assert 0 < difference < 0.2 * wanted.abs().max()
    assert denoiser.dtype == torch.float32


def test_maps_that_are_no_permutation_are_refused():
    device, shape = torch.device("cpu"), (1, 2, 6)

    def affine(latents):
        return latents.flip(2).reshape(1, 3, 4) * torch.tensor([1.0, 2.0, -0.5, 4.0]) + 3

    known = LatentMap(affine, shape, device)
    latents = noise((5, 2, 6))
    torch.testing.assert_close(known.inverse(known(latents)), latents)
    torch.testing.assert_close(known(latents[:1]), affine(latents[:1]))
    for decoded, why in {
        (lambda latents: latents.cumsum(2)): "more .* than permute",
        (lambda latents: latents + latents.square()): "more .* than permute",
        (lambda latents: latents + 0.1 * (2 * torch.pi * latents).sin()): "not affine",  # but at whole numbers
        (lambda latents: latents.repeat(1, 1, 2)): "do not match",
        (lambda latents: 0 * latents): "do not match",
        (lambda latents: latents.transpose(0, 1)): "frames lie in the batch",
    }.items():
        with pytest.raises(ValueError, match=why):
            LatentMap(decoded, shape, device)


def test_large_latents_keep_their_places():
    """Positions beyond what fp32 counts, by digits."""
    order = torch.randperm(2**20 + 7, generator=torch.Generator().manual_seed(0))
    known = LatentMap(lambda latents: latents[:, order] * 0.13025 - 0.7, (1, len(order)), torch.device("cpu"))
    assert torch.equal(known.source, order)


def test_the_flow_scheduler_takes_every_spelling():
    pipe = build("StableDiffusion3Pipeline")
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    denoiser = PipelineDenoiser(pipe, height=32, width=64, sigmas=[1.0, 0.5], num_inference_steps=2)
    assert denoiser.schedule_arguments() == {"sigmas": [1.0, 0.5]}
    assert denoiser.check(PROMPTS) == 0.0
