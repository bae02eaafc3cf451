"""The owner of a folder's lock, and the evidence that it still lives."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from hpcsgd.diagnostics import procfs

#: States of a Slurm job of which processes may exist; of the second kind they do, and give no sign of life.
_MAY_RUN = {"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT"}
_SUSPENDED = {"SUSPENDED", "STOPPED"}
_QUEUE_TIMEOUT = 20.0  # seconds


@dataclass(frozen=True)
class LockOwner:
    """A process that owns a lock; the defaults are those of this process."""

    #: Unique to each lock that a process acquires.
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    #: Host and id of the process, and its start in clock ticks since that of the machine.
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    started: int = field(default_factory=lambda: procfs.started(os.getpid()))
    #: The boot of the machine and the namespace of process ids, in which `pid` is valid; "": unknown.
    machine: str = field(default_factory=lambda: _machine())
    #: Slurm's job, the number of times that it was requeued, and the cluster; "": none.
    job: str = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID", ""))
    restarts: int = field(default_factory=lambda: int(os.environ.get("SLURM_RESTART_COUNT") or 0))
    cluster: str = field(default_factory=lambda: os.environ.get("SLURM_CLUSTER_NAME", ""))
    #: Time at which the lock was acquired, for people.
    since: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S %Z"))

    @classmethod
    def parse(cls, text: str) -> LockOwner:
        """Return the owner in the text of a lock; an unknown one, of a token only, if that is damaged."""
        with contextlib.suppress(ValueError, TypeError, LookupError):
            values = json.loads(text)
            return cls(**{name: type(default)(values[name]) for name, default in asdict(_UNKNOWN).items()})
        return replace(_UNKNOWN, token=f"damaged: {text}")

    def text(self) -> str:
        """Return the contents of a lock."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def __str__(self) -> str:
        if not self.pid:
            return "an unknown process"
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def remedy(self) -> str:
        """Return the command that ends the owner."""
        if not self.pid:
            return "look for it with squeue or ps"
        return f"scancel {self.job}" if self.job else f"kill {self.pid} on {self.host}"

    def lives(self, observer: LockOwner) -> bool | None:
        """Return whether the owner lives, as far as another process can know without its sign of life."""
        if self.machine and self.machine == observer.machine:
            return _exists(self.pid, self.started)
        if not self.job or self.cluster != observer.cluster:
            return None
        if self.job == observer.job:
            # Slurm starts a job again only after it has ended the processes of the last time.
            return False if self.restarts < observer.restarts else None
        states = _states(self.job)
        if states is None or states & _MAY_RUN:
            return None
        return bool(states & _SUSPENDED)


_UNKNOWN = LockOwner("", "", 0, 0, "", "", 0, "", "")


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _exists(pid: int, started: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # A process of another user, of which /proc may show nothing.
        return procfs.started(pid) in (0, started)
    return procfs.is_alive(pid) and procfs.started(pid) == started


def _states(job: str) -> set[str] | None:
    """The states of a job in Slurm's queue, empty if it is not there; None: unknown."""
    squeue = shutil.which("squeue")
    if squeue is None:
        return None
    command = [squeue, "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=_QUEUE_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return set() if "Invalid job id" in done.stderr else None
    return set(done.stdout.split())
