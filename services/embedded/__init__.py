"""The one-command stack: PostgreSQL, Valkey and the workers as child processes, and every service in one server.

launch.py     runs in the child: privileges dropped, parent-death signal set, then exec
processes.py  starts children that way, finds and ends what a crash left behind
lock.py       one stack per state directory
cluster.py    the PostgreSQL data directory and the account it runs under
servers.py    start_postgres, start_valkey
keeper.py     starts a PostgreSQL or Valkey that died again
supervisor.py keeps worker processes running
access.py     the database and the store of a state directory, whether its stack runs or not
backup.py     captune backup, captune restore
"""
