"""What people do first in a cell: install something. The host's settings help, and stay out of the layer."""

from __future__ import annotations

from pathlib import Path

from tests.jupyter.clients import run
from tests.jupyter.conftest import Start
from workbench.jupyter import shared
from workbench.linux import userns


def upper_of(manager) -> tuple[str, str]:
    container = manager.provisioner._container
    return container.id, container.upper


def test_pip_install_from_a_cell(start: Start) -> None:
    manager, client = start()
    done = run(client, "!pip install --quiet cowsay==6.1; echo ended $?", timeout=120)
    assert "ended 0" in done.stdout, done.stdout
    assert "kept" in run(client, "import cowsay; cowsay.cow('kept')").stdout
    name, upper = upper_of(manager)
    client.stop_channels()
    manager.shutdown_kernel()
    bench = shared.workbench()
    try:
        assert [row["status"] for row in bench.ps(True) if row["id"] == name] == ["exited"]
        assert Path(upper, "opt/venv/lib/python3.11/site-packages/cowsay/__init__.py").exists()
        assert traces_of_the_host(upper) == []
    finally:
        bench.remove(name, force=True)


def test_apt_get_install_from_a_cell(start: Start) -> None:
    manager, client = start()
    done = run(client, "!apt-get update -qq && apt-get install -qqy hello >/dev/null; echo ended $?", timeout=180)
    assert "ended 0" in done.stdout, done.stdout
    assert "Hello, world!" in run(client, "!hello").stdout
    name, upper = upper_of(manager)
    client.stop_channels()
    manager.shutdown_kernel()
    try:
        assert Path(upper, "usr/bin/hello").exists()
        assert traces_of_the_host(upper) == []
    finally:
        shared.workbench().remove(name, force=True)


def traces_of_the_host(upper: str) -> list[str]:
    """Files of a writable layer that name what the host offered: its CA bundle's place, an index, a proxy."""
    settings = shared.workbench().settings("bookworm")
    words = {path for path, _ in settings.files} | {value for _, value in settings.env if "://" in value}
    words |= {inside for _, inside in settings.files}
    words.discard("/etc/ssl/certs/ca-certificates.crt")  # Debian's own texts name it
    return list(userns.call("tests.jupyter.inside:files_with", upper, sorted(words)))


def test_one_setting_turns_the_offer_off(start: Start, monkeypatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
    bench = shared.workbench()
    try:
        assert ("HTTPS_PROXY", "http://proxy.invalid:3128") in bench.settings().env
        bench.offer_host_settings = False
        assert bench.settings().env == ()
        assert bench.settings().files == ()
    finally:
        bench.close()
        shared._known.clear()
