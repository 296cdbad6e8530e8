"""What can go wrong, as seen by whoever runs the command."""


class UserError(Exception):
    """A setting, a file or a folder that cannot be used. One line; the command exits with 2.

    `everywhere`: all ranks raise it, and the first says it. `alone`: a rank that is not the first
    raises it, and must say it itself.
    """

    everywhere = False
    alone = False


class TrainingError(Exception):
    """Training itself failed, for example on a loss that is not finite. Exit code 1."""

    everywhere = False
    alone = False


class ProcessLost(TrainingError):
    """Another process of the run has ended: a rank, or one that prepares images. Exit code 1."""


class Stopped(Exception):
    """A signal asked training to stop. Exit code 128 + `signum`."""

    def __init__(self, signum: int, message: str = "stopped") -> None:
        super().__init__(message)
        self.signum = signum
