"""Files that are whole or absent: written under a temporary name beside the target, then renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_OS_ERROR = re.compile(r"\bos error (\d+)")


@contextmanager
def atomic_path(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path (file or folder) beside `path`, renamed to it when the block ends without an error.

    An existing folder at `path` is replaced; on an error the temporary is removed and `path` stays as it was.

    Args:
        path: what the block makes.
        durable: everything is on the disk, name included, when this returns: a power cut cannot leave a name without content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if durable:
            for part in (temporary, *temporary.rglob("*")):
                sync(part)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        _remove(temporary)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def os_error(error: Exception) -> int | None:
    """The number (`errno`) of what the operating system refused, also where a library in Rust words it; None: nothing."""
    code = getattr(error, "errno", None)
    found = None if code else _OS_ERROR.search(str(error))
    return int(found[1]) if found else code


def is_full(error: Exception) -> bool:
    """Whether an error is that of a full disk, a quota or a limit on the size of files."""
    return os_error(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error)


def remove_leftovers(folder: Path, *, idle: float = 0.0) -> None:
    """Removes the temporaries that killed processes left in a folder, of those that nobody wrote to for `idle` seconds."""
    for path in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # another process removes them, too
            if idle == 0.0 or path.stat().st_mtime < time.time() - idle:
                _remove(path)


def write_text(path: str | Path, text: str, *, durable: bool = False) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, *, durable: bool = False) -> None:
    """Writes indented JSON atomically; NaN and infinity are errors, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", durable=durable)


def write_jsonl(path: str | Path, rows: list[dict[str, Any]], *, durable: bool = False) -> None:
    """Writes one JSON object a line atomically."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text(path, "".join(lines), durable=durable)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line.

    Raises:
        ValueError: a line is no JSON; file and line are named.
    """
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line[:40]!r} ({error})") from error
    return found


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
