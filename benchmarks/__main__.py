"""``python -m benchmarks``: the table, as root and as an unprivileged user.

Started by root it measures as root, then as the account of the tests (``scripts/run_tests.py``); started by
somebody else, as that user only. Nothing of it stays but the image ``python`` in the store.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from benchmarks.measure import Figure
from benchmarks.scene import TOP, folders, say, stage


def main() -> int:
    """Exit code 1 when something could not be measured; a goal that is missed is said by the table."""
    options = _options()
    free, wanted = shutil.disk_usage("/tmp").free, _room(options.only)
    if free < wanted:
        other = "" if options.only else ", or choose a group with --only WORD"
        say(f"bench: the figures take up to {wanted >> 30} GiB in /tmp, where {free >> 30} are free; free some{other}")
        return 1
    started = time.monotonic()
    rows = _measure(options)
    if os.geteuid() == 0 and not options.only_me:
        rows += _as_account(options)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        _show(rows)
        say(f"{time.monotonic() - started:.0f} s")
    return 0 if rows else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: a look, not a proof")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--only", default="", metavar="WORD", help="only groups of figures whose name holds WORD")
    parser.add_argument("--only-me", action="store_true", help="not as the other account too")
    return parser.parse_args()


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """As whoever runs this."""
    from workbench.linux import syscalls as sc

    who = pwd.getpwuid(os.geteuid()).pw_name
    say(f"figures as {who}")
    if os.geteuid() == 0:  # whatever the peers mount is gone with this process
        sc.unshare(sc.CLONE_NEWNS)
        sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)
    found: list[Figure] = []
    with ExitStack() as stack:
        base = stack.enter_context(folders())
        from benchmarks import figures, peers

        scene = stack.enter_context(stage(base))
        stack.enter_context(peers.whole_hierarchy())
        podman = stack.enter_context(peers.podman(scene)) if _wants_podman(options.only) else None
        effort = figures.QUICK if options.quick else figures.Effort()
        for figure in figures.every(scene, podman, effort, options.only):
            say(f"  {_line(figure)}")
            found.append(figure)
    return [{"as": who, **asdict(figure)} for figure in found]


def _room(only: str) -> int:
    """Bytes of the disk that figures take. Nothing is removed in between: ext4 makes files slowly for a while then."""
    if not only:
        return 40 << 30
    return (24 if _wants_podman(only) else 4) << 30


def _wants_podman(only: str) -> bool:
    return any(only in name for name in ("first", "process", "builds", "history"))


def _line(figure: Figure) -> str:
    peer = f" / {figure.peer:.1f}" if figure.peer is not None else ""
    ratio = f" = {figure.ratio:.3f}" if figure.ratio is not None else ""
    goal = f", goal {figure.goal}{'' if figure.holds else '  MISSED'}" if figure.goal else ""
    return f"{figure.figure}: {figure.ours:.1f}{peer} {figure.unit}{ratio}{goal}"


def _as_account(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same as the tests' unprivileged account."""
    sys.path.insert(0, str(TOP / "scripts"))
    import run_tests
    from steps import StepError

    try:
        with _said_on_stderr():
            python, project = run_tests.prepare_account()
    except (StepError, OSError, subprocess.SubprocessError) as error:
        say(f"not measured as an unprivileged user: {error}")
        return []
    words = [word for word in ("--quick",) if options.quick] + [f"--only={options.only}"]
    command = [*run_tests.as_account(python), "-m", "benchmarks", "--json", *words]
    done = subprocess.run(command, cwd=project, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        say(f"not measured as {run_tests.ACCOUNT}: exit code {done.returncode}")
    return json.loads(done.stdout) if done.stdout.strip() else []


class _said_on_stderr:  # noqa: N801 - reads like a statement
    """The set-up of the tests talks to stdout, which is the table's here."""

    def __enter__(self) -> None:
        sys.stdout.flush()
        self._kept = os.dup(1)
        os.dup2(2, 1)

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        os.dup2(self._kept, 1)
        os.close(self._kept)


def _show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    import pandas as pd

    shown = [
        {
            "as": row["as"], "figure": row["figure"],
            "ours": f"{row['ours']:.1f} {row['unit']}",
            "peer": f"{row['peer']:.1f} {row['unit']}" if row["peer"] is not None else "",
            "ratio": f"{row['ratio']:.3f}" if row["ratio"] is not None else "",
            "quartiles": f"{row['spread'][0]:.3g} - {row['spread'][1]:.3g}",
            "n": row["count"], "goal": row["goal"], "holds": ("yes" if row["holds"] else "NO") if row["goal"] else "",
        }
        for row in rows
    ]  # fmt: skip
    with pd.option_context("display.width", 200, "display.max_colwidth", 60):
        print(pd.DataFrame(shown).to_string(index=False))
    for peer in sorted({f"{row['as']}: {row['figure'].split(' / ')[-1]}: {row['against']}" for row in rows
                        if "podman" in row["against"] or "crun" in row["against"]}):  # fmt: skip
        print(f"  peer {peer}")


if __name__ == "__main__":
    sys.exit(main())
