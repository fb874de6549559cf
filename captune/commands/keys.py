"""`captune keys`."""

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from captune import arguments, tables
from captune.printing import say, say_json
from captune.terminal import client_of, show
from shared.schemas.keys import Key

HEADER = ("id", "owner", "name", "begins with", "scopes", "limit", "last used", "expires", "state")


def create(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        key = client.create_key(
            owner=args.owner,
            name=args.name,
            scopes=args.scopes,
            expires_in_days=args.expires_in_days,
            rate_limit=args.rate_limit,
        )
    if args.json:
        say_json(key)
    else:
        say(f"{key.id}  {key.key}  (shown this once)")
    return 0


def list_keys(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        if args.json:
            show(args, client.keys())
        else:
            say(tables.table(HEADER, map(_row, client.keys())))
    return 0


def revoke(args: argparse.Namespace) -> int:
    with client_of(args) as client:
        client.revoke_key(args.id)
    return 0


def _row(key: Key) -> tuple[object, ...]:
    begins = f"{key.prefix}…" if key.prefix else None
    times = (_time(key.last_used_at), _time(key.expires_at))
    return (key.id, key.owner, key.name, begins, ",".join(key.scopes), key.rate_limit, *times, _state(key))


def _time(unix: int | None) -> str | None:
    return None if unix is None else f"{datetime.fromtimestamp(unix, UTC):%Y-%m-%d %H:%M}"


def _state(key: Key) -> str:
    if key.revoked_at is not None:
        return "revoked"
    ended = key.expires_at is not None and key.expires_at <= datetime.now(UTC).timestamp()
    return "expired" if ended else "usable"


def add(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    keys = commands.add_parser("keys", help="API keys").add_subparsers(required=True, metavar="COMMAND")
    made = command(keys, "create", create, "make a key")
    made.add_argument("--owner", required=True)
    made.add_argument("--name", default="", help="what it is for, to tell it apart by")
    made.add_argument(
        "--scopes", type=arguments.names, default=["read", "write"],
        help="comma-separated: read, write, admin (default: read,write)",
    )  # fmt: skip
    made.add_argument("--expires-in-days", type=int, metavar="N", help="default: never")
    made.add_argument(
        "--rate-limit", metavar="N/UNIT", help="such as 600/second, 50/minute or off (default: the server's)"
    )
    command(keys, "list", list_keys, "list keys")
    command(keys, "revoke", revoke, "revoke a key, at once").add_argument("id")
