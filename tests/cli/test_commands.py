"""Each command as a process, as a person runs it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from workbench.workbench import Workbench

MAIN = [sys.executable, "-m", "workbench"]


def one_line(text: str) -> bool:
    return text.startswith("jupyter workbench") and text.count("\n") == 1 and "Traceback" not in text


def test_images(cli, image):
    (row,) = [row for row in cli("images", "--json").json if row["id"] == image]
    assert "python:latest" in row["names"] or "python" in row["names"]
    assert row["size"] > 100_000_000 and row["layers"] >= 3
    head, *lines = cli("images").out.splitlines()
    assert head.split() == ["NAME", "ID", "CREATED", "SIZE", "LAYERS", "KERNEL"]
    assert any(image.removeprefix("sha256:")[:12] in line and "MiB" in line for line in lines)


def test_empty_lists_say_what_to_do_next(cli, tmp_path):
    for command in ("images", "ps"):
        done = cli(command, WORKBENCH_HOME=str(tmp_path / "w"))
        assert done.code == 0 and re.search(r"build|--all", done.out), done
        assert cli(command, "--json", WORKBENCH_HOME=str(tmp_path / "w")).json == []


@pytest.mark.parametrize(
    "line",
    [
        ["run", "no-such-image", "true"],
        ["run", "NOT A NAME", "true"],
        ["run", "--memory", "lots", "python", "true"],
        ["run", "--Workbench.memory=some%", "python", "true"],
        ["run", "--mount", "/no/such/folder", "python", "true"],
        ["run", "--env", "NOVALUE", "python", "true"],
        ["rmi", "no-such-image"],
        ["stop", "0123456789ab"],
        ["rm", "0123456789ab"],
        ["logs", "0123456789ab"],
        ["build", "/no/such/folder"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(cli, image, line):
    done = cli(*line)
    assert done.code == 1 and one_line(done.err), done
    assert Workbench().store.check(deep=False) == []


def test_a_foreign_store_is_refused(cli, tmp_path):
    foreign = "/var"
    if os.geteuid() == 0:
        os.chown(tmp_path, 1, 1)
        foreign = str(tmp_path)
    done = cli("images", WORKBENCH_HOME=foreign)
    assert done.code == 1 and one_line(done.err), done
    assert cli("doctor", WORKBENCH_HOME=foreign).code == 1


def test_a_host_without_user_namespaces_is_told_and_nothing_stays(cli, image):
    forbid = "echo 0 > /proc/sys/user/max_user_namespaces"  # of the namespace that unshare(1) makes
    run = "env WORKBENCH_SINGLE_ID=1 " + shlex.join([*MAIN, "run", "--network", "none", "python", "true"])
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-euc", f"{forbid}\nexec {run}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and one_line(done.stderr), done


def test_debug_gives_the_traceback(cli):
    done = cli("run", "--debug", "no-such-image", "true")
    assert done.code == 1 and "Traceback" in done.err


def test_run_passes_input_output_and_exit_code(cli, image):
    script = "read line; echo out $line; echo err $line >&2; exit 37"
    done = cli("run", "--network", "none", "python", "sh", "-c", script, stdin="hello\n")
    assert (done.code, done.out, done.err) == (37, "out hello\n", "err hello\n")


def test_run_carries_bytes_unchanged(image):
    data = bytes(range(256)) * 4096
    done = subprocess.run(
        [*MAIN, "run", "--network", "none", "python", "cat"], input=data, capture_output=True, check=True
    )
    assert done.stdout == data


def test_run_a_command_that_is_not_there(cli, image):
    done = cli("run", "--network", "none", "python", "no-such-command")
    assert done.code == 127 and "no-such-command" in done.err and "Traceback" not in done.err


def test_run_works_in_the_current_folder(cli, image, tmp_path):
    (tmp_path / "here").write_text("seen")
    done = cli("run", "--network", "none", "python", "sh", "-c", "pwd; cat here; echo new > made", cwd=tmp_path)
    assert done.out == f"{tmp_path}\nseen" and (tmp_path / "made").read_text() == "new\n"
    hidden = cli("run", "--network", "none", "--no-folder", "python", "ls", str(tmp_path), cwd=tmp_path)
    assert hidden.code != 0


def test_run_options(cli, image, tmp_path):
    (tmp_path / "f").write_text("x")
    done = cli(
        "run", "--network", "none", "--env", "COLOUR=blue", "--mount", f"{tmp_path}:/data:ro", "python",
        "sh", "-c", "echo $COLOUR; cat /data/f; touch /data/g",
    )  # fmt: skip
    assert done.out == "blue\nx" and done.code != 0 and not (tmp_path / "g").exists()


def test_unchanged_goes_and_changed_stays(cli, image):
    assert cli("run", "--network", "none", "python", "true").err == ""
    assert cli("ps", "--all", "--json").json == []
    done = cli("run", "--network", "none", "python", "touch", "/opt/changed")
    (row,) = cli("ps", "--all", "--json").json
    assert done.code == 0 and row["id"] in done.err and row["status"] == "exited"
    assert row["id"] in cli("ps", "--all").out and row["id"] not in cli("ps").out
    kept = cli("rm", row["id"])
    assert kept.code == 1 and "it holds 1 change, " in kept.err and "rm --force drops it" in kept.err
    assert cli("rm", "-f", row["id"][:6]).out == f"removed {row['id']}\n"
    assert cli("run", "--network", "none", "--rm", "python", "touch", "/opt/changed").err == ""
    assert cli("ps", "--all", "--json").json == []


@pytest.fixture
def sleeper(image):
    """A container that runs until it is told to stop; its process and its row."""
    process = subprocess.Popen(
        [*MAIN, "run", "--network", "none", "python", "sh", "-c", "echo ready; exec sleep 100"], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def rows():
    done = subprocess.run([*MAIN, "ps", "--json"], capture_output=True, check=True)
    return json.loads(done.stdout)


def test_stop_from_another_process(cli, sleeper):
    (row,) = rows()
    assert row["status"] == "running" and "sleep" in " ".join(row["command"])
    done = cli("stop", row["id"])
    assert done.out == f"stopped {row['id']}\n", done
    assert sleeper.wait(10) in (143, 137)


def test_rm_refuses_what_runs_unless_forced(cli, sleeper):
    (row,) = rows()
    done = cli("rm", row["id"])
    assert done.code == 1 and one_line(done.err)
    assert cli("rm", "--force", row["id"]).code == 0
    assert sleeper.wait(10) in (143, 137)


def test_rmi_refuses_what_is_in_use(cli, sleeper):
    done = cli("rmi", "python")
    assert done.code == 1 and one_line(done.err), done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_the_command(image, number):
    script = f"trap 'echo got it; exit 9' {number.value}; echo ready; while :; do sleep 0.05; done"
    process = subprocess.Popen(
        [*MAIN, "run", "--network", "none", "python", "sh", "-c", script], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert (out, process.returncode) == ("got it\n", 9)


def test_a_command_killed_by_a_signal_ends_with_128_and_more(cli, image):
    assert cli("run", "--network", "none", "python", "sh", "-c", "kill -TERM $$").code == 143


def test_a_killed_launcher_leaves_nothing(sleeper, cli):
    sleeper.kill()
    sleeper.wait()
    until = time.monotonic() + 10
    while rows() and time.monotonic() < until:
        time.sleep(0.05)
    assert rows() == []


def test_the_memory_limit_is_told(cli, image):
    code = "x = bytearray(400 * 1024 * 1024)"
    done = cli("run", "--network", "none", "--memory", "128M", "python", "python", "-c", code)
    assert done.code != 0 and ("128" in done.err or "MemoryError" in done.err), done


def test_no_container_may_take_all_of_the_hosts_memory(sleeper, cli):
    (row,) = cli("ps", "--json").json
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert row["limits"]["memory"] == int(0.9 * host)


def test_gc_and_check(cli, image):
    assert set(cli("gc", "--json").json) >= {"layers", "blobs", "bytes"}
    assert cli("check", "--json").json == []
    assert "digests" in cli("check").out


def test_doctor(cli):
    checks = cli("doctor", "--json").json
    assert {"user namespaces", "overlay", "network", "limits"} <= {check["name"] for check in checks}
    assert all(check["found"] for check in checks)
    done = cli("doctor")
    assert done.code == int(any(check["state"] == "missing" for check in checks))
    assert done.code == 0, done.out


def test_configuration_files_count(cli, image, tmp_path):
    (tmp_path / "jupyter_workbench_config.py").write_text("c.Workbench.network = 'none'\n")
    folder = str(tmp_path)
    seen = ["run", "python", "sh", "-c", "ls /sys/class/net"]
    assert cli(*seen, JUPYTER_CONFIG_DIR=folder).out.split() == ["lo"]
    wrong = cli("images", "--Workbench.network=fast")
    assert wrong.code == 2 and "Traceback" not in wrong.err and "fast" in wrong.err
    (tmp_path / "jupyter_workbench_config.py").write_text("this is no Python\n")
    broken = cli("images", JUPYTER_CONFIG_DIR=folder)
    assert broken.code == 1 and one_line(broken.err)


def test_an_unknown_setting_is_told_of(cli, image, tmp_path):
    (tmp_path / "jupyter_workbench_config.py").write_text("c.Workbench.netwrok = 'none'\n")
    done = cli("images", "--json", JUPYTER_CONFIG_DIR=str(tmp_path))
    assert (
        done.code == 0 and "netwrok" in done.err and "did you mean" in done.err.lower() and "Traceback" not in done.err
    )
