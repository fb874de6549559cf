"""`captune train`, `sweep` and `methods`: what is asked of the server, and what is printed."""

from typing import Any

import pytest

from captune import cli
from captune.commands import training
from captune.commands.training import method_specs
from shared.schemas.fine_tuning import Method


def parsed(*arguments: str) -> Any:
    return cli._parser().parse_args(arguments)


def method(name: str, *hyperparameters: str) -> Method:
    properties = {
        each: {"type": "number", "default": 1, "exclusiveMinimum": 0, "maximum": 9, "unit": "1"}
        for each in hyperparameters
    }
    return Method(
        name=name,
        summary=f"What {name} does.",
        source="arXiv 1",
        kind="fine_tune",
        needs_captions=name == "mmft",
        trains=True,
        presets={"paper": {"epochs": 50}},
        hyperparameters={"properties": properties},
    )


KNOWN = [method("mmft", "epochs", "w"), method("flyp", "epochs"), method("zero_shot")]


def specs(*arguments: str, names: tuple[str, ...] = ("mmft", "flyp", "zero_shot")) -> list[tuple[str, dict[str, Any]]]:
    args = parsed("sweep", "ds_1", *arguments)
    made = method_specs(KNOWN, names, args.preset, args.set, args.grid)
    return [(each["type"], each["hyperparameters"]) for each in made]


def test_a_setting_is_of_one_method_or_of_all_that_have_it() -> None:
    assert specs("--set", "epochs=3", "--set", "mmft.w=0.5") == [
        ("mmft", {"epochs": 3, "w": 0.5}),
        ("flyp", {"epochs": 3}),
        ("zero_shot", {}),
    ]
    assert specs("--set", "epochs=3", "--set", "flyp.epochs=5", names=("flyp",)) == [("flyp", {"epochs": 5})]
    assert specs("--set", "flyp.epochs=5", "--set", "epochs=3", names=("flyp",)) == [("flyp", {"epochs": 5})]


def test_a_grid_multiplies_the_methods_that_it_is_of() -> None:
    assert specs("--grid", "mmft.w=0.1,0.3", "--grid", "epochs=1,2", names=("mmft", "flyp")) == [
        ("mmft", {"w": 0.1, "epochs": 1}),
        ("mmft", {"w": 0.1, "epochs": 2}),
        ("mmft", {"w": 0.3, "epochs": 1}),
        ("mmft", {"w": 0.3, "epochs": 2}),
        ("flyp", {"epochs": 1}),
        ("flyp", {"epochs": 2}),
    ]


@pytest.mark.parametrize(
    ("setting", "named"), [("tes.w=1", "'tes'"), ("lr=1", "none of mmft, flyp, zero_shot"), ("mmft.lr=1", None)]
)
def test_a_setting_that_no_method_of_the_sweep_has(setting: str, named: str | None) -> None:
    """What one method is given by name goes to the server, which knows its ranges too."""
    if named is None:
        assert specs("--set", setting)[0] == ("mmft", {"lr": 1})
        return
    with pytest.raises(ValueError, match=named):
        specs("--set", setting)


def test_lists_of_a_sweep() -> None:
    args = parsed(
        "sweep", "ds_1", "--methods", "mmft, flyp", "--captions", "cap_1,cap_2", "--shots", "1,16,all",
        "--seeds", "0,1", "--shot-seeds", "7", "--tag", "a", "--tag", "b", "--preset", "paper",
    )  # fmt: skip
    assert (args.methods, args.captions, args.shots) == (["mmft", "flyp"], ["cap_1", "cap_2"], [1, 16, None])
    assert (args.seeds, args.shot_seeds, args.tag, args.preset) == ([0, 1], [7], ["a", "b"], "paper")
    assert parsed("sweep", "ds_1").shot_seeds is None, "each seed's own"


@pytest.mark.parametrize(
    "wrong",
    [("--seeds", "one"), ("--shots", "few"), ("--set", "w"), ("--grid", "w="), ("--preset", "best")],
)
def test_wrong_usage_of_a_sweep(wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parsed("sweep", "ds_1", *wrong)
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_a_method_is_shown_with_its_ranges_and_presets() -> None:
    shown = training._method(KNOWN[0])
    assert shown.startswith("mmft (fine_tune): What mmft does.\narXiv 1\nreads captions")
    row = next(line for line in shown.splitlines() if line.startswith("epochs"))
    assert row.split("  ")[0] == "epochs"
    assert "> 0, ≤ 9" in row
    assert "paper: 50" in row


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 5}, "≥ 1, ≤ 5"),
        ({"enum": ["full", "visual"]}, "full | visual"),
        ({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}, "> 0"),
        ({"anyOf": [{"type": "number"}, {"const": "val"}, {"type": "null"}]}, "number or val"),
        ({"type": "boolean"}, "boolean"),
    ],
)
def test_ranges_in_words(field: dict[str, Any], shown: str) -> None:
    assert training._range(field) == shown
