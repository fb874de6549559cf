"""Exit 0 when the URL answers with 2xx, 1 with the reason when not. Slim images have no curl."""

import sys
from urllib.request import urlopen

try:
    urlopen(sys.argv[1], timeout=4).close()
except OSError as error:  # refused, timed out, or an HTTP error status
    sys.exit(f"{sys.argv[1]}: {error}")
