"""What can go wrong, as seen by whoever runs the command."""


class UserError(Exception):
    """A setting, a file or a folder that cannot be used. One line; the command exits with 2."""


class TrainingError(Exception):
    """Training itself failed, for example on a loss that is not finite. Exit code 1."""


class Stopped(Exception):
    """A signal asked training to stop. Exit code 128 + `signum`."""

    def __init__(self, signum: int, message: str = "stopped") -> None:
        super().__init__(message)
        self.signum = signum
