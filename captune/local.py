"""`captune up`, `demo`, `collect`, `backup` and `restore`: they need the services installed beside the client, and
import them only here."""

import argparse
import signal
import time
from collections.abc import Callable
from pathlib import Path

from captune.connection import default_state_dir
from captune.printing import note, say


def up(args: argparse.Namespace) -> int:
    from services.embedded.stack import Stack, docs_url
    from shared.errors import CaptuneError

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both raise KeyboardInterrupt, during the start too
    state_dir: Path = args.state_dir or default_state_dir()
    try:
        with Stack(state_dir, port=args.port, say=_say) as stack:
            docs = docs_url(stack.url)
            say(f"Captune is up:  {stack.url}" + (f"   (API docs: {docs})" if docs else ""))
            say(f"API key:        {stack.api_key}")
            say(f"State and logs: {stack.state_dir}")
            say("Stop with Ctrl-C.")
            try:
                while True:
                    stack.check()
                    time.sleep(1.0)
            except KeyboardInterrupt:
                for number in (signal.SIGINT, signal.SIGTERM):  # an impatient second one must not cut this short
                    signal.signal(number, signal.SIG_IGN)
                _say("stopping")
    except KeyboardInterrupt:
        _say("stopped before it was up")
        return 130
    except CaptuneError as error:
        note(f"captune: {error.message}")
        return 1
    return 0


def demo(args: argparse.Namespace) -> int:
    from services.embedded.demo import run
    from shared.errors import CaptuneError

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop what was started, as on Ctrl-C
    try:
        return run(args.state_dir or default_state_dir(), args.port)
    except CaptuneError as error:
        note(f"captune: {error.message}")
        return 1


def collect(args: argparse.Namespace) -> int:
    from services.embedded.access import reach
    from shared.db.migrate import migrate
    from shared.store.collector import CollectorSettings, Retention
    from shared.store.collector import collect as run

    def work() -> None:
        with reach(args.state_dir or default_state_dir()) as core:
            migrate(core.db)
            settings = core.settings
            retention = settings.retention if isinstance(settings, CollectorSettings) else Retention()
            say(run(core, retention, args.dry_run).table())

    return _reported(work)


def backup(args: argparse.Namespace) -> int:
    from services.embedded.backup import backup

    def work() -> None:
        made = backup(args.state_dir or default_state_dir(), args.folder, _say)
        say(f"{args.folder}: {sum(made['rows'].values()):,} rows, {made['objects']:,} files, {made['bytes']:,} bytes")

    return _reported(work)


def restore(args: argparse.Namespace) -> int:
    from services.embedded.backup import restore

    state_dir = args.state_dir or default_state_dir()

    def work() -> None:
        made = restore(args.folder, state_dir, _say)
        say(f"{state_dir}: {sum(made['rows'].values()):,} rows and {made['objects']:,} files, all there and whole")

    return _reported(work)


def _reported(work: Callable[[], None]) -> int:
    from shared.errors import CaptuneError

    try:
        work()
    except (CaptuneError, OSError) as error:
        note(f"captune: {error.message if isinstance(error, CaptuneError) else error}")
        return 1
    return 0


def _say(text: str) -> None:
    note(f"  {text} …")
