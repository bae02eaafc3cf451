"""Several hosts on one machine: a command under mpiexec over real TCP and links of a given rate.

    python tests/lab/hosts.py --hosts 4 --rate 1gbit --ppn 1 -- python -m pytest

Each host is a network namespace with a host name and a /dev/shm of its own, connected to a bridge by a
link that a token bucket limits to the rate. All of it is removed when the program ends or is interrupted.
Needs root, iproute2 and MPICH.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_BUCKET = "burst 128kb latency 50ms"
_SECONDS_TO_END = 10.0
_SUBNETS = range(1, 255)

# Started by MPICH in place of ssh, with options, the address of the host, and the command.
_LAUNCHER = """#!/bin/bash
while [[ "$1" == -* ]]; do shift; done
name={name}-"${{1##*.}}"; shift
exec ip netns exec "$name" unshare --uts --ipc bash -c "
hostname $name; mount -t tmpfs tmpfs /dev/shm; $*"
"""


class Hosts:
    """Network namespaces connected by links of one rate; a context manager that removes them.

    Parameters
    ----------
    count
        Number of hosts, 1 to 253.
    rate
        The rate of each host's outgoing link, in the syntax of `tc`: "1gbit", "100mbit".

    Attributes
    ----------
    name
        The prefix of all names that are created.
    """

    def __init__(self, count: int, rate: str) -> None:
        self.count, self.rate = count, rate

    def __enter__(self) -> Hosts:
        self.name, self.subnet = _create_bridge()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    @property
    def addresses(self) -> list[str]:
        """The address of each host."""
        return [f"{self.subnet}.{host}" for host in range(1, self.count + 1)]

    def command(self, ppn: int, extra: int, launcher: Path, program: list[str]) -> list[str]:
        """Return the mpiexec command for `program` with `ppn` ranks a host, and `extra` more on the last."""
        mpiexec = _beside_python("mpiexec")
        launch = ["-iface", self.name, "-launcher", "ssh", "-launcher-exec", str(launcher)]
        counts = [*[ppn] * (self.count - 1), ppn + extra]
        hosts = ",".join(f"{host}:{count}" for host, count in zip(self.addresses, counts, strict=True))
        return [mpiexec, *launch, "-hosts", hosts, "-n", f"{sum(counts)}", *program]

    def _build(self) -> None:
        _ip(f"addr add {self.subnet}.254/24 dev {self.name}")
        _ip(f"link set {self.name} up")
        for host, address in enumerate(self.addresses, 1):
            namespace, port = f"{self.name}-{host}", f"{self.name}p{host}"
            _ip(f"netns add {namespace}")
            _ip(f"link add {port} type veth peer name eth0 netns {namespace}")
            _ip(f"link set {port} master {self.name} up")
            _ip(f"-n {namespace} addr add {address}/24 dev eth0")
            _ip(f"-n {namespace} link set eth0 up")
            _ip(f"-n {namespace} link set lo up")
            _run(f"tc -n {namespace} qdisc add dev eth0 root tbf rate {self.rate} {_BUCKET}")

    def _remove(self) -> None:
        for host in range(1, self.count + 1):
            namespace = f"{self.name}-{host}"
            # A namespace, with its link, exists as long as a process runs in it.
            pids = subprocess.run(
                ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False
            )
            for pid in map(int, pids.stdout.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _ip(f"link del {self.name}p{host}", check=False)
            _ip(f"netns del {namespace}", check=False)
        _ip(f"link del {self.name}", check=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns the exit status of mpiexec."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=4, help="number of hosts [4]")
    parser.add_argument("--rate", default="1gbit", help="rate of each link, in the syntax of tc [1gbit]")
    parser.add_argument("--ppn", type=int, default=1, help="ranks per host [1]")
    parser.add_argument("--extra", type=int, default=0, help="additional ranks on the last host [0]")
    parser.add_argument("program", nargs="+", help="after --: the program of each rank")
    options = parser.parse_args(arguments)
    problem = obstacle()
    if problem:
        parser.error(problem)
    if not 1 <= options.hosts <= 253 or options.ppn < 1 or options.extra < 0:
        parser.error("--hosts is 1 to 253, --ppn at least 1, --extra at least 0")
    # A shell makes its background processes ignore SIGINT.
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        with Hosts(options.hosts, options.rate) as hosts, launcher(hosts.name) as started_by:
            return _wait_for(hosts.command(options.ppn, options.extra, started_by, options.program))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except subprocess.CalledProcessError as error:
        print(f"{' '.join(error.cmd)}: {error.stderr.strip()}", file=sys.stderr)
        return 1


def obstacle() -> str:
    """Return the reason why hosts cannot be created here, or an empty string."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "unshare"):
        if not shutil.which(tool):
            return f"there is no {tool!r}: install iproute2 and util-linux"
    if not Path(_beside_python("mpiexec.hydra")).exists():
        return f"no mpiexec of MPICH beside {sys.executable}: pip install mpich"
    return ""


def _beside_python(tool: str) -> str:
    return str(Path(sys.executable).parent / tool)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _create_bridge() -> tuple[str, str]:
    """Create a bridge under an unused name; several of these programs may run at once."""
    for attempt in _SUBNETS:
        number = (os.getpid() + attempt) % len(_SUBNETS)
        name = f"hpcsgd{number}"
        if _ip(f"link add {name} type bridge", check=attempt == _SUBNETS[-1]):
            return name, f"10.77.{number}"
    raise AssertionError("the last attempt raises")


@contextlib.contextmanager
def launcher(name: str) -> Iterator[Path]:
    """Context with an executable that MPICH uses in place of ssh, for hosts with this prefix."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "launcher")
        path.write_text(_LAUNCHER.format(name=name))
        path.chmod(0o755)
        yield path


def _wait_for(command: list[str]) -> int:
    # Without this UCX may connect the hosts by transports that bypass the links.
    job = subprocess.Popen(command, env={"UCX_TLS": "tcp,self", **os.environ})
    try:
        return job.wait()
    except KeyboardInterrupt:
        job.terminate()
        try:
            job.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
        raise


def _ip(arguments: str, *, check: bool = True) -> bool:
    return _run(f"ip {arguments}", check=check)


def _run(command: str, *, check: bool = True) -> bool:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=check)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
