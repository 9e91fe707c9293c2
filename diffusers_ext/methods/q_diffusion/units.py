"""A model cut into units, blocks or single layers, through which all states are carried one unit at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["CHUNK", "Unit", "carry", "find_units", "in_chunks", "joined", "map_tensors", "rows_of"]

BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "Attention")
TOO_LARGE = ("CrossAttnUpBlock2D",)  # named by models as what devices should not cut, but a stage of many blocks
CHUNK = 64  # states that pass a unit together


@dataclass
class Unit:
    """A part of a model that is calibrated as a whole.

    Attributes:
        name: of the module; the order of units is that of their first calls.
        layers: names of the layers in it that are quantized, within the unit; "" for the unit itself.
        per_state: by place in the arguments of its call, how many rows a state has there; other tensors are shared.
    """

    name: str
    layers: list[str]
    per_state: dict[str, int]


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


def rows_of(unit: Unit, call: Any, states: torch.Tensor | slice, device: torch.device | None = None) -> Any:
    """Returns the arguments of a unit's call for some of the states."""

    def take(place: str, tensor: torch.Tensor) -> torch.Tensor:
        count = unit.per_state.get(place)
        if count:
            tensor = tensor.view(-1, count, *tensor.shape[1:])[states].flatten(0, 1)
        return tensor if device is None else tensor.to(device)

    return map_tensors(call, take)


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
        args, kwargs = rows_of(unit, call, states, device)
        found.append(map_tensors(module(*args, **kwargs), lambda _, tensor: tensor.cpu()))
    return joined(found)


@torch.no_grad()
def find_units(
    model: nn.Module, arguments: Callable[[int], dict[str, Any]], layers: Sequence[str], granularity: str
) -> list[Unit]:
    """Finds the units of a model and their order, by calling it with two and with three states.

    Args:
        model: in evaluation mode.
        arguments: number of states -> arguments of a call on the model's device.
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
    seen: dict[str, list[dict[str, int]]] = {}
    called: set[str] = set()
    handles = [
        model.get_submodule(layer).register_forward_pre_hook(lambda *_, layer=layer: called.add(layer))
        for layer in layers
    ]
    for count in (2, 3):
        first: dict[str, dict[str, int]] = {}

        def note(module: nn.Module, args: Any, kwargs: Any, first: Any = first, name: str = "") -> None:
            sizes = {k: len(v) for k, v in tensors_in((args, kwargs)).items() if v.ndim}
            first.setdefault(name, sizes)

        def hook(name: str, note: Any = note) -> Any:
            return lambda module, args, kwargs: note(module, args, kwargs, name=name)

        own = [model.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True) for n in owner]
        try:
            model(**arguments(count))
        finally:
            for handle in own:
                handle.remove()
        for name, sizes in first.items():
            seen.setdefault(name, []).append(sizes)
    for handle in handles:
        handle.remove()
    units = []
    for name, (two, three) in seen.items():
        per_state = {k: two[k] // 2 for k in two if two[k] != three.get(k)}
        inside = [f"{name}.{layer}" if layer else name for layer in owner[name]]
        kept = [layer for layer, full in zip(owner[name], inside, strict=True) if full in called]
        units.append(Unit(name, kept, per_state))
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
    arguments: dict[str, Any],
    visit: Callable[[Unit, Any, int], Any],
) -> Any:
    """Takes all states through a model once; what is between units runs on the CPU, for all states together.

    Args:
        model: whose units are replaced in a copy; it stays as it is.
        units: see `find_units`.
        arguments: of a call with all states.
        visit: called at each unit as `(unit, (args, kwargs), number of the call)`, returns the unit's output.
    """
    memo: dict[int, Any] = {}
    counts = dict.fromkeys((unit.name for unit in units), 0)

    def at(unit: Unit) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
        def arrive(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            counts[unit.name] += 1
            return visit(unit, (args, kwargs), counts[unit.name] - 1)

        return arrive

    for unit in units:
        module = model.get_submodule(unit.name)
        memo[id(module)] = _Station(module, at(unit))
    skeleton = copy.deepcopy(model, memo).cpu().float()
    skeleton.eval()
    return skeleton(**arguments)
