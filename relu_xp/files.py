"""Files that are either the old ones or whole: written beside their target and then renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

__all__ = ["write"]


def write(file: str | os.PathLike[str], data: bytes | None) -> None:
    """Replace a file by data in one step, or (None) only find out whether that is possible.

    What is no regular file, ``/dev/stdout`` say, is written into.

    Parameters
    ----------
    file : path
    data : bytes or None

    Raises
    ------
    OSError
        If it is not; what is there already stays as it is. The message names the file.
    """
    path = Path(os.path.realpath(file))  # so that a link stays a link
    name = repr(os.fspath(file))
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {name}: it is a directory")
    there = Path(file).exists()
    if there and not os.access(file, os.W_OK):  # a rename would not ask
        raise PermissionError(f"cannot write {name}: it is read-only")
    beside = path.with_name(f".relu-xp-{os.getpid()}.tmp")
    try:
        if there and not Path(file).is_file():  # a device or a pipe: there is nothing to replace
            if data is not None:
                Path(file).write_bytes(data)
            return
        with beside.open("wb") as stream:
            try:
                stream.write(data or b"")
                stream.flush()
                if data is not None:
                    if there:
                        shutil.copymode(path, beside)
                    beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
    except OSError as error:
        raise type(error)(f"cannot write {name}: {error.strerror}") from None
