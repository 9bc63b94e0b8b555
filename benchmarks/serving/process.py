"""`ernie serve` as a process of its own, for the scripts that watch one."""

import contextlib
import json
import subprocess
import urllib.request
from pathlib import Path


@contextlib.contextmanager
def serving(ernie, database, *options):
    """A server on a free port, as a process and its URL; it is ended in the end."""
    command = [ernie, "serve", "--port", "0", "--database", database, "--log-level", "error", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        # Said once it listens: nano is served at http://127.0.0.1:8080/v1 …
        line = server.stdout.readline()
        if "http://" not in line:
            raise RuntimeError(f"the server did not start: {line!r}, exit status {server.wait(60)}")
        root = "http://" + line.split("http://", 1)[1].split("/v1", 1)[0]
        urllib.request.urlopen(root + "/health/ready", timeout=30).close()
        yield server, root
    finally:
        server.terminate()
        server.wait(60)


def resident_kib(server):
    status = Path(f"/proc/{server.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))


def make_key(ernie, database, *scopes):
    """A new key and its id."""
    command = [ernie, "keys", "--database", database, "--json", "create", "-".join(scopes) or "all"]
    command += ["--scopes", ",".join(scopes)] if scopes else []
    made = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return made["key"], made["id"]
