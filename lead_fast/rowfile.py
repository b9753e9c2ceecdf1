"""The rows of a pool on disk: files read row by row, one Arrow file written, cached by content and memory-mapped.

The Arrow file has the columns `id`, `source` (int32, an index into the source names), `messages` (list of {role,
content}) and the scores that the input has, in record batches. What is known only at the end (source names, number of
rejected rows, fingerprint) travels with the last batch, which is empty, as JSON under the metadata key `lead_fast`.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import logging
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from lead_fast.files import atomic_path, is_full, remove_leftovers
from lead_fast.rows import (
    ANSWERS,
    FIELDS,
    SHAPES,
    Payload,
    PoolError,
    RowError,
    Turn,
    parse_line,
    read_id,
    read_scores,
    read_source,
    read_turns,
    score_fields,
)

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_A_DAY = 86_400.0  # seconds
FORMAT = 1
BATCH_ROWS = 4096
BATCH_CHARS = 1 << 25  # 32-bit Arrow offsets reach 2 GiB of text a batch
READ_ROWS = 1024
SCORE_TYPES = {"difficulty": np.float32, "utility": np.float32, "arm": np.int16, "task": np.int32}
NO_SOURCE = "unknown"

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Input:
    """One file or dataset to read rows from.

    Attributes:
        name: the file, or what stands for it in messages.
        rows: yields (1-based line or row, payload).
        digest: sha256 of its bytes, in hex.
    """

    name: Path | str
    rows: Callable[[], Iterator[tuple[int, Payload]]]
    digest: Callable[[], str]

    @classmethod
    def jsonl(cls, path: Path) -> Input:
        return cls(path, partial(jsonl_rows, path), partial(_file_digest, path))

    @classmethod
    def parquet(cls, path: Path) -> Input:
        return cls(path, partial(parquet_rows, path), partial(_file_digest, path))

    @classmethod
    def dataset(cls, path_or_dataset: str | os.PathLike[str] | Dataset) -> Input:
        """See `Pool.from_dataset`."""
        try:
            import datasets
        except ImportError as error:
            raise ImportError("Pool.from_dataset: needs `datasets`: pip install lead-fast[datasets]") from error
        name, data = "Dataset", path_or_dataset
        if isinstance(data, str | os.PathLike):
            name = os.fspath(data)
            try:
                data = datasets.load_from_disk(name)
            except (OSError, ValueError, KeyError) as error:
                raise PoolError(name, None, None, "a readable datasets folder", str(error)) from error
        if isinstance(data, datasets.DatasetDict):
            if len(data) != 1:
                splits = ", ".join(map(str, data))
                raise PoolError(name, None, None, "one split, or the path of one split's subfolder", f"splits {splits}")
            data = next(iter(data.values()))
        if not isinstance(data, datasets.Dataset):
            kind = type(data).__name__
            raise TypeError(f"Pool.from_dataset: `path_or_dataset` must be a path or a datasets.Dataset, got {kind}")
        data = data.select_columns(known_columns(name, data.column_names)).with_format("arrow")
        return cls(name, partial(dataset_rows, data), partial(_dataset_digest, data))


def jsonl_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (1-based line, line) of a .jsonl or .jsonl.gz file, without blank lines and a leading byte order mark.

    Raises:
        PoolError: the gzip stream is truncated or corrupt; names the line that could not be completed.
    """
    line = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            for line, raw in enumerate(file, 1):
                if line == 1:
                    raw = raw.removeprefix(_BOM)
                if raw and not raw.isspace():
                    yield line, raw
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise PoolError(path, line + 1, "row", "gzip data to the end of the file", str(error)) from error


def parquet_rows(path: Path) -> Iterator[tuple[int, Payload]]:
    """Yields (1-based row, record) of a Parquet file.

    Raises:
        PoolError: the file is not readable as Parquet, or has the columns of no row shape.
    """
    row = 1
    try:
        with pq.ParquetFile(path) as file:
            columns = known_columns(path, file.schema_arrow.names)
            for batch in file.iter_batches(READ_ROWS, columns=columns):
                yield from arrow_rows(batch, row)
                row += len(batch)
    except (pa.ArrowException, OSError) as error:
        got = str(error).partition("\n")[0]
        raise PoolError(path, row, "row", "a Parquet file readable to its end", got) from error


def dataset_rows(dataset: Dataset) -> Iterator[tuple[int, Payload]]:
    """Yields (1-based row, record) of a dataset in Arrow format."""
    row = 1
    for table in dataset.iter(READ_ROWS):
        yield from arrow_rows(table, row)
        row += len(table)


def arrow_rows(batch: Any, first: int) -> Iterator[tuple[int, Payload]]:
    """Yields (row, record) of an Arrow batch or table whose first row is `first`; invalid UTF-8 spoils its row only."""
    try:
        rows: list[Payload] = batch.to_pylist()
    except UnicodeDecodeError:
        rows = [_arrow_row(batch, i) for i in range(len(batch))]
    yield from enumerate(rows, first)


def known_columns(name: Path | str, columns: list[str]) -> list[str]:
    """The columns that rows are read from.

    Raises:
        PoolError: they make none of the row shapes.
    """
    shaped = "messages" in columns or "conversations" in columns
    shaped |= any(prompt in columns and any(answer in columns for answer in ANSWERS[prompt]) for prompt in ANSWERS)
    if not shaped:
        raise PoolError(name, None, "columns", SHAPES, ", ".join(f"`{column}`" for column in columns) or "none")
    return [column for column in columns if column in FIELDS]


class RowReader:
    """Reads, checks and normalises the rows of all inputs into record batches.

    Args:
        inputs: read in order as one pool.
        official: every row must have the scores of the official LEAD pool.
        rejects: takes bad rows as JSONL; None makes the first one an error.
    """

    def __init__(self, inputs: list[Input], official: bool, rejects: IO[str] | None) -> None:
        self.inputs, self.official, self.rejects = inputs, official, rejects
        self.num_rejected = 0
        self._sources: dict[str, int] = {}
        self._places: dict[str, int] = {}
        self._fields: dict[str, str] | None = None
        self._block = _Block()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields record batches of at most BATCH_ROWS rows.

        Raises:
            PoolError: a bad row while `rejects` is None, or no good row at all.
        """
        number, first_error = 0, None
        with tqdm(desc="reading pool", unit=" rows", delay=2) as bar:
            for i, source in enumerate(self.inputs):
                for line, payload in source.rows():
                    try:
                        self._read(payload, number, i << 40 | line)
                    except RowError as error:
                        bad = PoolError(source.name, line, error.field, error.expected, error.got)
                        if self.rejects is None:
                            raise bad from None
                        first_error = first_error or bad
                        self.num_rejected += 1
                        self.rejects.write(_reject(bad, payload))
                    number += 1
                    if self._block.is_full():
                        bar.update(number - bar.n)
                        yield self._take()
            bar.update(number - bar.n)
        if first_error and self.num_rejected == number:
            got = f"{number} bad, the first for this: expected {first_error.expected}, got {first_error.got}"
            raise PoolError(first_error.path, first_error.line, first_error.field, "at least one good row", got)
        if not number:
            raise PoolError(self.inputs[0].name, None, None, "at least one row", "no rows")
        if self._block.ids:
            yield self._take()

    def info(self) -> dict[str, Any]:
        """What is known at the end, for the last batch."""
        names = list(self._sources)
        return {"source_names": [] if names == [NO_SOURCE] else names, "num_rejected": self.num_rejected}

    def _take(self) -> pa.RecordBatch:
        block, self._block = self._block, _Block()
        return block.to_batch(self._fields or {})

    def _read(self, payload: Payload, number: int, place: int) -> None:
        if isinstance(payload, RowError):
            raise payload
        row = parse_line(payload) if isinstance(payload, bytes) else payload
        turns = read_turns(row)
        source = read_source(row)
        found = score_fields(row, self.official)
        scores = read_scores(row, found, found if self._fields is None else self._fields)
        row_id = read_id(row, number)
        first = self._places.setdefault(row_id, place)
        if first != place:
            other, line = self.inputs[first >> 40].name, first & (1 << 40) - 1
            raise RowError("id", "an id that no other row has", f"{row_id!a}, the id of {other}:{line}")
        if self._fields is None:
            self._fields = found
        code = self._sources.setdefault(source or NO_SOURCE, len(self._sources))
        self._block.add(row_id, code, turns, scores)


@dataclass
class _Block:
    """Rows on their way into one record batch."""

    ids: list[str] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=lambda: [0])
    roles: list[str] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)
    scores: list[list[int | float]] = field(default_factory=list)
    num_chars: int = 0

    def add(self, row_id: str, source: int, turns: list[Turn], scores: list[int | float]) -> None:
        self.ids.append(row_id)
        self.sources.append(source)
        self.scores.append(scores)
        roles, contents = zip(*turns, strict=True)
        self.roles += roles
        self.contents += contents
        self.num_chars += sum(map(len, contents))
        self.offsets.append(len(self.roles))

    def is_full(self) -> bool:
        return len(self.ids) >= BATCH_ROWS or self.num_chars >= BATCH_CHARS

    def to_batch(self, fields: dict[str, str]) -> pa.RecordBatch:
        turns = pa.StructArray.from_arrays(
            [pa.array(self.roles, pa.string()), pa.array(self.contents, pa.string())], ["role", "content"]
        )
        columns: dict[str, Any] = {
            "id": pa.array(self.ids, pa.string()),
            "source": pa.array(self.sources, pa.int32()),
            "messages": pa.ListArray.from_arrays(pa.array(self.offsets, pa.int32()), turns),
        }
        for name, values in zip(fields.values(), zip(*self.scores, strict=True), strict=True):
            columns[name] = pa.array(np.array(values, SCORE_TYPES[name]))
        return pa.record_batch(columns)


def write_rows(path: Path, batches: Iterable[pa.RecordBatch], info: Callable[[], dict[str, Any]]) -> None:
    """Writes a row file.

    Args:
        path: a new file.
        batches: at least one, of one schema.
        info: called after the last batch; `source_names` and `num_rejected`.
    """
    fingerprint = Fingerprint()
    batches = iter(batches)
    first = next(batches)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
        for batch in chain([first], batches):
            fingerprint.update(batch)
            writer.write_batch(batch)
        tail = json.dumps({"format": FORMAT, "fingerprint": fingerprint.hexdigest(), **info()})
        writer.write_batch(first.slice(0, 0), custom_metadata={"lead_fast": tail})


class RowFile:
    """A row file, memory-mapped: it takes no memory until rows are asked for. Pickles as its path.

    Args:
        path: what `write_rows` wrote.
        fingerprint: what it must hold; None is anything.

    Raises:
        PoolError: missing, truncated, of another version, or with other rows than `fingerprint` says.
    """

    def __init__(self, path: Path, fingerprint: str | None = None) -> None:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [reader.get_batch_with_custom_metadata(i) for i in range(reader.num_record_batches)]
            self.info: dict[str, Any] = json.loads(batches[-1].custom_metadata["lead_fast"])
            version = self.info["format"]
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            raise PoolError(path, None, None, "a row file", f"{type(error).__name__}: {error}") from error
        if version != FORMAT:
            raise PoolError(path, None, "format", str(FORMAT), str(version))
        if fingerprint not in (None, self.info["fingerprint"]):
            raise PoolError(path, None, "fingerprint", str(fingerprint), self.info["fingerprint"])
        self.path = path
        self.batches: list[pa.RecordBatch] = [batch.batch for batch in batches[:-1]]
        self.names: list[str] = reader.schema.names
        self._starts = np.cumsum([0, *map(len, self.batches)])

    def __reduce__(self) -> tuple[type[RowFile], tuple[Path, str]]:
        return RowFile, (self.path, self.info["fingerprint"])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> pa.ChunkedArray:
        """A column over all rows, not copied."""
        return pa.chunked_array([batch.column(name) for batch in self.batches])

    def value(self, name: str, row: int) -> Any:
        """One cell as a Python object."""
        batch = int(np.searchsorted(self._starts, row, "right")) - 1
        return self.batches[batch].column(name)[row - int(self._starts[batch])].as_py()

    def take(self, rows: np.ndarray) -> pa.RecordBatch:
        """Copies rows, int64 [n] with n > 0, in any order.

        Batch by batch: taking from a chunked column would first copy the whole column into memory.
        """
        batch = np.searchsorted(self._starts, rows, "right") - 1
        order = np.argsort(batch, kind="stable")
        present, begins = np.unique(batch[order], return_index=True)
        parts = zip(present, np.split(rows[order], begins[1:]), strict=True)
        pieces = [self.batches[b].take(pa.array(part - self._starts[b])) for b, part in parts]
        table = pa.Table.from_batches(pieces).combine_chunks().take(pa.array(np.argsort(order)))
        return table.to_batches()[0]


class Fingerprint:
    """sha256 over the ids and messages of rows, in order.

    Every column has digests of its own, of its bytes and of their lengths: the result does not depend on how the rows
    are cut into batches, and moving text across a boundary changes it.
    """

    def __init__(self) -> None:
        self._digests = defaultdict(hashlib.sha256)

    def update(self, batch: pa.RecordBatch) -> None:
        self._add("id", batch.column("id"))
        if "messages" in batch.schema.names:
            messages = batch.column("messages")
            self._digests["turns"].update(messages.value_lengths().to_numpy().tobytes())
            role, content = messages.flatten().flatten()
            self._add("role", role)
            self._add("content", content)

    def hexdigest(self) -> str:
        parts = [name.encode() + digest.digest() for name, digest in sorted(self._digests.items())]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def _add(self, name: str, strings: pa.StringArray) -> None:
        if not len(strings):
            return
        _, offsets, data = strings.buffers()
        bounds = np.frombuffer(offsets, np.int32)[strings.offset : strings.offset + len(strings) + 1]
        self._digests[f"{name} lengths"].update(np.diff(bounds).tobytes())
        self._digests[f"{name} bytes"].update(memoryview(data or b"")[bounds[0] : bounds[-1]])


def cached_rows(
    inputs: list[Input], *, official: bool, skip: bool, cache_dir: str | os.PathLike[str] | None
) -> tuple[RowFile, Path]:
    """The row file of these inputs, read and written only where the cache has none for the same bytes.

    Args:
        inputs: read in order as one pool.
        official: every row must have the scores of the official LEAD pool.
        skip: leave bad rows out instead of raising.
        cache_dir: None is $LEAD_FAST_CACHE, else ~/.cache/lead-fast.

    Returns:
        The row file, and the path of the rejects, which exists where `skip`.

    Raises:
        PoolError: see `RowReader`; also when an input changed while it was read. Nothing is left in the cache then.
    """
    root = Path(cache_dir or os.environ.get("LEAD_FAST_CACHE") or Path.home() / ".cache" / "lead-fast")
    digests = [source.digest() for source in inputs]
    key = hashlib.sha256(json.dumps([FORMAT, skip, official, digests]).encode()).hexdigest()
    path, rejects_path = root / "pools" / f"{key}.arrow", root / "pools" / f"{key}.rejects.jsonl"
    if path.exists() and (rejects_path.exists() or not skip):
        try:
            return RowFile(path), rejects_path
        except PoolError as error:
            logger.warning("%s; reading the pool again", error)
    remove_leftovers(path.parent, idle=_A_DAY)  # the cache is shared: another process may be writing one now
    try:
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(path))
            rejects = None
            if skip:
                rejects_temporary = stack.enter_context(atomic_path(rejects_path))
                rejects = stack.enter_context(open(rejects_temporary, "w", encoding="utf-8"))
            reader = RowReader(inputs, official, rejects)
            write_rows(temporary, reader.batches(), reader.info)
            for source, digest in zip(inputs, digests, strict=True):
                if source.digest() != digest:
                    raise PoolError(source.name, None, None, "a file that stays as it is while it is read", "a changed one")
    except OSError as error:
        if not is_full(error):
            raise
        raise OSError(f"the disk of the cache {root} is full ({error}): free some space, or set LEAD_FAST_CACHE") from error
    return RowFile(path), rejects_path


def _reject(error: PoolError, payload: Payload) -> str:
    record = {"file": str(error.path), "line": error.line, "field": error.field,
              "reason": f"expected {error.expected}, got {error.got}"}  # fmt: skip
    if isinstance(payload, bytes):
        try:
            record["raw"] = payload.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            record["raw_base64"] = base64.b64encode(payload).decode()
    elif isinstance(payload, dict):
        record["raw"] = json.dumps(payload, default=str)
    return json.dumps(record) + "\n"


def _arrow_row(batch: Any, i: int) -> Payload:
    row: dict[str, Any] = {}
    for name in batch.schema.names:
        try:
            row[name] = batch.column(name)[i].as_py()
        except UnicodeDecodeError as error:
            return RowError(name, "UTF-8 text", f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1}")
    return row


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dataset_digest(dataset: Any) -> str:
    digest = hashlib.sha256()
    for table in dataset.iter(READ_ROWS):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()
