"""Words are counted in any script; text in ASCII gives what it always gave."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hldm.evaluation.metrics import (
    TrainingText,
    diversity,
    random_passage,
    repeat_last_words,
    rouge_scores,
)
from hldm.evaluation.words import count_words, ends_unspaced, letter_words, normal_words, split_words

SENTENCES = {
    "English": "the cat sat on the mat",
    "French": "été où les garçons étaient là",
    "Russian": "кошка сидела на коврике дома",
    "Greek": "η γάτα κάθισε στο χαλί",
    "Arabic": "جلست القطة على السجادة",
    "Hebrew": "הַחתול ישב על השטיח",
    "Hindi": "बिल्ली चटाई पर बैठी थी",
    "Tamil": "பூனை பாயில் அமர்ந்தது நன்று",
    "Armenian": "կատուն նստած էր գորգին",
    "Amharic": "ድመቷ ምንጣፉ ላይ ተቀመጠች",
    "Korean": "고양이가 매트 위에 앉았다",
    "Persian": "گربه می‌خوابد روی فرش",
}
UNSPACED = {
    "Chinese": "猫坐在垫子上",
    "Japanese": "猫はマットの上にすわった",
    "Thai": "แมวนั่งบนเสื่อ",
    "Khmer": "ឆ្មាអង្គុយលើកន្ទេល",
    "Burmese": "ကြောင်ဖျာပေါ်ထိုင်",
    "Lao": "ແມວນັ່ງເທິງເສື່ອ",
}


@given(st.text(st.characters(max_codepoint=127)))
def test_words_in_ascii_are_those_of_before(text):
    assert split_words(text) == text.split()
    assert normal_words(text) == re.sub("[^a-z0-9]+", " ", text.lower()).split()
    assert letter_words(text) == re.findall(r"[^\W\d_]+", text)
    assert count_words(text) == len(text.split())


count_words("é")  # makes the classes of Unicode, once


@given(st.text())
def test_no_text_is_lost_or_counted_twice(text):
    assert "".join(split_words(text)) == "".join(text.split())
    assert count_words(text) == len(split_words(text))
    normal_words(text), letter_words(text), ends_unspaced(text)


@pytest.mark.parametrize("name", SENTENCES)
def test_words_between_spaces_stay_whole_marks_included(name):
    text = SENTENCES[name]
    assert split_words(text) == normal_words(text) == letter_words(text) == text.split()
    assert rouge_scores([text], [text]) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    first, rest = text.split(" ", 1)
    assert 0 < rouge_scores([first], [text])["rouge1"] < rouge_scores([rest], [text])["rouge1"] < 1
    assert diversity([text])["distinct1"] > 0.8
    assert TrainingText(text.encode(), 5).known_words([f"x {rest} x"]) == 1
    assert repeat_last_words(text, 500, words=2).startswith(f"{' '.join(text.split()[-2:])} ")


@pytest.mark.parametrize("name", UNSPACED)
def test_scripts_without_spaces_count_by_characters(name):
    text = UNSPACED[name]
    words = split_words(text)
    assert words == normal_words(text) and len(words) >= 6
    assert rouge_scores([text], [text]) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert 0 < rouge_scores(["".join(words[:3])], [text])["rouge1"] < 1
    repeated = repeat_last_words(f"AB {text}", 5 * len(text), words=2)
    assert repeated.startswith("".join(words[-2:]) * 2)


def test_digits_do_not_stand_for_the_text_around_them():
    assert rouge_scores(["там было 7 котов"], ["там жили 7 собак"])["rouge1"] == pytest.approx(0.5)
    assert normal_words("पृष्ठ १२, page ٣") == ["पृष्ठ", "१२", "page", "٣"]


def test_text_without_words_is_compared_with_nothing():
    assert rouge_scores(["words"], ["👍 🎉 !!"]) == {"rouge1": None, "rouge2": None, "rougeL": None}
    assert rouge_scores(["👍"], ["words"])["rouge1"] == 0
    assert rouge_scores(["a", "b"], ["a", "…"])["rouge1"] == 1


def test_a_random_passage_of_text_without_spaces_starts_at_any_character():
    text = "一 " + "".join(chr(0x4E00 + i) for i in range(2000))
    passages = {random_passage(text.encode(), 9, torch.Generator().manual_seed(seed)) for seed in range(30)}
    assert len(passages) > 20
    for passage in passages:
        assert len(passage) == 9 and passage in text
