"""``make test``: the suite as root and as an unprivileged user, side by side; any arguments go to pytest.

Started by root: here as root, and as the account ``workbench-test`` over a wheel of this checkout.
Started by somebody else: here as they are, and as root where sudo asks for no password; what is not covered is
said, and fails where CI is set in the environment.

Most tests wait for something outside of Python, so that two parts take little longer than one. Tests that need the
machine for themselves say so with the mark ``alone``, see tests/conftest.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bootstrap import LOGS, TOP, VENV, as_root, grant_ids
from steps import StepError, say, step

ACCOUNT = "workbench-test"
#: What of the caller's environment the other account needs to reach the same package indexes.
PASSED_ON = (
    "SSL_CERT_",
    "REQUESTS_CA",
    "CURL_CA",
    "PIP_",
    "UV_",
    "http",
    "HTTP",
    "no_proxy",
    "NO_PROXY",
    "CI",
)
#: The variable that tells the parts in which folder they agree about turns; a word of a part's command.
TURNS = "WORKBENCH_TEST_TURNS="
#: The word that stands before it in the second part of root's, which makes its account ready first.
PREPARE = "--prepare"
#: What a part leaves out where there are two: the marks say whose is what is the same for both.
FIRST = ("-m", "not second")
#: Sources are looked at where they are.
SECOND = ("--ignore=tests/test_house.py", "-m", "not first")
#: pytest's exit code where no test is left.
NOTHING_TO_DO = 5


@dataclass(frozen=True)
class Part:
    """One run of pytest."""

    who: str
    command: Sequence[str]
    cwd: Path


def main(arguments: Sequence[str]) -> int:
    """pytest's exit code of the first part that failed."""
    started = time.monotonic()
    # Started in the background by a shell it is ignored, also in what the tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if arguments[:1] == [PREPARE]:
            return as_account_once_ready(*arguments[1:])
        parts = parts_of_root(arguments) if os.geteuid() == 0 else parts_of_a_user(arguments)
    except StepError as error:
        print(f"run_tests: {error}", file=sys.stderr)
        return 1
    results = run(parts)
    say(f"\n{'=' * 78}")
    for who, code in results.items():
        say(f"{who}: {'passed' if code == 0 else f'pytest exit code {code}'}")
    if len(parts) == 1:
        say("Not covered: everything that only root can do. Run `sudo make test` for it.")
    say(f"all parts: {time.monotonic() - started:.0f} s")
    missed = len(parts) == 1 and bool(os.environ.get("CI"))
    # All that was asked for may be one part's.
    codes = [code for code in results.values() if code != NOTHING_TO_DO] or [NOTHING_TO_DO]
    return next((code for code in codes if code), int(missed))


def run(parts: Sequence[Part]) -> dict[str, int]:
    """All at once; the first one's output is shown as it comes, the others' after it, and then as it comes."""
    with tempfile.TemporaryDirectory(prefix="tests") as folder:
        os.chmod(folder, 0o755)
        for name in ("turn", "gate"):
            Path(folder, name).touch()
        started = []
        with open(f"{folder}/turn") as turn, open(os.devnull) as nothing:
            if any(PREPARE in part.command for part in parts):
                fcntl.flock(turn, fcntl.LOCK_SH)  # it has that as its input, so that no test is alone meanwhile
            for number, part in enumerate(parts):
                command = [f"{TURNS}{folder}" if word == TURNS else word for word in part.command]
                output = open(f"{folder}/{number}", "wb") if number else None
                given = turn if PREPARE in command else nothing
                process = subprocess.Popen(command, cwd=part.cwd, stdin=given, stdout=output, stderr=output)
                started.append((part, process))
        results = {}
        for number, (part, process) in enumerate(started):
            say(f"\n{'=' * 78}\n{part.who}")
            if number:
                follow(Path(folder, str(number)), process)
            results[part.who] = process.wait()
    return results


def follow(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Show what a process wrote into a file, and writes, until it ends."""
    with open(path, "rb") as file:
        ended = False
        while True:
            if data := file.read(1 << 16):
                sys.stdout.buffer.write(data)
                sys.stdout.flush()
            elif ended:
                return
            else:
                ended = process.poll() is not None
                time.sleep(0.2)


def parts_of_root(arguments: Sequence[str]) -> list[Part]:
    """Root's way. Its own part begins while the other's account is being made ready."""
    here = ["env", TURNS, str(VENV / "bin" / "python"), "-m", "pytest", *FIRST, *arguments]
    there = [sys.executable, str(Path(__file__).resolve()), PREPARE, TURNS, *arguments]
    return [Part("as root", here, TOP), Part(f"as {ACCOUNT}", there, TOP)]


def as_account_once_ready(turns: str, *arguments: str) -> int:
    """Make the account ready, and become its run of pytest. turns: TURNS with the folder."""
    python, project = prepare_account()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # it held the turn until now
    command = [*(turns if word == TURNS else word for word in as_account(python)), "-m", "pytest", *SECOND, *arguments]
    sys.stdout.flush()
    os.chdir(project)
    os.execvp(command[0], command)


def as_account(python: Path) -> list[str]:
    """What to put before Python's arguments to run them as the account, in an environment of its own."""
    home = pwd.getpwnam(ACCOUNT).pw_dir
    environment = {
        name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)
    } | {
        "HOME": home, "USER": ACCOUNT, "LOGNAME": ACCOUNT, "LANG": "C.UTF-8",
        "PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    }  # fmt: skip
    words = [TURNS, *(f"{name}={value}" for name, value in environment.items())]
    return ["runuser", "-u", ACCOUNT, "--", "env", "-i", *words, str(python)]


def parts_of_a_user(arguments: Sequence[str]) -> list[Part]:
    """Everybody else's way."""
    python = [str(VENV / "bin" / "python"), "-m", "pytest"]
    sudo = as_root() == ["sudo", "-n"]
    mine = ["env", TURNS, *python, *(FIRST if sudo else ()), *arguments]
    parts = [Part(f"as {pwd.getpwuid(os.geteuid()).pw_name}", mine, TOP)]
    if sudo:
        # As root, but leaving no file of root's in this checkout.
        quiet = ["sudo", "-n", "env", TURNS, "PYTHONDONTWRITEBYTECODE=1", f"CI={os.environ.get('CI', '')}"]
        without = ["-p", "no:cacheprovider", *SECOND]
        parts.append(Part("as root, by sudo", [*quiet, *python, *without, *arguments], TOP))
    return parts


def prepare_account() -> tuple[Path, Path]:
    """The unprivileged account with an environment and a copy of the tests; its Python and that copy."""
    try:
        account = pwd.getpwnam(ACCOUNT)
    except KeyError:
        say(f"The account {ACCOUNT} is made, to run the tests without root's rights; remove it with deluser")
        step(
            "useradd",
            ["useradd", "--create-home", "--shell", "/bin/bash", "--comment", "tests of Workbench", ACCOUNT],
            log=LOGS / "useradd.log",
        )
        account = pwd.getpwnam(ACCOUNT)
    grant_ids(ACCOUNT)
    home = Path(account.pw_dir)
    venv, project = home / "venv", home / "project"
    wheel = build_wheel()
    make_environment(venv, wheel)
    copy_sources(project)
    step("ownership", ["chown", "-R", f"{ACCOUNT}:", str(venv), str(project)], log=LOGS / "chown.log")
    return venv / "bin" / "python", project


def build_wheel() -> Path:
    """A wheel of this checkout, as it would be published."""
    folder = TOP / ".cache" / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps"]
    step("wheel", [*pip, "--wheel-dir", str(folder), str(TOP)], log=LOGS / "wheel.log")
    return next(folder.glob("*.whl"))


def make_environment(venv: Path, wheel: Path) -> None:
    """An environment outside of root's home, by the system's Python, that any user can read."""
    python = venv / "bin" / "python"
    stamp = venv / "workbench-setup"
    wanted = hashlib.sha256((TOP / "pyproject.toml").read_bytes()).hexdigest()
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    if not (python.exists() and stamp.exists() and stamp.read_text() == wanted):
        system = "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else sys.executable
        step("virtual environment", [system, "-m", "venv", "--clear", str(venv)], log=LOGS / "user-venv.log")
        step("Python packages", [*pip, f"{wheel}[lab,test]"], log=LOGS / "user-pip.log")
        stamp.write_text(wanted)
    step("this version", [*pip, "--force-reinstall", "--no-deps", str(wheel)], log=LOGS / "user-wheel.log")


def copy_sources(project: Path) -> None:
    """Tests and what they read, without the package: that one comes from the wheel."""
    shutil.rmtree(project, ignore_errors=True)
    skip = {".git", ".venv", ".cache", ".hypothesis", "workbench"}
    for entry in TOP.iterdir():
        if entry.name in skip or entry.name.endswith("_cache"):
            continue
        if entry.is_dir():
            shutil.copytree(entry, project / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            project.mkdir(exist_ok=True)
            shutil.copy(entry, project)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
