"""What a run logged is read whatever state it is in; what cannot be read is counted and said."""

from __future__ import annotations

import json

import pytest

from hldm.app.report.logs import read_logs, read_stage


@pytest.fixture
def stage(tmp_path):
    folder = tmp_path / "run" / "autoencoder"
    folder.mkdir(parents=True)
    return folder


def test_numbers_become_curves_and_events_notes(stage):
    lines = [{"step": step, "seconds": step / 10, "decoder": 3 - step / 100} for step in (50, 100, 150)]
    events = [{"step": step, "event": "gradient spike", "threshold": 1.0} for step in (60, 70)]
    lines += [*events, {"step": 90, "event": "dead: prototypes"}]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (stage / "totals.json").touch()
    found = read_stage(stage)
    assert found.curve("decoder", "seconds") == [(5.0, 2.5), (10.0, 2.0), (15.0, 1.5)]
    assert found.curve("nothing", "seconds") == []
    assert found.notes == [
        "gradient norm that stands out: 2 times, from step 60 to 70",
        "step 90: dead: prototypes",
    ]


def test_validations_are_a_curve_over_every_axis(stage):
    lines = [{"step": step, "seconds": step / 10, "characters": step * 20} for step in (50, 100)]
    lines.insert(1, {"step": 75, "event": "validation", "validation_bound": 2.5})
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (stage / "totals.json").touch()
    found = read_stage(stage)
    assert found.notes == []
    for axis, at in (("step", 75), ("seconds", 7.5), ("characters", 1500)):
        assert found.curve("validation_bound", axis) == [(at, 2.5)]


def test_what_is_torn_or_not_finite_is_left_out_and_said(stage):
    lines = ['{"step": 1, "decoder": 2.0}', '{"step": 2, "decoder": "nan"}', "[1]", '{"step": 3, "deco']
    (stage / "metrics.jsonl").write_text("\n".join(lines))
    found = read_stage(stage)
    assert found.curve("decoder", "step") == [(1, 2.0)]
    notes = " | ".join(found.notes)
    assert "decoder is not finite in 1 of 2 lines" in notes and "2 lines of metrics.jsonl" in notes
    assert "not finished" in notes


def test_a_post_mortem_is_told_and_a_broken_one_said(stage):
    path = stage / "post-mortem.json"
    path.write_text('{"step": 7, "reason": "numbers stay not finite"}')
    assert "training ended at step 7: numbers stay not finite" in read_stage(stage).notes
    path.write_text("[" * 10_000)
    assert "post-mortem.json cannot be read" in read_stage(stage).notes


def test_the_last_sample_is_the_one_shown(stage):
    (stage / "samples.txt").write_text("=== step 5 ===\n    old\n=== step 9 ===\n    new\n    text\n")
    assert read_stage(stage).sample == "new\n    text"


def test_an_exported_folder_says_that_it_has_no_metrics(stage):
    (stage / "totals.json").touch()
    assert read_logs(stage.parent)[0].notes == [
        "no metrics.jsonl: this run was exported, or has logged nothing yet"
    ]
