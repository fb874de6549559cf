"""A fault harness: `python -m tests.faults` (or `make faults`) tries to break the promise that every job answered with
202 ends in exactly one final state, that no caption is lost or doubled and that every score stands once.

world.py     a running stack with tiny models, and its processes
load.py      what users do meanwhile, in threads, from a seed
schedule.py  which faults a seed means, and when
inject/      the faults; inside/: what the stack's own processes carry to fail at named places
journal.py   what was asked and what was acknowledged
oracle.py    what must hold afterwards, of the journal, the database, the store, the queue
processes.py what must hold of the processes: no zombie, nothing left over, no growth
run.py       one schedule: load, faults, settling, verdict
soak.py      one stack for long, a fault now and then: what grows
report.py    the results file and the table
"""
