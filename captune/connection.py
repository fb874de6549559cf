"""Where the server is: arguments, then `CAPTUNE_URL` and `CAPTUNE_API_KEY`, then the `connection.json` that
`captune up` writes into its state directory."""

import json
import os
from pathlib import Path

from pydantic import BaseModel

from captune.errors import ConnectionNotFound

FILE = "connection.json"


class Connection(BaseModel):
    url: str
    api_key: str


def default_state_dir() -> Path:
    """`CAPTUNE_STATE_DIR`, else `$XDG_STATE_HOME/captune`, else `~/.local/state/captune`."""
    if named := os.environ.get("CAPTUNE_STATE_DIR"):
        return Path(named).expanduser().resolve()
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser().resolve() / "captune"


def find(url: str | None = None, api_key: str | None = None, state_dir: Path | None = None) -> Connection:
    """A `state_dir` named by the caller wins over the environment. The saved key is shown to the saved server only.
    Raises ConnectionNotFound, saying what to do."""
    if state_dir is None:
        url = url or os.environ.get("CAPTUNE_URL")
        api_key = api_key or os.environ.get("CAPTUNE_API_KEY")
    if url and api_key:
        return Connection(url=url, api_key=api_key)
    path = (state_dir or default_state_dir()) / FILE
    try:
        saved = Connection.model_validate(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ConnectionNotFound(
            f"no server is known: start one with 'captune up', or set CAPTUNE_URL and CAPTUNE_API_KEY (no {path})"
        ) from None
    except (OSError, ValueError) as error:
        raise ConnectionNotFound(f"{path} cannot be read ({error}); start the server again to rewrite it") from None
    if url and url.rstrip("/") != saved.url.rstrip("/"):
        raise ConnectionNotFound(f"no API key for {url}: set CAPTUNE_API_KEY (the one in {path} is of {saved.url})")
    return Connection(url=saved.url, api_key=api_key or saved.api_key)
