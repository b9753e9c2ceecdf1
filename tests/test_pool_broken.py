"""Pools that are broken: each says which file, line and field, leaves nothing behind, hides nothing when skipped."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lead_fast.pool import Pool, PoolError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
GOOD = {"id": "good", "messages": [USER, ANSWER]}
LAST = {"id": "last", "prompt": "q", "response": "a"}
BAD_LINE = 3  # after a good row and a blank line


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEAD_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def messages(*turns: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": list(turns), **fields}


def turn(role: Any, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def sharegpt(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": name, "value": value} for name, value in turns]}


BAD_LINES: dict[str, tuple[bytes, str, str]] = {
    # name: (line, field, part of the message)
    "cut off": (b'{"messages": [', "row", "invalid JSON"),
    "two objects": (b"{} {}", "row", "invalid JSON: Extra data at column 4"),
    "not JSON": (b"user: q, assistant: a", "row", "invalid JSON"),
    "zero bytes": (b"\0" * 8, "row", "invalid JSON"),
    "array": (b'["q", "a"]', "row", "expected a JSON object, got list of 2"),
    "null": (b"null", "row", "got null"),
    "invalid UTF-8": (b'{"prompt": "caf\xe9", "response": "a"}', "row", "UTF-8 text, got byte 0xe9 at byte 16"),
    "UTF-16": ('{"prompt": "q"}'.encode("utf-16"), "row", "UTF-8 text, got byte 0xff at byte 1"),
    "encoded surrogate": (b'{"prompt": "\xed\xa0\x80", "response": "a"}', "row", "UTF-8 text"),
    "huge integer": (b'{"id": ' + b"9" * 5000 + b"}", "row", "beyond the parser's limits"),
    "deep nesting": (b"[" * 200_000, "row", "beyond the parser's limits"),
    "NaN score": (b'{"prompt": "q", "response": "a", "utility": NaN}', "utility", "got float nan"),
    "infinite score": (b'{"prompt": "q", "response": "a", "difficulty": 1e999}', "difficulty", "got float inf"),
}

BAD_ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    # name: (row, field, part of the message)
    "empty object": ({}, "row", "got empty object"),
    "unknown shape": ({"text": "q a"}, "row", "expected `messages`, `conversations`, .* got object with keys 'text'"),
    "messages null": ({"messages": None}, "messages", "got object with keys 'messages'"),
    "messages a string": ({"messages": "q"}, "messages", "a non-empty list of messages, got str 'q'"),
    "messages empty": ({"messages": []}, "messages", "got list of 0"),
    "message a string": (messages("q"), "messages[0]", "an object with `role` and `content`, got str 'q'"),
    "role missing": (messages({"content": "q"}), "messages[0].role", "one of system, user, assistant, tool, got null"),
    "role unknown": (messages(USER, turn("narrator", "x"), ANSWER), "messages[1].role", "got str 'narrator'"),
    "role of ShareGPT": (messages(turn("human", "q"), ANSWER), "messages[0].role", "got str 'human'"),
    "role a list": (messages(turn(["user"], "q")), "messages[0].role", "got list of 1"),
    "content null": (messages(USER, turn("assistant", None)), "messages[1].content", "a string or a list .* got null"),
    "content a number": (messages(turn("user", 7), ANSWER), "messages[0].content", "got int 7"),
    "content an image": (
        messages(turn("user", [{"type": "image_url", "image_url": "u"}]), ANSWER),
        "messages[0].content[0]",
        "a part .* got object with keys 'type', 'image_url'",
    ),
    "part without text": (messages(turn("user", [{"type": "text"}]), ANSWER), "messages[0].content[0]", "a part"),
    "tool call": (messages(USER, turn("assistant", "a", tool_calls=[{}])), "messages[1].tool_calls", "text only"),
    "no answer": (messages(USER), "messages", r"an answer \(an assistant message\), got roles user"),
    "answer empty": (messages(USER, turn("assistant", "")), "messages[1].content", "an answer with text, got str ''"),
    "answer blank": (messages(USER, turn("assistant", " \n")), "messages[1].content", r"with text, got str ' \\n'"),
    "later answer blank": (messages(USER, ANSWER, USER, turn("assistant", "\t")), "messages[3].content", "an answer"),
    "answer of empty parts": (messages(USER, turn("assistant", [])), "messages[1].content", "an answer with text"),
    "no prompt": (messages(ANSWER, USER), "messages", "user message with text before .* got roles assistant, user"),
    "system prompt only": (messages(turn("system", "s"), ANSWER), "messages", "got roles system, assistant"),
    "prompt blank": (messages(turn("user", " "), ANSWER), "messages", "before the first answer, got a blank one"),
    "lone surrogate": (messages(USER, turn("assistant", "a\ud800")), "messages[1].content", r"surrogate '\\ud800' at"),
    "response missing": ({"prompt": "q"}, "response", "an answer in `response` or `completion`"),
    "response empty": ({"prompt": "q", "response": ""}, "response", "an answer with text"),
    "completion blank": ({"prompt": "q", "completion": "\n"}, "completion", "an answer with text"),
    "completion a number": ({"prompt": "q", "completion": 4}, "completion", "a list of messages, got int 4"),
    "completion without answer": ({"prompt": "q", "completion": [USER]}, "completion", "an answer"),
    "prompt empty": ({"prompt": "", "response": "a"}, "prompt", "got a blank one"),
    "prompt list without user": ({"prompt": [turn("system", "s")], "response": "a"}, "prompt", "got roles system"),
    "prompt with surrogate": ({"prompt": "\udfff", "response": "a"}, "prompt", "Unicode text"),
    "output missing": ({"instruction": "q", "input": "i"}, "output", "an answer in `output` or `response`"),
    "instruction a list": ({"instruction": ["q"], "output": "a"}, "instruction", "a string, got list of 1"),
    "instruction and input blank": ({"instruction": " ", "input": "", "output": "a"}, "instruction", "got a blank one"),
    "input a number": ({"instruction": "q", "input": 3, "output": "a"}, "input", "a string, got int 3"),
    "system a list": ({"instruction": "q", "output": "a", "system": ["s"]}, "system", "a string, got list of 1"),
    "ShareGPT role unknown": (sharegpt(("alien", "q")), "conversations[0].from", "one of .* got str 'alien'"),
    "ShareGPT value missing": ({"conversations": [{"from": "human"}]}, "conversations[0].value", "got null"),
    "ShareGPT answer blank": (sharegpt(("human", "q"), ("gpt", " ")), "conversations[1].value", "an answer with text"),
    "ShareGPT without answer": (sharegpt(("human", "q")), "conversations", "an answer"),
    "ShareGPT without prompt": (sharegpt(("gpt", "a")), "conversations", "a user message"),
    "id twice": (GOOD, "id", r"an id that no other row has, got 'good', the id of .*pool\.jsonl:1"),
    "id empty": (GOOD | {"id": ""}, "id", "a non-empty string or an integer, got str ''"),
    "id a boolean": (GOOD | {"id": True}, "id", "got bool True"),
    "id a float": (GOOD | {"id": 1.5}, "id", "got float 1.5"),
    "id with surrogate": (GOOD | {"id": "\ud800"}, "id", "Unicode text"),
    "dataset a number": (GOOD | {"id": "x", "dataset": 3}, "dataset", "a string, got int 3"),
    "source a list": (GOOD | {"id": "x", "source": ["s"]}, "source", "a string, got list of 1"),
}

BAD_SCORES: dict[str, tuple[dict[str, Any], str, str]] = {
    "difficulty negative": ({"difficulty": -0.5}, "difficulty", "a finite number >= 0 .* got float -0.5"),
    "difficulty beyond float32": ({"difficulty": 1e39}, "difficulty", "float32 holds, got float 1e"),
    "utility a string": ({"utility": "2.5"}, "utility", "got str '2.5'"),
    "utility a boolean": ({"utility": True}, "utility", "got bool True"),
    "utility missing": ({"utility": None}, "utility", "a number, as in the first good row, got null"),
    "arm negative": ({"arm": -1}, "arm", "an integer from 0 to 32,767, got int -1"),
    "arm out of range": ({"arm": 32768}, "arm", "got int 32768"),
    "arm a fraction": ({"arm": 1.5}, "arm", "got float 1.5"),
    "task out of range": ({"task": 2**31}, "task", "an integer from 0 to 2,147,483,647, got int 2147483648"),
}

BAD_OFFICIAL: dict[str, tuple[dict[str, Any], str, str]] = {
    "idf NaN": ({"idf": float("nan")}, "idf", "got float nan"),
    "idf null": ({"idf": None}, "idf", "a finite number >= 0 .* got null"),
    "cross_entropy negative": ({"cross_entropy": -1.0}, "cross_entropy", "got float -1.0"),
    "idf_cluster a name": ({"idf_cluster": "hard"}, "idf_cluster", "an integer from 0 to 32,767, got str 'hard'"),
    "task null": ({"task": None}, "task", "got null"),
}


def check_line(folder: Path, good: list[dict[str, Any]], bad: bytes, field: str, part: str) -> None:
    """A file of one good row, a blank line, the bad line and another good row fails, and is read when skipping."""
    path, rejects = folder / "pool.jsonl", folder / "out" / "rejects.jsonl"
    lines = [json.dumps(good[0]).encode(), b"", bad, json.dumps(good[1]).encode()]
    path.write_bytes(b"\n".join(lines) + b"\n")

    with pytest.raises(PoolError, match=part) as caught:
        Pool.open(path, rejects=rejects)
    assert str(caught.value).startswith(f"{path}:{BAD_LINE}: `{field}`: expected ")
    assert (caught.value.path, caught.value.line, caught.value.field) == (path, BAD_LINE, field)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert files(folder) == [path]

    for _ in range(2):  # read, then from the cache
        pool = Pool.open(path, on_bad_row="skip", rejects=rejects)
        assert pool.ids.to_pylist() == [good[0]["id"], good[1]["id"]]
        assert (pool.num_rejected, pool.rejects_path) == (1, rejects)
        (reject,) = map(json.loads, rejects.read_text().splitlines())
        assert (reject["file"], reject["line"], reject["field"]) == (str(path), BAD_LINE, field)
        assert str(caught.value).endswith(reject["reason"])
        raw = reject["raw"].encode() if "raw" in reject else base64.b64decode(reject["raw_base64"]).rstrip(b"\n")
        assert raw == bad
        rejects.unlink()
    with pytest.raises(PoolError, match=part):
        Pool.open(path)


@pytest.mark.parametrize(("bad", "field", "part"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line(tmp_path: Path, bad: bytes, field: str, part: str) -> None:
    scores = {} if field == "row" else {field: 1.0}
    check_line(tmp_path, [GOOD | scores, LAST | scores], bad, field, part)


@pytest.mark.parametrize(("row", "field", "part"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row(tmp_path: Path, row: dict[str, Any], field: str, part: str) -> None:
    check_line(tmp_path, [GOOD, LAST], json.dumps(row).encode(), field, part)


@pytest.mark.parametrize(("scores", "field", "part"), BAD_SCORES.values(), ids=BAD_SCORES)
def test_bad_score(tmp_path: Path, scores: dict[str, Any], field: str, part: str) -> None:
    fine = {"difficulty": 0.5, "utility": 2.5, "arm": 0, "task": 1}
    bad = GOOD | {"id": "bad"} | fine | scores
    check_line(tmp_path, [GOOD | fine, LAST | fine], json.dumps(bad).encode(), field, part)


@pytest.mark.parametrize(("scores", "field", "part"), BAD_OFFICIAL.values(), ids=BAD_OFFICIAL)
def test_bad_official_score(tmp_path: Path, scores: dict[str, Any], field: str, part: str) -> None:
    fine = GOOD | {"dataset": "d", "dataset_id": 1, "idf": 0.5, "cross_entropy": 2.5, "idf_cluster": 0, "task": 1}
    bad = fine | {"id": "bad"} | scores
    check_line(tmp_path, [fine, fine | {"id": "last"}], json.dumps(bad).encode(), field, part)


def test_score_that_only_a_later_row_has(tmp_path: Path) -> None:
    bad = json.dumps(LAST | {"id": "x", "arm": 3}).encode()
    check_line(tmp_path, [GOOD, LAST], bad, "arm", "no value, as in the first good row, got int 3")


def test_official_reader_wants_every_score(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text(json.dumps(GOOD | {"idf": 0.5, "cross_entropy": 2.5, "idf_cluster": 0}))
    assert Pool.from_jsonl(path).task is None
    with pytest.raises(PoolError, match=r"pool\.jsonl:1: `task`: expected an integer .* got null"):
        Pool.from_official(path)


def test_same_id_in_two_shards(tmp_path: Path) -> None:
    for name in ("0.jsonl", "1.jsonl"):
        (tmp_path / "shards").mkdir(exist_ok=True)
        (tmp_path / "shards" / name).write_text("\n" + json.dumps(GOOD))
    with pytest.raises(PoolError, match=r"1\.jsonl:2: `id`: expected .* got 'good', the id of .*0\.jsonl:2$"):
        Pool.open(tmp_path / "shards")


def test_row_number_that_is_also_an_id(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text(json.dumps(GOOD | {"id": 1}) + "\n" + json.dumps({"prompt": "q", "response": "a"}))
    with pytest.raises(PoolError, match=r"pool\.jsonl:2: `id`: expected .* got '1', the id of .*pool\.jsonl:1$"):
        Pool.open(path)


def test_rejects_of_several_rows_and_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "shards").mkdir()
    for name in "ab":
        rows = [{"id": f"{name}{i}", "prompt": "q", "response": "a" if i % 2 else ""} for i in range(6)]
        (tmp_path / "shards" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pool = Pool.open(tmp_path / "shards", on_bad_row="skip")
    assert pool.ids.to_pylist() == ["a1", "a3", "a5", "b1", "b3", "b5"]
    assert pool.num_rejected == 6
    assert f"6 of 12 rows rejected, see {pool.rejects_path}" in caplog.text
    assert pool.rejects_path is not None
    records = [json.loads(line) for line in pool.rejects_path.read_text().splitlines()]
    places = [(Path(record["file"]).name, record["line"]) for record in records]
    assert places == [(name, line) for name in ("a.jsonl", "b.jsonl") for line in (1, 3, 5)]
    assert "6 rejected" in repr(pool)

    pool.save(tmp_path / "prepared")
    pool.rejects_path.unlink()
    loaded = Pool.load(tmp_path / "prepared")
    assert (loaded.num_rejected, loaded.rejects_path) == (6, tmp_path / "prepared" / "rejects.jsonl")
    again = Pool.open(tmp_path / "shards", on_bad_row="skip")  # a cache without its rejects is no cache
    assert again.rejects_path is not None
    assert [json.loads(line) for line in again.rejects_path.read_text().splitlines()] == records


def test_skipping_nothing_says_so(tmp_path: Path) -> None:
    path, rejects = tmp_path / "pool.jsonl", tmp_path / "rejects.jsonl"
    path.write_text(json.dumps(GOOD))
    rejects.write_text("of an earlier run")
    assert Pool.open(path, on_bad_row="skip").rejects_path is None
    assert Pool.open(path, on_bad_row="skip", rejects=rejects).rejects_path == rejects
    assert rejects.read_text() == ""
    with pytest.raises(ValueError, match="`on_bad_row` must be 'error' or 'skip', got 'ignore'"):
        Pool.open(path, on_bad_row="ignore")


def gzipped(cut: Callable[[bytes], bytes]) -> bytes:
    """A pool of 1,000 rows, compressed, then damaged."""
    random = Random(0)
    rows = [{"id": str(i), "prompt": random.randbytes(40).hex(), "response": "a"} for i in range(1000)]
    return cut(gzip.compress("\n".join(map(json.dumps, rows)).encode(), mtime=0))


def damaged(data: bytes) -> bytes:
    return data[:30_000] + bytes(64) + data[30_064:]


BAD_FILES: dict[str, tuple[str, bytes, str | None, str]] = {
    # name: (file name, bytes, field, part of the message)
    "empty": ("pool.jsonl", b"", None, "at least one row, got no rows"),
    "blank lines only": ("pool.jsonl", b"\n \n\r\n", None, "at least one row"),
    "byte order mark only": ("pool.jsonl", b"\xef\xbb\xbf", None, "at least one row"),
    "empty gzip": ("pool.jsonl.gz", gzip.compress(b""), None, "at least one row"),
    "gzip cut off": ("pool.jsonl.gz", gzipped(lambda data: data[: len(data) // 2]), "row", "gzip data to the end"),
    "gzip cut at its checksum": ("pool.jsonl.gz", gzipped(lambda data: data[:-4]), "row", "gzip data to the end"),
    "gzip damaged": ("pool.jsonl.gz", gzipped(damaged), "row", "gzip data to the end|invalid JSON"),
    "not gzip": ("pool.jsonl.gz", b'{"prompt": "q"}', "row", "gzip data to the end of the file, got Not a gzip"),
    "Parquet cut off": ("pool.parquet", b"PAR1" + bytes(100), "row", "a Parquet file readable to its end"),
    "Parquet empty": ("pool.parquet", b"", "row", "a Parquet file readable to its end"),
    "unknown suffix": ("pool.csv", b"q,a", None, "a name ending in .jsonl, .jsonl.gz or .parquet, got 'pool.csv'"),
    "no suffix": ("pool", b"q,a", None, "a name ending in"),
}


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize(("name", "data", "field", "part"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(tmp_path: Path, name: str, data: bytes, field: str | None, part: str, on_bad_row: Any) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PoolError, match=part) as caught:
        Pool.open(tmp_path / name, on_bad_row=on_bad_row, rejects=tmp_path / "rejects.jsonl")
    assert str(caught.value).startswith(str(tmp_path / name))
    assert caught.value.field == field
    assert files(tmp_path) == [tmp_path / name]


def test_damaged_gzip_names_the_line_reached(tmp_path: Path) -> None:
    half = gzipped(lambda data: data[: len(data) // 2])
    (tmp_path / "pool.jsonl.gz").write_bytes(half)
    with pytest.raises(PoolError) as caught:
        Pool.open(tmp_path / "pool.jsonl.gz")
    assert caught.value.line == zlib.decompressobj(wbits=31).decompress(half).count(b"\n") + 1 > 400


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_places_without_a_pool(tmp_path: Path, on_bad_row: Any) -> None:
    for name in ("nothing", "mixed", "prepared", "dataset"):
        (tmp_path / name).mkdir()
    (tmp_path / "nothing" / "README.md").write_text("no data")
    for name in ("pool.jsonl", "pool.parquet"):
        (tmp_path / "mixed" / name).touch()
    (tmp_path / "prepared" / "pool.json").write_text("{}")
    (tmp_path / "dataset" / "dataset_info.json").write_text("{}")
    for name, part in [
        ("absent", "expected a file or folder, got a path that does not exist"),
        ("nothing", "expected a prepared pool, a datasets folder, or shards .* got none of them"),
        ("mixed", "shards of one kind .* got both JSONL and Parquet"),
        ("prepared", "expected a prepared pool, got FileNotFoundError"),
        ("dataset", "expected a readable datasets folder"),
    ]:
        with pytest.raises(PoolError, match=part) as caught:
            Pool.open(tmp_path / name, on_bad_row=on_bad_row)
        assert str(caught.value).startswith(str(tmp_path / name))
    with pytest.raises(PoolError, match="expected a file, got a folder"):
        Pool.from_jsonl(tmp_path / "nothing")
    with pytest.raises(PoolError, match="expected a file, got a path that does not exist"):
        Pool.from_parquet(tmp_path / "absent.parquet")
    assert not files(tmp_path / "cache")


def test_nothing_but_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join([json.dumps({"prompt": "q", "response": ""})] * 5))
    with pytest.raises(PoolError, match=r"at least one good row, got 5 bad, the first .* answer with text") as caught:
        Pool.open(path, on_bad_row="skip", rejects=tmp_path / "rejects.jsonl")
    assert (caught.value.path, caught.value.line, caught.value.field) == (path, 1, "response")
    assert files(tmp_path) == [path]


def invalid_utf8() -> pa.Array:
    """Three strings, the second of them the single byte 0xff."""
    offsets, data = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffc")
    return pa.StringArray.from_buffers(3, offsets, data)


BAD_TABLES: dict[str, tuple[dict[str, Any], str, str]] = {
    # name: (columns; the second row is bad, field, part of the message)
    "null": ({"messages": [[USER, ANSWER], None, [USER, ANSWER]]}, "messages", "got object with keys 'messages'"),
    "null content": (
        {"messages": [[USER, ANSWER], [USER, turn("assistant", None)], [USER, ANSWER]]},
        "messages[1].content",
        "got null",
    ),
    "null answer": ({"prompt": ["q"] * 3, "response": ["a", None, "a"]}, "response", "an answer in `response`"),
    "id twice": ({"prompt": ["q"] * 3, "response": ["a"] * 3, "id": [4, 4, 5]}, "id", "got '4', the id of .*:1$"),
    "NaN": ({"prompt": ["q"] * 3, "response": ["a"] * 3, "utility": [1, float("nan"), 1]}, "utility", "float nan"),
    "invalid UTF-8": ({"prompt": ["q"] * 3, "response": invalid_utf8()}, "response", "UTF-8 text, got byte 0xff"),
}


@pytest.mark.parametrize(("columns", "field", "part"), BAD_TABLES.values(), ids=BAD_TABLES)
@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_bad_row_of_a_table(tmp_path: Path, kind: str, columns: dict[str, Any], field: str, part: str) -> None:
    path, read = tmp_path / "pool.parquet", Pool.from_parquet
    if kind == "parquet":
        pq.write_table(pa.table(columns), path)
    else:
        datasets = pytest.importorskip("datasets", reason="needs the extra lead-fast[datasets]")
        path, read = tmp_path / "dataset", Pool.from_dataset
        datasets.Dataset(pa.table(columns)).save_to_disk(path)
    before = files(tmp_path)
    with pytest.raises(PoolError, match=part) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2: `{field}`: expected ")
    assert files(tmp_path) == before
    pool = read(path, on_bad_row="skip", rejects=tmp_path / "rejects.jsonl")
    assert (len(pool), pool.num_rejected) == (2, 1)
    (reject,) = map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    assert (reject["file"], reject["line"], reject["field"]) == (str(path), 2, field)


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_tables_that_hold_no_rows_of_any_shape(tmp_path: Path, on_bad_row: Any) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra lead-fast[datasets]")
    wrong, path = pa.table({"prompt": ["q"], "answer": ["a"]}), tmp_path / "pool.parquet"
    pq.write_table(wrong, path)
    for call in (lambda: Pool.open(path, on_bad_row=on_bad_row), lambda: Pool.from_dataset(datasets.Dataset(wrong))):
        with pytest.raises(PoolError, match=r"`columns`: expected `messages`, .* got `prompt`, `answer`$"):
            call()
    pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "response": pa.array([], pa.string())}), path)
    with pytest.raises(PoolError, match=r"pool\.parquet: expected at least one row, got no rows"):
        Pool.open(path, on_bad_row=on_bad_row)
    with pytest.raises(TypeError, match=r"must be a path or a datasets\.Dataset, got list"):
        Pool.from_dataset([GOOD])
    split = datasets.Dataset.from_list([GOOD])
    with pytest.raises(PoolError, match="one split, or the path of one split's subfolder, got splits train, test"):
        Pool.from_dataset(datasets.DatasetDict(train=split, test=split))
    assert not files(tmp_path / "cache")


def test_file_that_grows_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    digests = iter(("before", "after"))
    monkeypatch.setattr("lead_fast.rowfile._file_digest", lambda _: next(digests))
    with pytest.raises(PoolError, match="stays as it is while it is read"):
        Pool.open(path)
    assert files(tmp_path) == [path]


def test_failure_late_in_the_file_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lead_fast.rowfile.BATCH_ROWS", 4)
    path = tmp_path / "pool.jsonl"
    rows = [{"prompt": "q", "response": "a"}] * 50
    path.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "q"}])))
    with pytest.raises(PoolError, match=r"pool\.jsonl:51: `response`"):
        Pool.open(path)
    assert files(tmp_path) == [path]
