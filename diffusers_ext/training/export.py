"""The pipeline that a run would save now: of the average, or of weights gathered from many processes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from .recipe import Modules, Recipe
from .weights import Ema, copy_full_, full_tensor

__all__ = ["Exporter"]


class Exporter:
    """Gives a recipe's pipeline while it is trained.

    Args:
        accelerator: the run's.
        recipe: makes the pipeline.
        modules: the run's, before the engine rounds those that are frozen.
        weight_dtype: precision to which it rounds them.
        sharded: processes share the parameters, so that the module cannot be saved as it stands.
    """

    def __init__(
        self, accelerator: Accelerator, recipe: Recipe[Any], modules: Modules, weight_dtype: torch.dtype, sharded: bool
    ) -> None:
        self.accelerator, self.recipe, self.modules, self.weight_dtype = accelerator, recipe, modules, weight_dtype
        self._originals = self._saved_weights() if weight_dtype != torch.float32 else {}
        # An unsharded twin takes the gathered weights.
        self._twin: Any = copy.deepcopy(modules.trainable) if sharded else None

    def _saved_weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """Copies the weights of those frozen modules that the finished pipeline will hold."""
        if not self.accelerator.is_main_process:
            return {}
        held = {id(component) for component in self.recipe.pipeline(self.modules).components.values()}
        saved = {name: module for name, module in self.modules.frozen.items() if id(module) in held}
        return {n: {k: v.to("cpu", copy=True) for k, v in m.state_dict().items()} for n, m in saved.items()}

    @contextlib.contextmanager
    def pipeline(self, model: Any, ema: Ema | None) -> Iterator[DiffusionPipeline | None]:
        """Gives the pipeline on the main process, and `None` on the others; every process must enter it.

        Args:
            model: the prepared module.
            ema: the average of its trained parameters, which is then taken.
        """
        with self._weights(model, ema) as trainable:
            if self.accelerator.is_main_process:
                was_training = trainable.training
                trainable.eval()
                with self._own_weights():
                    yield self.recipe.pipeline(Modules(trainable, self.modules.scheduler, self.modules.frozen))
                trainable.train(was_training)
            else:
                yield None
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _weights(self, model: Any, ema: Ema | None) -> Iterator[Any]:
        if self._twin is not None:
            weights = self.accelerator.get_state_dict(model)
            shadow = [full_tensor(p) for p in ema.shadow_params] if ema is not None else None
            if self.accelerator.is_main_process:
                self._twin.load_state_dict(weights)
                if shadow is not None:
                    trained = [p for p in self._twin.parameters() if p.requires_grad]
                    for parameter, value in zip(trained, shadow, strict=True):
                        copy_full_(parameter.data, value)
                self._twin.to(self.accelerator.device)
            yield self._twin
        elif ema is not None:
            trained = [p for p in model.parameters() if p.requires_grad]
            ema.store(trained)
            ema.copy_to(trained)
            try:
                yield self.accelerator.unwrap_model(model)
            finally:
                ema.restore(trained)
        else:
            yield self.accelerator.unwrap_model(model)

    @contextlib.contextmanager
    def _own_weights(self) -> Iterator[None]:
        """Holds frozen modules in their own precision for a while, with weights that training has rounded."""
        modules = {name: self.modules.frozen[name] for name in self._originals}
        for name, module in modules.items():
            module.float().load_state_dict(self._originals[name])
        try:
            yield
        finally:
            for module in modules.values():
                module.to(self.weight_dtype)
