"""A model cut into units, blocks or single layers, through which all states are carried one unit at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .calibration import is_per_sample
from .in_step import InStep

__all__ = [
    "CHUNK",
    "Unit",
    "carry",
    "find_units",
    "in_chunks",
    "joined",
    "map_tensors",
    "rows_of",
    "selected",
    "within_groups",
]

BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "Attention")
TOO_LARGE = ("CrossAttnUpBlock2D",)  # named by models as what devices should not cut, but a stage of many blocks
CHUNK = 64  # states that pass a unit together


@dataclass
class Unit:
    """A part of a model that is calibrated as a whole.

    Attributes:
        name: of the module; the order of units is that of their first calls.
        layers: names of the layers in it that are quantized, within the unit; "" for the unit itself.
        per_state: places in the arguments of its call that have rows for each state; other tensors are shared.
    """

    name: str
    layers: list[str]
    per_state: set[str]


def tensors_in(value: Any, place: str = "") -> dict[str, torch.Tensor]:
    """Returns the tensors of nested arguments by their place."""
    if isinstance(value, torch.Tensor):
        return {place: value}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in tensors_in(inner, f"{place}.{key}").items()}
    return {}


def map_tensors(value: Any, function: Callable[[str, torch.Tensor], Any], place: str = "") -> Any:
    """Returns nested arguments with each tensor replaced by `function(place, tensor)`."""
    if isinstance(value, torch.Tensor):
        return function(place, value)
    if isinstance(value, dict):
        return {key: map_tensors(inner, function, f"{place}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(inner, function, f"{place}.{i}") for i, inner in enumerate(value))
    return value


def selected(arguments: dict[str, Any], count: int, states: list[int]) -> dict[str, Any]:
    """Returns the arguments of a call of a model with some of its `count` states."""

    def taken(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {k: taken(v, f"{name}.{k}") for k, v in value.items()}
        if not is_per_sample(value, name, count):
            return value
        return [value[i] for i in states] if isinstance(value, list) else value[states]

    return {name: taken(value, name) for name, value in arguments.items()}


def rows_of(
    value: Any,
    states: torch.Tensor | slice,
    count: int,
    places: set[str] | None = None,
    device: torch.device | None = None,
) -> Any:
    """Returns arguments of a unit's call, or its outputs, for some of `count` states.

    Args:
        value: nested tensors.
        states: which are taken.
        count: how many there are.
        places: of tensors that have rows for each state; `None` for all.
        device: where they go.
    """

    def take(place: str, tensor: torch.Tensor) -> torch.Tensor:
        if places is None or place in places:
            tensor = tensor.view(count, -1, *tensor.shape[1:])[states].flatten(0, 1)
        return tensor if device is None else tensor.to(device)

    return map_tensors(value, take)


def within_groups(states: torch.Tensor, counts: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
    """Returns numbers of states, counted over all groups, as pairs of a group and numbers within it."""
    found, start = [], 0
    for group, count in enumerate(counts):
        own = states[(states >= start) & (states < start + count)] - start
        found += [(group, own)] * bool(len(own))
        start += count
    return found


def joined(parts: Sequence[Any]) -> Any:
    """Concatenates outputs of parts of a batch."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(parts))
    if isinstance(first, list | tuple):
        return type(first)(joined([part[i] for part in parts]) for i in range(len(first)))
    if isinstance(first, dict):
        return type(first)({key: joined([part[key] for part in parts]) for key in first})
    return first


@torch.no_grad()
def in_chunks(module: nn.Module, unit: Unit, call: Any, count: int, device: torch.device) -> Any:
    """Returns a unit's output for `count` states, computed a few at a time, on the CPU."""
    found = []
    for states in torch.arange(count).split(CHUNK):
        args, kwargs = rows_of(call, states, count, unit.per_state, device)
        found.append(map_tensors(module(*args, **kwargs), lambda _, tensor: tensor.cpu()))
    return joined(found)


@torch.no_grad()
def find_units(
    model: nn.Module, probes: Sequence[Callable[[int], dict[str, Any]]], layers: Sequence[str], granularity: str
) -> list[Unit]:
    """Finds the units of a model and their order, by calling it with two and with three states.

    Args:
        model: in evaluation mode.
        probes: for each group of states, number of states -> arguments of a call on the model's device.
        layers: names of the layers to be quantized.
        granularity: `"block"`, or `"layer"` for each layer by itself.

    Returns:
        Units in the order of their first calls. Layers that are never called are in none.
    """
    cut = {*BLOCKS, *(getattr(model, "_no_split_modules", None) or ())} - {*TOO_LARGE}
    owner: dict[str, list[str]] = {}
    for layer in layers:
        words = layer.split(".")
        above = [".".join(words[:i]) for i in range(1, len(words))] if granularity == "block" else []
        name = next((n for n in above if type(model.get_submodule(n)).__name__ in cut), layer)
        owner.setdefault(name, []).append(layer[len(name) + 1 :])
    per_state: dict[str, set[str]] = {}
    called: set[str] = set()
    sizes: dict[str, dict[str, int]] = {}

    def see(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    def measure(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            own = {place: len(tensor) for place, tensor in tensors_in((args, kwargs)).items() if tensor.ndim}
            sizes.setdefault(name, own)  # at the first call

        return hook

    handles = [model.get_submodule(layer).register_forward_pre_hook(see(layer)) for layer in layers]
    handles += [model.get_submodule(n).register_forward_pre_hook(measure(n), with_kwargs=True) for n in owner]
    try:
        for probe in probes:
            found = []
            for count in (2, 3):
                sizes.clear()
                model(**probe(count))
                found.append({name: dict(own) for name, own in sizes.items()})
            two, three = found
            for name, own in two.items():
                places = {place for place, size in own.items() if size != three[name].get(place)}
                per_state.setdefault(name, set()).update(places)
    finally:
        for handle in handles:
            handle.remove()
    units = []
    for name, places in per_state.items():
        inside = [f"{name}.{layer}" if layer else name for layer in owner[name]]
        kept = [layer for layer, full in zip(owner[name], inside, strict=True) if full in called]
        units.append(Unit(name, kept, places))
    return units


class _Station(nn.Module):
    """Stands in a model for a unit, whose attributes it shows, and hands its calls over."""

    def __init__(self, unit: nn.Module, visit: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self.__dict__["_unit"], self.__dict__["_visit"] = unit, visit

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_unit"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_visit"](args, kwargs)


@torch.no_grad()
def carry(
    model: nn.Module,
    units: Sequence[Unit],
    arguments: Sequence[dict[str, Any]],
    visit: Callable[[Unit, list[Any], int], list[Any]],
) -> None:
    """Takes all states through a model once; what is between units runs on the CPU, for all states together.

    Args:
        model: whose units are replaced in a copy; it stays as it is.
        units: see `find_units`.
        arguments: for each group of states that can be joined, those of a call with all of them.
        visit: called at each unit as `(unit, (args, kwargs) of each group, number of the call)`, returns the unit's
            outputs.
    """
    memo: dict[int, Any] = {}
    counts, groups = dict.fromkeys((unit.name for unit in units), 0), InStep()

    def station(unit: Unit) -> _Station:
        return _Station(model.get_submodule(unit.name), lambda args, kwargs: groups.stop(unit, (args, kwargs)))

    def arrive(unit: Unit, calls: list[Any]) -> list[Any]:
        counts[unit.name] += 1
        return visit(unit, calls, counts[unit.name] - 1)

    for unit in units:
        memo[id(model.get_submodule(unit.name))] = station(unit)
    skeleton = copy.deepcopy(model, memo).cpu().float().eval()
    groups.run([lambda given=given: skeleton(**given) for given in arguments], arrive)
