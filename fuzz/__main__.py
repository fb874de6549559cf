"""`python -m fuzz archives|pictures`: coverage-guided fuzzing with Atheris. README.md says how."""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

import atheris

FOUND = Path(__file__).resolve().parent / "found"
# Whose lines guide the search. (Not what they import: the rest of Python would only be noise.)
INSTRUMENTED = ["shared.datasets", "PIL", "tarfile", "gzip", "bz2", "lzma", "csv", "fuzz.targets"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the intake of data sets.")
    parser.add_argument("target", choices=["archives", "pictures"])
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--corpus", type=Path, help="where inputs are kept; a temporary folder where not given")
    parser.add_argument("--reproduce", type=Path, help="one input, once")
    options = parser.parse_args()
    if options.reproduce:
        from fuzz.targets import TARGETS

        return TARGETS[options.target](options.reproduce.read_bytes())
    with atheris.instrument_imports(include=INSTRUMENTED):
        targets = importlib.import_module("fuzz.targets").TARGETS
    corpus = importlib.import_module("fuzz.corpus")  # it imports what is to be instrumented
    with tempfile.TemporaryDirectory(prefix="captune-corpus-") as temporary:
        folder = options.corpus or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(getattr(corpus, options.target)()):
            (folder / f"seed-{number:02}").write_bytes(data)
        found = FOUND / options.target
        found.mkdir(parents=True, exist_ok=True)
        limits = [f"-max_total_time={options.seconds}", "-timeout=10", "-rss_limit_mb=2048", "-max_len=8192"]
        atheris.Setup(
            [sys.argv[0], *limits, f"-artifact_prefix={found}/", "-print_final_stats=1", str(folder)],
            targets[options.target],
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
