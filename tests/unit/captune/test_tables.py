"""Plain-text tables, the leaderboard's above all."""

from typing import Any

from captune import tables
from shared.schemas.captions import Caption, CaptionPreview, CaptionReport
from shared.schemas.evaluations import Comparison, Leaderboard, LeaderboardRow


def row(**values: Any) -> LeaderboardRow:
    defaults: dict[str, Any] = {
        **{"id": "0123456789abcdef", "rank": 1, "protocol": "full", "method": "mmft", "model": "starter"},
        **{"captions": None, "captioner": None, "shots": 8, "hyperparameters": {}, "suffix": None, "tags": []},
        **{"pinned": False, "data_changed": False, "n": 3, "mean": 0.705, "stderr": 0.0123, "few_seeds": False},
        "tied_with_best": None,
        "metrics": {"top1": 0.705, "top5": 0.95, "macro_f1": 0.7, "ece": 0.05, "nll": 1.25},
        **{"train_seconds": 12.4, "caption_seconds": 60.2, "classifier_ids": []},
    }
    return LeaderboardRow.model_validate(defaults | values)


def board(*rows: LeaderboardRow, metric: str = "top1", unit: str = "fraction", has_more: bool = False) -> str:
    return tables.leaderboard(
        Leaderboard(
            dataset_id="ds_1",
            dataset_name="pets",
            data_fingerprint="f",
            split="test",
            metric=metric,
            unit=unit,
            higher_is_better=metric != "nll",
            rows=list(rows),
            has_more=has_more,
            last_id=None,
        )
    )


ZERO = row(rank=2, method="zero_shot", shots=None, n=1, mean=0.5, stderr=None, train_seconds=0.0, caption_seconds=None)


def test_columns_are_padded_and_numbers_stand_right() -> None:
    text = tables.table(("name", "count"), [("a", 1), ("longer", 200), ("b", None)])
    assert text.splitlines() == ["name    count", "------  -----", "a           1", "longer    200", "b           -"]


def test_no_rows_leave_the_header() -> None:
    assert tables.table(("id", "status"), []).splitlines() == ["id  status", "--  ------"]


def test_fractions_are_percentages_with_their_standard_error() -> None:
    lines = board(row(), ZERO).splitlines()
    assert lines[0] == "pets: top1 % on test, mean ± standard error over seeds"
    mmft, zero = (line.split() for line in lines[-2:])
    assert mmft == ["1", "mmft", "starter", "8", "70.50", "±", "1.23", "3", "5.0", "1.250", "12", "60", "01234567"]
    assert zero == ["2", "zero_shot", "starter", "0", "50.00", "1", "5.0", "1.250", "-", "-", "01234567"]


def test_what_is_tied_with_the_best_is_marked_and_explained() -> None:
    text = board(row(), row(rank=2, tied_with_best=True), row(rank=3, tied_with_best=False))
    assert [" ≈ " in line for line in text.splitlines()[5:8]] == [False, True, False]
    assert "≈ not distinguishable from the best of its protocol at 95 %" in text
    assert "≈" not in board(row(), ZERO)


def test_what_was_scored_on_other_data_stands_apart_without_a_rank() -> None:
    lines = board(row(), row(id="0123456789abcdef.was-fedcba98", rank=None, data_changed=True)).splitlines()
    assert lines[-4] == "validation: full; scored on what the data set was before"
    assert lines[-1].split()[0] == "-"
    assert lines[-1].endswith("0123456789abcdef.was-fedcba98")


def test_a_suffix_tells_rows_apart_and_more_rows_are_told() -> None:
    text = board(row(suffix="b"), has_more=True)
    assert "mmft (b)" in text
    assert text.endswith("there are more rows: raise --limit")


def test_a_comparison_says_which_way_and_how_sure() -> None:
    found = {
        **{"dataset_id": "ds_1", "split": "test", "a": "x", "b": "y", "images": 1200, "pairs": 5, "mean_a": 0.7},
        **{"mean_b": 0.72, "difference": -0.02, "low": -0.031, "high": -0.009, "p_value": 0.0012, "resamples": 2000},
        **{"only_a": 0.05, "only_b": 0.07},
    }
    text = tables.comparison(Comparison.model_validate(found))
    for part in ("1,200 images, 5 pairs", "-2.00 points", "-3.10 to -0.90", "0.0012", "5.00 %", "7.00 %"):
        assert part in text
    assert "not of other seeds" in tables.comparison(Comparison.model_validate(found | {"pairs": 1}))


def test_nats_are_no_percentages() -> None:
    lines = board(row(mean=1.25, stderr=0.02), metric="nll", unit="nats").splitlines()
    assert lines[0].startswith("pets: nll on test")
    assert " 1.25 ± 0.02 " in lines[-1]


def test_all_training_images_are_told_from_none() -> None:
    lines = board(row(shots=None), ZERO).splitlines()
    assert [line.split()[3] for line in lines[-2:]] == ["all", "0"]


def test_few_seeds_are_flagged_and_explained() -> None:
    text = board(row(n=2, few_seeds=True), ZERO)
    assert "70.50 ± 1.23*" in text
    assert text.splitlines()[-1] == "* fewer than 3 seeds: the standard error means little"
    assert "*" not in board(row(), ZERO)


def test_each_protocol_has_its_own_table() -> None:
    text = board(row(), ZERO, row(protocol="none", mean=0.6), row(**ZERO.model_dump() | {"protocol": "none"}))
    assert [line for line in text.splitlines() if line.startswith("validation")] == [
        "validation: full",
        "validation: none",
    ]
    assert text.count("zero_shot") == 2


def test_no_scores_yet_is_told() -> None:
    assert "no scores yet" in board()


def caption(**values: Any) -> Caption:
    defaults = {
        **{"id": "cpt_1", "dataset_id": "ds_1", "image_id": "img_1", "path": "cat/1.png", "class_name": "cat"},
        **{"characteristic": "visual", "text": "a soft coat", "clip_tokens": 9, "flags": [], "excluded": False},
        **{"version": 1, "original_text": None, "edited_by": None, "agreement": None, "provenance": {}},
        "created_at": 0,
    }
    return Caption.model_validate(defaults | values)


def test_captions_stand_on_one_line_each() -> None:
    long = caption(id="cpt_2", text="word\n" * 40, flags=["duplicate"], excluded=True, original_text="was")
    lines = tables.captions([caption(), long]).splitlines()
    assert lines[2].split() == ["cpt_1", "cat/1.png", "visual", "9", "-", "a", "soft", "coat"]
    assert "excluded,duplicate  word word" in lines[3]
    assert lines[3].endswith("… *")


PREVIEW: dict[str, Any] = {
    **{"images": 1200, "captions": 3600, "reusable": 600, "model_calls": 3000, "image_id": "img_1"},
    **{"estimated_prompt_tokens": 1_500_000, "estimated_completion_tokens": 210_000, "estimated_seconds": 600.4},
    **{"captions_per_second": 5.0, "path": "n01/1.png", "class_name": "n01", "display_name": "tabby cat"},
    "examples": [{"characteristic": "visual", "prompt": "Describe the tabby cat."}],
}


def test_a_dry_run_shows_the_cost_and_the_prompts() -> None:
    lines = tables.preview(CaptionPreview.model_validate(PREVIEW)).splitlines()
    assert [line[19:] for line in lines[4:7]] == ["about 1,500,000", "about 210,000", "about 10 min"]
    for text in ("images             1,200", "written before     600", "measured rate      5.0 captions/s"):
        assert text in lines
    assert lines[-4:] == ["n01/1.png, class n01, called 'tabby cat':", "", "-- visual", "Describe the tabby cat."]


def test_a_dry_run_of_a_model_never_measured_says_so_and_a_live_one_what_came() -> None:
    live = {"raw": "**A cat.**", "text": "A cat.", "clip_tokens": 8, "flags": ["label_missing"]}
    unknown = dict.fromkeys(("estimated_prompt_tokens", "estimated_seconds", "captions_per_second"))
    found = PREVIEW | unknown | {"examples": [PREVIEW["examples"][0] | live]}
    text = tables.preview(CaptionPreview.model_validate(found))
    assert text.count("not measured yet") == 2
    assert text.endswith("-> A cat.  [8 tokens, label_missing]")


def test_times_are_in_the_unit_one_thinks_in() -> None:
    found = [tables.preview(CaptionPreview.model_validate(PREVIEW | {"estimated_seconds": s})) for s in (9.0, 36_000.0)]
    assert "about 9 s" in found[0]
    assert "about 10.0 h" in found[1]


def test_a_report_is_counts_lengths_and_examples() -> None:
    report = CaptionReport.model_validate(
        {
            **{"caption_job_id": "cap_1", "images": 10, "captions": 30, "excluded": 1, "edited": 2},
            **{"flags": {"duplicate": 3}, "characteristics": {"visual": 20, "shape": 10}, "budget": 77},
            "tokens": [{"low": 1, "high": 10, "captions": 20}, {"low": 11, "high": 20, "captions": 10}],
            **{"words_mean": 12.34, "distinct_1": 0.5, "distinct_2": 0.75, "distinct_sample": 30},
            **{"agreement": {"clip_score": 0.61}, "examples": {"duplicate": [caption()]}},
        }
    )
    lines = tables.caption_report(report).splitlines()
    assert lines[0] == "cap_1: 30 captions of 10 images, 1 excluded, 2 edited"
    assert "agreement: clip_score 0.610" in lines
    assert any(line.split() == ["1-10", "20", "#" * 30] for line in lines)
    assert any(line.split() == ["11-20", "10", "#" * 15] for line in lines)
    assert lines[-1].split(maxsplit=2) == ["duplicate", "3", "cpt_1: a soft coat"]
