"""How a process that computes shares the cores with the others."""

import os


def share_cores() -> None:
    """Let OpenMP threads sleep while they wait for one another. By default they spin, and two such processes on one
    machine (a run being trained, another being scored) slow each other several times over: docs/log.md. Call it before
    torch is imported; a policy that the operator set stands."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
