"""A seeded generator of instruction rows: task families, easy and hard, with duplicates and noisy answers (the demo's pool).

Every row says in its id what it is ("add-hard-000123-noisy"), which the selection never sees.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

_WORDS = re.findall(
    r"\w+",
    "apple river stone cloud paper table green seven window garden yellow music silver orange mother winter summer bridge"
    " pencil rabbit market doctor forest island monkey hammer basket candle dragon engine feather guitar helmet jacket",
)
_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ivy", "Jonas")
_CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Peru": "Lima", "Cuba": "Havana", "Norway": "Oslo", "Greece": "Athens", "Poland": "Warsaw", "Chile": "Santiago",
}  # fmt: skip


def _add(r: random.Random, hard: bool) -> tuple[str, str]:
    a, b = (r.randint(10, 99), r.randint(10, 99)) if hard else (r.randint(0, 9), r.randint(0, 9))
    return f"What is {a} + {b}?", f"{a} + {b} = {a + b}"


def _story(r: random.Random, hard: bool) -> tuple[str, str]:
    name, thing = r.choice(_NAMES), r.choice(_WORDS)
    a, b, c = r.randint(2, 20), r.randint(2, 9), r.randint(1, 9)
    if not hard:
        return (
            f"{name} has {a} {thing}s and buys {b} more. How many now?",
            f"{a} + {b} = {a + b}. {name} has {a + b} {thing}s.",
        )
    total = a * b
    return (
        f"{name} fills {a} boxes with {b} {thing}s each and then adds {c}. How many {thing}s are there?",
        f"{a} * {b} = {total}. {total} + {c} = {total + c}. There are {total + c} {thing}s.",
    )


def _reverse(r: random.Random, hard: bool) -> tuple[str, str]:
    words = r.sample(_WORDS, r.randint(5, 7) if hard else 2)
    return f"Write these words in reverse order: {' '.join(words)}", " ".join(reversed(words))


def _sort(r: random.Random, hard: bool) -> tuple[str, str]:
    numbers = r.sample(range(100 if hard else 10), r.randint(6, 8) if hard else 3)
    return f"Sort the numbers: {', '.join(map(str, numbers))}", ", ".join(map(str, sorted(numbers)))


def _spell(r: random.Random, hard: bool) -> tuple[str, str]:
    word = r.choice(_WORDS)
    if not hard:
        return f"Spell the word {word}.", "-".join(word)
    return f"Spell the word {word} backwards in capitals.", "-".join(reversed(word.upper()))


def _count(r: random.Random, hard: bool) -> tuple[str, str]:
    words = [r.choice(_WORDS[:6]) for _ in range(r.randint(8, 12) if hard else r.randint(3, 5))]
    wanted = r.choice(words)
    return f"How often does {wanted} occur in: {' '.join(words)}?", f"{wanted} occurs {words.count(wanted)} times."


def _capital(r: random.Random, hard: bool) -> tuple[str, str]:
    country, city = r.choice(sorted(_CAPITALS.items()))
    if not hard:
        return f"What is the capital of {country}?", f"The capital of {country} is {city}."
    return (
        f"Which country has the capital {city}, and how many letters has it?",
        f"{country}, with {len(country)} letters.",
    )


def _code(r: random.Random, hard: bool) -> tuple[str, str]:
    name, n, step = r.choice(_WORDS), r.randint(2, 9), r.randint(2, 5)
    if not hard:
        return f"Write Python that prints {name} {n} times.", f"for i in range({n}):\n    print('{name}')"
    return (
        f"Write a Python function {name} that sums the multiples of {step} below its argument.",
        f"def {name}(n):\n    return sum(i for i in range(n) if i % {step} == 0)",
    )


FAMILIES: dict[str, Callable[[random.Random, bool], tuple[str, str]]] = {
    "add": _add, "story": _story, "reverse": _reverse, "sort": _sort, "spell": _spell, "count": _count,
    "capital": _capital, "code": _code,
}  # fmt: skip


def demo_rows(
    num_rows: int,
    *,
    seed: int,
    noisy: float = 0.15,
    duplicates: float = 0.1,
    hard: float = 0.5,
    families: list[str] | None = None,
) -> list[Row]:
    """Rows `{"id", "source", "messages"}`.

    Args:
        num_rows: rows.
        seed: same seed, same rows.
        noisy: share whose answer's characters are shuffled.
        duplicates: share that repeats an earlier row, words and all.
        hard: share of the harder variant of each family.
        families: of `FAMILIES`; None is all.
    """
    r = random.Random(seed)
    names = sorted(FAMILIES) if families is None else families
    rows: list[Row] = []
    clean: list[Row] = []
    for number in range(num_rows):
        if clean and r.random() < duplicates:
            twin = r.choice(clean)
            rows.append({**twin, "id": f"{twin['source']}-{number:06d}-duplicate"})
            continue
        name, is_hard = r.choice(names), r.random() < hard
        question, answer = FAMILIES[name](r, is_hard)
        kind = f"{name}-{'hard' if is_hard else 'easy'}-{number:06d}"
        is_noisy = r.random() < noisy
        if is_noisy:
            letters = list(answer)
            r.shuffle(letters)
            answer = "".join(letters).strip() or answer[::-1]
        row = {
            "id": kind + ("-noisy" if is_noisy else ""),
            "source": name,
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        }
        rows.append(row)
        if not is_noisy:
            clean.append(row)
    return rows
