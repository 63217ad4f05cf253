"""An OpenSSH server on loopback, on a high port, with a host key and a user key of its own."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SSHD = Path("/usr/sbin/sshd")


def why_not() -> str | None:
    """The reason why no server can be started here."""
    if not SSHD.exists():
        return f"needs Debian's openssh-server: no {SSHD} (sshd)"
    if shutil.which("ssh") is None:
        return "needs Debian's openssh-client: no ssh, sshd alone is not enough"
    return None


@contextmanager
def running(folder: Path) -> Iterator[Path]:
    """Start the server; yields the configuration for ssh in which the host `board` is it."""
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where a server that root starts keeps unprivileged children
    for name in ("host_key", "user_key", "other_host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized_keys").write_text((folder / "user_key.pub").read_text())
    (folder / "empty").write_text("")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\n"
        f"PidFile {folder}/pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
        "KbdInteractiveAuthentication no\nLogLevel ERROR\n"
    )
    for name in ("host_key", "other_host_key"):
        kind, key, *_ = (folder / f"{name}.pub").read_text().split()
        (folder / f"known_by_{name}").write_text(f"board {kind} {key}\n")
    config = write_config(folder, port)
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=subprocess.DEVNULL)
    try:
        _wait(port, server)
        yield config
    finally:
        server.terminate()
        server.wait()


def write_config(folder: Path, port: int, known: str = "known_by_host_key") -> Path:
    config = folder / f"config_{known}"
    config.write_text(
        f"Host board\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  HostKeyAlias board\n"
        f"  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/{known}\n"
        "  GlobalKnownHostsFile none\n"
    )
    return config


def _wait(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(100):
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, "sshd ended at once"
        time.sleep(0.05)
    raise AssertionError("sshd does not listen")
