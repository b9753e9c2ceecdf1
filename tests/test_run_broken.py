"""Broken pools by the command line: each is refused with file, line and field, and leaves no output folder."""

import gzip
import json

import pytest

from lead_fast.cli import main

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
LINE = json.dumps(GOOD).encode()


def row(**fields):
    return json.dumps(fields).encode()


def turns(*pairs):
    return row(messages=[{"role": r, "content": c} for r, c in pairs])


# name: (the second of three lines, what the message says beside file and line)
BROKEN_ROWS = {
    "json": (b'{"messages": [', "JSON"),
    "not an object": (b"[1, 2]", "object"),
    "unknown shape": (row(text="hello"), "messages"),
    "messages of the wrong type": (row(messages="hello"), "messages"),
    "no answer": (turns(("user", "q")), "messages"),
    "no messages": (row(messages=[]), "messages"),
    "empty answer": (turns(("user", "q"), ("assistant", "")), "messages"),
    "blank answer": (turns(("user", "q"), ("assistant", " \n")), "messages"),
    "no prompt": (turns(("assistant", "a")), "messages"),
    "unknown role": (turns(("wizard", "q"), ("assistant", "a")), "role"),
    "content of the wrong type": (turns(("user", 3), ("assistant", "a")), "content"),
    "null content": (turns(("user", "q"), ("assistant", None)), "content"),
    "response of the wrong type": (row(prompt="q", response=5), "response"),
    "prompt without response": (row(prompt="q"), "response"),
    "empty output": (row(instruction="q", input="", output=""), "output"),
    "ShareGPT without value": (row(conversations=[{"from": "human"}, {"from": "gpt", "value": "a"}]), "value"),
    "NaN score": (b'{"prompt": "q", "response": "a", "difficulty": NaN, "utility": 1.0}', "difficulty"),
    "infinite score": (b'{"prompt": "q", "response": "a", "utility": Infinity}', "utility"),
    "score on one row only": (row(prompt="q", response="a", utility=1.0), "utility"),
    "invalid UTF-8": (b'{"prompt": "q\xff", "response": "a"}', "UTF-8"),
    "lone surrogate": (b'{"prompt": "q\\ud800", "response": "a"}', "prompt"),
    "id of the wrong type": (row(id=[1], **GOOD), "id"),
}


@pytest.mark.parametrize("name", BROKEN_ROWS)
def test_a_broken_row_is_named_and_nothing_is_written(name, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("LEAD_FAST_CACHE", str(tmp_path / "cache"))
    line, words = BROKEN_ROWS[name]
    pool, out = tmp_path / "pool.jsonl", tmp_path / "out"
    pool.write_bytes(LINE + b"\n" + line + b"\n" + LINE + b"\n")
    assert main(["train", "--model-config", "tiny", "--pool", str(pool), "--out", str(out)]) == 1
    error = capfd.readouterr().err
    assert "pool.jsonl:2" in error and words in error, error
    assert "Traceback" not in error
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["pool.jsonl"]
    assert not out.exists()


def _duplicate(folder):
    path = folder / "pool.jsonl"
    path.write_bytes(b"\n".join([row(id="a", **GOOD), row(id="b", **GOOD), row(id="a", **GOOD)]))
    return path, "pool.jsonl:3"


def _truncated(folder):
    path = folder / "pool.jsonl.gz"
    path.write_bytes(gzip.compress(LINE * 1000)[:-20])
    return path, "pool.jsonl.gz"


def _not_gzip(folder):
    path = folder / "pool.jsonl.gz"
    path.write_bytes(LINE)
    return path, "pool.jsonl.gz"


def _empty(folder):
    path = folder / "pool.jsonl"
    path.write_bytes(b"\n\n")
    return path, "pool.jsonl"


def _absent(folder):
    return folder / "absent.jsonl", "absent.jsonl"


def _unknown(folder):
    path = folder / "pool.csv"
    path.write_text("a,b\n")
    return path, "pool.csv"


def _no_parquet(folder):
    path = folder / "pool.parquet"
    path.write_bytes(b"PAR1 this is not Parquet")
    return path, "pool.parquet"


@pytest.mark.parametrize("make", [_duplicate, _truncated, _not_gzip, _empty, _absent, _unknown, _no_parquet])
def test_a_broken_file_is_named_and_nothing_is_written(make, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("LEAD_FAST_CACHE", str(tmp_path / "cache"))
    pool, words = make(tmp_path)
    out = tmp_path / "out"
    assert main(["prepare", "--model-config", "tiny", "--pool", str(pool), "--out", str(out)]) == 1
    error = capfd.readouterr().err
    assert words in error and "Traceback" not in error, error
    assert not out.exists()


def test_skipping_writes_the_rejects_beside_the_output(tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.setenv("LEAD_FAST_CACHE", str(tmp_path / "cache"))
    pool, out = tmp_path / "pool.jsonl", tmp_path / "out"
    pool.write_bytes(LINE + b"\n" + turns(("user", "q")) + b"\n")
    # The pool that is left has one row: too few to take any for pretraining, which is said.
    code = main(["prepare", "--model-config", "tiny", "--pool", str(pool), "--out", str(out), "--on-bad-row", "skip"])
    assert code == 1
    assert "leave none for the pool" in capfd.readouterr().err
    assert "1 of 2 rows rejected" in caplog.text
    (reject,) = [json.loads(x) for x in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert reject["line"] == 2 and "messages" in reject["field"]
    assert not out.exists()
