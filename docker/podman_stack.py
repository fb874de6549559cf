"""docker-compose.yml under podman, on a Debian machine without a Docker engine. docker/compose_check.py uses it.

A debootstrapped base, Debian's PostgreSQL and Redis, and Caddy from PyPI (docker/check/) stand in for the official
images. podman-compose turns the services into containers; the waiting for `depends_on` conditions is done here, because
podman 4.3 cannot wait for health and runs health checks through systemd timers, which a bare machine may not have.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "captune-check"
BASE_IMAGE = f"localhost/{PROJECT}/base"
TOOLS = {  # command: Debian package
    "podman": "podman",
    "runc": "runc",
    "debootstrap": "debootstrap",
    "catatonit": "catatonit",
    "iptables": "iptables",
    "/usr/lib/podman/netavark": "netavark",
    "/usr/lib/podman/aardvark-dns": "aardvark-dns",
}
# runc, because crun insists on cgroups that a machine inside a container or a micro VM may not have; limits named
# outright, because podman otherwise asks for more than a process without CAP_SYS_RESOURCE may set.
CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
events_logger = "file"
"""


def say(text: str) -> None:
    print(f"compose-check: {text}", flush=True)


def run(*command: str) -> str:
    """Standard output of a command, run in the repository's root. Raises SystemExit with all it printed if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        sys.exit(f"compose-check: {' '.join(command)} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return done.stdout


def install_tools() -> None:
    missing = [package for command, package in TOOLS.items() if shutil.which(command) is None]
    if missing:
        say(f"installing {' '.join(missing)}")
        run("apt-get", "update")
        run("apt-get", "install", "--yes", "--no-install-recommends", *missing)


def make_base() -> None:
    """A minimal Debian with Python 3.11, from the mirror that this machine's apt uses, as an image."""
    if subprocess.run(["podman", "image", "exists", BASE_IMAGE], check=False).returncode == 0:
        return
    say("making the Debian base image (a minute, once)")
    mirrors = run("apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages", "Origin: Debian").split()
    with tempfile.TemporaryDirectory(prefix=PROJECT) as root:
        packages = "--include=ca-certificates,python3-venv"
        run("debootstrap", "--variant=minbase", packages, "bookworm", root, *mirrors[:1])
        policy = Path(root, "usr/sbin/policy-rc.d")  # packages installed in a build start no service
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        run("sh", "-c", f"tar --directory {root} --exclude './var/cache/apt/archives/*.deb' --create . "
            f"| podman import --quiet - {BASE_IMAGE}")  # fmt: skip


def pip_mounts(folder: Path) -> list[str]:
    """Volumes that make pip inside a build reach what pip reaches here, whether files or the environment say so."""
    merged: dict[str, str] = {}
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in ("global", "install", ":env:") and name != "find-links":  # :env: comes first, and wins
            merged.setdefault(name, value.strip("'\""))
    conf = folder / "pip.conf"
    conf.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in merged.items()))
    mounts = [f"{conf}:/etc/pip.conf:ro"]
    if cert := merged.get("cert"):
        mounts.append(f"{cert}:{cert}:ro")
    return mounts


class Stack:
    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.api_key = secrets.token_hex(24)
        self.folder = folder
        (folder / "containers.conf").write_text(CONTAINERS_CONF)
        os.environ |= {
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "BUILDAH_ISOLATION": "chroot",
            "BASE_IMAGE": BASE_IMAGE,
            "CAPTUNE_IMAGE": f"localhost/{PROJECT}/captune",
            "CAPTUNE_PORT": str(port),
            "CAPTUNE_BOOTSTRAP_KEY": self.api_key,
            **{k: secrets.token_hex(24) for k in ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "CAPTUNE_SERVICE_TOKEN")},
        }
        self.compose = [sys.executable, "-m", "podman_compose", "--in-pod=false", f"--project-name={PROJECT}"]
        self.compose += ["-f", "docker-compose.yml", "-f", "docker/check/compose.yml"]

    def config(self) -> dict[str, Any]:
        merged: dict[str, Any] = yaml.safe_load(run(*self.compose, "config"))["services"]
        return merged

    def build(self) -> None:
        """The stand-ins and the one image of all Captune services."""
        say("building the images (the first time this downloads torch)")
        flags = " ".join(f"--volume={mount}" for mount in pip_mounts(self.folder))
        command = [*self.compose, f"--podman-build-args={flags}", "build"]
        for service in ("postgres", "redis", "gateway", "migrate"):
            subprocess.run([*command, service], cwd=ROOT, check=True)

    def container(self, service: str) -> str:
        return f"{PROJECT}_{service}_1"

    def state(self, service: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(run("podman", "inspect", self.container(service)))[0]["State"]
        return found

    def met(self, service: str, condition: str) -> bool:
        """Whether a service that was started fulfils a `depends_on` condition. A health check is run here and now."""
        state = self.state(service)
        if condition == "service_started":
            return True
        if condition == "service_completed_successfully":
            if state["Status"] == "exited" and state["ExitCode"]:
                sys.exit(f"compose-check: {service} failed:\n{self.logs(service)}")
            return bool(state["Status"] == "exited")
        check = ["podman", "healthcheck", "run", self.container(service)]
        return subprocess.run(check, capture_output=True, check=False).returncode == 0

    def wait(self, service: str, condition: str, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not self.met(service, condition):
            if time.monotonic() > deadline:
                sys.exit(f"compose-check: {service} is not {condition} after {seconds:.0f} s:\n{self.logs(service)}")
            time.sleep(1)

    def up(self, *only: str) -> None:
        """Start every service, or these, once the conditions it names are met, as `docker compose up --detach` does."""
        services = {name: service for name, service in self.config().items() if not only or name in only}
        started: set[str] = set()
        while len(started) < len(services):
            ready = {n for n, s in services.items() if started.issuperset(s.get("depends_on", {}))} - started
            assert ready, "depends_on goes in a circle"
            for name in ready:
                for dependency, how in services[name].get("depends_on", {}).items():
                    self.wait(dependency, how["condition"])
            say(f"starting {' '.join(sorted(ready))}")
            run(*self.compose, "up", "--detach", "--no-deps", "--no-build", *sorted(ready))
            started |= ready
        for name, service in services.items():
            if "healthcheck" in service:
                self.wait(name, "service_healthy")

    def logs(self, service: str, lines: int = 40) -> str:
        done = subprocess.run(
            ["podman", "logs", f"--tail={lines}", self.container(service)], capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    def down(self) -> None:
        subprocess.run([*self.compose, "down", "--volumes", "--timeout=5"], cwd=ROOT, capture_output=True, check=False)
