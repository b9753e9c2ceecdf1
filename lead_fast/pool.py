"""A pool of samples: text on disk in one memory-mapped Arrow file, numbers in arrays, rows addressed by position.

Reading a pool parses its rows once (`lead_fast.rows` says what a row may look like) and writes them to
<cache>/pools/<key>.arrow, the key being a sha256 of the input's bytes and of how it was read; the next reading of the
same bytes only maps that file. <cache> is `cache_dir`, else $LEAD_FAST_CACHE, else ~/.cache/lead-fast.
"""

from __future__ import annotations

import copy
import gzip
import json
import logging
import operator
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, Unpack

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lead_fast.files import atomic_path, write_json
from lead_fast.rowfile import SCORE_TYPES, Fingerprint, Input, RowFile, cached_rows, write_rows
from lead_fast.rows import SCORE_MAX, PoolError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Pool", "PoolError"]

logger = logging.getLogger(__name__)

PathLike: TypeAlias = str | os.PathLike[str]
Rows: TypeAlias = "np.ndarray | Iterable[int]"

FORMAT = 1
TAKE_ROWS = 1024
ARRAYS: dict[str, tuple[type[np.generic], float]] = {
    "arm": (np.int16, SCORE_MAX["arm"]),
    "task": (np.int32, SCORE_MAX["task"]),
    "utility": (np.float32, SCORE_MAX["utility"]),
    "difficulty": (np.float32, SCORE_MAX["difficulty"]),
    "num_tokens": (np.int32, 2**31 - 1),
    "aside": (np.bool_, 1),
}
"""The arrays beside the text: dtype and largest value; the smallest is 0."""


class ReadOptions(TypedDict, total=False):
    """How a pool is read.

    Attributes:
        on_bad_row: "error" (default) raises PoolError at the first bad row; "skip" leaves bad rows out, writes them to
            a rejects file and logs how many. A file that cannot be read to its end is an error either way.
        rejects: where "skip" writes the bad rows, one JSON object a line: file, line, field, reason, and raw (its text)
            or raw_base64. Written even when there are none. Default: beside the cached rows.
        cache_dir: folder of the cache.
    """

    on_bad_row: Literal["error", "skip"]
    rejects: PathLike | None
    cache_dir: PathLike | None


class Pool:
    """N rows to choose from; made by `open`, `load` or one of the `from_` methods.

    Attributes:
        sources: int32 [N] into `source_names` ("unknown" for a row without one), or None where no row has a source.
        source_names: the distinct values of the rows' `dataset` (else `source`) field, in order of appearance.
        arm: int16 [N] in 0..K-1, or None. Labels read from a file are renumbered in sorted order, empty arms closed up.
        task: int32 [N], or None. Labels are kept as they are.
        utility: float32 [N], first utility in nats per token, or None.
        difficulty: float32 [N], or None.
        num_tokens: int32 [N], tokens of the packed sample, or None.
        aside: bool [N], rows that are never selected unless asked for.
        num_rejected: bad rows left out by on_bad_row="skip".
        rejects_path: the file that holds them, or None.
    """

    def __init__(self, file: RowFile | None, ids: pa.Array | None = None) -> None:
        self._file, self._all_ids = file, ids
        self._index: np.ndarray | None = None
        self.source_names: list[str] = file.info["source_names"] if file else []
        self.sources: np.ndarray | None = None
        if file and self.source_names:
            self.sources = file.column("source").to_numpy().astype(np.int32)
        self.arm: np.ndarray | None = None
        self.task: np.ndarray | None = None
        self.utility: np.ndarray | None = None
        self.difficulty: np.ndarray | None = None
        self.num_tokens: np.ndarray | None = None
        self.aside = np.zeros(len(self._base_ids()), np.bool_)
        self.num_rejected: int = file.info["num_rejected"] if file else 0
        self.rejects_path: Path | None = None

    @classmethod
    def open(cls, path: PathLike, **options: Unpack[ReadOptions]) -> Pool:
        """Reads whatever pool is at `path`.

        Args:
            path: a prepared pool (the folder that `save` wrote), a `datasets` folder (`save_to_disk`), a folder of
                .jsonl, .jsonl.gz or .parquet shards (in the order of their names, no subfolders), or one such file.
            **options: see `ReadOptions`; a prepared pool has no use for them.

        Raises:
            PoolError: there is no pool at `path`, or it cannot be read.
        """
        path = Path(path)
        if not path.exists():
            raise PoolError(path, None, None, "a file or folder", "a path that does not exist")
        files = [path]
        if path.is_dir():
            if (path / "pool.json").exists():
                return cls.load(path)
            if any((path / name).exists() for name in ("state.json", "dataset_info.json", "dataset_dict.json")):
                return cls.from_dataset(path, **options)
            files = sorted(file for file in path.iterdir() if _shard_kind(file) and not file.name.startswith("."))
        kinds = {_shard_kind(file) for file in files}
        if kinds == {"jsonl"}:
            return cls.from_jsonl(files, **options)
        if kinds == {"parquet"}:
            return cls.from_parquet(files, **options)
        if not path.is_dir():
            raise PoolError(path, None, None, "a name ending in .jsonl, .jsonl.gz or .parquet", f"{path.name!r}")
        expected = "a prepared pool, a datasets folder, or shards of one kind (.jsonl, .jsonl.gz or .parquet)"
        raise PoolError(path, None, None, expected, "both JSONL and Parquet" if kinds else "none of them")

    @classmethod
    def from_jsonl(cls, path: PathLike | Sequence[PathLike], **options: Unpack[ReadOptions]) -> Pool:
        """Reads .jsonl or .jsonl.gz files, each row in any shape of `lead_fast.rows`, the official LEAD pool included.

        Args:
            path: one file, or several that make one pool.
            **options: see `ReadOptions`.

        Raises:
            PoolError: names file, line and field.
        """
        return cls._read([Input.jsonl(file) for file in _files(path)], **options)

    @classmethod
    def from_official(cls, path: PathLike | Sequence[PathLike], **options: Unpack[ReadOptions]) -> Pool:
        """As `from_jsonl`, but every row must have the official pool's idf, cross_entropy, idf_cluster and task."""
        return cls._read([Input.jsonl(file) for file in _files(path)], official=True, **options)

    @classmethod
    def from_parquet(cls, path: PathLike | Sequence[PathLike], **options: Unpack[ReadOptions]) -> Pool:
        """Reads Parquet files; as `from_jsonl`, a "line" being a 1-based row."""
        return cls._read([Input.parquet(file) for file in _files(path)], **options)

    @classmethod
    def from_dataset(cls, path_or_dataset: PathLike | Dataset, **options: Unpack[ReadOptions]) -> Pool:
        """Reads a `datasets.Dataset`, or the folder that its `save_to_disk` wrote; a "line" is a 1-based row.

        Raises:
            ImportError: `datasets` is not installed.
            TypeError: neither a path nor a `datasets.Dataset`.
            PoolError: as `from_jsonl`; a folder with several splits is refused, its subfolders can be read.
        """
        return cls._read([Input.dataset(path_or_dataset)], **options)

    @classmethod
    def from_arrays(cls, *, arm: Any, task: Any = None, utility: Any = None, ids: Sequence[str | int] | None = None,
                    difficulty: Any = None) -> Pool:  # fmt: skip
        """A pool of numbers without text, for a loop that has its samples elsewhere.

        Args:
            arm: [N] integers in 0..K-1, kept as they are; arms without rows are allowed.
            task, utility, difficulty: [N] each, or None.
            ids: N distinct strings or integers; default "0" to "N-1".

        Raises:
            TypeError, ValueError: names the argument.
        """
        shape = np.shape(arm)
        if len(shape) != 1 or not shape[0]:
            raise ValueError(f"Pool.from_arrays: `arm` must be [N] with N >= 1, got {list(shape)}")
        names = [str(i) for i in (range(*shape) if ids is None else ids)]
        if len(names) != shape[0] or len(set(names)) != shape[0]:
            got = f"{len(names)}, {len(set(names))} of them distinct"
            raise ValueError(f"Pool.from_arrays: `ids` must be {shape[0]} distinct ids, got {got}")
        pool = cls(None, pa.array(names, pa.string()))
        return pool.with_arrays(arm=arm, task=task, utility=utility, difficulty=difficulty)

    @classmethod
    def load(cls, folder: PathLike) -> Pool:
        """Opens a prepared pool, as `save` wrote it; its text is mapped, not read.

        Raises:
            PoolError: a file is missing, unreadable, of another version, or does not belong to the others.
        """
        folder = Path(folder)
        try:
            summary = json.loads((folder / "pool.json").read_text(encoding="utf-8"))
            arrays = load_file(folder / "arrays.safetensors")
            version, fingerprint = summary["format"], summary["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise PoolError(folder, None, None, "a prepared pool", f"{type(error).__name__}: {error}") from error
        if version != FORMAT:
            raise PoolError(folder / "pool.json", None, "format", str(FORMAT), str(version))
        pool = cls(RowFile(folder / "rows.arrow", fingerprint))
        try:
            pool = pool.with_arrays(**arrays)
        except (TypeError, ValueError) as error:
            name = folder / "arrays.safetensors"
            raise PoolError(name, None, None, "arrays that fit the rows", str(error)) from error
        rejects = folder / "rejects.jsonl"
        pool.rejects_path = rejects if rejects.exists() else None
        return pool

    @property
    def path(self) -> Path | None:
        """The memory-mapped Arrow file behind the rows; None for a pool made by `from_arrays`."""
        return self._file.path if self._file else None

    @property
    def has_text(self) -> bool:
        return self._file is not None and "messages" in self._file.names

    @property
    def num_arms(self) -> int:
        """K, the highest arm number plus 1; 0 without arms."""
        return 0 if self.arm is None or not len(self.arm) else int(self.arm.max()) + 1

    @cached_property
    def ids(self) -> pa.Array | pa.ChunkedArray:
        """Distinct strings [N]; a row without an `id` has its 0-based number in the input, bad rows counted."""
        return self._base_ids() if self._index is None else self._base_ids().take(pa.array(self._index))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over ids and text in order, in hex; the same for the same rows however they were read."""
        if self._file and self._index is None:
            return self._file.info["fingerprint"]
        fingerprint = Fingerprint()
        for batch in self._batches():
            fingerprint.update(batch)
        return fingerprint.hexdigest()

    def __len__(self) -> int:
        return len(self.aside)

    def __repr__(self) -> str:
        parts = [f"{len(self):,} rows {'from ' + str(self.path) if self.has_text else 'without text'}"]
        if self.sources is not None:
            counts = Counter(self._source_counts()).most_common()
            shown = ", ".join(f"{name} {count:,}" for name, count in counts[:8])
            parts.append(f"{len(counts)} sources: {shown}{', ...' if len(counts) > 8 else ''}")
        if self.arm is not None and len(self):
            sizes = np.bincount(self.arm)
            parts.append(f"{self.num_arms} arms of {sizes.min():,} to {sizes.max():,} rows")
        if self.task is not None:
            parts.append(f"{len(np.unique(self.task))} tasks")
        parts += [name for name in ("utility", "difficulty", "num_tokens") if getattr(self, name) is not None]
        if self.aside.any():
            parts.append(f"{int(self.aside.sum()):,} set aside")
        if self.num_rejected:
            parts.append(f"{self.num_rejected:,} rejected ({self.rejects_path})")
        return f"Pool({'; '.join(parts)})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "ids"}

    def id(self, row: int) -> str:
        """The id of one row."""
        return self.ids[self._row("id", row)].as_py()

    def messages(self, row: int) -> list[dict[str, str]]:
        """The messages of one row, [{"role", "content"}], read from the memory map.

        Raises:
            ValueError: the pool has no text, or no such row.
        """
        file, row = self._text_file("messages"), self._row("messages", row)
        return file.value("messages", row if self._index is None else int(self._index[row]))

    def iter_messages(self, rows: Rows | None = None) -> Iterator[list[dict[str, str]]]:
        """The messages of many rows, one block of rows in memory at a time.

        Args:
            rows: [n] row numbers in any order, or a bool mask [N]; None is every row.

        Raises:
            ValueError, TypeError: the pool has no text, or `rows` does not fit it.
        """
        self._text_file("iter_messages")
        rows = None if rows is None else self._rows("iter_messages", rows)
        return (messages for batch in self._batches(rows) for messages in batch.column("messages").to_pylist())

    def with_arrays(self, **arrays: Any) -> Pool:
        """A pool over the same rows and text with some arrays replaced.

        Args:
            **arrays: any of arm, task, utility, difficulty, num_tokens, aside: array-like [N], copied and converted to
                the dtypes of the class; None drops the array (`aside`: nothing aside).

        Raises:
            TypeError, ValueError: an unknown name, or a wrong shape, dtype or value.
        """
        pool = copy.copy(self)
        for name, value in arrays.items():
            if name not in ARRAYS:
                raise TypeError(f"Pool.with_arrays: expected any of {', '.join(ARRAYS)}, got `{name}`")
            if name == "aside" and value is None:
                value = np.zeros(len(self), np.bool_)
            setattr(pool, name, None if value is None else _checked(name, value, len(self)))
        return pool

    def subset(self, rows: Rows) -> Pool:
        """A pool of some of the rows, in the order given; text stays where it is, arms and tasks keep their numbers.

        Args:
            rows: [n] distinct row numbers, or a bool mask [N].
        """
        rows = self._rows("subset", rows, distinct=True)
        pool = copy.copy(self)
        for cached in ("ids", "fingerprint"):
            pool.__dict__.pop(cached, None)
        pool._index = rows if self._index is None else self._index[rows]
        for name in ("sources", *ARRAYS):
            array = getattr(self, name)
            setattr(pool, name, None if array is None else array[rows])
        return pool

    def save(self, folder: PathLike) -> None:
        """Writes a prepared pool: rows.arrow, arrays.safetensors, pool.json; rejects.jsonl where rows were rejected.

        Args:
            folder: new, empty, or a prepared pool, which is replaced. Written beside it first, then renamed.

        Raises:
            ValueError: the pool has no rows, or `folder` holds something else.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / "pool.json").exists() and (folder.is_file() or any(folder.iterdir())):
            raise ValueError(f"Pool.save: `folder` must be new, empty or a prepared pool, got {folder}, which is not")
        if not len(self):
            raise ValueError("Pool.save: the pool must have at least 1 row, got 0")
        arrays = {name: getattr(self, name) for name in ARRAYS if getattr(self, name) is not None}
        info = {"source_names": self.source_names, "num_rejected": self.num_rejected}
        summary = {"format": FORMAT, "rows": len(self), "fingerprint": self.fingerprint, "arms": self.num_arms,
                   "aside": int(self.aside.sum()), "rejected": self.num_rejected,
                   "sources": self._source_counts(), "arrays": sorted(arrays)}  # fmt: skip
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            write_rows(temporary / "rows.arrow", self._batches(), lambda: info)
            save_file(arrays, temporary / "arrays.safetensors")
            if self.rejects_path and self.rejects_path.exists():
                shutil.copyfile(self.rejects_path, temporary / "rejects.jsonl")
            write_json(temporary / "pool.json", summary)

    def export_jsonl(self, rows: Rows, path: PathLike, extra: Sequence[dict[str, Any]] | None = None) -> None:
        """Writes rows as JSONL (gzipped where `path` ends in .gz): id, dataset where known, messages, then `extra`.

        Args:
            rows: [n] distinct row numbers, or a bool mask [N].
            path: written under a temporary name first, then renamed.
            extra: n objects whose fields are added to the rows'.

        Raises:
            TypeError, ValueError: no text, `rows` does not fit, `extra` has another length, a field twice, or no JSON.
        """
        self._text_file("export_jsonl")
        rows = self._rows("export_jsonl", rows, distinct=True)
        if extra is not None and len(extra) != len(rows):
            raise ValueError(f"Pool.export_jsonl: `extra` must have {len(rows)} objects, one a row, got {len(extra)}")
        opener = gzip.open if Path(path).suffix == ".gz" else open
        with _new_file(path) as temporary, opener(temporary, "wt", encoding="utf-8", newline="\n") as file:
            for i, (row, messages) in enumerate(zip(rows.tolist(), self.iter_messages(rows), strict=True)):
                record: dict[str, Any] = {"id": self.id(row)}
                if self.sources is not None:
                    record["dataset"] = self.source_names[self.sources[row]]
                record["messages"] = messages
                if extra is not None:
                    if taken := record.keys() & extra[i].keys():
                        raise ValueError(f"Pool.export_jsonl: `extra[{i}]` must not have {sorted(taken)}")
                    record |= extra[i]
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def _read(cls, inputs: list[Input], official: bool = False, *, on_bad_row: str = "error",
              rejects: PathLike | None = None, cache_dir: PathLike | None = None) -> Pool:  # fmt: skip
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"Pool: `on_bad_row` must be 'error' or 'skip', got {on_bad_row!r}")
        skip = on_bad_row == "skip"
        file, rejects_path = cached_rows(inputs, official=official, skip=skip, cache_dir=cache_dir)
        pool = cls(file)
        scores = {name: file.column(name).to_numpy() for name in SCORE_TYPES if name in file.names}
        if "arm" in scores:
            labels, scores["arm"] = np.unique(scores["arm"], return_inverse=True)
            if labels[-1] != len(labels) - 1:
                logger.info("pool: arms %s renumbered 0 to %d", labels.tolist(), len(labels) - 1)
        pool = pool.with_arrays(**scores)
        if skip and rejects is not None:
            with _new_file(rejects) as temporary:
                shutil.copyfile(rejects_path, temporary)
            pool.rejects_path = Path(rejects)
        elif pool.num_rejected:
            pool.rejects_path = rejects_path
        if pool.num_rejected:
            num_read = len(pool) + pool.num_rejected
            logger.warning("pool: %d of %d rows rejected, see %s", pool.num_rejected, num_read, pool.rejects_path)
        return pool

    def _base_ids(self) -> pa.Array | pa.ChunkedArray:
        return self._file.column("id") if self._file else self._all_ids

    def _text_file(self, op: str) -> RowFile:
        if self._file is None or not self.has_text:
            raise ValueError(f"Pool.{op}: the pool must have text, got one made by from_arrays")
        return self._file

    def _batches(self, rows: np.ndarray | None = None) -> Iterator[pa.RecordBatch]:
        """Record batches of the given rows, in order, without the scores as read: arrays may have replaced them."""
        if self._file is None:
            ids = self.ids if rows is None else self.ids.take(pa.array(rows))
            yield pa.record_batch({"id": ids})
            return
        columns = [name for name in ("id", "source", "messages") if name in self._file.names]
        if rows is None and self._index is None:
            yield from (batch.select(columns) for batch in self._file.batches)
            return
        if self._index is not None:
            rows = self._index if rows is None else self._index[rows]
        assert rows is not None
        for start in range(0, len(rows), TAKE_ROWS):
            yield self._file.take(rows[start : start + TAKE_ROWS]).select(columns)

    def _row(self, op: str, row: int) -> int:
        row = operator.index(row)
        if not 0 <= row < len(self):
            raise ValueError(f"Pool.{op}: `row` must be in 0..{len(self) - 1}, got {row}")
        return row

    def _rows(self, op: str, rows: Rows, distinct: bool = False) -> np.ndarray:
        array = np.asarray(rows)
        if array.dtype == np.bool_ and array.shape == (len(self),):
            return np.flatnonzero(array)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            got = f"{array.dtype} {list(array.shape)}"
            raise TypeError(f"Pool.{op}: `rows` must be integers [n] or bool [{len(self)}], got {got}")
        array = array.astype(np.int64)
        if array.size and not 0 <= array.min() <= array.max() < len(self):
            raise ValueError(f"Pool.{op}: `rows` must be in 0..{len(self) - 1}, got {array.min()} to {array.max()}")
        if distinct and len(np.unique(array)) != len(array):
            raise ValueError(f"Pool.{op}: `rows` must be distinct, got {len(array) - len(np.unique(array))} repeated")
        return array

    def _source_counts(self) -> dict[str, int]:
        if self.sources is None:
            return {}
        counts = np.bincount(self.sources, minlength=len(self.source_names))
        return dict(zip(self.source_names, counts.tolist(), strict=True))


def _checked(name: str, value: Any, length: int) -> np.ndarray:
    array = np.asarray(value)
    dtype, high = ARRAYS[name]
    kinds = {"b": "b", "i": "iu", "f": "iuf"}[np.dtype(dtype).kind]
    if array.dtype.kind not in kinds:
        raise TypeError(f"Pool.with_arrays: `{name}` must convert to {np.dtype(dtype)}, got {array.dtype}")
    if array.shape != (length,):
        raise ValueError(f"Pool.with_arrays: `{name}` must be [{length}], one value a row, got {list(array.shape)}")
    good = (array >= 0) & (array <= high)
    if not good.all():
        row = int(np.argmin(good))
        raise ValueError(f"Pool.with_arrays: `{name}` must be finite, in 0..{high:g}, got {array[row]} in row {row}")
    return array.astype(dtype)


def _files(path: PathLike | Sequence[PathLike]) -> list[Path]:
    files = [Path(path)] if isinstance(path, str | os.PathLike) else [Path(file) for file in path]
    if not files:
        raise ValueError("Pool: `path` must name at least one file, got an empty list")
    for file in files:
        if not file.is_file():
            raise PoolError(file, None, None, "a file", "a folder" if file.is_dir() else "a path that does not exist")
    return files


def _new_file(path: PathLike) -> AbstractContextManager[Path]:
    if Path(path).is_dir():
        raise ValueError(f"Pool: the file to write must not be a folder, got {path}")
    return atomic_path(Path(path))


def _shard_kind(path: Path) -> str | None:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return "jsonl"
    return "parquet" if path.suffix == ".parquet" else None
