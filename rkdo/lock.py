"""One process at a time trains into a folder.

The lock is the system's record lock (`fcntl.lockf`) on `.lock` in the folder: it ends with the
process that holds it, however that ends, and workers do not inherit it. It also holds between the
hosts that share an NFS folder, if the server's lock service runs; a host that crashes gives it
back when the server notices, which may take minutes.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rkdo.errors import UserError

NAME = ".lock"
POLL = 0.5  # seconds between attempts when waiting
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
# By path, those of this process: a record lock does not keep out its own process, and is lost when
# that closes the file, however often it had opened it.
_held: set[Path] = set()


class FolderLock:
    """The right to write into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / NAME
        self._file: int | None = None
        self._key = Path()

    def acquire(self, *, wait: bool) -> None:
        """Take it, or be refused, or `wait` until it is free. The folder must exist.

        Raises:
            UserError: another process holds it, or the folder cannot be written.
        """
        if self._file is not None:
            return
        told = False
        while not self._try():
            holder = self._holder()
            if not wait:
                raise UserError(
                    f"--out {self.folder} is in use by {holder}: let it end or stop it; "
                    "--wait waits until it has ended"
                )
            if not told:
                print(f"rkdo: waiting for {self.folder}, in use by {holder}", file=sys.stderr)
                told = True
            time.sleep(POLL)

    def release(self) -> None:
        if self._file is None:
            return
        with suppress(OSError):
            self.path.unlink()  # still ours: whoever has opened it finds out that it is gone
        os.close(self._file)
        self._file = None
        _held.discard(self._key)

    def _try(self) -> bool:
        key = self.path.resolve()
        if key in _held:
            return False
        while True:
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise UserError(
                    f"--out {self.folder} cannot be written: {error.strerror}"
                ) from error
            try:
                if not self._lock(file):
                    os.close(file)
                    return False
                if self._is_the_path(file):
                    self._sign(file)
                    break
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # its holder removed it in between
        self._file, self._key = file, key
        _held.add(key)
        return True

    def _lock(self, file: int) -> bool:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in NO_LOCKS:
                raise UserError(f"{self.path} cannot be locked: {error.strerror}") from error
            print(
                f"rkdo: warning: the file system of {self.folder} has no locks "
                f"({error.strerror}): nothing keeps a second process out of the run",
                file=sys.stderr,
            )
        return True

    def _is_the_path(self, file: int) -> bool:
        """Whether the file is still the one that others would open, not one that was removed."""
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _sign(self, file: int) -> None:
        since = datetime.now(timezone.utc).isoformat(" ", "seconds")
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        with suppress(OSError):  # a full disk: the lock holds, unsigned
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(about).encode(), 0)

    def _holder(self) -> str:
        if self.path.resolve() in _held:
            return f"this process, {os.getpid()}"
        try:
            about: Any = json.loads(self.path.read_bytes())
            return f"process {about['pid']} on {about['host']} since {about['since']}"
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return "another process, which has not signed its lock"
