"""Training, from the first image to the last checkpoint."""

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rkdo.batches import Batches, training_loader
from rkdo.batchnorm import synchronise_batch_norm
from rkdo.config import TrainConfig, check_resumable
from rkdo.data import (
    Data,
    Skipped,
    TrainingData,
    find_unreadable,
    fingerprint,
    left_out,
    load_training,
)
from rkdo.encoder import build_encoder
from rkdo.errors import Stopped, TrainingError, UserError
from rkdo.evaluate import evaluate
from rkdo.field import TrainingField
from rkdo.files import writing
from rkdo.interrupt import StopRequest, listening
from rkdo.logs import make_logs
from rkdo.objective import build_objective
from rkdo.ranks import Ranks, average_gradients, joined_ranks
from rkdo.record import Run
from rkdo.report import draw_curves
from rkdo.schedule import alpha_at, levelled_off, scheduled_at, temperature_at
from rkdo.state import State
from rkdo.workers import workers_watched


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    wait: bool = False,
) -> list[dict[str, Any]]:
    """Train into the folder `out`, on every rank that torchrun has started; returns the metrics.

    A run that was stopped, or killed at any moment, goes on with `resume` to the same bits as if
    it never had been, on the same kind of machine with as many threads and ranks (of more than two
    on GPUs this is untested). While another process trains into `out` it is refused, or `wait`
    waits until that has ended.

    Raises:
        UserError: a setting or a file cannot be used, or a file not be written; an existing run,
            or its last checkpoint, is left as it is.
        TrainingError: the loss is not finite, or another process of the run has ended; the last
            checkpoint is left as it is.
        Stopped: SIGTERM or Ctrl-C; the run is saved.
    """
    run = Run(Path(out))
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    try:
        with listening() as stop, joined_ranks(config.device) as ranks, cudnn, workers_watched():
            ranks.on_first(lambda: _claim(run, config, resume, overwrite, wait))
            skipped = ranks.on_first(lambda: _unreadable(run, config, resume))
            data = _load_on_all(config, skipped, ranks)
            images = len(data.images)
            steps_per_epoch = ranks.together(lambda: _steps_per_epoch(config, images, ranks.size))
            torch.manual_seed(config.seed)
            state = ranks.together(lambda: _build(config, data, ranks))
            with stop.deferred():
                if resume:
                    ranks.together(lambda: _restore(run, config, state, steps_per_epoch))
                ranks.on_first(lambda: _begin(run, config, state, skipped, resume, overwrite, wait))
                if ranks.first:
                    _tell(run, config, data, skipped, state.step if resume else None)
                _train(config, run, state, data, steps_per_epoch, ranks, stop)
            return run.read_metrics()
    finally:
        run.close()


def _build(config: TrainConfig, data: TrainingData, ranks: Ranks) -> State:
    encoder = build_encoder(config).to(ranks.device, getattr(torch, config.dtype))
    adam = torch.optim.Adam(encoder.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    n, field = len(data.images), None
    if config.recursion != "batch":
        field = TrainingField(config, n, data.labels, ranks)
    return State(encoder, adam, field, images=n, files=fingerprint(config, data.images))


def _train(
    config: TrainConfig,
    run: Run,
    state: State,
    data: TrainingData,
    steps_per_epoch: int,
    ranks: Ranks,
    stop: StopRequest,
) -> None:
    encoder: nn.Module = state.encoder.train()
    if ranks.size > 1:
        synchronise_batch_norm(encoder)
        encoder = average_gradients(encoder, ranks)
    objective = build_objective(config, state.field)
    n_steps = config.epochs * steps_per_epoch
    batches = Batches(
        n_images=len(data.images),
        batch_size=config.batch_size,
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
        seed=config.seed,
        start=state.step,
        rank=ranks.rank,
        n_ranks=ranks.size,
    )
    loader = iter(training_loader(data.images, config, batches, ranks.device))
    progress = tqdm(
        total=n_steps, initial=state.step, unit="step", disable=not ranks.first, leave=True
    )
    with progress:
        while True:
            ended = state.step == n_steps or levelled_off(config, state.losses)
            due = ranks.first and _evaluation_due(config, state, steps_per_epoch, ended)
            if due and data.judged is not None:
                _evaluate(config, run, state, data.judged, steps_per_epoch, stop, progress)
            _stop_if_asked(run, config, state, ranks, stop)
            if ended:
                if ranks.first and state.step < n_steps:
                    progress.write("the loss has levelled off (--stop-slope)", file=sys.stderr)
                break

            started = time.perf_counter()
            first, second, index = next(loader)
            views = torch.cat([first, second]).to(ranks.device, state.dtype)
            with torch.autocast(ranks.device.type, torch.bfloat16, config.precision == "bf16"):
                queries, keys = encoder(views).chunk(2)
            done = state.step / n_steps
            loss: Tensor = objective(queries, keys, index.to(ranks.device), done)
            loss.backward()
            mean_loss = ranks.mean(loss.detach())
            norm = _gradient_norm(encoder)
            if not (math.isfinite(mean_loss) and math.isfinite(norm)):
                raise _not_finite(run, state, mean_loss, norm)
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


def _claim(run: Run, config: TrainConfig, resume: bool, overwrite: bool, wait: bool) -> None:
    """Everything about the run folder that can be refused before anything is written."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if not resume:
        _check_apart(run, config)
        run.check_new(overwrite)
    run.claim(wait)
    if resume:
        check_resumable(run.read_config(), config)
        run.check_views()


def _check_apart(run: Run, config: TrainConfig) -> None:
    """That the run's own pictures are not among the images."""
    folders = {"--data-dir": config.data_dir, "--evaluate-dir": config.evaluate_dir}
    for name, folder in folders.items() if config.dataset == "folder" else ():
        if folder and run.folder.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"--out must not lie in {name}, got {run.folder} in {folder}")


def _unreadable(run: Run, config: TrainConfig, resume: bool) -> Skipped:
    """What the run does without: found out before it begins, and the same to its end."""
    return run.read_skipped() if resume else find_unreadable(config)


def _load_on_all(config: TrainConfig, skipped: Skipped, ranks: Ranks) -> TrainingData:
    loaded: list[TrainingData] = []
    ranks.on_first(lambda: loaded.append(load_training(config, skipped)))  # it alone downloads
    return ranks.together(lambda: loaded[0] if loaded else load_training(config, skipped))


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


def _begin(
    run: Run,
    config: TrainConfig,
    state: State,
    skipped: Skipped,
    resume: bool,
    overwrite: bool,
    wait: bool,
) -> None:
    logs = make_logs(config, run.folder, run.read_metrics)
    if resume:
        run.remove_partial()
    run.require_room(state.size(), overwrite)
    if not resume:
        run.create(config, skipped, overwrite=overwrite, wait=wait)
    elif run.read_config() != config:
        run.write_config(config)
    run.open_metrics(state.metrics_size, logs)


def _tell(
    run: Run, config: TrainConfig, data: TrainingData, skipped: Skipped, resumed: int | None
) -> None:
    """What might surprise: files that are left out, and that nothing will be evaluated; of a run
    that is resumed, after which step."""
    if resumed is not None:
        print(f"rkdo: goes on after step {resumed}", file=sys.stderr)
        return
    count = len(skipped.data_dir) + len(skipped.evaluate_dir)
    if count:
        print(f"rkdo: {count} unreadable images are left out: {run.skipped}", file=sys.stderr)
    others = left_out(config, data, skipped)
    if others:
        first = f"the first is {others[0]}"
        print(f"rkdo: {len(others)} other files are not used, {first}", file=sys.stderr)
    if data.judged is None:
        print("rkdo: no labels: nothing will be evaluated (see --evaluate-dir)", file=sys.stderr)


def _restore(run: Run, config: TrainConfig, state: State, steps_per_epoch: int) -> None:
    """Put the last checkpoint into `state`; a run killed before its first starts again."""
    saved = run.load_checkpoint()
    if saved is not None:
        state.restore(saved, config, run.checkpoint, steps_per_epoch)


def _save(run: Run, config: TrainConfig, state: State, ranks: Ranks) -> None:
    if ranks.first:
        state.metrics_size = run.sync_metrics()
    values = state.to_dict(config)
    if ranks.first:
        run.save_checkpoint(values)


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


def _not_finite(run: Run, state: State, loss: float, norm: float) -> TrainingError:
    error = TrainingError(
        f"step {state.step + 1}: the loss is {loss} and its gradient's norm {norm}; "
        f"{run.checkpoint} is from before"
    )
    error.everywhere = True  # both numbers are the same on all ranks
    return error


def _gradient_norm(encoder: nn.Module) -> float:
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item()


def _finish(run: Run, config: TrainConfig, state: State) -> None:
    about = {"architecture": "resnet18", "stem": config.stem, "image_size": str(config.size)}
    run.save_encoder(state.encoder.backbone.state_dict(), about)
    with writing(run.curves):
        draw_curves(run.read_metrics(), f"{config.method} on {config.dataset}", run.curves)
