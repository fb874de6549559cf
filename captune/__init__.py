"""What users import: `from captune import Client`."""

from captune.client import Client
from captune.errors import CaptuneAPIError, ConnectionNotFound

__all__ = ["CaptuneAPIError", "Client", "ConnectionNotFound"]
