"""Writing files so that a killed process, a full disk or a crash leaves the old content or the new one, never a half."""

import errno
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fedtail.errors import CheckpointError


def cache_folder() -> Path:
    """Folder that holds the data sets and what was computed once.

    `$FEDTAIL_DATA`, else `fedtail` in the platform's cache of this user.
    """
    if chosen := os.environ.get("FEDTAIL_DATA"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fedtail"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fedtail"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedtail"


def write_atomic(path: Path, content: str | bytes | Iterable[bytes | memoryview]) -> None:
    """Writes a file under a temporary name beside it, flushes it to the disk and renames it.

    Args:
        path: the file.
        content: all of it, or its parts in order.

    Raises:
        CheckpointError: the disk is full or not writable; the old file is untouched.
    """
    parts = [content.encode()] if isinstance(content, str) else [content] if isinstance(content, bytes) else content
    name = ""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:  # an interrupt too must leave no half-written file behind
        if name:
            Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def append(path: Path, text: str) -> int:
    """Appends to a file and flushes it to the disk; returns the file's new size in bytes."""
    try:
        with open(path, "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
            return file.tell()
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> CheckpointError:
    """Returns the error for a failed write: what, where, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "Free some space" if full else "Check the path and the folder's permissions"
    a_run = (path.parent / "config.toml").is_file()
    then = f"continue with `fedtail resume {path.parent}`" if a_run else "try again"
    return CheckpointError(
        f"cannot write {path}: {error.strerror}. {remedy}, then {then}; what was saved before is untouched."
    )
