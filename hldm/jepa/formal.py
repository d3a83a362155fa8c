r"""Pairs of a sentence and what it says in symbols: sums and regular expressions, made by small grammars.

Both have a test of unseen combinations and a test of greater length, beside one like the training pairs. Regular
expressions are written as in NL-RX (arXiv 1608.03000), where `&` is "and" and `~` is "not", and are matched here, since
`re` knows neither. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

PairList = list[tuple[str, str]]
WITHHELD_SUMS, WITHHELD_REGEXES = 0.1, 0.2  # share of combinations that training pairs do not have

_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SUMS: dict[str, tuple[str, ...]] = {
    "+": ("{} plus {}", "the sum of {} and {}", "{} added to {}", "{} and {} together"),
    "-": ("{} minus {}", "the difference of {} and {}", "{} less {}", "{} decreased by {}"),
    "*": ("{} times {}", "the product of {} and {}", "{} multiplied by {}", "{} taken {} times"),
}
_WORDS = ("dog", "truck", "ring", "lake", "cat", "king", "star", "rain")
_ATOMS: dict[str, tuple[str, ...]] = {
    "[AEIOUaeiou]": ("a vowel",),
    "[0-9]": ("a number", "a digit"),
    "[A-Za-z]": ("a letter",),
    "[A-Z]": ("a capital letter", "an upper-case letter"),
    **{word: (f"the string '{word}'",) for word in _WORDS},
}
_UNARY: dict[str, tuple[str, ...]] = {
    "({})(.*)": ("starting with {}", "that start with {}", "which begin with {}"),
    "(.*)({})": ("ending with {}", "that end with {}", "which finish with {}"),
    ".*({}).*": ("containing {}", "with {}", "that have {}"),
    "(.*{}.*){{2,}}": (
        "with {} at least twice",
        "that have {} two or more times",
        "containing {} twice or more",
    ),
    "~(.*({}).*)": ("without {}", "not containing {}", "that do not have {}"),
}
_BINARY: dict[str, tuple[str, ...]] = {
    "({})&({})": ("{} and {}", "{} as well as {}", "both {} and {}"),
    "({})|({})": ("{} or {}", "either {} or {}", "{} or else {}"),
    "({}).*({})": ("{} before {}", "{} followed by {}", "{} and then {}"),
}


class Splits(NamedTuple):
    """Pairs to train on, to choose settings on, and to test on."""

    train: PairList
    validation: PairList
    test: PairList
    combinations: PairList  # of parts that training pairs never join
    longer: PairList


def number_words(number: int) -> str:
    """0 to 99 in words."""
    if number < len(_SMALL):
        return _SMALL[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens] + (f"-{_SMALL[ones]}" if ones else "")


def sums(count: int, seed: int = 0) -> Splits:
    """`the sum of five and three` and `5 + 3 = 8`: up to two operators in training, three in the longer test."""
    rng = np.random.default_rng([seed, 1])
    cells = [(operator, a, b) for operator in _SUMS for a in range(10) for b in range(10)]
    withheld = {cells[index] for index in rng.permutation(len(cells))[: round(WITHHELD_SUMS * len(cells))]}

    def draw(operators: int) -> tuple[str, str, bool]:
        value = int(rng.integers(100))
        words, code = number_words(value), str(value)
        is_withheld, left = False, value
        for index in range(operators):
            operator, right = str(rng.choice([*_SUMS])), int(rng.integers(100))
            if index == 0:
                is_withheld = (operator, left // 10, right // 10) in withheld
            words = str(rng.choice(_SUMS[operator])).format(words, number_words(right))
            code = f"{f'({code})' if index else code} {operator} {right}"
            value = {"+": value + right, "-": value - right, "*": value * right}[operator]
            words += "," if index + 1 < operators else ""
        return words, f"{code} = {value}", is_withheld

    return _split(count, draw, lambda: int(rng.integers(1, 3)), longest=3)


def regexes(count: int, seed: int = 0) -> Splits:
    """`lines with a vowel or the string 'dog'` and its expression: depth 1 and 2 in training, 3 in the longer test."""
    rng = np.random.default_rng([seed, 2])
    cells = [(operator, atom) for operator in _UNARY for atom in _ATOMS]
    withheld = {cells[index] for index in rng.permutation(len(cells))[: round(WITHHELD_REGEXES * len(cells))]}

    def draw_part(depth: int) -> tuple[str, str, bool]:
        if depth <= 1:
            operator, atom = str(rng.choice([*_UNARY])), str(rng.choice([*_ATOMS]))
            words = str(rng.choice(_UNARY[operator])).format(rng.choice(_ATOMS[atom]))
            return words, operator.format(atom), (operator, atom) in withheld
        operator = str(rng.choice([*_BINARY]))
        first, second = draw_part(depth - 1), draw_part(1)
        words = str(rng.choice(_BINARY[operator])).format(first[0], second[0])
        return words, operator.format(first[1], second[1]), first[2] or second[2]

    def draw(depth: int) -> tuple[str, str, bool]:
        words, code, is_withheld = draw_part(depth)
        return f"lines {words}", code, is_withheld

    return _split(count, draw, lambda: int(rng.integers(1, 3)), longest=3)


def _split(
    count: int, draw: Callable[[int], tuple[str, str, bool]], size: Callable[[], int], longest: int
) -> Splits:
    """count training pairs, an eighth of it in each other split, no sentence twice."""
    seen: set[str] = set()

    def fill(wanted: int, want_withheld: bool, size: Callable[[], int]) -> PairList:
        found: PairList = []
        tries = 0
        while len(found) < wanted and tries < 200 * wanted + 1000:
            tries += 1
            words, code, is_withheld = draw(size())
            if is_withheld == want_withheld and words not in seen:
                seen.add(words)
                found.append((words, code))
        if len(found) < wanted:
            raise ValueError(f"pairs.count={count} is more than the grammar has sentences: lower it")
        return found

    few = max(count // 8, 1)
    return Splits(
        train=fill(count, False, size),
        validation=fill(few, False, size),
        test=fill(few, False, size),
        combinations=fill(few, True, size),
        longer=fill(few, False, lambda: longest),
    )


# ---------------------------------------------------------------- regular expressions with & and ~

Ends = Callable[[str, int], frozenset[int]]  # where a match that starts at a place of a text may end


class RegexError(ValueError):
    """Not an expression of this syntax."""


MAX_DEPTH, MAX_REPEATS = 50, 100


def compile_regex(code: str) -> Callable[[str], bool]:
    r"""Whether a text matches as a whole: literals, `.`, `[...]`, `\b`, `* + ? {n} {n,} {n,m}`, `|`, `&`, `~`, `( )`.

    Raises RegexError for anything else.
    """
    parser = _Parser(code)
    ends = parser.either(0)
    if parser.at < len(code):
        raise RegexError(f"{code[:80]!r}: unexpected {code[parser.at]!r} at {parser.at}")
    return lambda text: len(text) in ends(text, 0)


def same_language(first: str, second: str, texts: list[str]) -> bool:
    """Whether two expressions match the same of these texts; one that cannot be read matches like no other."""
    try:
        a, b = compile_regex(first), compile_regex(second)
    except RegexError:
        return False
    return all(a(text) == b(text) for text in texts)


def probe_texts(count: int = 50, seed: int = 0) -> list[str]:
    """Texts that tell expressions of these grammars apart: words, letters, digits, in all orders and numbers."""
    rng = np.random.default_rng([seed, 3])
    parts = [*_WORDS, *"aeiouAEbcdKXZ0159", " ", "  ", "-"]
    return ["".join(str(part) for part in rng.choice(parts, int(rng.integers(0, 9)))) for _ in range(count)]


class _Parser:
    """Recursive descent, each method from self.at on; a node is its function of ends."""

    def __init__(self, code: str):
        self.code, self.at = code, 0

    def peek(self) -> str:
        return self.code[self.at : self.at + 1]

    def either(self, depth: int) -> Ends:
        if depth > MAX_DEPTH:
            raise RegexError("nested too deeply")
        parts = [self.both(depth)]
        while self.peek() == "|":
            self.at += 1
            parts.append(self.both(depth))
        if len(parts) == 1:
            return parts[0]
        return lambda text, at: frozenset().union(*(part(text, at) for part in parts))

    def both(self, depth: int) -> Ends:
        parts = [self.sequence(depth)]
        while self.peek() == "&":
            self.at += 1
            parts.append(self.sequence(depth))
        if len(parts) == 1:
            return parts[0]
        return lambda text, at: frozenset.intersection(*(part(text, at) for part in parts))

    def sequence(self, depth: int) -> Ends:
        parts: list[Ends] = []
        while self.peek() and self.peek() not in "|&)":
            parts.append(self.repeated(depth))

        def ends(text: str, at: int) -> frozenset[int]:
            places = frozenset([at])
            for part in parts:
                places = frozenset(end for place in places for end in part(text, place))
            return places

        return ends

    def repeated(self, depth: int) -> Ends:
        node = self.atom(depth)
        while self.peek() and self.peek() in "*+?{":
            least, most = self.bounds()
            node = _repeat(node, least, most)
        return node

    def bounds(self) -> tuple[int, int | None]:
        mark = self.peek()
        self.at += 1
        if mark != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[mark]
        close = self.code.find("}", self.at)
        least, comma, most = self.code[self.at : close].partition(",")
        if close < 0 or not least.isdigit() or not (most.isdigit() or not most):
            raise RegexError(f"bad repetition at {self.at}")
        self.at = close + 1
        if max(int(least), int(most or 0)) > MAX_REPEATS:
            raise RegexError(f"repeated more than {MAX_REPEATS} times")
        return int(least), int(most) if most else None if comma else int(least)

    def atom(self, depth: int) -> Ends:
        letter = self.peek()
        self.at += 1
        if letter == "~":
            node = self.repeated(depth + 1)
            return lambda text, at: frozenset(range(at, len(text) + 1)) - node(text, at)
        if letter == "(":
            inner = self.either(depth + 1)
            if self.peek() != ")":
                raise RegexError("a bracket is not closed")
            self.at += 1
            return inner
        if letter == "[":
            return _one_of(self.letters())
        if letter == "\\":
            letter = self.peek()
            self.at += 1
            if letter == "b":
                return _word_border
        elif letter == ".":
            return lambda text, at: frozenset([at + 1] if at < len(text) else [])
        elif letter in "*+?{}]":
            raise RegexError(f"nothing to repeat at {self.at - 1}")
        if not letter:
            raise RegexError("ends too early")
        return _one_of(frozenset(letter))

    def letters(self) -> frozenset[str]:
        close = self.code.find("]", self.at)
        inside = self.code[self.at : close]
        if close <= self.at:
            raise RegexError("a class is empty or not closed")
        self.at = close + 1
        found: set[str] = set()
        index = 0
        while index < len(inside):
            if inside[index + 1 : index + 2] == "-" and index + 2 < len(inside):
                found.update(map(chr, range(ord(inside[index]), ord(inside[index + 2]) + 1)))
                index += 3
            else:
                found.add(inside[index])
                index += 1
        return frozenset(found)


def _one_of(letters: frozenset[str]) -> Ends:
    return lambda text, at: frozenset([at + 1] if text[at : at + 1] in letters and at < len(text) else [])


def _word_border(text: str, at: int) -> frozenset[int]:
    before, after = text[at - 1 : at].isalnum() if at else False, text[at : at + 1].isalnum()
    return frozenset([at] if before != after else [])


def _repeat(node: Ends, least: int, most: int | None) -> Ends:
    def ends(text: str, at: int) -> frozenset[int]:
        places = frozenset([at])
        for _ in range(least):
            places = frozenset(end for place in places for end in node(text, place))
        reached, fresh, times = places, places, least
        while fresh and (most is None or times < most):
            fresh = frozenset(end for place in fresh for end in node(text, place)) - reached
            reached, times = reached | fresh, times + 1
        return reached

    return ends
