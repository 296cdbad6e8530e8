"""The command line: `rkdo train`, `evaluate`, `embed`, `field` and `check-data`."""

import contextlib
import difflib
import errno
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rkdo.config import TrainConfig, flag
from rkdo.errors import Stopped, TrainingError, UserError
from rkdo.imports import importing
from rkdo.unexpected import describe

POSITIONAL = {
    ("evaluate", "run"), ("embed", "run"), ("field", "run"), ("check-data", "folder"),
}  # fmt: skip
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Command:
    """What the arguments ask for, ready to be called, and the run's folder that it is about."""

    folder: Path
    run: Callable[[], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or what went wrong: 1 training, 2 a setting or file, 128 + signal."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    folder: Path | None = None
    try:
        if given[:1] == ["--version"]:
            print(_version())
            return 0
        command = _parse(given)
        folder = command.folder
        command.run()
    except UserError as error:
        return _fail(f"error: {_one_line(error)}", 2, error.alone)
    except ModuleNotFoundError as error:
        missing = f"needs {error.name}, which is not installed"
        return _fail(f"error: {missing}: it comes with rkdo-kernels[train]", 2)
    except TrainingError as error:
        return _fail(f"error: {_one_line(error)}", 1, error.alone)
    except OSError as error:
        return _fail(f"error: {error}", 2 if error.errno in FULL else 1)
    except Stopped as stopped:
        return _fail(str(stopped), 128 + stopped.signum)
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except MemoryError as error:
        return _fail(f"error: not enough memory: {_one_line(error)}", 1, alone=True)
    except Exception as error:
        if _is_memory(error):
            return _fail(f"error: not enough memory: {_one_line(error)}", 1, alone=True)
        return _fail(f"error: {describe(error, folder)}", 1, alone=True)
    return 0


def _is_memory(error: Exception) -> bool:
    """Whether PyTorch was refused memory, which it says by a RuntimeError."""
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "not enough memory" in str(error)
    )


def _version() -> str:
    import rkdo_kernels

    return f"rkdo {rkdo_kernels.__version__}"


def _train(config: TrainConfig, out: Path, resume: bool, overwrite: bool, wait: bool) -> None:
    with importing():
        from rkdo.record import Run
        from rkdo.report import evaluations, table
        from rkdo.train import train

    metrics = evaluations(train(config, out, resume=resume, overwrite=overwrite, wait=wait))
    if _speaks():
        if metrics:  # whoever edits metrics.jsonl may have taken them out
            print(table({"before": metrics[0], "after": metrics[-1]}))
        else:
            print("not evaluated: the images have no labels (--evaluate-dir names some that have)")
        print(f"curves: {Run(out).curves}")


def _evaluate(
    run: Path, protocol: str, data_dir: str | None, evaluate_dir: str | None, device: str
) -> None:
    with importing():
        from rkdo.evaluate import evaluate_run
        from rkdo.report import table
        from rkdo.workers import workers_watched

    with workers_watched():
        metrics, written = evaluate_run(
            run, protocol, data_dir=data_dir, evaluate_dir=evaluate_dir, device=device
        )
    print(table({protocol: metrics}))
    print(f"written: {written}")


def _check_data(folder: Path) -> None:
    with importing():
        from rkdo.data import Skipped, left_out, load_training, used_files
        from rkdo.images import unreadable

    config = TrainConfig(dataset="folder", data_dir=str(folder))
    data = load_training(config)
    paths = used_files(config, data)
    faults = unreadable(paths)
    for path, why in faults.items():
        print(path, why)
    others = left_out(config, data, Skipped())
    if others:
        print(f"{len(others)} other files are not used, the first is {others[0]}")
    if faults:
        raise UserError(f"{len(faults)} of {len(paths)} images below {folder} cannot be used")
    print(f"images that can be used: all {len(paths)}")


def _field(run: Path, out: Path | None, classes: int, images: int, data_dir: str | None) -> None:
    with importing():
        from rkdo.field import picture

    path = picture(run, out, classes=classes, images=images, data_dir=data_dir)
    print(f"written: {path}")


def _embed(run: Path, data: Path, out: Path, how: dict[str, Any]) -> None:
    with importing():
        from rkdo.embed import embed

    made = embed(run, data, out, **how)
    if made.skipped:
        print(f"unreadable images skipped: {len(made.skipped)}, the first is {made.skipped[0]}")
    print(f"{made.count} embeddings of length {made.width}")
    print(f"written: {', '.join(map(str, made.files))}")


def _parse(arguments: list[str], run_config: TrainConfig | None = None) -> Command:
    """What `arguments` ask for, ready to be called; to resume, on top of the settings of the run,
    `run_config`."""
    with importing():
        import tyro

    if run_config is None and (out := _resumed(arguments)):
        with importing():
            from rkdo.record import Run

        return _parse(arguments, Run(Path(out)).read_config())

    def train(
        out: Path,
        config: tyro.conf.OmitArgPrefixes[TrainConfig] = run_config or TrainConfig(),  # noqa: B008
        resume: bool = False,
        overwrite: bool = False,
        wait: bool = False,
    ) -> Command:
        """Train an encoder, and evaluate it before and after.

        Args:
            out: Folder of the run.
            resume: Go on with the run in OUT and its settings. Only epochs (without a schedule),
                stop-slope, stop-window, evaluate-every, checkpoint-every, workers, device,
                data-dir, download, csv and tensorboard may be given anew.
            overwrite: Replace the run in OUT.
            wait: While another process trains into OUT, wait until it has ended, as a requeued
                job should. (On NFS, processes of other hosts are only seen if its locks work.)
        """
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        if not out.parts:
            raise UserError("--out must name a folder, got ''")
        config.check_read(_settings_in(arguments))
        return Command(out, lambda: _train(config, out, resume, overwrite, wait))

    def evaluate(
        run: tyro.conf.Positional[Path],
        protocol: Literal["standard", "paper"] = "standard",
        data_dir: str | None = None,
        evaluate_dir: str | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
    ) -> Command:
        """Evaluate the encoder of a run, and write the metrics into its folder.

        Args:
            run: Folder of the run.
            protocol: standard: the backbone's features, learned on the training images, judged on
                the test images. paper: the embeddings of 11 test batches alone; of a folder, of as
                many images drawn by a fixed seed.
            data_dir: Where the images are. None: where they were.
            evaluate_dir: Where labelled images are, if those of the run have no labels.
            device: Where to compute. auto: a GPU if there is one.
        """
        return Command(run, lambda: _evaluate(run, protocol, data_dir, evaluate_dir, device))

    def embed(
        run: tyro.conf.Positional[Path],
        data: Path,
        out: Path,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        workers: int = 0,
        batch_size: int = 256,
        skip_unreadable: bool = False,
    ) -> Command:
        """Write the embeddings of a folder's images, in the order of their paths.

        Args:
            run: Folder of the run, or an encoder.safetensors alone.
            data: Folder of images, flat or nested.
            out: X.npy: an array, row i the embedding of the image that line i of X.names.txt
                names. X.csv: a line an image, its name first.
            device: Where to compute. auto: a GPU if there is one.
            workers: Processes that prepare images. 0: this process itself.
            batch_size: Images that are embedded at once.
            skip_unreadable: Go on without images that cannot be read, and say how many.
        """
        how = {
            "device": device, "workers": workers, "batch_size": batch_size,
            "skip_unreadable": skip_unreadable,
        }  # fmt: skip
        return Command(run, lambda: _embed(run, data, out, how))

    def field(
        run: tyro.conf.Positional[Path],
        out: Path | None = None,
        classes: int = 10,
        images: int = 30,
        data_dir: str | None = None,
    ) -> Command:
        """Draw a run's response field: a block of it ordered by label, and how it changed.

        Args:
            run: Folder of the run.
            out: The picture, X.png. None: field.png in the run's folder.
            classes: How many classes are shown, spread over all.
            images: How many images of each.
            data_dir: Where the images are. None: where they were.
        """
        for name, value in (("classes", classes), ("images", images)):
            if value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}")
        return Command(run, lambda: _field(run, out, classes, images, data_dir))

    def check_data(folder: tyro.conf.Positional[Path]) -> Command:
        """Look at every image below a folder, and list those that training could not use.

        Args:
            folder: Images, in folders or not; labelled or not.
        """
        return Command(folder, lambda: _check_data(folder))

    commands: dict[str, Any] = {
        "train": train, "evaluate": evaluate, "embed": embed, "field": field,
        "check-data": check_data,
    }  # fmt: skip
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(commands, prog="rkdo", args=arguments)
    except SystemExit as exit:
        if not exit.code:  # --help
            raise
        raise UserError(_unframed(complaint.getvalue()) + _meant(arguments, commands)) from None


def _unframed(complaint: str) -> str:
    """tyro's complaint without its frame and its hints: one line."""
    said = re.split(r"\n.? *─{4,}", complaint.partition("\n")[2])[0]
    return " ".join(re.sub("[│╰╯─]", " ", said).split())


def _meant(arguments: list[str], commands: dict[str, Any]) -> str:
    """The flag or command that is most like the first that does not exist; "" if none is."""
    if not arguments:
        return ""
    known = commands.get(arguments[0])
    if known is None:
        wrong, names = arguments[0], [*commands, "--version", "--help"]
    else:
        own = [
            name for name in inspect.signature(known).parameters
            if name != "config" and (arguments[0], name) not in POSITIONAL
        ]  # fmt: skip
        if "config" in inspect.signature(known).parameters:
            own += [field.name for field in fields(TrainConfig)]
        names = [flag(name) for name in own]
        flags = [word.split("=")[0] for word in arguments if re.match("--?[a-zA-Z]", word)]
        unknown = [word for word in flags if _setting(word) not in own and word != "--help"]
        wrong = unknown[0] if unknown else ""
    close = difflib.get_close_matches(wrong, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _resumed(arguments: list[str]) -> str | None:
    """The folder of the run that `arguments` say to resume."""
    switches = [word for word in arguments if word in ("--resume", "--no-resume")]
    if arguments[:1] != ["train"] or switches[-1:] != ["--resume"] or "--overwrite" in arguments:
        return None
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    given = [word[6:] if word[5:6] == "=" else following for word, following in pairs
             if word == "--out" or word.startswith("--out=")]  # fmt: skip
    return given[-1] if given else None


def _setting(word: str) -> str:
    """`--batch-size` as the setting is called, `--no-download` too."""
    return word.lstrip("-").split("=")[0].replace("-", "_").removeprefix("no_")


def _settings_in(arguments: list[str]) -> set[str]:
    """The settings that `arguments` name, whatever they give them."""
    return {_setting(word) for word in arguments if word.startswith("--")}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _fail(message: str, code: int, alone: bool = False) -> int:
    """Say it, once for all ranks, or if it happened to this one `alone`."""
    if alone or _speaks():
        with contextlib.suppress(OSError):  # the disk that is full may be the log's
            print(f"rkdo: {message}", file=sys.stderr)
    return code


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
