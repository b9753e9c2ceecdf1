"""Pools that are as they should be: every way in gives the same rows, and text stays on disk."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lead_fast import rowfile
from lead_fast.pool import Pool, PoolError

DATA = Path(os.environ.get("LEAD_FAST_DATA") or Path(__file__).parents[2] / "shared" / "data")
MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4\n"}]
SYSTEM = {"role": "system", "content": "Be brief."}
UNICODE = [{"role": "user", "content": "hé ☃"}, {"role": "assistant", "content": "𝄞"}]
SECOND = [{"role": "user", "content": ""}, {"role": "assistant", "content": "5"}]
ROWS: list[dict[str, Any]] = [
    {"id": "a", "dataset": "x", "messages": MESSAGES},
    {"id": "b", "dataset": "y", "messages": [SYSTEM, *UNICODE]},
    {"id": "c", "dataset": "x", "messages": [*MESSAGES, *SECOND]},
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAD_FAST_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def contents(pool: Pool) -> list[dict[str, Any]]:
    """The rows of a pool as written in ROWS."""
    assert pool.sources is not None
    names = [pool.source_names[code] for code in pool.sources]
    ids = [pool.id(row) for row in range(len(pool))]
    return [
        {"id": i, "dataset": name, "messages": messages}
        for i, name, messages in zip(ids, names, pool.iter_messages(), strict=True)
    ]


def official(**changes: Any) -> dict[str, Any]:
    scores = {"dataset_id": 3, "idf": 0.5, "cross_entropy": 1.25, "idf_cluster": 2, "task": 9, "query_token": 11}
    return {"dataset": "x", "messages": MESSAGES} | scores | changes


SHAPES = {
    "messages": {"messages": MESSAGES},
    "text parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "4\n"}]},
        ]
    },
    "more keys": {"messages": [{**message, "name": None, "tool_calls": []} for message in MESSAGES]},
    "prompt, response": {"prompt": "What is 2 + 2?", "response": "4\n"},
    "prompt, completion": {"prompt": "What is 2 + 2?", "completion": "4\n", "messages": None},
    "prompt and completion as lists": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "instruction, output": {"instruction": "What is 2 + 2?", "output": "4\n"},
    "instruction, response": {"instruction": "What is 2 + 2?", "response": "4\n"},
    "instruction, empty input": {"instruction": "What is 2 + 2?", "input": "", "output": "4\n", "system": ""},
    "instruction, null input": {"instruction": "What is 2 + 2?", "input": None, "output": "4\n"},
    "input alone": {"instruction": "", "input": "What is 2 + 2?", "output": "4\n"},
    "conversations": {"conversations": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4\n"}]},
    "official": official(),
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_every_row_shape_gives_the_same_messages(tmp_path: Path, row: dict[str, Any]) -> None:
    pool = Pool.from_jsonl(write(tmp_path / "pool.jsonl", [row]))
    assert pool.messages(0) == MESSAGES
    assert list(pool.iter_messages()) == [MESSAGES]
    assert pool.has_text
    assert pool.id(0) == "0"


def test_row_shapes_mix_in_one_file(tmp_path: Path) -> None:
    rows = [row for name, row in SHAPES.items() if name != "official"]
    pool = Pool.from_jsonl(write(tmp_path / "pool.jsonl", rows))
    assert list(pool.iter_messages()) == [MESSAGES] * len(rows)
    assert pool.sources is None


def test_every_way_in_gives_the_same_pool(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra lead-fast[datasets]")
    plain = write(tmp_path / "pool.jsonl", ROWS)
    zipped = write(tmp_path / "pool.jsonl.gz", ROWS)
    shards = [write(tmp_path / "shards" / "0.jsonl.gz", ROWS[:2]), write(tmp_path / "shards" / "1.jsonl", ROWS[2:])]
    (tmp_path / "shards" / "README.md").write_text("not a shard")
    write(tmp_path / "shards" / ".0.jsonl", [{"not": "a row"}])
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "pool.parquet")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "dataset")
    datasets.DatasetDict(train=dataset).save_to_disk(tmp_path / "splits")
    shuffled = dataset.select([2, 0, 1]).select([1, 2, 0])
    names = ("pool.jsonl", "pool.jsonl.gz", "shards", "pool.parquet", "dataset", "splits")
    pools = [
        Pool.from_jsonl(plain),
        Pool.from_jsonl(str(zipped)),
        Pool.from_jsonl(shards),
        Pool.from_parquet(tmp_path / "pool.parquet"),
        Pool.from_dataset(dataset),
        Pool.from_dataset(shuffled),
        Pool.from_dataset(tmp_path / "dataset"),
        *(Pool.open(tmp_path / name) for name in names),
    ]
    for pool in pools:
        assert contents(pool) == ROWS
        assert pool.fingerprint == pools[0].fingerprint
        assert (pool.source_names, pool.sources.dtype) == (["x", "y"], np.int32)
        assert (len(pool), pool.num_arms, pool.num_rejected, pool.rejects_path) == (3, 0, 0, None)
        assert not pool.aside.any()


def test_datasets_is_asked_for_only_where_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(Pool.open(write(tmp_path / "pool.jsonl", ROWS))) == 3
    with pytest.raises(ImportError, match=r"lead-fast\[datasets\]"):
        Pool.from_dataset(tmp_path)


def test_byte_order_mark_crlf_and_blank_lines(tmp_path: Path) -> None:
    lines = [json.dumps(row).encode() for row in ROWS]
    (tmp_path / "pool.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n \t\r\n".join(lines))
    assert contents(Pool.from_jsonl(tmp_path / "pool.jsonl")) == ROWS


def test_ids_and_sources_that_some_rows_lack(tmp_path: Path) -> None:
    rows = [row | {"messages": MESSAGES} for row in ({}, {"id": 7, "source": "s"}, {"dataset": "d", "source": "s"})]
    pool = Pool.from_jsonl(write(tmp_path / "pool.jsonl", rows))
    assert pool.ids.to_pylist() == ["0", "7", "2"]
    assert pool.source_names == ["unknown", "s", "d"]
    assert pool.sources is not None
    assert pool.sources.tolist() == [0, 1, 2]


def test_scores_in_any_row_shape(tmp_path: Path) -> None:
    scores = {"difficulty": 1, "utility": 2.5, "arm": 1.0, "task": 4}
    rows = [{"prompt": "q", "response": "a", **scores}, {"messages": MESSAGES, **scores, "arm": 0, "difficulty": 0.25}]
    pool = Pool.from_jsonl(write(tmp_path / "pool.jsonl", rows))
    for name, values, dtype in [("difficulty", [1, 0.25], np.float32), ("utility", [2.5, 2.5], np.float32),
                                ("arm", [1, 0], np.int16), ("task", [4, 4], np.int32)]:  # fmt: skip
        array = getattr(pool, name)
        assert (array.tolist(), array.dtype) == (values, dtype)
    assert pool.num_arms == 2


@pytest.mark.parametrize("name", ["pool.jsonl", "pool.jsonl.gz", "pool.parquet"])
def test_official_pool(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [official(idf_cluster=cluster, idf=0.1 * i, task=i) for i, cluster in enumerate([5, 2, 9, 2])]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        write(tmp_path / name, rows)
        assert Pool.from_official(tmp_path / name).arm.tolist() == [1, 0, 2, 0]
    with caplog.at_level("INFO"):
        pool = Pool.open(tmp_path / name)
    assert pool.arm.tolist() == [1, 0, 2, 0]
    assert "[2, 5, 9] renumbered 0 to 2" in caplog.text
    assert pool.task.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(pool.difficulty, [0, 0.1, 0.2, 0.3], rtol=1e-6)
    assert pool.utility.tolist() == [1.25] * 4
    assert pool.ids.to_pylist() == ["0", "1", "2", "3"]


def test_second_reading_parses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Pool.from_jsonl(write(tmp_path / "pool.jsonl", ROWS))
    os.rename(tmp_path / "pool.jsonl", tmp_path / "other.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(rowfile, "RowReader", lambda *_: pytest.fail("read again"))
        again = Pool.from_jsonl(tmp_path / "other.jsonl")
    assert (again.path, again.fingerprint, contents(again)) == (first.path, first.fingerprint, ROWS)
    changed = Pool.from_jsonl(write(tmp_path / "other.jsonl", ROWS[:2]))
    elsewhere = Pool.from_jsonl(tmp_path / "other.jsonl", cache_dir=tmp_path / "elsewhere")
    assert len({first.path, changed.path, elsewhere.path}) == 3
    assert changed.fingerprint == elsewhere.fingerprint != first.fingerprint
    assert elsewhere.path.parent == tmp_path / "elsewhere" / "pools"


def test_what_a_killed_process_left_in_the_cache_goes_after_a_day(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "pools"
    cache.mkdir(parents=True)
    left, written = cache / ".a.arrow.0123.tmp", cache / ".b.arrow.4567.tmp"
    for path in (left, written):
        path.write_text("a part of it")
    os.utime(left, (0, time.time() - 90_000))
    (tmp_path / "pool.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    Pool.from_jsonl(tmp_path / "pool.jsonl")
    assert [path.name for path in cache.glob(".*")] == [written.name]


@pytest.mark.parametrize("keep", [0, 100, -20])
def test_damaged_cache_is_replaced(tmp_path: Path, keep: int, caplog: pytest.LogCaptureFixture) -> None:
    path = Pool.from_jsonl(write(tmp_path / "pool.jsonl", ROWS)).path
    path.write_bytes(path.read_bytes()[:keep])
    assert contents(Pool.from_jsonl(tmp_path / "pool.jsonl")) == ROWS
    assert "reading the pool again" in caplog.text


def test_fingerprint_is_that_of_ids_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "id": [row["id"] for row in ROWS],
        "role": [message["role"] for row in ROWS for message in row["messages"]],
        "content": [message["content"] for row in ROWS for message in row["messages"]],
    }
    parts = {"turns": struct.pack("<3i", *(len(row["messages"]) for row in ROWS))}
    for name, strings in texts.items():
        encoded = [string.encode() for string in strings]
        parts[f"{name} bytes"] = b"".join(encoded)
        parts[f"{name} lengths"] = struct.pack(f"<{len(encoded)}i", *map(len, encoded))
    digests = [name.encode() + hashlib.sha256(data).digest() for name, data in sorted(parts.items())]
    expected = hashlib.sha256(b"".join(digests)).hexdigest()

    file = write(tmp_path / "pool.jsonl", ROWS)
    for i, (rows, chars) in enumerate([(4096, 1 << 25), (2, 1 << 25), (4096, 1)]):
        monkeypatch.setattr(rowfile, "BATCH_ROWS", rows)
        monkeypatch.setattr(rowfile, "BATCH_CHARS", chars)
        pool = Pool.from_jsonl(file, cache_dir=tmp_path / str(i))
        assert pool.fingerprint == expected
        assert pool.subset([0, 1, 2]).fingerprint == expected
        assert pool.subset([1, 0, 2]).fingerprint != expected
        assert contents(pool) == ROWS
    fingerprint, table = rowfile.Fingerprint(), rowfile.RowFile(pool.path).take(np.arange(3))
    for start in range(3):
        fingerprint.update(table.slice(start, 1))
    assert fingerprint.hexdigest() == expected
    cuts = [Pool.from_jsonl(write(file, [{"prompt": "abc"[:n], "response": "abc"[n:]}])) for n in (1, 2)]
    assert cuts[0].fingerprint != cuts[1].fingerprint


def numbered(tmp_path: Path, n: int, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """n rows in batches of 7; row i says i."""
    monkeypatch.setattr(rowfile, "BATCH_ROWS", 7)
    rows = [{"id": f"r{i}", "dataset": f"d{i % 3}", "prompt": f"say {i}", "response": str(i), "arm": i % 4} for i in range(n)]
    pool = Pool.from_jsonl(write(tmp_path / "numbered.jsonl", rows))
    return pool.with_arrays(utility=np.arange(n), aside=np.arange(n) % 5 == 0)


def test_subset_is_seen_by_every_accessor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = numbered(tmp_path, 50, monkeypatch)
    rows = np.random.default_rng(0).permutation(50)[:20]
    for subset, kept in [
        (pool.subset(rows), rows),
        (pool.subset(rows).subset([3, 1, 2]), rows[[3, 1, 2]]),
        (pool.subset(np.arange(50) % 7 == 1), np.arange(1, 50, 7)),
        (pool.subset([]), rows[:0]),
    ]:
        assert len(subset) == len(kept)
        assert subset.ids.to_pylist() == [f"r{i}" for i in kept]
        assert [subset.id(i) for i in range(len(kept))] == [f"r{i}" for i in kept]
        assert [m[1]["content"] for m in subset.iter_messages()] == [str(i) for i in kept]
        assert [subset.messages(i)[1]["content"] for i in range(len(kept))] == [str(i) for i in kept]
        assert subset.utility.tolist() == kept.tolist()
        assert subset.aside.tolist() == (kept % 5 == 0).tolist()
        assert subset.arm.tolist() == (kept % 4).tolist()
        assert [subset.source_names[s] for s in subset.sources] == [f"d{i % 3}" for i in kept]
        assert subset.path == pool.path
    backwards = np.arange(19, -1, -1)
    assert [m[1]["content"] for m in pool.subset(rows).iter_messages(backwards)] == [str(i) for i in rows[::-1]]
    assert [m[1]["content"] for m in pool.iter_messages([4, 4, 49, 0])] == ["4", "4", "49", "0"]


def test_with_arrays_shares_text_and_spares_the_old_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = numbered(tmp_path, 10, monkeypatch)
    other = pool.with_arrays(arm=[0] * 10, num_tokens=range(10), utility=None, aside=None)
    assert (other.num_arms, other.utility, other.aside.any(), other.num_tokens.dtype) == (1, None, False, np.int32)
    assert (pool.num_arms, pool.num_tokens, pool.aside.sum()) == (4, None, 2)
    assert (other.path, other.fingerprint, other.messages(3)) == (pool.path, pool.fingerprint, pool.messages(3))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arm": [0, 1]}, r"`arm` must be \[3\], one value a row, got \[2\]"),
        ({"arm": [[0, 1, 2]]}, r"`arm` must be \[3\], one value a row, got \[1, 3\]"),
        ({"arm": [0.5, 1, 2]}, r"`arm` must convert to int16, got float64"),
        ({"arm": [0, 1, 32768]}, r"`arm` must be finite, in 0\.\.32767, got 32768 in row 2"),
        ({"task": [0, -1, 0]}, r"`task` must be .* got -1 in row 1"),
        ({"utility": [0, 1, float("nan")]}, r"`utility` must be finite, .* got nan in row 2"),
        ({"difficulty": [float("inf"), 1, 1]}, r"`difficulty` must be finite, .* got inf in row 0"),
        ({"utility": ["a", "b", "c"]}, r"`utility` must convert to float32"),
        ({"aside": [0, 1, 0]}, r"`aside` must convert to bool"),
        ({"loss": [0, 1, 0]}, r"expected any of arm, .*, got `loss`"),
    ],
)
def test_wrong_arrays_are_refused(arrays: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Pool.from_arrays(arm=[0, 1, 2]).with_arrays(**arrays)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 3], r"`rows` must be in 0\.\.2, got 0 to 3"),
        ([-1], r"`rows` must be in 0\.\.2, got -1 to -1"),
        ([0.0, 1.0], r"`rows` must be integers"),
        ([True, False], r"`rows` must be integers \[n\] or bool \[3\], got bool \[2\]"),
        ([[0, 1]], r"`rows` must be integers"),
        ([1, 1, 2], r"`rows` must be distinct, got 1 repeated"),
    ],
)
def test_wrong_rows_are_refused(rows: list[Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Pool.from_arrays(arm=[0, 1, 2]).subset(rows)


def test_from_arrays(tmp_path: Path) -> None:
    pool = Pool.from_arrays(arm=[0, 4, 4], task=[1, 2, 2], utility=[0.5, 1, 2], ids=["a", 5, "c"])
    assert (len(pool), pool.num_arms, pool.path, pool.has_text, pool.sources) == (3, 5, None, False, None)
    assert pool.ids.to_pylist() == ["a", "5", "c"]
    assert pool.fingerprint != Pool.from_arrays(arm=[0, 4, 4]).fingerprint
    for call in (lambda: pool.messages(0), pool.iter_messages, lambda: pool.export_jsonl([0], tmp_path / "x")):
        with pytest.raises(ValueError, match="must have text"):
            call()
    with pytest.raises(ValueError, match=r"`row` must be in 0\.\.2, got 3"):
        pool.id(3)
    for wrong in ({"ids": ["a", "b"]}, {"ids": ["a", "b", "a"]}, {"arm": []}):
        with pytest.raises(ValueError, match=r"Pool\.from_arrays"):
            Pool.from_arrays(**{"arm": [0, 1, 2], **wrong})
    loaded = Pool.load(save(pool.subset([2, 0]), tmp_path / "saved"))
    assert (loaded.ids.to_pylist(), loaded.utility.tolist(), loaded.has_text) == (["c", "a"], [2, 0.5], False)


def save(pool: Pool, folder: Path) -> Path:
    pool.save(folder)
    return folder


def test_save_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = numbered(tmp_path, 50, monkeypatch).with_arrays(num_tokens=np.arange(50), difficulty=np.linspace(0, 1, 50))
    for pool in (whole, whole.subset(np.arange(49, 0, -3)), whole.with_arrays(arm=None)):
        loaded = Pool.open(save(pool, tmp_path / "prepared"))
        names = sorted(file.name for file in (tmp_path / "prepared").iterdir())
        assert names == ["arrays.safetensors", "pool.json", "rows.arrow"]
        assert contents(loaded) == contents(pool)
        assert loaded.fingerprint == pool.fingerprint
        for name in ("arm", "task", "utility", "difficulty", "num_tokens", "aside"):
            old, new = getattr(pool, name), getattr(loaded, name)
            assert (old is None) == (new is None)
            assert old is None or (old.dtype == new.dtype and np.array_equal(old, new))
        again = save(loaded.subset(np.arange(len(loaded))), tmp_path / "prepared")
        assert contents(Pool.load(again)) == contents(pool)
    assert json.loads((tmp_path / "prepared" / "pool.json").read_text())["rows"] == 50


def test_save_spares_folders_that_are_no_pool(tmp_path: Path) -> None:
    pool = Pool.from_arrays(arm=[0, 1])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="`folder` must be new, empty or a prepared pool"):
        pool.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    with pytest.raises(ValueError, match="at least 1 row"):
        pool.subset([]).save(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert len(Pool.load(save(pool, tmp_path / "empty"))) == 2


def test_failed_save_keeps_the_old_pool_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(Pool.from_arrays(arm=[0, 1]), tmp_path / "prepared")

    def full_disk(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("lead_fast.pool.write_json", full_disk)
    with pytest.raises(OSError, match="no space left"):
        Pool.from_arrays(arm=[0, 1, 2]).save(tmp_path / "prepared")
    assert [file.name for file in tmp_path.iterdir()] == ["prepared"]
    assert len(Pool.load(tmp_path / "prepared")) == 2


def test_prepared_pool_whose_files_do_not_fit_is_refused(tmp_path: Path) -> None:
    folder, other = (save(Pool.from_arrays(arm=range(n)), tmp_path / str(n)) for n in (2, 3))
    for name, field in [("rows.arrow", "fingerprint"), ("arrays.safetensors", "arm|aside")]:
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes((other / name).read_bytes())
        with pytest.raises(PoolError, match=rf"{name}.*`({field})`"):
            Pool.load(folder)
        (folder / name).write_bytes(kept[:50])
        with pytest.raises(PoolError, match="expected a"):
            Pool.load(folder)
        (folder / name).unlink()
        with pytest.raises(PoolError, match="expected a"):
            Pool.load(folder)
        (folder / name).write_bytes(kept)
    summary = json.loads((folder / "pool.json").read_text())
    (folder / "pool.json").write_text(json.dumps(summary | {"format": 99}))
    with pytest.raises(PoolError, match=r"pool.json: `format`: expected 1, got 99"):
        Pool.load(folder)


def test_export_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool.from_jsonl(write(tmp_path / "pool.jsonl", ROWS))
    for name in ("chosen.jsonl", "chosen.jsonl.gz"):
        pool.export_jsonl(np.array([2, 0]), tmp_path / "out" / name, extra=[{"rounds": [1, 4]}, {"rounds": [2]}])
        assert contents(Pool.open(tmp_path / "out" / name)) == [ROWS[2], ROWS[0]]
    lines = (tmp_path / "out" / "chosen.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["rounds"] for line in lines] == [[1, 4], [2]]


@pytest.mark.parametrize("extra", [[{}], [{}, {"id": "z"}], [{}, {"loss": float("nan")}]])
def test_failed_export_leaves_nothing(tmp_path: Path, extra: list[dict[str, Any]]) -> None:
    pool = Pool.from_jsonl(write(tmp_path / "pool.jsonl", ROWS))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"extra|JSON"):
        pool.export_jsonl([0, 1], tmp_path / "out" / "chosen.jsonl", extra=extra)
    with pytest.raises(ValueError, match="must not be a folder"):
        pool.export_jsonl([0, 1], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_text_stays_on_disk(tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": "q" * 4000, "response": "a" * 4000} for i in range(3000)]
    write(tmp_path / "pool.jsonl", rows)
    Pool.from_jsonl(tmp_path / "pool.jsonl")
    before, memory = pa.total_allocated_bytes(), pa.default_memory_pool()
    pool = Pool.from_jsonl(tmp_path / "pool.jsonl")
    assert pool.path is not None
    assert pool.path.stat().st_size > 24_000_000
    assert (pool.id(2999), pool.messages(2999)[0]["content"]) == ("2999", "q" * 4000)
    assert sum(len(messages) for messages in pool.iter_messages()) == 6000
    subset = pool.subset(np.arange(0, 3000, 2))
    assert pa.total_allocated_bytes() - before < 200_000, memory.backend_name
    assert len(pickle.dumps(pool)) < 10_000
    assert len(pickle.dumps(subset)) < 30_000


def test_pickled_pool_maps_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = numbered(tmp_path, 50, monkeypatch)
    for original in (pool, pool.subset([5, 3]), Pool.from_arrays(arm=[0, 1])):
        copied = pickle.loads(pickle.dumps(original))
        assert copied.fingerprint == original.fingerprint
        assert copied.ids.to_pylist() == original.ids.to_pylist()
        assert np.array_equal(copied.arm, original.arm)
        assert not original.has_text or contents(copied) == contents(original)
    stored = pickle.dumps(pool)
    os.replace(Pool.from_jsonl(write(tmp_path / "other.jsonl", ROWS)).path, pool.path)
    with pytest.raises(PoolError, match="`fingerprint`"):
        pickle.loads(stored)


def test_repr_says_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = repr(numbered(tmp_path, 50, monkeypatch))
    for part in ("50 rows from", "3 sources: d0 17, d1 17, d2 16", "4 arms of 12 to 13 rows", "10 set aside"):
        assert part in text
    assert repr(Pool.from_arrays(arm=[0, 2])) == "Pool(2 rows without text; 3 arms of 0 to 1 rows)"


def test_the_real_pool(tmp_path: Path) -> None:
    if not (DATA / "pool.jsonl.gz").exists():
        pytest.skip("needs pool.jsonl.gz in $LEAD_FAST_DATA or ../shared/data")
    pool = Pool.open(DATA / "pool.jsonl.gz")
    assert (len(pool), len(set(pool.ids.to_pylist()))) == (25038, 25038)
    counts = dict(zip(pool.source_names, np.bincount(pool.sources).tolist(), strict=True))
    assert counts == {"gsm8k": 6420, "toolformer": 6653, "bbh": 5618, "codegen": 3866, "roleplay": 1632, "svamp": 849}
    with gzip.open(DATA / "pool.jsonl.gz", "rt", encoding="utf-8") as file:
        for line, messages in zip(file, pool.iter_messages(), strict=True):
            assert json.loads(line)["messages"] == messages
