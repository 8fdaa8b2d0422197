"""``make test``: the suite as root and as an unprivileged user; any arguments go to pytest.

Started by root: here as root, then as the account ``workbench-test``, over a wheel of this checkout.
Started by somebody else: here as they are, then as root where sudo asks for no password; what is not covered is
said, and fails where CI is set in the environment.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
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
#: The sources are looked at once, where they are.
ONLY_HERE = "tests/test_house.py"


def main(arguments: Sequence[str]) -> int:
    """pytest's exit code of the first part that failed."""
    started = time.monotonic()
    try:
        results = as_both(arguments) if os.geteuid() == 0 else as_user_first(arguments)
    except StepError as error:
        print(f"run_tests: {error}", file=sys.stderr)
        return 1
    say(f"\n{'=' * 78}")
    for who, code in results.items():
        say(f"{who}: {'passed' if code == 0 else f'pytest exit code {code}'}")
    say(f"all parts: {time.monotonic() - started:.0f} s")
    return next((code for code in results.values() if code), 0)


def part(who: str, command: Sequence[str], cwd: Path) -> int:
    """One run of pytest, its output shown as it comes."""
    say(f"\n{'=' * 78}\n{who}")
    return subprocess.run(command, cwd=cwd, check=False).returncode


def as_both(arguments: Sequence[str]) -> dict[str, int]:
    """Root's way."""
    python, project = prepare_account()
    results = {"as root": part("as root", [str(VENV / "bin" / "python"), "-m", "pytest", *arguments], TOP)}
    command = [*as_account(python), "-m", "pytest", f"--ignore={ONLY_HERE}", *arguments]
    results[f"as {ACCOUNT}"] = part(f"as {ACCOUNT} (sources are checked by root's part)", command, project)
    return results


def as_account(python: Path) -> list[str]:
    """What to put before Python's arguments to run them as the account, in an environment of its own."""
    home = pwd.getpwnam(ACCOUNT).pw_dir
    environment = {
        name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)
    } | {
        "HOME": home, "USER": ACCOUNT, "LOGNAME": ACCOUNT, "LANG": "C.UTF-8",
        "PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    }  # fmt: skip
    words = [f"{name}={value}" for name, value in environment.items()]
    return ["runuser", "-u", ACCOUNT, "--", "env", "-i", *words, str(python)]


def as_user_first(arguments: Sequence[str]) -> dict[str, int]:
    """Everybody else's way."""
    python = [str(VENV / "bin" / "python"), "-m", "pytest"]
    me = pwd.getpwuid(os.geteuid()).pw_name
    results = {f"as {me}": part(f"as {me}", [*python, *arguments], TOP)}
    if as_root() == ["sudo", "-n"]:
        # As root, but leaving no file of root's in this checkout.
        quiet = ["sudo", "-n", "env", "PYTHONDONTWRITEBYTECODE=1", f"CI={os.environ.get('CI', '')}"]
        without = ["-p", "no:cacheprovider", f"--ignore={ONLY_HERE}"]
        results["as root"] = part("as root, by sudo", [*quiet, *python, *without, *arguments], TOP)
    else:
        say("\nNot covered: everything that only root can do. Run `sudo make test` for it.")
        if os.environ.get("CI"):
            results["as root (not run)"] = 1
    return results


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
    skip = {".git", ".venv", ".cache", "workbench"}
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
