"""The last resort: an error that nobody foresaw is one line, and its traceback is in a file."""

import os
import tempfile
import traceback
from pathlib import Path

NAME = "traceback.txt"


def describe(error: BaseException, folder: Path | None) -> str:
    """What to tell whoever ran the command; the traceback is written into `folder`, a run's, if
    there is one and it can be written, else among the temporary files."""
    kind = type(error).__name__
    # An error from a worker carries a traceback: its last line says what happened.
    said = " ".join((str(error).strip().splitlines() or [""])[-1].split())
    text = "".join(traceback.format_exception(error))
    path = _write(text, folder)
    where = f"the traceback is in {path}" if path else "its traceback could not be written"
    return f"rkdo itself failed ({kind}: {said[:300]}); {where}"


def _write(text: str, folder: Path | None) -> Path | None:
    text = f"rank {os.environ.get('RANK', '0')}\n{text}"
    if folder is not None and (folder / "config.json").is_file():
        path = folder / NAME
        try:
            with path.open("a") as file:  # ranks share it
                file.write(text)
            return path
        except OSError:
            pass
    try:
        handle, name = tempfile.mkstemp(prefix="rkdo-traceback-", suffix=".txt")
        with open(handle, "w") as file:
            file.write(text)
        return Path(name)
    except OSError:
        return None
