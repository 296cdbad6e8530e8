"""What goes wrong at the hands of a user: one line, no traceback."""

import argparse
from typing import NoReturn


class BenchError(Exception):
    pass


class Parser(argparse.ArgumentParser):
    """One line where argparse prints its usage too."""

    def error(self, message: str) -> NoReturn:
        raise BenchError(f"{message} (see {self.prog} --help)")
