"""What goes wrong at the hands of a user: one line, no traceback."""


class BenchError(Exception):
    pass
