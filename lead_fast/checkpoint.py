"""Training states on disk: safetensors and JSON, whole or absent, verified by SHA-256 before they are used.

    checkpoints/step-00000120/      the state after 120 optimizer steps
        weights.safetensors, ...    the tensors of each part of the state, by name
        state.json                  everything else
        foreign/                    with DeepSpeed's ZeRO alone: its optimizer, in its own format
        manifest.json               SHA-256 and bytes of each file and of the manifest itself; written last

A checkpoint is written into `.step-00000120.writing`: every file and the folder are synced, then the folder is renamed and
its parent synced. A process killed at any moment leaves that folder behind, and the checkpoints before it as they were.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from lead_fast.files import sync

logger = logging.getLogger(__name__)

FORMAT = "lead-fast checkpoint 2"
STATE_FILE, MANIFEST_FILE, FOREIGN = "state.json", "manifest.json", "foreign"

State = dict[str, Any]  # nested; leaves are tensors, numbers, strings, bools, None, and lists of these but tensors

_NAME = re.compile(r"step-\d{8,}")
_NOT_FINITE = "$float"  # JSON has no NaN and no infinity: {"$float": "nan"}
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class CheckpointError(RuntimeError):
    """No checkpoint could be written or read; the message says why and what is left."""


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is not what its manifest says."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was verified and read."""

    path: Path
    state: State


class Checkpoints:
    """The checkpoints of a run, numbered by optimizer steps; one process writes.

    Args:
        folder: made with the first checkpoint.
        keep: how many are kept.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Folders of checkpoints, oldest first; what they hold is not verified."""
        return sorted(path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name))

    def prepare_foreign(self, step: int) -> Path:
        """A new folder for files in another library's format, for `write`; removed with the leftovers of killed processes."""
        folder = self.folder / f".step-{step:08d}-foreign.writing"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def write(self, step: int, state: State, foreign: Path | None = None) -> Path:
        """Writes `state`, whole or not at all, and removes all but the newest `keep`.

        Args:
            step: optimizer steps done; above that of every checkpoint in the folder.
            state: by part; a part with tensors gets a file of its own. Tensors may live on any device: they are copied to the
                host one at a time.
            foreign: from `prepare_foreign`, filled: becomes the checkpoint's folder `foreign`, in the manifest as all else.

        Raises:
            OSError: disk full, no permission, ...; the checkpoints before are intact.
        """
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            sync(self.folder.parent)
        name = f"step-{step:08d}"
        writing = self.folder / f".{name}.writing"
        try:
            _write_files(writing, state, foreign)
            os.rename(writing, self.folder / name)
        except BaseException:
            for folder in (writing, foreign):
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)
            raise
        sync(self.folder)
        for path in self.paths()[: -self.keep]:
            # Renamed first: what is half removed must not look like a checkpoint.
            deleting = self.folder / f".{path.name}.deleting"
            os.rename(path, deleting)
            shutil.rmtree(deleting)
        return self.folder / name

    def load(self, needs: Callable[[Checkpoint], Any] = lambda _: None) -> Checkpoint | None:
        """The newest good checkpoint; damaged ones are named in a warning and the one before is taken.

        Args:
            needs: looks for what else a checkpoint goes with, and raises CheckpointError where it is not there.

        Returns:
            None where there is no checkpoint at all.

        Raises:
            CheckpointError: there are some, all of them damaged.
        """
        reasons = []
        for path in reversed(self.paths()):
            try:
                checkpoint = self.read(path)
                needs(checkpoint)
                return checkpoint
            except (CheckpointError, OSError) as error:
                logger.warning("checkpoint %s is damaged and not used: %s", path, error)
                reasons.append(str(error))
        if reasons:
            raise CheckpointError(
                f"{self.folder}: no checkpoint is usable; remove the folder to begin the rounds again ({'; '.join(reasons)})"
            )
        return None

    def read(self, path: Path) -> Checkpoint:
        """The checkpoint at `path`, verified.

        Raises:
            DamagedCheckpoint: it is not what its manifest says.
        """
        _verify(path)
        return Checkpoint(path, _read_files(path))

    def set_aside_newer(self, path: Path) -> None:
        """Renames the checkpoints newer than `path`, found damaged, to `*.damaged`: their steps will be written again."""
        for newer in self.paths():
            if newer > path:
                target = newer.with_name(f"{newer.name}.damaged")
                shutil.rmtree(target, ignore_errors=True)
                os.rename(newer, target)

    def remove_leftovers(self) -> None:
        """Removes what killed processes left half written or half removed."""
        for path in (*self.folder.glob(".step-*.writing"), *self.folder.glob(".step-*.deleting")):
            shutil.rmtree(path)


# Writing


class _HashedFile:
    """A new file that hashes and counts what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.bytes += len(data)

    def entry(self) -> dict[str, Any]:
        return {"sha256": self.sha256.hexdigest(), "bytes": self.bytes}


@contextmanager
def _new_file(path: Path) -> Iterator[_HashedFile]:
    """A file that is on the disk when the block ends."""
    with path.open("xb") as file:
        yield _HashedFile(file)
        file.flush()
        os.fsync(file.fileno())


def _write_files(folder: Path, state: State, foreign: Path | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files: dict[str, Any] = {}
    if foreign is not None:
        os.rename(foreign, folder / FOREIGN)
        for path in (folder / FOREIGN, *sorted((folder / FOREIGN).rglob("*"))):
            sync(path)
            if path.is_file():
                files[str(path.relative_to(folder))] = _entry(path)
    rest: State = {}
    for part, value in state.items():
        tensors: dict[str, Tensor] = {}
        rest[part] = _split(value, part, "", tensors)
        if tensors:
            with _new_file(folder / f"{part}.safetensors") as file:
                write_safetensors(file, tensors)
            files[f"{part}.safetensors"] = file.entry()
    with _new_file(folder / STATE_FILE) as file:
        file.write(_json(rest))
    files[STATE_FILE] = file.entry()
    with _new_file(folder / MANIFEST_FILE) as file:
        file.write(_manifest(FORMAT, files))
    sync(folder)


def _entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}


def _manifest(version: str, files: dict[str, Any]) -> bytes:
    """The bytes of a manifest, which its last entry makes sure of."""
    manifest = {"format": version, "files": files}
    return _json(manifest | {"sha256": hashlib.sha256(_json(manifest)).hexdigest()})


def write_safetensors(file: Any, tensors: dict[str, Tensor]) -> None:
    """Writes tensors in the safetensors format, one at a time, so that the host holds one copy of one tensor.

    Args:
        file: anything with `write(bytes)`.
        tensors: by name, on any device.
    """
    # Wide numbers first, so that each tensor starts at a multiple of its width; by name, so that equal states are equal files.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, offset = {}, 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        file.write(tensor_bytes(tensor))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any device and dtype, in row order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 1:  # one number may carry any stride
        flat = flat.as_strided((1,), (1,))
    return flat.view(torch.uint8).numpy().data


def _split(value: Any, part: str, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` without its tensors, which go to `tensors` under their path of keys joined by "/"."""
    if isinstance(value, dict):
        rest = {}
        for key, entry in value.items():
            if not isinstance(key, str) or "/" in key:
                raise TypeError(f"checkpoint: keys of {part!r} must be strings without '/', got {key!r}")
            name = f"{path}/{key}" if path else key
            if isinstance(entry, Tensor):
                tensors[name] = entry
            else:
                rest[key] = _split(entry, part, name, tensors)
        return rest
    if isinstance(value, list | tuple):
        return [_split(entry, part, f"{path}/{i}", tensors) for i, entry in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {_NOT_FINITE: str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"checkpoint: {part}/{path} must be a tensor, number, string, bool, None or list, got {type(value)}")


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"


# Reading


def _verify(folder: Path) -> None:
    """Compares every file with the manifest, and the manifest with itself.

    Raises:
        DamagedCheckpoint: the first file that differs, with what was expected and what was found.
    """
    path = folder / MANIFEST_FILE
    try:
        written = path.read_bytes()
        manifest = json.loads(written)
        version, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path}: expected the manifest, got {type(error).__name__}: {error}") from error
    if written != (expected := _manifest(version, files)):
        hashes = [hashlib.sha256(content).hexdigest() for content in (expected, written)]
        raise DamagedCheckpoint(f"{path}: expected sha256 {hashes[0]}, got {hashes[1]}")
    if version != FORMAT:
        raise CheckpointError(f"{path}: expected the format {FORMAT!r}, got {version!r}")
    for name, entry in files.items():
        try:
            got = _entry(folder / name)
        except OSError as error:
            raise DamagedCheckpoint(f"{folder / name}: expected sha256 {entry['sha256']}, got {error.strerror}") from error
        if got != entry:
            raise DamagedCheckpoint(
                f"{folder / name}: expected sha256 {entry['sha256']} ({entry['bytes']} bytes), "
                f"got {got['sha256']} ({got['bytes']} bytes)"
            )


def _read_files(folder: Path) -> State:
    state: State = _join(json.loads((folder / STATE_FILE).read_bytes()))
    for part in state:
        path = folder / f"{part}.safetensors"
        if path.exists():
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, it is no dict
                    *parents, last = name.split("/")
                    target = state[part]
                    for key in parents:
                        target = target[int(key) if isinstance(target, list) else key]
                    target[last] = file.get_tensor(name)
    return state


def _join(value: Any) -> Any:
    """Undoes what `_split` did to numbers that JSON does not have."""
    if isinstance(value, dict):
        return float(value[_NOT_FINITE]) if value.keys() == {_NOT_FINITE} else {k: _join(v) for k, v in value.items()}
    return [_join(entry) for entry in value] if isinstance(value, list) else value
