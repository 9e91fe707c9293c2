"""What a model sees while a pipeline samples: the states of many timesteps, recorded by a hook on its network."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from diffusers_ext.rng import mix

__all__ = [
    "Calibration",
    "batch_arguments",
    "claim",
    "collect_calibration",
    "fingerprint",
    "is_per_sample",
    "network_name",
]

# Tensors that hold places, not samples; their first axis is no batch.
SHARED = ("img_ids", "txt_ids", "image_rotary_emb", "freqs_cis")
TIMES = ("timestep", "t")
NETWORKS = ("unet", "transformer", "prior")
SAMPLES = ("prompt", "class_labels")  # arguments that say what is drawn, one entry a sample


def fingerprint(model: Any) -> str:
    """Returns what tells a model's architecture from others'."""
    config = {
        k: v for k, v in dict(getattr(model, "config", {})).items() if k[0] != "_" and k != "quantization_config"
    }
    text = json.dumps([type(model).__name__, config], sort_keys=True, default=str)
    return f"{type(model).__name__}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class Calibration:
    """Recorded calls of a network.

    Args:
        calls: arguments by name, one dictionary a call, their tensors on the CPU.
        model: the `fingerprint` of the network that was called.

    Attributes:
        timesteps: those of the calls, each once, descending.

    Raises:
        ValueError: there are no calls.
    """

    def __init__(self, calls: Sequence[dict[str, Any]], model: str) -> None:
        if not calls:
            raise ValueError("`calibration` must hold recorded calls, got none.")
        self.calls, self.model = list(calls), model
        self.timesteps = sorted({t for call in self.calls for t in times_of(call)}, reverse=True)

    def __len__(self) -> int:
        """Returns the number of states: samples in all calls."""
        return sum(batch_of(call) for call in self.calls)

    def at(self, timesteps: Sequence[float]) -> Calibration:
        """Returns the calls at some of the timesteps."""
        kept = [call for call in self.calls if any(t in timesteps for t in times_of(call))]
        return Calibration(kept, self.model)

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of one call with all states.

        Raises:
            ValueError: the calls cannot be joined, because something other than the samples differs.
        """
        names = list(dict.fromkeys(name for call in self.calls for name in call))
        counts = [batch_of(call) for call in self.calls]
        return {n: _joined([call.get(n) for call in self.calls], counts, n) for n in names}

    def groups(self) -> list[Calibration]:
        """Returns the calls in groups that can be joined, such as those of texts of one length."""
        found: dict[Any, list[dict[str, Any]]] = {}
        for call in self.calls:
            found.setdefault(_kind(call, "", batch_of(call)), []).append(call)
        return [Calibration(calls, self.model) for calls in found.values()]

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Calibration:
        """Reads what `collect_calibration` wrote.

        Raises:
            ValueError: the folder holds no calibration.
        """
        settings = Path(folder) / "calibration.json"
        if not settings.is_file():
            raise ValueError(f"`calibration` must be a folder that `collect_calibration` wrote, got {str(folder)!r}.")
        calls = [call for path in sorted(Path(folder).glob("*.safetensors")) for call in _read(path)]
        return cls(calls, json.loads(settings.read_text())["model"])


def time_name(call: dict[str, Any]) -> str:
    """Returns the name of the argument that holds the timestep.

    Raises:
        ValueError: there is none.
    """
    name = next((name for name in TIMES if name in call), None)
    if name is None:
        raise ValueError(f"`pipeline` must call its network with one of {list(TIMES)}, got {list(call)}.")
    return name


def times_of(call: dict[str, Any]) -> list[float]:
    """Returns the timesteps of a call."""
    time = call[time_name(call)]
    return [float(t) for t in time.flatten().unique()] if isinstance(time, torch.Tensor) else [float(time)]


def batch_of(call: dict[str, Any]) -> int:
    """Returns the number of samples of a call, which is the first axis of its first argument."""
    first = next(iter(call.values()))
    return len(first)


def is_per_sample(value: Any, name: str, batch: int) -> bool:
    """Returns whether an argument has an entry for each sample of a call."""
    if isinstance(value, torch.Tensor):
        return value.ndim > 0 and len(value) == batch and name.split(".")[-1] not in SHARED
    return isinstance(value, list) and len(value) == batch


def _kind(value: Any, name: str, batch: int) -> Any:
    """Returns what calls must have in common to be joined: the shape of what is a sample's, and what samples share."""
    if isinstance(value, dict):
        return tuple((key, _kind(inner, key, batch)) for key, inner in sorted(value.items()))
    if name in TIMES:
        return name
    if is_per_sample(value, name, batch):
        return (name, *value.shape[1:]) if isinstance(value, torch.Tensor) else name
    return _described(value)


def _for_each(value: Any, name: str, batch: int) -> Any:
    """Gives each sample its own copy of what a pipeline passes once for all of them, such as a negative prompt."""
    alone = isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == 1
    return value.expand(batch, *value.shape[1:]) if alone and name not in SHARED else value


def _joined(values: list[Any], counts: list[int], name: str) -> Any:
    first = values[0]
    if isinstance(first, dict) and not any(v is None for v in values):
        return {k: _joined([v[k] for v in values], counts, f"{name}.{k}") for k in first}
    if name in TIMES:
        values = [torch.as_tensor(v).reshape(-1).expand(n) for v, n in zip(values, counts, strict=True)]
        return torch.cat(values)
    if all(is_per_sample(v, name, n) for v, n in zip(values, counts, strict=True)):
        if isinstance(first, list):
            return [entry for value in values for entry in value]
        if len({v.shape[1:] for v in values}) == 1:
            return torch.cat(values)
        accepted = "of one shape in all calls (texts of one length, images of one size)"
        raise ValueError(f"`{name}` must be {accepted}, got {sorted({tuple(v.shape[1:]) for v in values})}.")
    if all(_same(first, v) for v in values[1:]):
        return first
    raise ValueError(f"`{name}` must have an entry for each sample or be the same in all calls, got neither.")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    return a == b


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: _to_cpu(v) for k, v in value.items()}
    return type(value)(_to_cpu(v) for v in value) if isinstance(value, list | tuple) else value


def network_name(pipeline: Any) -> str:
    """Returns the name of the network that a pipeline denoises with.

    Raises:
        ValueError: it has none under a name that is known.
    """
    for name in NETWORKS:
        if isinstance(getattr(pipeline, name, None), torch.nn.Module):
            return name
    raise ValueError(f"`pipeline` must have one of {list(NETWORKS)}, {type(pipeline).__name__} has none.")


def collect_calibration(
    pipeline: Any,
    num_samples: int = 256,
    num_timesteps: int = 20,
    *,
    batch_size: int = 16,
    output_dir: str | os.PathLike | None = None,
    seed: int = 0,
    **call_kwargs: Any,
) -> Calibration:
    """Samples with a pipeline and records what its network is called with (section 4.2 of arXiv 2302.04304).

    Of every call of the pipeline, each (number of steps // `num_timesteps`)-th step is kept, with all arguments: the
    states, timesteps and conditions that the network meets in use. Sample as you will later: the same scheduler,
    number of steps and guidance. With guidance, conditional and unconditional states are recorded both.

    Args:
        pipeline: any pipeline that has a `unet` or a `transformer`; it stays as it is.
        num_samples: samples to draw.
        num_timesteps: steps to keep of each, at least 2.
        batch_size: samples in a call of the pipeline.
        output_dir: folder where calls are stored as they are made; a collection that was stopped goes on there.
        seed: of the starting noise.
        **call_kwargs: arguments of the pipeline's call. Lists in `prompt` or `class_labels` are gone through in turn,
            one entry a sample.

    Returns:
        The recorded calls.

    Raises:
        ValueError: an argument is outside its range, there are fewer steps than are to be kept, or `output_dir` holds
            another collection.

    Example:
        >>> calibration = collect_calibration(pipe, 64, 10, num_inference_steps=20)  # doctest: +SKIP
    """
    for name, value, least in (
        ("num_samples", num_samples, 1),
        ("num_timesteps", num_timesteps, 2),
        ("batch_size", batch_size, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}.")
    steps = call_kwargs.get("num_inference_steps")
    if isinstance(steps, int) and steps < num_timesteps:
        raise ValueError(f"`num_timesteps` must be at most the {steps} `num_inference_steps`, got {num_timesteps}.")
    if "generator" in call_kwargs:
        raise ValueError("`generator` must be left out: every call draws its own noise, from `seed`.")
    network = getattr(pipeline, network_name(pipeline))
    settings = {
        "model": fingerprint(network),
        "scheduler": type(pipeline.scheduler).__name__,
        "num_samples": num_samples,
        "num_timesteps": num_timesteps,
        "batch_size": batch_size,
        "seed": seed,
        "call": json.loads(json.dumps(call_kwargs, default=_described)),
    }
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        claim(folder / "calibration.json", settings, "collection")
    calls: list[dict[str, Any]] = []
    starts = range(0, num_samples, batch_size)
    with _prepared(pipeline):
        for index in tqdm(range(len(starts)), desc="calibration", unit="call"):
            path = None if folder is None else folder / f"{index:06d}.safetensors"
            count = min(batch_size, num_samples - starts[index])
            if path is not None and path.is_file():
                found = _read(path)
            else:
                arguments = batch_arguments(pipeline, call_kwargs, starts[index], count)
                arguments["generator"] = torch.Generator().manual_seed(mix(seed, index))
                found = _kept(_recorded(pipeline, network, arguments), num_timesteps)
                if path is not None:
                    _write(path, found)
            calls += found
    return Calibration(calls, settings["model"])


class _prepared:
    """Turns a pipeline's bar off for a while."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline, self.before = pipeline, dict(getattr(pipeline, "_progress_bar_config", {}))

    def __enter__(self) -> None:
        self.pipeline.set_progress_bar_config(disable=True)

    def __exit__(self, *error: object) -> None:
        self.pipeline._progress_bar_config = self.before


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    return repr(value)


def claim(path: Path, settings: dict[str, Any], what: str) -> None:
    """Writes what decides a folder's content into it; refuses a folder of other settings.

    Args:
        path: the file of the settings.
        settings: by name, of plain types.
        what: the folder's content, for the message.

    Raises:
        ValueError: the folder's are others.
    """
    if path.is_file():
        there = json.loads(path.read_text())
        for name, value in settings.items():
            if there.get(name) != value:
                raise ValueError(
                    f"`output_dir` must be new or hold a {what} of the same settings: "
                    f"{name} is {there.get(name)!r} in {path.parent}, got {value!r}."
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1))


def batch_arguments(pipeline: Any, given: dict[str, Any], start: int, count: int) -> dict[str, Any]:
    """Returns the arguments of one call: the next `count` samples."""
    arguments, known = dict(given), inspect.signature(type(pipeline).__call__).parameters
    key = next((name for name in SAMPLES if arguments.get(name) is not None), None)
    if key is not None:
        entries = arguments[key]
        if isinstance(entries, torch.Tensor):
            entries = entries.tolist()
        entries = list(entries) if isinstance(entries, list | tuple) else [entries]
        arguments[key] = [entries[(start + i) % len(entries)] for i in range(count)]
    elif "batch_size" in known:
        arguments["batch_size"] = count
    else:
        raise ValueError(f"`prompt` or `class_labels` must be given for {type(pipeline).__name__}, got neither.")
    if "output_type" in known:
        arguments.setdefault("output_type", "latent" if "latents" in known else "np")
    return arguments


def _recorded(pipeline: Any, network: Any, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Calls a pipeline and returns the arguments of all calls of its network."""
    calls, signature = [], inspect.signature(network.forward)
    more = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    ignored = ("return_dict", "joint_attention_kwargs", "cross_attention_kwargs", "attention_kwargs")

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        bound = {**{k: v for k, v in bound.items() if k != more}, **bound.get(more or "", {})}
        call = {k: _to_cpu(v) for k, v in bound.items() if v is not None and k not in ignored}
        calls.append({k: _for_each(v, k, batch_of(call)) for k, v in call.items()})

    handle = network.register_forward_pre_hook(record, with_kwargs=True)
    try:
        pipeline(**arguments)
    finally:
        handle.remove()
    return calls


def _kept(calls: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Returns the calls of every (steps // count)-th step; the calls of one step share its time."""
    steps: list[list[dict[str, Any]]] = []
    for call in calls:
        if steps and times_of(steps[-1][-1]) == times_of(call):
            steps[-1].append(call)
        else:
            steps.append([call])
    if len(steps) < count:
        raise ValueError(
            f"`num_timesteps` must be at most the {len(steps)} steps that the pipeline takes, got {count}."
        )
    return [call for step in steps[:: len(steps) // count] for call in step]


def _flattened(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value.contiguous()
    elif isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flattened(inner, f"{name}.{key}")


def _layout(value: Any) -> Any:
    """Returns what a value is like, its tensors left out, in plain types."""
    if isinstance(value, torch.Tensor):
        return {"kind": "tensor"}
    if isinstance(value, dict):
        return {"kind": "dict", "of": {k: _layout(v) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return {"kind": type(value).__name__, "of": [_layout(v) for v in value]}
    return {"kind": "value", "of": value}


def _filled(layout: Any, name: str, tensors: Any) -> Any:
    kind, inner = layout["kind"], layout.get("of")
    if kind == "tensor":
        return tensors.get_tensor(name)
    if kind == "dict":
        return {k: _filled(v, f"{name}.{k}", tensors) for k, v in inner.items()}
    if kind in ("list", "tuple"):
        values = [_filled(v, f"{name}.{i}", tensors) for i, v in enumerate(inner)]
        return values if kind == "list" else tuple(values)
    return inner


def _write(path: Path, calls: list[dict[str, Any]]) -> None:
    tensors = {k: v for i, call in enumerate(calls) for k, v in _flattened(call, str(i))}
    partial = path.with_suffix(".tmp")
    save_file(tensors, partial, metadata={"calls": json.dumps([_layout(call) for call in calls])})
    os.replace(partial, path)


def _read(path: Path) -> list[dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        return [_filled(lay, str(i), file) for i, lay in enumerate(json.loads(file.metadata()["calls"]))]
