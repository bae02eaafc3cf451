"""Slurm on one machine: a real controller, two nodes, and a command run with access to them.

    python tests/lab/slurm.py -- sbatch --wait --wrap 'srun -N2 hostname'

The nodes n1 and n2 are two slurmd on this machine, with a host name and a /dev/shm of their own. All of it
uses a temporary folder, free ports and a munged of its own, and is removed when the program ends or is
interrupted; several may run at once.
Needs root, and Debian's slurm-wlm and munge.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_SECONDS_TO_START = 30.0
_SECONDS_TO_END = 10.0
_DAEMONS = ("unshare", "munged", "slurmctld", "slurmd")
_CLIENTS = ("sbatch", "srun", "scontrol", "scancel", "squeue")
_NODES = ("n1", "n2")

_WITHIN = ("unshare", "--uts", "--ipc", "--mount", "sh", "-c")
# Arguments: a node, slurmd, and a file of hosts. With a common /dev/shm MPI would treat all ranks as local.
_NODE = """
hostname "$0" && mount --bind "$2" /etc/hosts && mount -t tmpfs tmpfs /dev/shm && exec "$1" -D -N "$0"
"""

# cred_expire: a requeued job waits so long before it restarts; 5 is the minimum.
_CONFIG = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=pmi2
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0,requeue_setup_env_fail
KillWait=5
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs={cpus} RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs={cpus} RealMemory=8000
PartitionName=lab Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


class Slurm:
    """A controller and two nodes; a context manager that stops them.

    Parameters
    ----------
    cpus
        The CPUs of each node, independent of those of this machine.

    Attributes
    ----------
    environment
        The environment for commands such as `sbatch`.
    folder
        The folder of its configuration and logs.
    """

    def __init__(self, cpus: int = 4) -> None:
        self._cpus = cpus
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        self._temporary = tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "PMI"))},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            **_one_network(),
        }
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, *command: str | Path) -> str:
        """Return the output of a command that must succeed."""
        done = subprocess.run(
            list(map(str, command)), env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def _start(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in _NODES)):
            (self.folder / name).mkdir()
        # Otherwise jobs of other users could not read it, and munge would reject it.
        self.folder.chmod(0o755)
        self._start_munge()
        first, second, controller = _free_ports(3)
        text = _CONFIG.format(
            folder=self.folder,
            host=socket.gethostname().split(".")[0],
            cpus=self._cpus,
            controller=controller,
            first=first,
            second=second,
        )
        (self.folder / "slurm.conf").write_text(text)
        self._daemon("slurmctld", "-D", "-i")
        hosts = self.folder / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {socket.gethostname()} {' '.join(_NODES)}\n")
        for node in _NODES:
            self._daemon(*_WITHIN, _NODE, node, _which("slurmd"), str(hosts))
        self._wait(lambda: self._states() == ["idle"] * len(_NODES), "the nodes to be idle")

    def _start_munge(self) -> None:
        key, sock = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "seed", "log")]
        self._daemon("munged", "--foreground", "--force", f"--socket={sock}", *files)
        self._wait(sock.exists, "munged")

    def _daemon(self, name: str, *options: str) -> None:
        with (self.folder / "output.txt").open("ab") as log:
            daemon = subprocess.Popen(
                [_which(name), *options],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._running.append(daemon)

    def _states(self) -> list[str]:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%T"],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.split()

    def _wait(self, ready: Callable[[], bool], condition: str) -> None:
        deadline = time.monotonic() + _SECONDS_TO_START
        while not ready():
            ended = [str(daemon.args) for daemon in self._running if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"waited for {condition}; ended: {ended}\n{self.logs()}")
            time.sleep(0.05)

    def logs(self) -> str:
        """Return the last lines of each log."""
        files = sorted([*self.folder.glob("*.log"), self.folder / "output.txt"])
        texts = [(f.name, f.read_text(errors="replace").splitlines()[-15:]) for f in files if f.exists()]
        return "\n".join(line for name, lines in texts for line in [f"== {name}", *lines])

    def _stop(self) -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                ["scancel", "--user=root"], env=self.environment, capture_output=True, check=False, timeout=5
            )
        for daemon in reversed(self._running):
            daemon.terminate()
        for daemon in self._running:
            try:
                daemon.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._kill_jobs()
        self._temporary.cleanup()

    def _kill_jobs(self) -> None:
        """Kill jobs and their launchers, which outlive slurmd; their environment names this configuration."""
        mark = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpus", type=int, default=4, help="CPUs of each node [4]")
    parser.add_argument("command", nargs="+", help="after --: the command")
    options = parser.parse_args(arguments)
    problem = obstacle()
    if problem:
        parser.error(problem)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with Slurm(options.cpus) as slurm:
            return subprocess.run(options.command, env=slurm.environment, check=False).returncode
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def obstacle() -> str:
    """Return the reason why Slurm cannot be started here, or an empty string."""
    if os.geteuid() != 0:
        return "slurmd needs root to start jobs"
    for tool in (*_DAEMONS, *_CLIENTS):
        if not _which(tool):
            return f"there is no {tool!r}: install slurm-wlm and munge"
    tried = subprocess.run([*_WITHIN, "mount -t tmpfs tmpfs /dev/shm"], capture_output=True, check=False)
    return "nodes need a /dev/shm of their own, and mount is not allowed" if tried.returncode else ""


def _which(tool: str) -> str:
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or ""


def _free_ports(count: int) -> list[int]:
    """Free ports outside the range of outgoing connections, which could take them at any moment."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            port = random.randrange(20000, 30000)
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind(("", port))
                ports.append(port)
        return ports


def _one_network() -> dict[str, str]:
    """Variables that pin MPICH to one network, while networks of other labs are created and removed.

    They also keep addresses short: MPICH sends them in lines of PMI, and Slurm splits lines of more than
    1,024 bytes, which UCX needs.
    """
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()]
    device = next((name for name, destination, *_ in routes if destination == "00000000"), "")
    pinned = {"FI_TCP_IFACE": device, "FI_SOCKETS_IFACE": device, "UCX_NET_DEVICES": device}
    return {"MPIR_CVAR_CH4_NETMOD": "ofi", **(pinned if device else {})}


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
