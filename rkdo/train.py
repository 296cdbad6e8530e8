"""Training, from the first image to the last checkpoint."""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from rkdo.batchnorm import synchronise_batch_norm
from rkdo.config import TrainConfig, check_resumable
from rkdo.data import Batches, Data, load_data, training_loader
from rkdo.encoder import Encoder, build_encoder
from rkdo.errors import Stopped, TrainingError, UserError
from rkdo.evaluate import evaluate
from rkdo.field import TrainingField
from rkdo.interrupt import StopRequest, listening
from rkdo.objective import build_objective
from rkdo.ranks import Ranks, joined_ranks
from rkdo.record import Run
from rkdo.report import draw_curves
from rkdo.schedule import alpha_at, levelled_off, scheduled_at, temperature_at


@dataclass
class State:
    """All that changes while training; a checkpoint is this and nothing else."""

    encoder: Encoder
    optimizer: torch.optim.Optimizer
    field: TrainingField | None = None
    losses: tuple[float, ...] = ()  # the epochs' means
    loss_sum: float = 0.0  # over this epoch's steps
    step: int = 0
    evaluated: int = -1  # the last step whose evaluation is in the metrics
    metrics_size: int = 0
    images: int = 0  # in the training set

    @property
    def dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype


def train(
    config: TrainConfig, out: Path, *, resume: bool = False, overwrite: bool = False
) -> list[dict[str, Any]]:
    """Train into the folder `out`, on every rank that torchrun has started; returns the metrics.

    A run that was stopped, or killed at any moment, goes on with `resume` to the same bits as if
    it never had been, on the same kind of machine with as many threads, and with one or two ranks
    (with more, the order in which gradients are added up is the collective library's).

    Raises:
        UserError: a setting or a file cannot be used; an existing run is left as it is.
        TrainingError: the loss is not finite; the last checkpoint is left as it is.
        Stopped: SIGTERM or Ctrl-C; the run is saved.
    """
    run = Run(Path(out))
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with listening() as stop, joined_ranks(config.device) as ranks, cudnn:
        ranks.on_first(lambda: _check_folder(run, config, resume, overwrite))
        data = _load_on_all(config, ranks)
        steps_per_epoch = _steps_per_epoch(config, len(data.train.labels), ranks.size)
        torch.manual_seed(config.seed)
        encoder = build_encoder(config).to(ranks.device, getattr(torch, config.dtype))
        adam = torch.optim.Adam(
            encoder.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        labels = data.train.labels
        state = State(encoder, adam, images=len(labels))
        if config.recursion != "batch":
            state.field = TrainingField(config, labels, ranks)
        with stop.deferred():
            if resume:
                _restore(run, config, state, len(labels), steps_per_epoch)
            ranks.on_first(lambda: _begin(run, config, state, resume))
            try:
                _train(config, run, state, data, steps_per_epoch, ranks, stop)
            finally:
                run.close()
        return run.read_metrics()


def _train(
    config: TrainConfig,
    run: Run,
    state: State,
    data: Data,
    steps_per_epoch: int,
    ranks: Ranks,
    stop: StopRequest,
) -> None:
    encoder: nn.Module = state.encoder.train()
    if ranks.size > 1:
        synchronise_batch_norm(encoder)
        encoder = DistributedDataParallel(encoder, broadcast_buffers=False)
    objective = build_objective(config, state.field)
    n_steps = config.epochs * steps_per_epoch
    batches = Batches(
        n_images=len(data.train.labels),
        batch_size=config.batch_size,
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
        seed=config.seed,
        start=state.step,
        rank=ranks.rank,
        n_ranks=ranks.size,
    )
    loader = iter(training_loader(data.train, config, batches))
    progress = tqdm(
        total=n_steps, initial=state.step, unit="step", disable=not ranks.first, leave=True
    )
    with progress:
        while True:
            ended = state.step == n_steps or levelled_off(config, state.losses)
            if ranks.first and _evaluation_due(config, state, steps_per_epoch, ended):
                _evaluate(config, run, state, data, steps_per_epoch, stop, progress)
            _stop_if_asked(run, config, state, ranks, stop)
            if ended:
                if ranks.first and state.step < n_steps:
                    progress.write("the loss has levelled off (--stop-slope)", file=sys.stderr)
                break

            started = time.perf_counter()
            first, second, index = next(loader)
            views = torch.cat([first, second]).to(ranks.device, state.dtype)
            queries, keys = encoder(views).chunk(2)
            done = state.step / n_steps
            loss: Tensor = objective(queries, keys, index.to(ranks.device), done)
            loss.backward()
            mean_loss = ranks.mean(loss.detach())
            norm = _gradient_norm(encoder)
            if not (math.isfinite(mean_loss) and math.isfinite(norm)):
                raise TrainingError(
                    f"step {state.step + 1}: the loss is {mean_loss} and its gradient's norm "
                    f"{norm}; {run.checkpoint} is from before"
                )
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.step += 1
            state.loss_sum += mean_loss
            measures = {}
            if state.step % steps_per_epoch == 0:
                measures = _end_epoch(config, state, steps_per_epoch, done)

            if ranks.first:
                speed = config.batch_size / (time.perf_counter() - started)
                run.write_metrics(
                    {
                        "step": state.step,
                        "epoch": state.step / steps_per_epoch,
                        "loss": mean_loss,
                        "gradient_norm": norm,
                        "images_per_second": round(speed, 1),
                        **scheduled_at(config, done),
                        **measures,
                    }
                )
                progress.update()
                progress.set_postfix_str(f"loss {mean_loss:.4f}, {speed:.0f} images/s", False)
            if state.step % config.checkpoint_every == 0:
                _save(run, config, state, ranks)
    _save(run, config, state, ranks)
    if ranks.first:
        _finish(run, config, state)


def _end_epoch(
    config: TrainConfig, state: State, steps_per_epoch: int, done: float
) -> dict[str, float]:
    """What the field has become; with `done` of the training behind the epoch's last step."""
    state.losses += (state.loss_sum / steps_per_epoch,)
    state.loss_sum = 0.0
    if state.field is None:
        return {}
    state.field.end_epoch(temperature_at(config, done), alpha_at(config, done))
    return state.field.measures()


def _check_folder(run: Run, config: TrainConfig, resume: bool, overwrite: bool) -> None:
    """Everything about the run folder that can be refused before anything is written."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if resume:
        check_resumable(run.read_config(), config)
    else:
        run.check_new(overwrite)


def _load_on_all(config: TrainConfig, ranks: Ranks) -> Data:
    loaded: list[Data] = []
    ranks.on_first(lambda: loaded.append(load_data(config)))  # it alone downloads
    return loaded[0] if loaded else load_data(config)


def _steps_per_epoch(config: TrainConfig, n_images: int, n_ranks: int) -> int:
    if config.batch_size % n_ranks:
        raise UserError(
            f"--batch-size must be divisible by the number of ranks, "
            f"got {config.batch_size} for {n_ranks}"
        )
    most = n_images // config.batch_size  # an incomplete last batch is dropped
    if most == 0:
        raise UserError(
            f"--batch-size must be at most the {n_images} training images, got {config.batch_size}"
        )
    if config.steps_per_epoch is not None and config.steps_per_epoch > most:
        raise UserError(
            f"--steps-per-epoch must be at most {most} for {n_images} training images in batches "
            f"of {config.batch_size}, got {config.steps_per_epoch}"
        )
    return config.steps_per_epoch or most


def _begin(run: Run, config: TrainConfig, state: State, resume: bool) -> None:
    if not resume:
        run.create(config)
    elif run.read_config() != config:
        run.write_config(config)
    run.open_metrics(state.metrics_size)


def _restore(
    run: Run, config: TrainConfig, state: State, n_images: int, steps_per_epoch: int
) -> None:
    """Put the last checkpoint into `state`; a run killed before its first starts again."""
    saved = run.load_checkpoint()
    if saved is None:
        return
    try:
        check_resumable(TrainConfig.from_dict(saved["config"], str(run.checkpoint)), config)
        state.encoder.load_state_dict(saved["encoder"])
        state.optimizer.load_state_dict(saved["optimizer"])
        state.step, state.evaluated = saved["step"], saved["evaluated"]
        state.metrics_size = saved["metrics_size"]
        state.losses, state.loss_sum = saved["losses"], saved["loss_sum"]
        if not all(type(loss) is float for loss in (*state.losses, state.loss_sum)):
            raise ValueError("losses that are not")
        if (saved["field"] is None) != (state.field is None):
            raise ValueError("a field where none was, or none")
        if state.field is not None:
            state.field.load_state_dict(saved["field"])
        counts = (state.step, state.evaluated + 1, state.metrics_size, saved["images"])
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("counts that are not")
        if state.step and not state.optimizer.state_dict()["state"]:
            raise ValueError("an optimizer that has not stepped")
        torch.set_rng_state(saved["rng"]["cpu"])
        if torch.cuda.is_available() and len(saved["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{run.checkpoint} does not fit {run.folder / 'config.json'}") from error
    if saved["images"] != n_images:
        raise UserError(
            f"--data-dir must hold the {saved['images']} training images that the run began with, "
            f"got {n_images}"
        )
    if config.epochs * steps_per_epoch < state.step:
        raise UserError(
            f"--epochs must be at least the {math.ceil(state.step / steps_per_epoch)} already "
            f"begun, got {config.epochs}"
        )


def _save(run: Run, config: TrainConfig, state: State, ranks: Ranks) -> None:
    field = state.field and state.field.state_dict()
    if not ranks.first:
        return
    state.metrics_size = run.sync_metrics()
    run.save_checkpoint(
        {
            "config": config.to_dict(),
            "encoder": state.encoder.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "field": field,
            "losses": state.losses,
            "loss_sum": state.loss_sum,
            "step": state.step,
            "evaluated": state.evaluated,
            "metrics_size": state.metrics_size,
            "images": state.images,
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
        }
    )


def _evaluation_due(config: TrainConfig, state: State, steps_per_epoch: int, ended: bool) -> bool:
    if state.evaluated == state.step:
        return False
    every = config.evaluate_every * steps_per_epoch
    return ended or state.step == 0 or (every > 0 and state.step % every == 0)


def _evaluate(
    config: TrainConfig,
    run: Run,
    state: State,
    data: Data,
    steps_per_epoch: int,
    stop: StopRequest,
    progress: tqdm,
) -> None:
    """Add an evaluation to the metrics; one that a signal cuts short is made when resuming."""
    progress.set_postfix_str("evaluating")
    try:
        with stop.immediate():
            metrics = evaluate(state.encoder, data, config)
    except Stopped:
        return
    run.write_metrics({"step": state.step, "epoch": state.step / steps_per_epoch, **metrics})
    state.evaluated = state.step


def _stop_if_asked(
    run: Run, config: TrainConfig, state: State, ranks: Ranks, stop: StopRequest
) -> None:
    signum = ranks.largest(stop.signum)
    if signum:
        _save(run, config, state, ranks)
        raise Stopped(
            signum,
            f"stopped after step {state.step}; rkdo train --resume --out {run.folder} goes on",
        )


def _gradient_norm(encoder: nn.Module) -> float:
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item()


def _finish(run: Run, config: TrainConfig, state: State) -> None:
    about = {"architecture": "resnet18", "stem": config.stem, "image_size": str(config.size)}
    run.save_encoder(state.encoder.backbone.state_dict(), about)
    draw_curves(run.read_metrics(), f"{config.method} on {config.dataset}", run.curves)
