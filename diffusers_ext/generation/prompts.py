"""Prompts as a pipeline encoded them: recorded one by one, joined to batches, kept as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["Conditions", "fresh"]


def fresh(value: Any) -> Any:
    """Copies the containers of a recording, so that a pipeline that changes its lists changes only its own."""
    if isinstance(value, (list, tuple)):
        return type(value)([fresh(item) for item in value])
    if isinstance(value, dict):
        return {key: fresh(item) for key, item in value.items()}
    return value


class Conditions:
    """What a batch of samples is conditioned on: prompts with what `encode_prompt` made of each, or class labels.

    Made by `PipelineDenoiser.encode_prompts`. `len`, indices, slices and `+` work as on a list.

    Args:
        prompts: texts, or class labels.
        recordings: for each prompt, what each call of `encode_prompt` returned; empty for class labels.
        masked: the pipeline takes a mask of the text's tokens.
    """

    __module__ = "diffusers_ext"

    def __init__(self, prompts: Sequence[Any], recordings: Sequence[list[Any]], masked: bool = False) -> None:
        self.prompts, self.recordings, self.masked = list(prompts), list(recordings), masked
        self._joined: dict[Any, list[Any]] = {}
        self._lengths: list[tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int | slice | Sequence[int]) -> Conditions:
        rows = range(len(self))[index] if isinstance(index, slice) else [index] if isinstance(index, int) else index
        return Conditions([self.prompts[i] for i in rows], [self.recordings[i] for i in rows], self.masked)

    def __add__(self, other: Conditions) -> Conditions:
        return Conditions(
            self.prompts + other.prompts, self.recordings + other.recordings, self.masked or other.masked
        )

    def repeat(self, batch: int) -> Conditions:
        """Returns one prompt's conditions for a whole batch."""
        return self if len(self) == batch else self[[0] * batch]

    def interpolated(self, other: Conditions, weights: Sequence[float]) -> Conditions:
        """Interpolates the encoded texts linearly, prompt by prompt.

        Args:
            other: as many, at weight 1.
            weights: one for each.

        Raises:
            ValueError: two texts have unequal lengths or masks, or two labels differ: nothing lies between them; or
                there are not as many conditions or weights.
        """
        count = len(self)
        if not isinstance(other, Conditions) or len(other) != count:
            found = len(other) if isinstance(other, Conditions) else repr(other)
            raise ValueError(f"`other` must be conditions of {count} prompts, got {found}.")
        if len(weights) != count or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"`weights` must be {count} finite numbers, one a prompt, got {weights!r}.")
        mixed = []
        for i, weight in enumerate(weights):
            a, b = self.recordings[i], other.recordings[i]
            same = self.prompts[i] == other.prompts[i]
            if not a and not same:
                raise ValueError("class labels cannot be interpolated.")
            mixed.append(a if same else _between(a, b, weight))
        return Conditions(self.prompts, mixed, self.masked)

    @property
    def layout(self) -> list[int]:
        """How many values each call of `encode_prompt` returned; equal for all prompts of a pipeline."""
        return [len(call) if isinstance(call, (list, tuple, dict)) else 1 for call in self.recordings[0]]

    @property
    def lengths(self) -> list[tuple[int, ...]]:
        """The lengths of each prompt's texts that have no mask: prompts of other lengths cannot share a batch."""
        if self._lengths is None:
            self._lengths = [
                tuple(length for call in recording for length in _unmasked(call, self.masked))
                for recording in self.recordings
            ]
        return self._lengths

    def joined(self, device: torch.device, dtype: torch.dtype, multiple: int = 1) -> list[Any]:
        """Returns what `encode_prompt` would answer for the whole batch, call by call.

        Args:
            device: where the tensors are wanted.
            dtype: of what depends on the prompt, where it is floating.
            multiple: masked text is padded to a multiple of this, so that a compiled network meets few lengths.
        """
        key = (str(device), dtype, multiple)
        if key not in self._joined:
            calls = zip(*self.recordings, strict=True)
            self._joined = {key: [_join(list(c), self.masked, device, dtype, multiple) for c in calls]}
        return self._joined[key]

    def to_tensors(self) -> list[dict[str, torch.Tensor]]:
        """Returns each prompt's recording as flat named tensors, for safetensors; `from_tensors` is its inverse."""
        found: list[dict[str, torch.Tensor]] = []
        for recording in self.recordings:
            tensors: dict[str, torch.Tensor] = {}
            _flatten(recording, "", tensors)
            found.append(tensors)
        return found

    @classmethod
    def from_tensors(
        cls, prompts: Sequence[Any], tensors: Sequence[dict[str, torch.Tensor]], masked: bool = False
    ) -> Conditions:
        """Makes conditions from `to_tensors`."""
        return cls(prompts, [_unflatten(item) for item in tensors], masked)


def _batch_axis(value: torch.Tensor) -> int | None:
    """The axis of one prompt in its recording; `None` where the recording does not depend on the batch (text ids)."""
    if value.ndim and value.shape[0] == 1:
        return 0
    return 1 if value.ndim >= 3 and value.shape[1] == 1 else None  # layers in front


def _text_length(value: Any) -> int | None:
    """The number of tokens, where a recording has them."""
    axis = _batch_axis(value) if isinstance(value, torch.Tensor) else None
    return None if axis is None or value.ndim < axis + 3 else value.shape[axis + 1]


def _unmasked(value: Any, masked: bool) -> list[int]:
    """Lengths of text that has no mask and can be given none."""
    if isinstance(value, torch.Tensor):
        length = _text_length(value)
        return [] if length is None else [length]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple)) or _is_chain(value):
        return []
    if isinstance(value, tuple) and (masked or any(_is_mask(item) for item in value)):
        return []
    return [length for item in value for length in _unmasked(item, masked)]


def _is_mask(value: Any) -> bool:
    """Whether a recording says for each token whether it counts."""
    return isinstance(value, torch.Tensor) and value.ndim == 2 and bool(((value == 0) | (value == 1)).all())


def _is_chain(value: Any) -> bool:
    """Whether a list has an element a prompt, as opposed to one a layer."""
    return isinstance(value, list) and len(value) == 1


def _join(values: list[Any], masked: bool, device: torch.device, dtype: torch.dtype, multiple: int) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return _join_tensors(values, device, dtype, multiple if masked else 1)
    if _is_chain(first):
        moved = [item for value in values for item in value]
        return [_moved(item, device, dtype) if isinstance(item, torch.Tensor) else item for item in moved]
    if isinstance(first, dict):
        return {key: _join([v[key] for v in values], masked, device, dtype, multiple) for key in first}
    if not isinstance(first, (list, tuple)):
        return first
    columns = [list(column) for column in zip(*values, strict=True)]
    if masked and isinstance(first, tuple):
        _make_masks(columns, multiple)
    return type(first)([_join(column, masked, device, dtype, multiple) for column in columns])


def _make_masks(columns: list[list[Any]], multiple: int) -> None:
    """Makes the mask that a pipeline leaves out where all tokens of its prompts count, once lengths differ."""
    for texts, masks in zip(columns, columns[1:], strict=False):
        lengths = [_text_length(text) for text in texts]
        if None in lengths or all(mask is not None for mask in masks):
            continue
        padded = any(length % multiple for length in lengths if length is not None)
        if len(set(lengths)) > 1 or padded or any(mask is not None for mask in masks):
            for i, (mask, length) in enumerate(zip(masks, lengths, strict=True)):
                if mask is None:
                    masks[i] = torch.ones(1, length or 0, dtype=torch.long)


def _join_tensors(values: list[torch.Tensor], device: torch.device, dtype: torch.dtype, multiple: int) -> torch.Tensor:
    first = values[0]
    axis = _batch_axis(first)
    if axis is None and first.ndim == 1 and len(first) == 2 and not first.is_floating_point() and first[0] == 0:
        ends = torch.stack([value[1] for value in values]).cumsum(0).to(first.dtype)  # cumulative lengths
        return torch.cat([first[:1], ends]).to(device)
    if axis is None:
        longest = max(values, key=len)
        if not all(torch.equal(value, longest[: len(value)]) for value in values):
            raise ValueError(
                f"`encode_prompt` returned {tuple(first.shape)}, in which no axis is that of the prompts."
            )
        return longest.to(device)
    if first.ndim >= axis + 3 or _is_mask(first):
        wanted = max(value.shape[axis + 1] for value in values)
        wanted = -(-wanted // multiple) * multiple
        values = [_padded(value, axis + 1, wanted) for value in values]
    return _moved(torch.cat(values, dim=axis), device, dtype)


def _padded(value: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    if value.shape[axis] == length:
        return value
    shape = list(value.shape)
    shape[axis] = length - shape[axis]
    return torch.cat([value, value.new_zeros(shape)], dim=axis)


def _moved(value: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _between(a: Any, b: Any, weight: float) -> Any:
    """Interpolates two recordings; what is no embedding must be equal."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape:
        if a.is_floating_point() and not (_is_mask(a) or _is_mask(b)):
            return ((1 - weight) * a.double() + weight * b.double()).to(a.dtype)
        if torch.equal(a, b):
            return a
    elif isinstance(a, dict):
        return {key: _between(a[key], b[key], weight) for key in a}
    elif isinstance(a, (list, tuple)) and len(a) == len(b):
        return type(a)([_between(one, other, weight) for one, other in zip(a, b, strict=True)])
    elif not isinstance(a, (torch.Tensor, list, tuple)) and a == b:
        return a
    raise ValueError("texts of unequal lengths or masks cannot be interpolated.")


# A name is the path through the containers, each step with its kind, as in "l0.t1.dmask"; what is no tensor is written
# as a name with an empty tensor: "l0.t2=None".
def _flatten(value: Any, path: str, into: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        into[path] = value.contiguous()
    elif isinstance(value, (list, tuple)):
        kind = "l" if isinstance(value, list) else "t"
        if not value:
            into[f"{path}={kind}"] = torch.empty(0)
        for i, item in enumerate(value):
            _flatten(item, f"{path}.{kind}{i}", into)
    elif isinstance(value, dict):
        for key, item in value.items():
            _flatten(item, f"{path}.d{key}", into)
    elif value is None:
        into[f"{path}=None"] = torch.empty(0)
    else:
        raise ValueError(f"`encode_prompt` returned a {type(value).__name__}, which cannot be kept as tensors.")


def _unflatten(tensors: dict[str, torch.Tensor]) -> Any:
    if len(tensors) == 1:
        path, value = next(iter(tensors.items()))
        if not path.startswith("."):
            return {"=l": [], "=t": (), "=None": None}.get(path, value)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for path, value in tensors.items():
        step, rest = _first_step(path)
        groups.setdefault(step, {})[rest] = value
    items = {step[1:]: _unflatten(group) for step, group in groups.items()}
    kind = next(iter(groups), "l")[0]
    if kind == "d":
        return items
    ordered = [items[str(i)] for i in range(len(items))]
    return ordered if kind == "l" else tuple(ordered)


def _first_step(path: str) -> tuple[str, str]:
    end = next((i for i, c in enumerate(path[1:], 1) if c in ".="), len(path))
    return path[1:end], path[end:]
