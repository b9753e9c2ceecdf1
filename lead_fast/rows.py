"""One row of a pool: read it from a line or an Arrow batch, say what is wrong with it, give it its one normal form.

Row shapes; the first that fits counts, and a field that is null counts as absent:

| shape | fields | becomes |
|---|---|---|
| messages | `messages`: list of {role, content} | itself |
| ShareGPT | `conversations`: list of {from, value} | roles by `SHAREGPT_ROLES` |
| prompt | `prompt`; `response` or `completion`: strings or message lists | user, assistant; lists are joined |
| instruction | `instruction`, `input` (optional); `output` or `response` | user: both, blank line between; assistant |

A `content` is a string or a list of {"type": "text", "text": str} parts, which are joined. `system` beside any shape
but the first becomes a leading system message. A good row has a user message with text before its first answer, at
least one answer, and no blank answer. Fields not named here are ignored.

Scores, in any shape: `difficulty`, `utility` (finite, >= 0), `arm` (integer, 0 to 32,767), `task` (integer, 0 to
2^31 - 1). A row of the official LEAD pool has `messages` and `idf`, `cross_entropy`, `idf_cluster`, `task` instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

Turn: TypeAlias = tuple[str, str]
"""Role and content of one message."""

Payload: TypeAlias = "bytes | dict[str, Any] | RowError"
"""A row as an input gives it: a line not yet parsed, a record, or what kept it from becoming one."""

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = ROLES | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
}

SCORE_MAX = {"difficulty": 3.4028234663852886e38, "utility": 3.4028234663852886e38, "arm": 2**15 - 1, "task": 2**31 - 1}
"""The largest value of each score column: what float32, int16 and int32 hold."""

INTEGER_SCORES = frozenset(("arm", "task"))
PLAIN_SCORES = {name: name for name in SCORE_MAX}
OFFICIAL_SCORES = {"idf": "difficulty", "cross_entropy": "utility", "idf_cluster": "arm", "task": "task"}

ANSWERS = {"prompt": ("response", "completion"), "instruction": ("output", "response")}
FIELDS = {"messages", "conversations", "system", "input", "id", "dataset", "source", *PLAIN_SCORES, *OFFICIAL_SCORES}
FIELDS |= {field for prompt, answers in ANSWERS.items() for field in (prompt, *answers)}
SHAPES = "`messages`, `conversations`, `prompt` + `response` or `completion`, or `instruction` + `output` or `response`"

_SCORE_FIELDS = {*PLAIN_SCORES, *OFFICIAL_SCORES}
_decode_json = json.JSONDecoder().decode


class RowError(ValueError):
    """What is wrong with a row, before anyone knows which file it came from."""

    def __init__(self, field: str, expected: str, got: str) -> None:
        super().__init__(field, expected, got)
        self.field, self.expected, self.got = field, expected, got

    def __str__(self) -> str:
        return f"`{self.field}`: expected {self.expected}, got {self.got}"


class PoolError(ValueError):
    """A pool that cannot be read: "<file>:<line>: `field`: expected ..., got ...".

    Attributes:
        path: the file, or the name of an input that is no file.
        line: 1-based line of a text file, 1-based row of a Parquet file or dataset; None when the whole input is meant.
        field: the field at fault, "row" for a line that is no record; None when the whole input is meant.
    """

    def __init__(self, path: Path | str, line: int | None, field: str | None, expected: str, got: str) -> None:
        super().__init__(path, line, field, expected, got)
        self.path, self.line, self.field, self.expected, self.got = path, line, field, expected, got

    def __str__(self) -> str:
        place = str(self.path) if self.line is None else f"{self.path}:{self.line}"
        field = "" if self.field is None else f"`{self.field}`: "
        return f"{place}: {field}expected {self.expected}, got {self.got}"


def describe(value: object) -> str:
    """Says in a few words what a value is, for the "got ..." of an error."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"list of {len(value)}"
    if isinstance(value, dict):
        return f"object with keys {_listing([ascii(key) for key in value])}" if value else "empty object"
    text = ascii(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def read_turns(row: dict[str, Any]) -> list[Turn]:
    """The messages of a row of any known shape, checked, as (role, content) pairs.

    Args:
        row: the record; see the module's table for its shapes.

    Returns:
        The turns in order: a user turn with text before the first answer, at least one answer, none blank.

    Raises:
        RowError: names the field at fault.
    """
    if (value := row.get("messages")) is not None:
        return _conversation("messages", _read_list("messages", value, "role", "content", ROLES))
    if (value := row.get("conversations")) is not None:
        turns = _read_list("conversations", value, "from", "value", SHAREGPT_ROLES)
        return _read_system(row, _conversation("conversations", turns))
    for prompt_field, answer_fields in ANSWERS.items():
        if row.get(prompt_field) is None:
            continue
        field = next((name for name in answer_fields if row.get(name) is not None), None)
        if field is None:
            raise RowError(answer_fields[0], f"an answer in `{'` or `'.join(answer_fields)}`", describe(row))
        prompt = _read_side(prompt_field, _join_input(row) if prompt_field == "instruction" else row["prompt"], "user")
        answer = _read_side(field, row[field], "assistant")
        _require_prompt(prompt_field, prompt)
        _require_answer(field, answer)
        return _read_system(row, prompt + answer)
    raise RowError("messages" if "messages" in row else "row", SHAPES, describe(row))


def read_id(row: dict[str, Any], number: int) -> str:
    """The row's `id` (a string, or a whole number written out), else its 0-based `number` in the whole input."""
    value = row.get("id")
    if value is None:
        return str(number)
    if type(value) is int or (type(value) is float and value.is_integer()):  # as pandas writes integers beside missing ones
        return str(int(value))
    if not isinstance(value, str) or not value:
        raise RowError("id", "a non-empty string or an integer", describe(value))
    return _text("id", value)


def read_source(row: dict[str, Any]) -> str | None:
    """The row's `dataset`, else its `source`; None where it has neither."""
    field = "dataset" if row.get("dataset") is not None else "source"
    value = row.get(field)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RowError(field, "a string", describe(value))
    return _text(field, value)


def score_fields(row: dict[str, Any], official: bool = False) -> dict[str, str]:
    """Which fields of a row feed which score columns.

    Args:
        row: the record.
        official: take the row for one of the official LEAD pool even where its fields are missing.

    Returns:
        {field: column}, in a fixed order. Rows of one pool must agree on it.
    """
    if official:
        return OFFICIAL_SCORES
    if _SCORE_FIELDS.isdisjoint(row):
        return {}
    if "idf" in row and "cross_entropy" in row and "idf_cluster" in row:
        return {field: column for field, column in OFFICIAL_SCORES.items() if field in row}
    fields = {field: column for field, column in PLAIN_SCORES.items() if row.get(field) is not None}
    if "arm" not in fields and "utility" not in fields:  # common names: a `task` or a `difficulty` in words is somebody else's
        fields = {field: column for field, column in fields.items() if type(row[field]) in (int, float)}
    return fields


def read_scores(row: dict[str, Any], found: dict[str, str], wanted: dict[str, str]) -> list[int | float]:
    """The row's scores in the order of `wanted`.

    Args:
        row: the record.
        found: `score_fields` of this row.
        wanted: `score_fields` of the pool's first good row.

    Returns:
        One number a score column.

    Raises:
        RowError: a score that earlier rows have is missing, or the other way round; a score is no number, not finite,
            negative or out of its column's range.
    """
    if found != wanted:
        for field in wanted:
            if field not in found:
                raise RowError(field, "a number, as in the first good row", describe(row.get(field)))
        for field in found:
            if field not in wanted:
                raise RowError(field, "no value, as in the first good row", describe(row.get(field)))
    return [_number(field, column, row.get(field)) for field, column in wanted.items()]


def parse_line(raw: bytes) -> dict[str, Any]:
    """Parses one line of JSON: strict UTF-8, one object.

    Raises:
        RowError: on field "row", with the byte or column at fault.
    """
    try:
        row = _decode_json(raw.decode())
    except UnicodeDecodeError as error:
        got = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        raise RowError("row", "UTF-8 text", got) from None
    except json.JSONDecodeError as error:
        raise RowError("row", "a JSON object", f"invalid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, thousands of brackets
        raise RowError("row", "a JSON object", f"JSON beyond the parser's limits: {error}") from None
    if not isinstance(row, dict):
        raise RowError("row", "a JSON object", describe(row))
    return row


def _read_list(field: str, value: object, role_key: str, text_key: str, roles: dict[str, str]) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise RowError(field, "a non-empty list of messages", describe(value))
    turns = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise RowError(f"{field}[{i}]", f"an object with `{role_key}` and `{text_key}`", describe(message))
        name = message.get(role_key)
        role = roles.get(name) if isinstance(name, str) else None
        if role is None:
            raise RowError(f"{field}[{i}].{role_key}", f"one of {', '.join(roles)}", describe(name))
        if len(message) > 2:
            _refuse_calls(f"{field}[{i}]", message)
        content = message.get(text_key)
        if isinstance(content, list):
            content = _join_parts(f"{field}[{i}].{text_key}", content)
        elif not isinstance(content, str):
            raise RowError(f"{field}[{i}].{text_key}", "a string or a list of text parts", describe(content))
        if not content.isascii():
            _text(f"{field}[{i}].{text_key}", content)
        if role == "assistant" and _blank(content):
            raise RowError(f"{field}[{i}].{text_key}", "an answer with text", describe(content))
        turns.append((role, content))
    return turns


def _join_parts(field: str, parts: list[Any]) -> str:
    for i, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowError(f"{field}[{i}]", 'a part {"type": "text", "text": string}', describe(part))
    return "".join(part["text"] for part in parts)


def _refuse_calls(field: str, message: dict[str, Any]) -> None:
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise RowError(f"{field}.{key}", "text only", describe(message[key]))


def _read_side(field: str, value: object, role: str) -> list[Turn]:
    if isinstance(value, str):
        if role == "assistant" and _blank(value):
            raise RowError(field, "an answer with text", describe(value))
        return [(role, _text(field, value))]
    if isinstance(value, list):
        return _read_list(field, value, "role", "content", ROLES)
    raise RowError(field, "a string or a list of messages", describe(value))


def _join_input(row: dict[str, Any]) -> str:
    parts = []
    for field in ("instruction", "input"):
        value = row.get(field)
        if not isinstance(value, str | None):
            raise RowError(field, "a string", describe(value))
        parts.append(value or "")
    return "\n\n".join(part for part in parts if not _blank(part))


def _read_system(row: dict[str, Any], turns: list[Turn]) -> list[Turn]:
    system = row.get("system")
    if system is None or system == "" or turns[0][0] == "system":
        return turns
    if not isinstance(system, str):
        raise RowError("system", "a string", describe(system))
    return [("system", _text("system", system)), *turns]


def _conversation(field: str, turns: list[Turn]) -> list[Turn]:
    _require_answer(field, turns)
    _require_prompt(field, turns)
    return turns


def _require_answer(field: str, turns: list[Turn]) -> None:
    for role, _ in turns:
        if role == "assistant":
            return
    raise RowError(field, "an answer (an assistant message)", _roles(turns))


def _require_prompt(field: str, turns: list[Turn]) -> None:
    blank = False
    for role, content in turns:
        if role == "assistant":
            break
        if role == "user" and not _blank(content):
            return
        blank |= role == "user"
    raise RowError(field, "a user message with text before the first answer", "a blank one" if blank else _roles(turns))


def _roles(turns: list[Turn]) -> str:
    return f"roles {_listing([role for role, _ in turns])}"


def _listing(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _blank(text: str) -> bool:
    return not text or text.isspace()


def _text(field: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = f"the lone surrogate {text[error.start]!a} at character {error.start + 1}"
        raise RowError(field, "Unicode text", got) from None
    return text


def _number(field: str, column: str, value: object) -> int | float:
    high = SCORE_MAX[column]
    if column in INTEGER_SCORES:
        if type(value) is float and value.is_integer():  # tables with gaps elsewhere write integers as 3.0
            value = int(value)
        if type(value) is not int or not 0 <= value <= high:
            raise RowError(field, f"an integer from 0 to {high:,}", describe(value))
        return value
    if (type(value) is not int and type(value) is not float) or not 0 <= value <= high:
        raise RowError(field, "a finite number >= 0 that float32 holds", describe(value))
    return value
