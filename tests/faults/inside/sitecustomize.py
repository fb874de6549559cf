"""Run by every interpreter that has this folder on its PYTHONPATH, before anything else: sets the named edges."""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_here = Path(__file__).resolve().parent

if os.environ.get("CAPTUNE_FAULTS_DIR"):
    import fault_points

    fault_points.install()

# The machine's own, which this one hides.
_others = [entry for entry in sys.path if Path(entry or ".").resolve() != _here]
if (_spec := PathFinder.find_spec("sitecustomize", _others)) is not None and _spec.loader is not None:
    _spec.loader.exec_module(module_from_spec(_spec))
