"""Learned rounding of a whole model, unit by unit: `quantize_model`."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from tqdm.auto import tqdm

from diffusers_ext.rng import mix

from .adaround import LayerRounding, rounding_penalty, total_loss
from .attention import QDiffAttnProcessor, attention_layers, takes_processor
from .calibration import Calibration, claim, fingerprint
from .config import QDiffConfig
from .in_step import InStep
from .layers import QuantLayer, check_compute, quantized_layer
from .points import ActPoint, LearningAttnProcessor, watch_inputs
from .quantizer import QDiffQuantizer, convertible, mark_quantized, splits_for
from .units import Unit, carry, find_units, in_chunks, joined, rows_of, selected, tensors_in, within_groups

__all__ = ["quantize_model"]

REGULARISER = 0.01
ACT_POWER, ACT_LR, ACT_STATES = 2.4, 4e-4, 64
WEIGHTS, ACTIVATIONS = "weights", "activations"  # the two passes, and what their files begin with


def quantize_model(
    model: Any,
    calibration: Calibration,
    config: QDiffConfig,
    *,
    iters: int = 2000,
    lr: float = 1e-2,
    act_iters: int = 500,
    batch_size: int = 32,
    granularity: str = "block",
    seed: int = 0,
    act_momentum: float | None = None,
    output_dir: str | os.PathLike | None = None,
) -> Any:
    """Quantizes a model, with rounding that is learned on what it sees while sampling (sections 3, 4 of 2302.04304).

    Block by block, in the order of their calls, each weight is rounded up or down so that the block's output, from the
    input that the quantized blocks before it give, stays that of the original block. Then, with `act_bits`, the steps
    of activations are learned likewise, and the last layer's bias takes what is constant in the output's error. Every
    block is passed once by all states: the cost is linear in depth.

    Args:
        model: a UNet or transformer of Diffusers; it stays as it is, and what is returned is a new one.
        calibration: from `collect_calibration` with this model.
        config: bits, and how ranges are found.
        iters: updates of the rounding for each unit; 0 rounds to nearest.
        lr: of Adam. 1e-2 is for few updates; the paper's 1e-3 is for 20,000.
        act_iters: updates of the steps of activations, at 4e-4 with a cosine to 0.
        batch_size: states in an update.
        granularity: `"block"` (resnets, attention and transformer blocks, then single layers) or `"layer"`.
        seed: of the order of states.
        act_momentum: makes ranges of activations running averages of the least and largest values, over all states in
            batches, with so much of the old one in each; the original's `running_stat` has 0.95. `None` takes ranges
            of 64 states.
        output_dir: folder where each finished unit is stored. A run that was stopped goes on there, and ends in the
            same bits as one that was not.

    Returns:
        The quantized model, on the CPU or wherever `model` is, in evaluation mode.

    Raises:
        ValueError: an argument is outside its range, the calibration is of another model or of one timestep only, or
            `output_dir` holds another run.

    Example:
        >>> unet = quantize_model(pipe.unet, calibration, QDiffConfig(4, act_bits=8))  # doctest: +SKIP
        >>> unet.save_pretrained("unet-w4a8")  # doctest: +SKIP
    """
    settings = Settings(iters, lr, act_iters, batch_size, granularity, seed, act_momentum)
    _check(model, calibration, config, settings)
    if len(calibration.timesteps) < 2:
        raise ValueError(
            f"`calibration` must hold states of several timesteps, got those of {calibration.timesteps} only: a model "
            "rounded for one is wrong at others."
        )
    return calibrated(model, calibration, config, settings, None if output_dir is None else Path(output_dir))


@dataclass
class Settings:
    """How rounding is learned; see `quantize_model`."""

    iters: int = 2000
    lr: float = 1e-2
    act_iters: int = 500
    batch_size: int = 32
    granularity: str = "block"
    seed: int = 0
    act_momentum: float | None = None


def _check(model: Any, calibration: Any, config: Any, settings: Settings) -> None:
    if not isinstance(calibration, Calibration):
        raise ValueError(f"`calibration` must be a `Calibration`, got {type(calibration).__name__}.")
    if not isinstance(config, QDiffConfig):
        raise ValueError(f"`config` must be a `QDiffConfig`, got {type(config).__name__}.")
    for name, least in (("iters", 0), ("act_iters", 0), ("batch_size", 1)):
        value = getattr(settings, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}.")
    granularity, momentum = settings.granularity, settings.act_momentum
    if not settings.lr > 0:
        raise ValueError(f"`lr` must be a number > 0, got {settings.lr!r}.")
    if granularity not in ("block", "layer"):
        raise ValueError(f"`granularity` must be one of ['block', 'layer'], got {granularity!r}.")
    if momentum is not None and not 0 < momentum < 1:
        raise ValueError(f"`act_momentum` must be a number in (0, 1) or None, got {momentum!r}.")
    check_compute(config)
    if config.quantize_attention and granularity != "block":
        raise ValueError(f"`granularity` must be 'block' with `quantize_attention`, got {granularity!r}.")
    if getattr(model, "is_quantized", False):
        raise ValueError(f"`model` must not be quantized before, got a {type(model).__name__} that is.")
    if any("lora_" in name for name, _ in model.named_modules()):
        raise ValueError("`model` must have no LoRA layers, got some: fuse or unload them first.")
    if calibration.model != fingerprint(model):
        raise ValueError(
            f"`calibration` must be of this model, {fingerprint(model)} (class and configuration), got one of "
            f"{calibration.model}."
        )


def calibrated(
    model: Any, calibration: Calibration, config: QDiffConfig, settings: Settings, folder: Path | None = None
) -> Any:
    """Does what `quantize_model` says, its arguments checked."""
    layers = convertible(model, config.modules_to_not_convert)
    if config.quantize_attention:
        attention_layers(model)
    splits = {name: split for name, split in splits_for(model, config).items() if name in layers}
    if folder is not None:
        _claim(folder, model, calibration, config, settings)
    training = model.training
    model.eval()
    try:
        run = _Run(model, calibration, config, settings, splits, folder)
        units = find_units(model, run.probes(), list(layers), settings.granularity)
        passes = [WEIGHTS] + [ACTIVATIONS] * (config.act_bits is not None)
        with tqdm(total=len(units) * len(passes), desc="quantizing", unit="unit") as bar:
            for kind in passes:
                run.take(units, kind, bar)
    finally:
        model.train(training)
    return run.finished(layers)


def _claim(folder: Path, model: Any, calibration: Calibration, config: QDiffConfig, settings: Settings) -> None:
    """Writes what decides the result beside it; refuses a folder of another run."""
    digest = hashlib.sha256()
    for tensor in [*model.state_dict().values(), *tensors_in(calibration.calls).values()]:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    wanted = {"config": config.to_dict(), **vars(settings), "model and calibration": digest.hexdigest()}
    claim(folder / "settings.json", wanted, "run")


class _Run:
    """What one quantization knows: the finished layers, and how a unit is learned."""

    def __init__(
        self,
        model: Any,
        calibration: Calibration,
        config: QDiffConfig,
        settings: Settings,
        splits: dict[str, int],
        folder: Path | None,
    ) -> None:
        self.model, self.config, self.settings, self.splits, self.folder = model, config, settings, splits, folder
        groups = calibration.groups()
        self.groups, self.counts = [group.arguments() for group in groups], [len(group) for group in groups]
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.quantized: dict[str, QuantLayer] = {}
        self.attention: dict[str, dict[str, torch.Tensor]] = {}
        self.lacking: dict[str, torch.Tensor] = {}  # what the bias of the last layer lacks, by name
        self.last = 0

    def probes(self) -> list[Callable[[int], dict[str, Any]]]:
        """Returns, for each group, what gives the arguments for a few states, as the model takes them."""

        def placed(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(self.device, self.dtype if value.is_floating_point() else None)
            if isinstance(value, dict):
                return {k: placed(v) for k, v in value.items()}
            return [placed(v) for v in value] if isinstance(value, list) else value

        def probe(arguments: dict[str, Any], count: int) -> Callable[[int], dict[str, Any]]:
            return lambda few: placed(selected(arguments, count, [i % count for i in range(few)]))

        return [probe(*group) for group in zip(self.groups, self.counts, strict=True)]

    def take(self, units: list[Unit], kind: str, bar: Any) -> None:
        """Carries all states through the model, original and quantized side by side, and learns each unit."""

        def doubled(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.float() if value.is_floating_point() else value
            return {k: doubled(v) for k, v in value.items()} if isinstance(value, dict) else value

        twice = [
            doubled(selected(arguments, count, [*range(count), *range(count)]))
            for arguments, count in zip(self.groups, self.counts, strict=True)
        ]
        order, self.last = {unit.name: i for i, unit in enumerate(units)}, len(units) - 1

        def visit(unit: Unit, calls: list[Any], times: int) -> list[Any]:
            if times == 0:
                bar.set_postfix_str(unit.name, refresh=False)
            outputs = self._unit(unit, order[unit.name], calls, kind, learn=times == 0)
            bar.update(times == 0)
            return outputs

        carry(self.model, units, twice, visit)

    def _unit(self, unit: Unit, index: int, calls: list[Any], kind: str, learn: bool) -> list[Any]:
        """Learns a unit where it is met first, and returns the outputs of the original and of the quantized one."""
        work = copy.deepcopy(self.model.get_submodule(unit.name)).to(self.device, torch.float32).requires_grad_(False)

        def half(states: Callable[[int], slice]) -> list[Any]:
            return [rows_of(c, states(n), 2 * n, unit.per_state) for c, n in zip(calls, self.counts, strict=True)]

        def outputs(given: list[Any]) -> list[Any]:
            return [in_chunks(work, unit, c, n, self.device) for c, n in zip(given, self.counts, strict=True)]

        targets, given = outputs(half(lambda n: slice(n))), half(lambda n: slice(n, None))
        if learn and kind == WEIGHTS and not self._load(unit, index, kind):
            self._learn_weights(work, unit, index, given, targets)
            self._save(unit, index, kind)
        self._round_weights(work, unit)
        if kind == ACTIVATIONS:
            known = not learn or self._load(unit, index, kind)
            points = self._place_points(work, unit, known)
            if not known:
                self._learn_activations(work, unit, index, given, targets, points)
                self._save(unit, index, kind)
        found = outputs(given)
        if self.settings.iters and index == self.last and isinstance(targets[0], torch.Tensor):
            self._correct_bias(unit, targets, found)
        return [joined(pair) for pair in zip(targets, found, strict=True)]

    def _loss(
        self, module: Callable[..., Any], unit: Unit, calls: list[Any], targets: list[Any], states: Any, power: float
    ) -> torch.Tensor:
        """Returns the mean loss of a unit's outputs at some of the states."""
        losses = []
        for group, own in within_groups(states, self.counts):
            args, kwargs = rows_of(calls[group], own, self.counts[group], unit.per_state, self.device)
            wanted = rows_of(targets[group], own, self.counts[group], device=self.device)
            losses.append(total_loss(module(*args, **kwargs), wanted, power) * (len(own) / len(states)))
        return torch.stack(losses).sum()

    def _correct_bias(self, unit: Unit, targets: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Finds what the last layer's bias lacks, so that the mean over all states is the original network's."""
        if unit.layers != [""]:
            return
        rows = [
            (a - b).movedim(1 if a.ndim == 4 else -1, -1).flatten(0, -2) for a, b in zip(targets, outputs, strict=True)
        ]
        self.lacking = {unit.name: torch.cat(rows).mean(0)}

    def _names(self, unit: Unit) -> list[tuple[str, str]]:
        """Returns the layers of a unit: name within it, name in the model."""
        return [(layer, f"{unit.name}.{layer}" if layer else unit.name) for layer in unit.layers]

    def _generator(self, index: int, kind: str) -> torch.Generator:
        # Of a unit by itself, so that a run that goes on draws what one in one piece would have drawn.
        return torch.Generator().manual_seed(mix(self.settings.seed, index, int(kind == ACTIVATIONS)))

    # ---------------------------------------------------------------- weights

    def _learn_weights(self, work: nn.Module, unit: Unit, index: int, calls: list[Any], targets: list[Any]) -> None:
        for inside, name in self._names(unit):
            layer = work.get_submodule(inside)
            # On the CPU: a grid must not depend on where the model is.
            self.quantized[name] = quantized_layer(layer.cpu(), self.config, self.splits.get(name, 0))
            layer.to(self.device)
        if self.settings.iters == 0:
            return
        rounding = {
            name: LayerRounding(work.get_parameter(_weight(inside)), self.quantized[name])
            for inside, name in self._names(unit)
        }
        alphas = [alpha for layer in rounding.values() for alpha in layer.alphas]
        optimizer = torch.optim.Adam(alphas, lr=self.settings.lr)

        def loss(states: torch.Tensor, count: int) -> torch.Tensor:
            weights = {_weight(inside): rounding[name].soft() for inside, name in self._names(unit)}

            def soft(*args: Any, **kwargs: Any) -> Any:
                return functional_call(work, weights, args, kwargs)

            penalty = sum(rounding_penalty(alpha, count, self.settings.iters) for alpha in alphas)
            return self._loss(soft, unit, calls, targets, states, 2.0) + REGULARISER * penalty

        self._minimise(loss, optimizer, self.settings.iters, self._generator(index, WEIGHTS))
        for layer in rounding.values():
            layer.store()

    def _round_weights(self, work: nn.Module, unit: Unit) -> None:
        for inside, name in self._names(unit):
            layer: Any = work.get_submodule(inside)
            layer.weight.data = self.quantized[name].dequantize().to(self.device)

    def _minimise(
        self,
        loss: Callable[[torch.Tensor, int], torch.Tensor],
        optimizer: torch.optim.Optimizer,
        iters: int,
        generator: torch.Generator,
        scheduler: Any = None,
    ) -> None:
        with torch.enable_grad():
            for count in range(1, iters + 1):
                states = torch.randperm(sum(self.counts), generator=generator)[: self.settings.batch_size]
                optimizer.zero_grad()
                loss(states, count).backward()
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()

    # ---------------------------------------------------------------- activations

    def _place_points(self, work: nn.Module, unit: Unit, known: bool) -> dict[str, list[ActPoint]]:
        """Lets a unit round its activations, by learned grids or by such as are still to be found."""
        points = {
            name: watch_inputs(work.get_submodule(inside), self.config, self.splits.get(name, 0))
            for inside, name in self._names(unit)
        }
        if self.config.quantize_attention:
            for inside, module in work.named_modules():
                if takes_processor(module):
                    made = LearningAttnProcessor(self.config).to(self.device)
                    module.set_processor(made)  # type: ignore[operator]
                    name = f"{unit.name}.{inside}" if inside else unit.name
                    points[f"{name}.processor"] = list(made.points.values())  # type: ignore[arg-type]
        for name, own in points.items():
            if known:
                self._recall(name, own)
            for point in own:
                point.to(self.device)
                point.zero = point.zero.to(self.device)
        return points

    def _recall(self, name: str, points: list[ActPoint]) -> None:
        if name in self.quantized:
            scale, zero = self.quantized[name].act_scale, self.quantized[name].act_zero_point
            assert scale is not None
            assert zero is not None
        else:
            stored = self.attention[name]
            scale, zero = stored["act_scale"], torch.cat([stored["act_zero_point"], torch.zeros(1)])
        for i, point in enumerate(points):
            point.step.data, point.zero, point.found = scale[i].clone(), zero[i].float(), True

    def _find_ranges(
        self, work: nn.Module, unit: Unit, calls: list[Any], batches: list[torch.Tensor], points: list[ActPoint]
    ) -> None:
        """Lets each point find its grid from what the rounded layers before it give for some of the states."""
        groups = InStep()
        for point in points:
            point.stop = groups.stop

        def call(group: int, own: torch.Tensor) -> Callable[[], Any]:
            args, kwargs = rows_of(calls[group], own, self.counts[group], unit.per_state, self.device)
            return lambda: work(*args, **kwargs)

        for states in batches:
            parts = [call(*part) for part in within_groups(states, self.counts)]
            groups.run(parts, lambda point, tensors: point.observe(tensors, self.settings.act_momentum))
        for point in points:
            point.stop = None

    def _learn_activations(
        self,
        work: nn.Module,
        unit: Unit,
        index: int,
        calls: list[Any],
        targets: list[Any],
        points: dict[str, list[ActPoint]],
    ) -> None:
        generator = self._generator(index, ACTIVATIONS)
        first = torch.randperm(sum(self.counts), generator=generator)[:ACT_STATES]
        batches = [first]
        if self.settings.act_momentum is not None:
            batches += torch.randperm(sum(self.counts), generator=generator).split(self.settings.batch_size)
        self._find_ranges(work, unit, calls, batches, [point for own in points.values() for point in own])

        def loss(states: torch.Tensor, count: int = 0) -> torch.Tensor:
            return self._loss(work, unit, calls, targets, states, ACT_POWER)

        steps = [point.step for own in points.values() for point in own if point.found]
        for step in steps:
            step.requires_grad_(True)
        if self.settings.act_iters:
            before, start = [step.detach().clone() for step in steps], float(loss(first))
            optimizer = torch.optim.Adam(steps, lr=ACT_LR)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.settings.act_iters, eta_min=0.0)
            self._minimise(loss, optimizer, self.settings.act_iters, generator, schedule)
            if not float(loss(first)) <= start:  # a step near the learning rate can be thrown off
                for step, old in zip(steps, before, strict=True):
                    step.data.copy_(old)
        for name, own in points.items():
            stack = {
                "act_scale": torch.stack([point.step.detach().cpu() for point in own]),
                "act_zero_point": torch.stack([point.zero.cpu() for point in own]),
            }
            if name in self.quantized:
                layer = self.quantized[name]
                layer.act_scale, layer.act_zero_point = stack["act_scale"], stack["act_zero_point"].to(torch.uint8)
            else:
                stack["act_zero_point"] = stack["act_zero_point"][:3]
                self.attention[name] = stack

    # ---------------------------------------------------------------- storage

    def _file(self, index: int, kind: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{kind}-{index:04d}.safetensors"

    def _save(self, unit: Unit, index: int, kind: str) -> None:
        path = self._file(index, kind)
        if path is None:
            return
        tensors = {
            f"{name}.{k}": v for _, name in self._names(unit) for k, v in self.quantized[name].state_dict().items()
        }
        for name, values in self.attention.items():
            if f"{name}.".startswith(f"{unit.name}."):
                tensors |= {f"{name}.{k}": v for k, v in values.items()}
        partial = path.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial)
        os.replace(partial, path)

    def _load(self, unit: Unit, index: int, kind: str) -> bool:
        """Takes a finished unit from the folder, if it is there."""
        path = self._file(index, kind)
        if path is None or not path.is_file():
            return False
        tensors = load_file(path)
        for _, name in self._names(unit):
            layer: Any = self.model.get_submodule(name)
            made = quantized_layer(copy.deepcopy(layer).to("meta"), self.config, self.splits.get(name, 0))
            own = {k[len(name) + 1 :]: v for k, v in tensors.items() if k.rpartition(".")[0] == name}
            made.load_state_dict(own, assign=True)
            self.quantized[name] = made
        for key, value in tensors.items():
            name, _, last = key.rpartition(".")
            if name.endswith("processor"):
                self.attention.setdefault(name, {})[last] = value
        return True

    def finished(self, layers: dict[str, nn.Module]) -> Any:
        """Returns a copy of the model with the quantized layers in their places."""
        config = copy.deepcopy(self.config)
        never = [name for name in layers if name not in self.quantized]
        if never and config.act_bits is not None:
            # There is no range for what no state has passed.
            config.modules_to_not_convert = [*(config.modules_to_not_convert or []), *never]
        elif never:
            for name in never:
                self.quantized[name] = quantized_layer(layers[name], config, self.splits.get(name, 0))
        memo: dict[int, Any] = {}
        for name, quantized in self.quantized.items():
            bias: Any = layers[name].bias
            if bias is not None:
                own = bias.detach() + self.lacking.get(name, torch.zeros(())).to(bias)
                quantized.bias = nn.Parameter(own, requires_grad=False)
            memo[id(layers[name])] = quantized.to(self.device)
        made = copy.deepcopy(self.model, memo)
        for name, stored in self.attention.items():
            processor = QDiffAttnProcessor(config.softmax_bits, self.device)
            processor.load_state_dict(stored)
            made.get_submodule(name.removesuffix(".processor")).set_processor(processor)
        mark_quantized(made, QDiffQuantizer(config, pre_quantized=True))
        return made.eval()


def _weight(inside: str) -> str:
    return f"{inside}.weight" if inside else "weight"
