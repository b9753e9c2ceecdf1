"""One row: every spelling of a conversation reads the same, anything else is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lead_fast.rows import (
    FIELDS,
    SHAREGPT_ROLES,
    RowError,
    parse_line,
    read_id,
    read_scores,
    read_source,
    read_turns,
    score_fields,
)

GOOD: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"prompt": "q", "response": "a"},
    {"instruction": "q", "input": "", "output": "a"},
    {},
]


def test_input_and_system_join_the_prompt() -> None:
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief."}
    assert read_turns(row) == [("system", "Be brief."), ("user", "Add.\n\n2, 2"), ("assistant", "4")]


@pytest.mark.parametrize(("name", "role"), [(n, r) for n, r in SHAREGPT_ROLES.items() if r != "system"])
def test_sharegpt_roles(name: str, role: str) -> None:
    frame = [{"from": "human", "value": "q"}, {"from": name, "value": "x"}, {"from": "gpt", "value": "a"}]
    assert read_turns({"conversations": frame}) == [("user", "q"), (role, "x"), ("assistant", "a")]


TEXT = st.text('ab"\\{ \n\t\0\u00e9\u2028\u2603\U0001d11e', max_size=20)
SOLID = TEXT.filter(lambda text: text.strip())
TURN = st.tuples(st.sampled_from(["user", "tool"]), TEXT) | st.tuples(st.just("assistant"), SOLID)


@settings(deadline=None)
@given(st.booleans(), SOLID, st.lists(TURN, max_size=5), SOLID, st.data())
def test_every_spelling_of_a_conversation_reads_the_same(
    system: bool, prompt: str, middle: list[tuple[str, str]], answer: str, data: st.DataObject
) -> None:
    turns = [("system", "s")] * system + [("user", prompt), *middle, ("assistant", answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    cut = data.draw(st.lists(st.integers(0, len(answer)), min_size=1, max_size=3).map(sorted))
    pieces = [answer[a:b] for a, b in zip([0, *cut], [*cut, len(answer)], strict=True)]
    parts = [{"type": "text", "text": piece} for piece in pieces]
    names = {role: [name for name, r in SHAREGPT_ROLES.items() if r == role] for role, _ in turns}
    named = [{"from": data.draw(st.sampled_from(names[role])), "value": content} for role, content in turns]
    spellings: list[dict[str, Any]] = [
        {"messages": messages},
        {"messages": [*messages[:-1], {"role": "assistant", "content": parts}]},
        {"conversations": named},
        {"prompt": messages[: 1 + system], "completion": messages[1 + system :]},
        {"prompt": messages[:-1], "response": answer},
    ]
    if not middle:
        start: dict[str, Any] = {"system": "s"} if system else {}
        spellings += [start | {"prompt": prompt, "response": answer}, start | {"instruction": prompt, "output": answer}]
    for row in spellings:
        for ascii_only in (True, False):
            raw = json.dumps(row, ensure_ascii=ascii_only).encode()
            assert read_turns(parse_line(raw)) == turns


SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", " ", "a", "\ud800", "text"])
SCALAR |= st.sampled_from([*SHAREGPT_ROLES])
PART = st.dictionaries(st.sampled_from(["type", "text"]), st.just("text") | SCALAR)
MESSAGE = st.fixed_dictionaries(
    {key: st.sampled_from(["user", "assistant"]) | SCALAR for key in ("role", "from")}
    | {key: st.just("a") | SCALAR | st.lists(PART, max_size=2) for key in ("content", "value")}
)
VALUE = SCALAR | st.lists(SCALAR | MESSAGE, max_size=3) | st.lists(MESSAGE, min_size=2, max_size=4)
CHANGES = st.dictionaries(st.sampled_from(sorted(FIELDS)), VALUE, max_size=3)


@settings(deadline=None)
@given(st.sampled_from(GOOD), CHANGES)
def test_any_record_is_read_or_refused_by_field(good: dict[str, Any], changes: dict[str, Any]) -> None:
    row = good | changes
    try:
        turns = read_turns(row)
        read_scores(row, score_fields(row), score_fields(row))
        texts = [read_id(row, 0), read_source(row) or "", *(content for _, content in turns)]
    except RowError as error:
        assert error.field.split("[")[0] in {*FIELDS, "row"}
    else:
        "".join(texts).encode()
        assert any(role == "assistant" and content.strip() for role, content in turns)
        assert turns[0][0] != "assistant"
