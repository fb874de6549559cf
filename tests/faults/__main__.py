"""`python -m tests.faults`: runs seeded schedules until the goal is met, appending to the results file.

--goal 200 --results FILE     go on until 200 seeds of the file have passed
--seed 17 --times 5           replay one, five times
--faults kill_api,redis_…     these faults in every schedule, instead of what the seed means
"""

import argparse
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from shared.cpu import share_cores
from tests.faults import report
from tests.faults.inject import FAULTS
from tests.faults.run import Runner, keep_of
from tests.faults.schedule import Schedule, schedule
from tests.faults.world import World

FRESH_AFTER = 25  # schedules; then the world is another


def main() -> int:
    share_cores()
    options = _options()
    if options.list:
        print("\n".join(f"{name}  ({fault.group})" for name, fault in sorted(FAULTS.items())))
        return 0
    if options.worlds > 1 and options.share is None:
        again = [sys.executable, "-m", "tests.faults", *sys.argv[1:]]
        children = [subprocess.Popen([*again, "--share", str(n)]) for n in range(options.worlds)]
        for child in children:
            child.wait()
    else:
        _run(options)
    lines = report.read(options.results)
    if options.share is None:
        print(report.table(lines))
    return 0 if report.passed(lines) == len(lines) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--goal", type=int, default=200, help="seeds of the results file that have passed")
    parser.add_argument("--results", type=Path, default=Path("build/faults.jsonl"))
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--times", type=int, default=1, help="how often, with --seed")
    parser.add_argument("--faults", type=lambda names: names.split(","), help="comma-separated")
    parser.add_argument("--worlds", type=int, default=1, help="stacks side by side")
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="begin no schedule after so long")
    parser.add_argument("--stop", action="store_true", help="at the first seed that fails")
    parser.add_argument("--list", action="store_true", help="the faults there are")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)  # of the worlds, the one that this process is
    options = parser.parse_args()
    if unknown := set(options.faults or ()) - FAULTS.keys():
        parser.error(f"no fault {', '.join(sorted(unknown))}; --list shows them")
    return options


def _seeds(options: argparse.Namespace, done: set[int]) -> list[Schedule]:
    """What there is to do, as far as it can be said now."""
    if options.seed is not None:
        return [schedule(options.seed, options.faults)] * options.times
    share, shares = options.share or 0, options.worlds
    seeds = (seed for seed in range(options.first, options.first + 10 * options.goal) if seed % shares == share)
    return [schedule(seed, options.faults) for seed in seeds if seed not in done]


def _run(options: argparse.Namespace) -> None:
    began = time.monotonic()
    todo = _seeds(options, set(report.read(options.results)))
    while todo:
        with ExitStack() as undo:
            starting = time.monotonic()
            world = undo.enter_context(World())
            runner = Runner(world)
            print(f"a world in {world.folder}, ready after {time.monotonic() - starting:.0f} s", flush=True)
            failed = False
            while todo and not failed and world.schedules < FRESH_AFTER:
                enough = options.seed is None and report.passed(report.read(options.results)) >= options.goal
                if enough or time.monotonic() - began > 60 * options.minutes:
                    todo = []
                    break
                failed = not _one(runner, todo.pop(0), options)
                if failed and options.stop:
                    todo = []
        if not failed:
            shutil.rmtree(world.folder, ignore_errors=True)


def _one(runner: Runner, planned: Schedule, options: argparse.Namespace) -> bool:
    outcome = runner.run(planned)
    report.append(options.results, outcome)
    word = "passed" if outcome.passed else "FAILED"
    fired = f"; fired {', '.join(outcome.fired)}" if outcome.fired else ""
    print(
        f"{word} in {outcome.seconds} s (settled after {outcome.settled}): {planned}; {outcome.jobs} jobs{fired}",
        flush=True,
    )
    if not outcome.passed:
        print("\n".join(f"    {finding}" for finding in outcome.findings))
        faults = f" --faults {','.join(options.faults)}" if options.faults else ""
        print(
            f"    {keep_of(runner.world)}; replay: python -m tests.faults --seed {planned.seed} --times 5{faults}",
            flush=True,
        )
    return outcome.passed


if __name__ == "__main__":
    sys.exit(main())
