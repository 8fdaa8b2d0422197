"""What every test shares: a store of its own, an image built once, and proof that nothing is left behind.

Set ``WORKBENCH_TEST_HOME`` to a folder with a short path to keep the store between runs while working on a test.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
RECIPE = TOP / "recipes" / "python"
#: Seconds that tidying up may take after a test.
PATIENCE = 10.0

# Before anything reads them: no test sees or touches the user's own Jupyter folders and store. The path is short,
# since a socket's name has 108 bytes (unix(7)).
_KEPT = os.environ.get("WORKBENCH_TEST_HOME")
BASE = Path(_KEPT) if _KEPT else Path(tempfile.mkdtemp(prefix="wbt", dir="/tmp"))
BASE.mkdir(mode=0o700, exist_ok=True)
os.environ["WORKBENCH_HOME"] = str(BASE / "w")
for _name in ("config", "data", "runtime"):
    os.environ[f"JUPYTER_{_name.upper()}_DIR"] = str(BASE / "j" / _name)
os.environ["XDG_DATA_HOME"] = str(BASE / "x")  # handed on to helpers, whose processes are known by it
os.environ["IPYTHONDIR"] = str(BASE / "ipython")
for _name in ("JUPYTER_TOKEN", "JUPYTER_CONFIG_PATH", "JUPYTER_PATH", "JPY_SESSION_NAME", "WORKBENCH_SINGLE_ID"):
    os.environ.pop(_name, None)


def pytest_configure(config: pytest.Config) -> None:
    """``tmp_path`` is below BASE: pytest itself cannot remove what containers leave, nor very deep trees."""
    if config.option.basetemp is None:
        config.option.basetemp = str(BASE / f"t{os.getpid()}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove all of it, whoever owns the files of layers."""
    from workbench.linux import userns

    userns.call("workbench.linux.trees:remove", str(BASE / f"t{os.getpid()}" if _KEPT else BASE))


@pytest.fixture(scope="session")
def home() -> Path:
    """The store of this test session (``$WORKBENCH_HOME``)."""
    return Path(os.environ["WORKBENCH_HOME"])


def other_account() -> tuple[str, str]:
    """An account that is not root's and the Python that has Workbench for it: that of ``make test`` (ready
    once a test is alone), or whose sudo it is."""
    for name, python in (("workbench-test", "venv/bin/python"), (os.environ.get("SUDO_USER", "root"), sys.executable)):
        with contextlib.suppress(KeyError):
            home = pwd.getpwnam(name).pw_dir
            if name != "root" and os.access(os.path.join(home, python), os.X_OK):
                return name, os.path.join(home, python)
    pytest.skip("there is no other account with Workbench; `sudo make test` makes one")


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> object:
        return json.loads(self.out)


@pytest.fixture(scope="session")
def cli() -> Callable[..., Finished]:
    """``cli("images", "--json")``: the command line in a process of its own."""

    def run(
        *arguments: str, stdin: str = "", timeout: float = 240, cwd: Path | str | None = None, **env: str
    ) -> Finished:
        done = subprocess.run(
            [sys.executable, "-m", "workbench", *arguments],
            input=stdin, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=os.environ | env, check=False,
        )  # fmt: skip
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def image(cli: Callable[..., Finished]) -> str:
    """The ID of recipes/python, built once; its name is ``python``, its kernelspec ``wb-python``."""
    done = cli("build", str(RECIPE), "--refresh", "--json", timeout=280)  # its lock may have aged
    assert done.code == 0, done.err
    return str(json.loads(done.out)["id"])


# --- two parts of one run, side by side ---------------------------------------------------------------------


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test with the mark ``alone`` waits for the other part's test to end, and the other part for it.

    flock(2) alone would let the other part in again and again: who waits for the whole keeps the gate shut.
    """
    turns = os.environ.get("WORKBENCH_TEST_TURNS")
    if not turns:
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    with open(Path(turns, "turn")) as turn, open(Path(turns, "gate")) as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(turn, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(turn, fcntl.LOCK_UN)  # closing is not enough: a server's process may have been forked


# --- nothing is left behind ---------------------------------------------------------------------------------

#: On a machine where other people's containers come and go, what cannot be told from theirs is not looked at.
SHARED_HOST = bool(os.environ.get("WORKBENCH_TEST_SHARED_HOST"))


@dataclass(frozen=True)
class Process:
    """A process that belongs to this test session."""

    parent: int
    start: str
    inside: bool
    command: str


def our_processes(folder: Path = BASE) -> dict[int, Process]:
    """Those whose environment, command or mounts name this session's folder, or another, and this one."""
    mark = f"{folder}/".encode()
    own = os.readlink("/proc/self/ns/pid")
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        place = Path("/proc", name)
        try:
            command = (place / "cmdline").read_bytes()
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            namespace = os.readlink(place / "ns" / "pid")
            marked = mark in command or mark in (place / "environ").read_bytes()
            inside = namespace != own
            if not marked and inside:
                marked = mark in (place / "mountinfo").read_bytes()
        except OSError:  # gone meanwhile, or somebody else's
            continue
        if command and fields[0] != "Z" and (marked or int(name) == os.getpid()):
            text = command.replace(b"\0", b" ").decode(errors="replace")
            found[int(name)] = Process(int(fields[1]), fields[19], inside, text[:150].strip())
    return found


def traces() -> set[str]:
    """What a run could leave on the machine beside processes, each as text."""
    mounted = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    things = {f"mount {path}" for path in mounted if not path.startswith("/sys/kernel/")}  # those mount themselves
    things |= {f"container {name}" for name in _listdir(BASE / "w" / "containers")}
    staging = BASE / "w" / "tmp"
    things |= {f"staging {name}" for name in _listdir(staging) if not _dead_lease(staging / name)}
    folders = [str(BASE / "j" / "runtime"), "/run/netns"]
    if not SHARED_HOST:
        if os.geteuid() == 0:  # nobody else makes links
            things |= {f"link {name}" for name in os.listdir("/sys/class/net")}
        for folder, below, _ in os.walk("/sys/fs/cgroup"):
            if "workbench" in folder and _own(folder):
                things.add(f"cgroup {folder}")
            if folder.count("/") > 7:
                below.clear()
        folders += ["/tmp", "/run", os.environ.get("XDG_RUNTIME_DIR", "")]
        # jupyter_client's, of a connection file that was given no name
        things |= {f"/tmp/{name}" for name in _listdir("/tmp") if re.fullmatch(r"tmp\w{8}\.json", name)}
    for folder in folders:
        things |= {f"{folder}/{name}" for name in _listdir(folder) if re.match(r"workbench|wb", name)}
    return {thing for thing in things if not thing.startswith("/") or _own(thing)}


def _with_content(thing: str) -> str:
    return f"{thing} ({' '.join(_listdir(thing)) or 'empty'})" if os.path.isdir(thing) else thing


def _own(path: str) -> bool:
    """Whether it is of this account, and not of the part of the tests that runs beside this one."""
    try:
        return os.lstat(path).st_uid == os.geteuid()
    except OSError:
        return False


def _dead_lease(path: Path) -> bool:
    """An empty file that a killed process held: it means nothing, and goes when the store is opened next."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return path.suffix == ".lease"


def _listdir(folder: Path | str) -> Sequence[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return ()


def left_behind(before: dict[int, Process], seen: set[str]) -> set[str]:
    """What is there now and was not before. A process below one that was there (a server's helper) may stay,
    a container may not."""
    now = our_processes()
    left = traces() - seen
    for pid, process in now.items():
        if pid in before and before[pid].start == process.start:
            continue
        above = process.parent
        while above in now and above != os.getpid() and above not in before:
            above = now[above].parent
        kept = above in before and above != os.getpid()
        if process.inside or not kept:
            left.add(f"process {pid}: {process.command}")
    return left


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """After each test: no process, mount, link, namespace, cgroup, container, staging or socket folder of it.

    A test that leaves something on purpose takes it away itself.
    """
    before, seen = our_processes(), traces()
    yield
    until = time.monotonic() + PATIENCE
    while left := left_behind(before, seen):
        if time.monotonic() > until:
            pytest.fail("left behind:\n  " + "\n  ".join(sorted(map(_with_content, left))), pytrace=False)
        time.sleep(0.05)
