"""Set up a checkout: ``python3 scripts/bootstrap.py run|test|bench``.

Needs nothing but Python. Says what it installs before it does; does nothing, quickly, when all is there:

* Debian packages, as root or through sudo; where neither may be, one line says what to run;
* a range of subordinate ids for an unprivileged user who has none (subuid(5));
* the virtual environment ``.venv`` with this package in editable form. pip's own settings are respected.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from steps import StepError, say, step

TOP = Path(__file__).resolve().parent.parent
VENV = TOP / ".venv"
LOGS = TOP / ".cache" / "setup"
IDS = 65536
#: The interpreter behind an environment that happens to be active: that one may be ours.
PYTHON = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


@dataclass(frozen=True)
class Tool:
    """A Debian package, what it is for, and a program of it to look for where there is no dpkg."""

    package: str
    purpose: str
    program: str = ""


TOOLS = (
    Tool("mmdebstrap", "makes the Debian base of an image", "mmdebstrap"),
    Tool("uidmap", "id ranges for containers without root", "newuidmap"),
    Tool("passt", "network for containers without root", "pasta"),
    Tool("libseccomp2", "loads the system call filter"),
    Tool("tini", "the init inside a container", "tini-static"),
    Tool("ca-certificates", "trusted certificates for downloads"),
)
PODMAN = (
    Tool("podman", "another reader of images, and what the figures are compared with", "podman"),
    Tool("crun", "what it runs containers with", "crun"),
)
PEERS = (
    *PODMAN,
    Tool("netavark", "network for podman as root"),
    Tool("slirp4netns", "network for podman without root", "slirp4netns"),
    Tool("fuse-overlayfs", "storage for podman without root", "fuse-overlayfs"),
)
TESTS = (
    Tool("faketime", "another clock, for builds that must not see it", "faketime"),
    Tool("chromium", "the browser of the user interface tests", "chromium"),
    Tool("fonts-dejavu-core", "letters for it"),
    Tool("libatomic1", "a library of the program that drives it"),
    Tool("skopeo", "another reader of image archives", "skopeo"),
    Tool("umoci", "another reader of image archives", "umoci"),
    *PODMAN,
)
#: goal: (extras of the package, Debian packages)
GOALS = {
    "run": ("lab", TOOLS),
    "test": ("lab,test", TOOLS + TESTS),
    "bench": ("lab,test", TOOLS + PEERS),
}


def missing(tools: tuple[Tool, ...]) -> list[Tool]:
    """The tools that are not installed: dpkg's word where it is there, else a look along PATH."""
    if shutil.which("dpkg-query"):
        names = [tool.package for tool in tools]
        asked = subprocess.run(
            ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *names],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        there = {line.split()[0] for line in asked.stdout.splitlines() if line.endswith(" installed")}
        return [tool for tool in tools if tool.package not in there]
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [tool for tool in tools if tool.program and not shutil.which(tool.program, path=path)]


def as_root() -> list[str] | None:
    """What to put before a command that needs root: nothing, sudo, or None where neither is possible."""
    if os.geteuid() == 0:
        return []
    if not shutil.which("sudo"):
        return None
    if subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0:
        return ["sudo", "-n"]
    if sys.stdin.isatty() and subprocess.run(["sudo", "-v"], check=False).returncode == 0:
        return ["sudo"]
    return None


def ask_for(command: str, why: str) -> None:
    """Give up with the one line that a person with root rights has to run."""
    raise StepError(f"{why}; as root, run: {command}")


def install_tools(tools: tuple[Tool, ...]) -> None:
    """Install what is missing with apt-get, saying so first."""
    absent = missing(tools)
    if not absent:
        return
    say("Debian packages to install:")
    for tool in absent:
        say(f"  {tool.package:<16} {tool.purpose}")
    names = [tool.package for tool in absent]
    install = ["apt-get", "install", "-y", "--no-install-recommends", *names]
    prefix = as_root()
    if not shutil.which("apt-get"):
        raise StepError(f"this is no Debian: install the counterparts of {' '.join(names)} and run this again")
    if prefix is None:
        ask_for(" ".join(install), "packages are missing and this user may not install them")
        return
    quiet = [*prefix, "env", "DEBIAN_FRONTEND=noninteractive"]
    step("apt-get update", [*quiet, "apt-get", "update"], log=LOGS / "apt-update.log")
    step("apt-get install", [*quiet, *install], log=LOGS / "apt-install.log")


def grant_ids(user: str | None = None) -> None:
    """Give a user a range of subordinate ids where they have none (``usermod --add-subuids``)."""
    name = user or pwd.getpwuid(os.geteuid()).pw_name
    if name == "root":
        return
    files = (Path("/etc/subuid"), Path("/etc/subgid"))
    lines = [line.split(":") for file in files if file.exists() for line in file.read_text().splitlines() if line]
    numbers = {file: any(line.startswith(f"{name}:") for line in _lines(file)) for file in files}
    if all(numbers.values()):
        return
    taken = [int(start) + int(count) for _, start, count in lines]
    start = max([100000, *taken])
    ids = f"{start}-{start + IDS - 1}"
    command = ["usermod", "--add-subuids", ids, "--add-subgids", ids, name]
    say(f"{name} gets the subordinate ids {ids}, so that a container has users of its own")
    prefix = as_root()
    if prefix is None:
        ask_for(" ".join(command), f"{name} has no id range in /etc/subuid")
        return
    step("usermod", [*prefix, "env", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *command], log=LOGS / "usermod.log")


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def fingerprint(extras: str) -> str:
    """What the environment was made from: another one means pip has to look again."""
    text = f"{sys.version} {PYTHON} {TOP} {extras}".encode()
    return hashlib.sha256((TOP / "pyproject.toml").read_bytes() + text).hexdigest()


def make_environment(extras: str) -> None:
    """``.venv`` with this package and its extras, unless it stands already."""
    stamp = VENV / "workbench-setup"
    known = stamp.read_text().split() if stamp.exists() else []
    if fingerprint(extras) in known and os.access(VENV / "bin" / "jupyter", os.X_OK):
        return
    say(f"Python environment: {VENV} with jupyter-workbench[{extras}] and what it needs")
    made_by = VENV / "pyvenv.cfg"
    if made_by.exists() and f"{VENV}" not in made_by.read_text():
        shutil.rmtree(VENV)  # the checkout was moved: scripts in there name the old place
    python = VENV / "bin" / "python"
    if not (python.exists() and (VENV / "bin" / "pip").exists()):
        step("virtual environment", [PYTHON, "-m", "venv", "--clear", str(VENV)], log=LOGS / "venv.log")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    step("Python packages", [*pip, "-e", f".[{extras}]"], log=LOGS / "pip.log", cwd=TOP)
    # An environment made for the tests serves `make demo` too.
    marks = {fingerprint(e) for e, _ in GOALS.values() if set(e.split(",")) <= set(extras.split(","))}
    stamp.write_text("\n".join(sorted({*marks})) + "\n")


def set_up(goal: str) -> None:
    """All that a goal needs. Raises StepError with one line when something cannot be had."""
    if sys.version_info < (3, 11):  # noqa: UP036 - it may well be an older one that reads this
        raise StepError(f"Python {sys.version.split()[0]} is too old, 3.11 is needed; name one with: make PYTHON=...")
    extras, tools = GOALS[goal]
    probe = subprocess.run([PYTHON, "-c", "import ensurepip, venv"], capture_output=True, check=False)
    if probe.returncode and not (VENV / "bin" / "pip").exists():
        tools += (Tool("python3-venv", "makes virtual environments", "python3-venv"),)
    install_tools(tools)
    grant_ids()
    make_environment(extras)


def main() -> int:
    """Exit code 0 when all is set up."""
    goal = sys.argv[1] if len(sys.argv) > 1 else "run"
    if goal not in GOALS:
        print(f"bootstrap: no goal {goal!r}; one of {', '.join(GOALS)}", file=sys.stderr)
        return 2
    try:
        set_up(goal)
    except StepError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bootstrap: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
