"""``make demo``: build an image, run a notebook in a container of it, and prove what its kernel sees.

All goes the way that a person's JupyterLab goes: a real server, its REST interface, a kernel's websocket.
Exit code 0 only when each claim of the table was checked and holds.
"""

from __future__ import annotations

import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from websocket import WebSocket, create_connection

from workbench.cli import show

TOP = Path(__file__).resolve().parent.parent
RECIPE = TOP / "recipes" / "python"
NOTEBOOK = TOP / "notebooks" / "quickstart.ipynb"
KERNEL = "wb-python"
CANARY = "WORKBENCH_DEMO_SECRET"

# Runs in the kernel; its answer is compared with the host's own.
PROBE = """
import json, os, platform, pwd, socket
def read(path):
    try:
        return open(path).read().strip()
    except OSError as error:
        return f"({error.strerror})"
def reachable(port):
    try:
        socket.create_connection(("127.0.0.1", port), 2).close()
        return True
    except OSError:
        return False
release = dict(line.split("=", 1) for line in read("/etc/os-release").splitlines() if "=" in line)
status = dict(line.split(":", 1) for line in read("/proc/self/status").splitlines())
print(json.dumps({
    "system": release["PRETTY_NAME"].strip('"'), "suite": release.get("VERSION_CODENAME", ""),
    "host_name": socket.gethostname(), "init": read("/proc/1/comm"),
    "processes": sum(name.isdigit() for name in os.listdir("/proc")),
    "interfaces": sorted(name for _, name in socket.if_nameindex()),
    "user": pwd.getpwuid(os.getuid()).pw_name, "uid": os.getuid(),
    "python": platform.python_version() + " at " + os.sys.executable,
    "capabilities": bin(int(status["CapEff"], 16)).count("1"),
    "no_new_privs": status["NoNewPrivs"].strip(), "seccomp": status["Seccomp"].strip(),
    "variables": len(os.environ), "canary": %(canary)r in os.environ,
    "home": [os.stat(%(home)r).st_dev, os.stat(%(home)r).st_ino] if os.path.exists(%(home)r) else None,
    "server_reached": reachable(%(port)d),
    "namespaces": {name: os.readlink(f"/proc/self/ns/{name}")
                   for name in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")},
}))
"""


class DemoError(Exception):
    """The demo cannot go on."""


@contextmanager
def timed(title: str) -> Iterator[None]:
    """Say what begins, and how long it took."""
    print(f"== {title} ...", flush=True)
    started = time.monotonic()
    yield
    print(f"   {title}: {time.monotonic() - started:.1f} s", flush=True)


def workbench(*arguments: str, quiet: bool = True) -> Any:
    """``jupyter workbench ... --json``: what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "workbench", *arguments, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE if quiet else None, text=True, check=False,
    )  # fmt: skip
    if done.returncode and not done.stdout.strip():
        raise DemoError(f"jupyter workbench {' '.join(arguments)}: {(done.stderr or '').strip() or 'failed'}")
    return json.loads(done.stdout)


def examine() -> None:
    """Stop at once where the host lacks something, with the line that mends it."""
    checks = workbench("doctor")
    for check in checks:
        if check["state"] != "ok":
            print(f"   {check['state']}: {check['name']}: {check['found']}\n      -> {check['remedy']}")
    if any(check["state"] == "missing" for check in checks):
        raise DemoError("this machine lacks something that containers need; see above")
    print(f"   {sum(check['state'] == 'ok' for check in checks)} of {len(checks)} points are well")


class Server:
    """A Jupyter server of our own: a random port, a random token, a folder with the notebook."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.token = secrets.token_hex(24)
        self.log = folder / "server.log"
        root = folder / "notebooks"
        root.mkdir()
        shutil.copy(NOTEBOOK, root)
        command = [
            str(Path(sys.executable).parent / "jupyter"),
            "server",
            "--no-browser",
            f"--ServerApp.port={self.port}",
            "--ServerApp.port_retries=0",
            f"--ServerApp.root_dir={root}",
        ]
        if os.geteuid() == 0:
            command.append("--allow-root")
        env = os.environ | {"JUPYTER_TOKEN": self.token, CANARY: "not for kernels"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """A request to the REST interface; the JSON of the answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"token {self.token}", "Content-Type": "application/json"},
        )
        # No proxy for the way to ourselves.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            with suppress(ValueError, KeyError, TypeError):
                said = json.loads(said)["message"]
            raise DemoError(f"{method} {path}: {error}: {said}") from None
        return json.loads(text) if text else None

    def wait(self, timeout: float = 60.0) -> str:
        """Until it answers; its version."""
        until = time.monotonic() + timeout
        while True:
            try:
                return str(self.ask("GET", "/api")["version"])
            except OSError as error:
                if self.process.poll() is not None or time.monotonic() > until:
                    tail = "\n".join(self.log.read_text().splitlines()[-15:])
                    raise DemoError(f"the Jupyter server does not answer ({error}):\n{tail}") from None
                time.sleep(0.1)

    def connect(self, kernel: str) -> WebSocket:
        """The websocket that carries a kernel's channels."""
        return create_connection(
            f"ws://127.0.0.1:{self.port}/api/kernels/{kernel}/channels",
            header=[f"Authorization: token {self.token}"],
            timeout=120,
            http_no_proxy=["127.0.0.1"],
        )

    def stop(self) -> None:
        """Ask it to end, and see to it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def execute(channel: WebSocket, code: str) -> str:
    """Run a cell; what it printed. Raises DemoError with the kernel's own words when it fails."""
    number = uuid.uuid4().hex
    channel.send(json.dumps({
        "channel": "shell", "parent_header": {}, "metadata": {}, "buffers": [],
        "header": {"msg_id": number, "msg_type": "execute_request", "username": "demo", "session": number,
                   "version": "5.3", "date": ""},
        "content": {"code": code, "silent": False, "store_history": True, "user_expressions": {},
                    "allow_stdin": False, "stop_on_error": True},
    }))  # fmt: skip
    printed, idle, replied = "", False, False
    while not (idle and replied):
        message = json.loads(channel.recv())
        if message.get("parent_header", {}).get("msg_id") != number:
            continue
        kind, content = message["msg_type"], message["content"]
        if kind == "stream" and content["name"] == "stdout":
            printed += content["text"]
        elif kind == "error":
            raise DemoError(f"a cell failed: {content['ename']}: {content['evalue']}\n{code}")
        elif kind == "execute_reply":
            replied = True
        elif kind == "status":
            idle = content["execution_state"] == "idle"
    return printed


@dataclass(frozen=True)
class Claim:
    """One line of the proof."""

    what: str
    inside: str
    outside: str
    holds: bool


def claims(inside: dict[str, Any], row: dict[str, Any], image: dict[str, Any], server: Server) -> list[Claim]:
    """What the kernel sees beside what this host has; each judged here."""
    suite = tomllib.loads((RECIPE / "recipe.toml").read_text())["base"]["suite"]
    system = fields(Path("/etc/os-release").read_text(), "=").get("PRETTY_NAME", "?").strip('"')
    host_name, init = socket.gethostname(), Path("/proc/1/comm").read_text().strip()
    interfaces = sorted(name for _, name in socket.if_nameindex())
    processes = sum(name.isdigit() for name in os.listdir("/proc"))
    outer_uid = int(fields(Path(f"/proc/{row['pid']}/status").read_text(), ":")["Uid"].split()[0])
    me = f"{pwd.getpwuid(os.geteuid()).pw_name} ({os.geteuid()})"
    own = [name for name, link in inside["namespaces"].items() if os.readlink(f"/proc/self/ns/{name}") != link]
    home = os.path.expanduser("~")
    same_home = inside["home"] == [os.stat(home).st_dev, os.stat(home).st_ino]
    built, runs = image["id"], row["image_id"]
    two_of_its_own = inside["interfaces"] == ["eth0", "lo"] and "net" in own
    ports = listening_ports(server.process.pid)
    confined = inside["capabilities"] <= 11 and inside["seccomp"] == "2" and inside["no_new_privs"] == "1"
    return [
        Claim("system", inside["system"], system, inside["suite"] == suite),
        Claim("image", short(runs), f"{short(built)} was built", runs == built),
        Claim("host name", inside["host_name"], host_name, inside["host_name"] not in ("", host_name)),
        Claim("process 1", inside["init"], init, inside["init"] != init and "pid" in own),
        Claim("processes", str(inside["processes"]), str(processes), inside["processes"] < min(processes, 7)),
        Claim("interfaces", " ".join(inside["interfaces"]), " ".join(interfaces), two_of_its_own),
        Claim("user", f"{inside['user']} ({inside['uid']})", f"uid {outer_uid}, started by {me}",
              inside["uid"] == 0 and outer_uid != 0),
        Claim("namespaces of its own", " ".join(own), "", len(own) == len(inside["namespaces"])),
        Claim("capabilities", str(inside["capabilities"]), "", confined),
        Claim("variables", str(inside["variables"]), f"{len(os.environ)}, a secret among them",
              not inside["canary"]),
        Claim("home folder", "seen" if same_home else "not seen", home, not same_home),
        Claim("the server's port", "reached" if inside["server_reached"] else "not reached", str(server.port),
              not inside["server_reached"]),
        Claim("TCP ports for the kernel", "none", f"server and kernel: {' '.join(map(str, ports))}",
              ports == [server.port]),
    ]  # fmt: skip


def listening_ports(top: int) -> list[int]:
    """The TCP ports of this host on which a process or any of its descendants listens (proc(5))."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            parents[int(name)] = int(Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[1])
    family = {top}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    sockets = set()
    for pid in family:
        with suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    sockets.add(os.readlink(f"/proc/{pid}/fd/{number}"))
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()[1:]]
    return sorted(
        {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}
    )


def fields(text: str, separator: str) -> dict[str, str]:
    """``NAME=VALUE`` lines as a dictionary."""
    return dict(line.split(separator, 1) for line in text.splitlines() if separator in line)


def short(image: str) -> str:
    """The beginning of an image ID."""
    return image.removeprefix("sha256:")[:16]


def left_behind(row: dict[str, Any]) -> list[str]:
    """What of a container can still be found once it has been shut down."""
    found = [f"process {row['pid']}"] if os.path.exists(f"/proc/{row['pid']}") else []
    found += [f"container {other['id']}" for other in workbench("ps", "--all") if other["id"] == row["id"]]
    found += [f"mount {line}" for line in Path("/proc/self/mountinfo").read_text().splitlines() if row["id"] in line]
    return found


def run_notebook(server: Server) -> tuple[str, WebSocket]:
    """Open the notebook as a client does and run its cells; the session and its channel."""
    notebook = server.ask("GET", f"/api/contents/{NOTEBOOK.name}")
    session = server.ask("POST", "/api/sessions", {
        "path": NOTEBOOK.name, "name": NOTEBOOK.name, "type": "notebook", "kernel": {"name": KERNEL},
    })  # fmt: skip
    channel = server.connect(session["kernel"]["id"])
    cells = [cell["source"] for cell in notebook["content"]["cells"] if cell["cell_type"] == "code"]
    for number, source in enumerate(cells, 1):
        started = time.monotonic()
        execute(channel, source)
        first = next((line for line in source.splitlines() if line.strip()), "")
        print(f"   cell {number} of {len(cells)}: {time.monotonic() - started:5.2f} s  {first[:70]}", flush=True)
    return session["id"], channel


def demo(folder: Path) -> bool:
    """The whole of it; whether every claim holds."""
    with timed("examining this machine"):
        examine()
    with timed("building recipes/python"):
        image = workbench("build", str(RECIPE), "--refresh", quiet=False)
        print(f"   {image['name']}: {image['id']}")
    server = Server(folder)
    try:
        with timed("starting a Jupyter server"):
            print(f"   jupyter_server {server.wait()} at 127.0.0.1:{server.port}")
        before = {row["id"] for row in workbench("ps")}
        with timed(f"running {NOTEBOOK.name} in {KERNEL}"):
            session, channel = run_notebook(server)
        started = [row for row in workbench("ps") if row["id"] not in before]
        if len(started) != 1:
            raise DemoError(f"one new container was expected, {len(started)} are there")
        row = started[0]
        facts = {"canary": CANARY, "home": os.path.expanduser("~"), "port": server.port}
        table = claims(json.loads(execute(channel, PROBE % facts)), row, image, server)
        channel.close()
        with timed("shutting down"):
            server.ask("DELETE", f"/api/sessions/{session}")
            server.stop()
            remains = left_behind(row)
            for other in remains:
                if other.startswith("container"):  # the notebook changed something: it stays by design
                    workbench("rm", "--force", row["id"])
    finally:
        server.stop()
    remains = left_behind(row)
    table.append(Claim("left behind afterwards", ", ".join(remains) or "nothing", "-", not remains))
    print("\nWhat the kernel sees, beside what this host has:\n")
    print(show.table([
        {"what": claim.what, "in the kernel": claim.inside, "on this host": claim.outside,
         "holds": "yes" if claim.holds else "NO"} for claim in table
    ]))  # fmt: skip
    return all(claim.holds for claim in table)


def main() -> int:
    """Exit code 0 only when all holds."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="workbench-demo-") as folder:
        try:
            held = demo(Path(folder))
        except (DemoError, urllib.error.HTTPError) as error:
            print(f"demo: {error}", file=sys.stderr)
            return 1
    print(f"\n{'Every claim holds' if held else 'Not every claim holds'}: {time.monotonic() - started:.1f} s.")
    if held:
        print("The image and its kernel stay: `make lab` opens JupyterLab with its launcher card.")
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
