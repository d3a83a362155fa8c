r"""Grammars keep their splits apart, sums are right, and expressions match what `re` says where it knows them."""

from __future__ import annotations

import re

import pytest

from hldm.jepa.formal import (
    RegexError,
    compile_regex,
    number_words,
    probe_texts,
    regexes,
    same_language,
    sums,
)


def test_numbers_in_words():
    assert [number_words(n) for n in (0, 13, 20, 42, 99)] == [
        "zero",
        "thirteen",
        "twenty",
        "forty-two",
        "ninety-nine",
    ]
    assert len({number_words(n) for n in range(100)}) == 100


def test_sums_are_right_and_splits_share_no_sentence():
    splits = sums(300, seed=1)
    assert [len(split) for split in splits] == [300, 37, 37, 37, 37]
    everything = [words for split in splits for words, _ in split]
    assert len(set(everything)) == len(everything) and splits == sums(300, seed=1) != sums(300, seed=2)
    for split in splits:
        for _, code in split:
            left, _, right = code.partition(" = ")
            tokens = re.findall(r"[-+*]|\d+", left)
            value = int(tokens[0])
            for operator, number in zip(tokens[1::2], tokens[2::2], strict=True):
                value = {"+": value + int(number), "-": value - int(number), "*": value * int(number)}[
                    operator
                ]
            assert value == int(right)
    operators = [{len(re.findall(r" [-+*] ", code)) for _, code in split} for split in splits]
    assert operators == [{1, 2}, {1, 2}, {1, 2}, {1, 2}, {3}]


def cell(code: str) -> tuple[str, int, int]:
    a, operator, b = re.match(r"\(*(\d+) ([-+*]) (\d+)", code).groups()
    return operator, int(a) // 10, int(b) // 10


def test_withheld_combinations_are_never_trained_on():
    splits = sums(2000)
    trained = {cell(code) for _, code in (*splits.train, *splits.test)}
    assert not trained & {cell(code) for _, code in splits.combinations}


def test_every_expression_of_the_grammar_can_be_read_and_none_is_in_two_splits():
    splits = regexes(60)
    words = [words for split in splits for words, _ in split]
    assert len(set(words)) == len(words) and all(line.startswith("lines ") for line in words)
    texts = probe_texts()
    for split in splits:
        for _, code in split:
            matches = compile_regex(code)
            assert isinstance([matches(text) for text in texts[:5]], list)
    few = regexes(80).train
    told_apart = sum(not same_language(a, b, texts) for (_, a), (_, b) in zip(few, few[1:], strict=False))
    assert told_apart > 0.8 * len(few)


@pytest.mark.parametrize(
    "code",
    [
        "abc",
        "a.c",
        "[a-c]+",
        "(ab|c)*",
        "a{2}",
        "a{2,}b?",
        "(a.*){1,2}",
        "((.*)(dog)).*",
        r"\bdog\b",
        ".*([0-9]).*",
        "",
    ],
)
def test_what_re_knows_matches_the_same(code):
    texts = [*probe_texts(200), "", "abc", "aab", "aa", "ab", "dog", "a dog b", "c", "axc", "dogs"]
    matches = compile_regex(code)
    assert [matches(text) for text in texts] == [re.fullmatch(code, text) is not None for text in texts]


def test_and_and_not():
    both = compile_regex("(.*dog.*)&(.*[0-9].*)")
    assert both("dog 1") and both("1dog") and not both("dog") and not both("1")
    neither = compile_regex("~(.*dog.*)")
    assert neither("cat") and neither("") and not neither("a dog")
    assert same_language("~(~(dog))", "dog", ["dog", "dogs", "", "do"])
    assert not same_language("dog", "dog)", ["dog"]) and not same_language("dog", "cat", ["dog"])


@pytest.mark.parametrize("code", ["(", "a)", "*a", "[", "[]", "a{", "a{x}", "(" * 60, "a{1000}", "\\"])
def test_what_is_no_expression_is_refused(code):
    with pytest.raises(RegexError):
        compile_regex(code)


def test_expressions_that_would_take_for_ever_are_fast():
    assert not compile_regex("(((a*)*)*)*b")("a" * 60)
