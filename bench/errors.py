"""What goes wrong at the hands of a user: one line, no traceback."""

import argparse
import math
from typing import NoReturn


class BenchError(Exception):
    pass


def at_least_one(text: str) -> int:
    """A whole number from 1 on, of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text}")
    return int(text)


def positive(text: str) -> float:
    """A number above 0, of the command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


class Parser(argparse.ArgumentParser):
    """One line where argparse prints its usage too."""

    def error(self, message: str) -> NoReturn:
        raise BenchError(f"{message} (see {self.prog} --help)")
