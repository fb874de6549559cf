"""Jobs: the ledger of rows, the claim a worker holds, the worker and the reconciler (DESIGN: no acknowledged job is
ever lost)."""


class Interrupted(Exception):
    """Long work must stop now. Raised out of `Claim.check()`; let it pass through untouched."""


class Cancelled(Interrupted):
    """The user asked for the end of the job."""


class Paused(Interrupted):
    """The user asked for a pause: save what is needed to go on."""


class HandedBack(Interrupted):
    """The worker is being stopped: save what is needed, another worker goes on."""


class LeaseLost(Interrupted):
    """Another attempt owns the job: write nothing more."""
