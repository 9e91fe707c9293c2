"""The training loop that every method shares.

A run is a function of its arguments: every random number follows from the seed and the position
(`diffusers_ext.rng`), and the position is one integer. A checkpoint therefore holds weights, optimizer,
learning-rate schedule, average and that integer, and a resumed run equals an uninterrupted one bit for bit on the
same number of processes.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration, send_to_device
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader

from diffusers_ext.data.buckets import BucketBatchSampler
from diffusers_ext.data.sampler import PositionalBatchSampler, SeededDataset, StreamingBatches
from diffusers_ext.hub.repo import push_repo
from diffusers_ext.rng import StepRNG, mix

from .callbacks import Callback, default_callbacks, draw_pictures, image_grid, measure
from .checkpoint import (
    DamagedCheckpointError,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_only_trained,
    set_aside,
)
from .config import TrainConfig, require
from .export import Exporter
from .folder import claimed_folder
from .networks import size_note
from .optimizers import make_optimizer
from .recipe import Context, Recipe
from .signals import StopSignals
from .weights import Ema, all_finite

__all__ = ["TrainResult", "Trainer"]

INITIALISATION, SAMPLE_PICTURE = 4, 6


@dataclass
class TrainResult:
    """How a run ended.

    Attributes:
        steps: updates made, those before a resume included.
        loss: mean loss since the last log, or the last logged one.
        stopped_by: name of the signal that stopped it, or `None` when it is complete.
    """

    steps: int
    loss: float
    stopped_by: str | None = None


class Trainer:
    """Trains a recipe's module and leaves a complete Hub repo in `config.output_dir`.

    Args:
        config: the arguments, an instance of the recipe's `Config`.
        recipe: the method.
        callbacks: further callbacks, called after the built-in ones.

    Attributes:
        step: updates made so far.
        total_steps: updates of the whole run.

    Raises:
        ValueError: arguments that contradict each other or the data.

    Example:
        >>> from diffusers_ext import ImmiscibleConfig, ImmiscibleRecipe, Trainer
        >>> config = ImmiscibleConfig(train_data_dir="photos", max_train_steps=1000)  # doctest: +SKIP
        >>> Trainer(config, ImmiscibleRecipe(config)).train()  # doctest: +SKIP
    """

    def __init__(self, config: TrainConfig, recipe: Recipe[Any], callbacks: Sequence[Callback] = ()) -> None:
        self.config, self.recipe = config, recipe
        self.callbacks: list[Callback] = [*default_callbacks(config), *callbacks]
        self.step = 0
        self.total_steps = 0
        self._micro_step = 0
        self._paused = 0.0
        self._claim = contextlib.ExitStack()

    def train(self) -> TrainResult:
        """Runs to the end, or to a signal, and saves.

        Returns:
            Steps, loss and what stopped it. After a signal there is a checkpoint but no finished pipeline.

        Raises:
            CheckpointError: a checkpoint could not be written; the previous one is whole.
            FloatingPointError: the loss is not finite.
            RuntimeError: the upload failed; the local folder is whole.
        """
        with self._claim:
            return self._train()

    def _train(self) -> TrainResult:
        config = self.config
        self._start()
        with StopSignals() as signals:
            self._load()
            for callback in self.callbacks:
                callback.on_start(self)
            try:
                self._loop(signals)
            finally:
                for callback in self.callbacks:
                    callback.on_end(self)
        if signals.received is None and not self._stopped:
            self._finish()
            if config.push_to_hub and self.accelerator.is_main_process:
                assert config.hub_model_id is not None
                push_repo(config.output_dir, config.hub_model_id, private=config.hub_private_repo or None)
            self.accelerator.wait_for_everyone()
        stopped_by = (signals.received or "another process's signal") if self._stopped else None
        return TrainResult(self.step, self._last_loss, stopped_by)

    def pause(self, seconds: float) -> None:
        """Takes time that was not spent on training out of the speed shown."""
        self._paused += seconds

    @contextlib.contextmanager
    def exported_pipeline(self) -> Iterator[DiffusionPipeline | None]:
        """Gives the pipeline with the weights that would be saved now: the average where there is one.

        Every process must enter it; on all but the main process the pipeline is `None`.
        """
        with self._export.pipeline(self.model, self.ema) as pipeline:
            yield pipeline

    # -- set-up ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        config = self.config
        accumulation = GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False, sync_each_batch=False
        )
        # Accelerate keeps the precision of the first run in a process, whatever a later one says.
        asked = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        if AcceleratorState._shared_state and AcceleratorState().mixed_precision != asked:
            AcceleratorState._reset_state()
        self.accelerator = accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_plugin=accumulation,
            log_with=[*config.trackers] or None,
            project_config=ProjectConfiguration(
                project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"
            ),
        )
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != accelerator.num_processes:
            raise ValueError(
                f"`num_processes` must be 1 here, got {launched}: the launcher started processes that do not know of "
                "each other. On a CPU use `ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`."
            )
        if config.allow_tf32 and torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = True
        if accelerator.is_main_process:
            config.check_targets()
            # All processes see the same checkpoints, and no other run's.
            resume, latest = config.resume_from_checkpoint, config.resume_from_checkpoint == "latest"
            path = find_checkpoint(config.output_dir, resume)[0] if resume is not None and not latest else None
            claim = claimed_folder(config.output_dir, path, latest, config.overwrite_output_dir)
            self._claim.enter_context(claim)
        accelerator.wait_for_everyone()
        self.rng = StepRNG(config.seed, accelerator.process_index, accelerator.num_processes, config.rng_scope)
        weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        self.ctx = ctx = Context(config, accelerator, self.rng, weight_dtype)

        torch.manual_seed(mix(config.seed, INITIALISATION))
        self.dataset = self.recipe.dataset(ctx)
        self._plan()
        ctx.modules = modules = self.recipe.setup(ctx)
        for p in modules.trainable.parameters():
            if p.requires_grad:  # what is frozen, beneath LoRA layers, keeps its precision
                p.data = p.data.float()
        modules.trainable.train()
        sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self._export = Exporter(accelerator, self.recipe, modules, weight_dtype, sharded)
        for module in modules.frozen.values():
            module.requires_grad_(False).eval().to(accelerator.device)
            # Diffusers warns about casts, even of nothing.
            if any(p.dtype != weight_dtype for p in module.parameters()):
                module.to(weight_dtype)
        if config.gradient_checkpointing and hasattr(modules.trainable, "enable_gradient_checkpointing"):
            modules.trainable.enable_gradient_checkpointing()
        only_trained = modules.only_trained and not sharded
        if only_trained:
            save_only_trained(accelerator, modules.trainable)
        said = size_note(modules.trainable, config, only_trained, self.recipe.size_advice)
        accelerator.print(said, file=sys.stderr)
        self._prepare()

    def _plan(self) -> None:
        """Fixes the number of updates and checks the arguments against the data."""
        config, world = self.config, self.accelerator.num_processes
        self._micro_batch = config.train_batch_size * world
        self._streaming = getattr(self.dataset, "streaming", False)
        update = self._micro_batch * config.gradient_accumulation_steps
        buckets = getattr(self.dataset, "buckets", None)
        if not self._streaming:
            fits = f"small enough for an update of {update} samples in all from the data's {len(self.dataset)}"
            require(update <= len(self.dataset), "train_batch_size", config.train_batch_size, fits)
        if config.max_train_steps is not None:
            self.total_steps = config.max_train_steps
        elif self._streaming:
            raise ValueError("`max_train_steps` must be given with `streaming`: the length of an epoch is not known.")
        else:
            assert config.num_train_epochs is not None
            self.total_steps = config.num_train_epochs * (len(self.dataset) // update)
            if buckets is not None:
                self.total_steps = sum(config.num_train_epochs * len(bucket) // update for bucket in buckets)
        config.check_warmup(self.total_steps)

    def _prepare(self) -> None:
        config, accelerator = self.config, self.accelerator
        trainable = self.ctx.modules.trainable
        optimizer = make_optimizer([p for p in trainable.parameters() if p.requires_grad], config)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            # DeepSpeed reads the batch size off a prepared loader; ours is positional and not prepared.
            plugin: Any = accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.train_batch_size
        self.model, self.optimizer = accelerator.prepare(trainable, optimizer)
        self.ctx.model = self.model
        # Not prepared: accelerate would step it once per process.
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=self.total_steps,
        )
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.ema = (
            Ema(
                self.parameters,
                decay=config.ema_decay,
                use_ema_warmup=config.use_ema_warmup,
                inv_gamma=config.ema_inv_gamma,
                power=config.ema_power,
            )
            if config.use_ema
            else None
        )

    def _load(self) -> None:
        config = self.config
        self._stopped = False
        self._last_loss = math.nan
        self._sums: dict[str, torch.Tensor] = {}
        self._summed = 0
        if config.resume_from_checkpoint is None:
            return
        found = self._load_newest(find_checkpoint(config.output_dir, config.resume_from_checkpoint))
        if found is None:
            return
        manifest, state = found
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        # The rate follows from the position and the present arguments, which may differ from the checkpoint's.
        self.lr_scheduler.base_lrs = [config.learning_rate] * len(self.lr_scheduler.base_lrs)
        rate = config.learning_rate * self.lr_scheduler.lr_lambdas[0](self.lr_scheduler.last_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.ema is not None:
            if state["ema"] is not None:
                self.ema.load_state_dict(state["ema"])
            else:  # switched on now: the average starts from the loaded weights
                self.ema.restart(self.parameters)
        self.recipe.load_state_dict(state["recipe"])
        self._last_loss, self._summed = state["loss"], state["summed"]
        self._sums = {name: value.to(self.accelerator.device) for name, value in state["sums"].items()}
        self.step = manifest["step"]
        # With other batch sizes the nearest earlier update of the new size is where the data goes on.
        effective = self._micro_batch * config.gradient_accumulation_steps
        self._micro_step = manifest["samples_seen"] // effective * config.gradient_accumulation_steps

    def _load_newest(self, paths: list[Path]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Loads the first checkpoint that can be read; damaged ones before it are renamed."""
        damaged: list[Path] = []
        for path in paths:
            try:
                found = load_checkpoint(self.accelerator, path, model=self.model, config=self.config.to_dict())
            except DamagedCheckpointError:
                damaged.append(path)
                if path is paths[-1]:
                    raise
                continue
            for old in damaged if self.accelerator.is_main_process else ():
                warnings.warn(f"{old} is damaged: it is renamed, and the run goes on from {path}", stacklevel=2)
                set_aside(old)
            return found
        return None

    def _loader(self) -> DataLoader:
        config = self.config
        # Counted from the position, not from the step: a resume with another batch size keeps the number of updates.
        total = self._micro_step + (self.total_steps - self.step) * config.gradient_accumulation_steps
        position = {
            "rank": self.rng.rank,
            "world": self.rng.world,
            "seed": config.seed,
            "start": self._micro_step,
            "total": total,
            "accumulation": config.gradient_accumulation_steps,
        }
        common = {
            "num_workers": config.dataloader_num_workers,
            "pin_memory": self.accelerator.device.type == "cuda",
            # The loader draws its workers' base seed from here instead of from the global generator.
            "generator": torch.Generator().manual_seed(config.seed),
        }
        if self._streaming:
            batches = StreamingBatches(self.dataset, config.train_batch_size, **position)
            return DataLoader(batches, batch_size=None, **common)
        if getattr(self.dataset, "buckets", None) is not None:
            sampler: Any = BucketBatchSampler(self.dataset.buckets, config.train_batch_size, **position)
        else:
            sampler = PositionalBatchSampler(len(self.dataset), config.train_batch_size, **position)
        return DataLoader(SeededDataset(self.dataset, config.seed), batch_sampler=sampler, **common)

    # -- the loop --------------------------------------------------------------------------------------------------

    def _loop(self, signals: StopSignals) -> None:
        config, accelerator, ctx = self.config, self.accelerator, self.ctx
        timed, since = 0, time.perf_counter()
        for batch in self._loader() if self.step < self.total_steps else ():
            first = self._micro_step * self._micro_batch + self.rng.rank * config.train_batch_size
            ctx.ids = range(first, first + config.train_batch_size)
            ctx.step = self.step
            self.rng.begin(self._micro_step)
            batch: Any = send_to_device(batch, accelerator.device, non_blocking=True)
            with accelerator.accumulate(self.model):
                output = self.recipe.training_step(batch, ctx)
                accelerator.backward(output.loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in {"loss": output.loss, **output.logs}.items():
                value = value.detach()
                self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._summed += 1
            timed += 1
            self._micro_step += 1
            if not accelerator.sync_gradients:
                continue

            if not accelerator.optimizer_step_was_skipped:
                self.lr_scheduler.step()
                if self.ema is not None:
                    self.ema.step(self.parameters)
            self.step += 1
            if self.step % config.logging_steps == 0 or self.step == self.total_steps:
                seconds = max(time.perf_counter() - since - self._paused, 1e-9)
                self._log(timed * self._micro_batch / seconds)
                timed, since, self._paused = 0, time.perf_counter(), 0.0
            self._call("on_step_end")
            self._stopped = self._stop_requested(signals)
            if self.step % config.checkpointing_steps == 0 or self.step == self.total_steps or self._stopped:
                start = time.perf_counter()
                self._save()
                self.pause(time.perf_counter() - start)
            if self._stopped:
                break

    def _stop_requested(self, signals: StopSignals) -> bool:
        """Whether any process received a signal; all of them get the same answer."""
        if self.accelerator.num_processes == 1:
            return signals.received is not None
        if signals.received is not None:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())

    def _over_processes(self) -> dict[str, torch.Tensor]:
        """Averages the sums of all processes."""
        if not self._sums:
            return {}
        means: Any = self.accelerator.reduce(torch.stack([value.float() for value in self._sums.values()]), "mean")
        return dict(zip(self._sums, means, strict=True))

    def _log(self, samples_per_second: float) -> None:
        means = torch.stack([*self._over_processes().values()]) / self._summed
        values: list[float] = means.tolist()
        logs = dict(zip(self._sums, values, strict=True))
        self._last_loss = logs["loss"]
        if not math.isfinite(self._last_loss):
            raise self._diverged(f"the loss is {self._last_loss}")
        logs["lr"] = float(self.lr_scheduler.get_last_lr()[0])
        logs["samples_per_second"] = samples_per_second
        self._sums, self._summed = {}, 0
        self._call("on_log", logs)

    def _call(self, hook: str, *arguments: Any) -> None:
        """Calls a hook of all callbacks; where one fails, what was trained so far is saved first."""
        try:
            for callback in self.callbacks:
                getattr(callback, hook)(self, *arguments)
        except Exception:
            if self.accelerator.num_processes == 1:  # other processes may not have failed, and would wait in vain
                self._save()
            raise

    # -- saving ----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        sums = self._over_processes()
        # A checkpoint may push out the last good one: it is not written after a loss or an update went wrong.
        if sums and not torch.isfinite(sums["loss"]):
            raise self._diverged(f"the loss is {float(sums['loss'])}")
        broken: Any = self.accelerator.reduce((~all_finite(self.parameters)).float(), "sum")
        if broken:
            raise self._diverged("weights are not finite")
        state = {
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "recipe": self.recipe.state_dict(),
            "loss": self._last_loss,
            # So that the first log after a resume is the mean over all its steps too.
            "sums": {name: value.cpu() for name, value in sums.items()},
            "summed": self._summed,
        }
        path = save_checkpoint(
            self.accelerator,
            self.config.output_dir,
            step=self.step,
            samples_seen=self._micro_step * self._micro_batch,
            model=self.model,
            state=state,
            config=self.config.to_dict(),
            total_limit=self.config.checkpoints_total_limit,
        )
        for callback in self.callbacks:
            callback.on_save(self, path)

    def _diverged(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"{what} at step {self.step}; checkpoints up to here are in {self.config.output_dir}. A lower "
            "`learning_rate` or `mixed_precision='bf16'` may help."
        )

    def _finish(self) -> None:
        """Writes the finished pipeline, its card and its sample picture into the run's folder."""
        config = self.config
        with self.exported_pipeline() as pipeline:
            if pipeline is None:
                return
            card = self.recipe.card()
            card.arguments = config.to_dict()
            card.results = {"training loss": self._last_loss, "updates": self.step, **card.results}
            card.results |= measure(self, pipeline, SAMPLE_PICTURE)
            images = draw_pictures(self, pipeline, SAMPLE_PICTURE) if config.num_validation_images else []
            self.recipe.save(pipeline, config.output_dir, card, image_grid(images) if images else None)
