"""JupyterLab and Notebook 7 as people see them, in Chromium; no server extension of ours is loaded.

With ``WORKBENCH_PICTURES=FOLDER`` the pictures of the documentation are taken on the way (the extension is loaded).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

from tests.jupyter.clients import ask_to_end
from workbench.jupyter import kernelspecs
from workbench.workbench import Workbench

TOP = Path(__file__).resolve().parent.parent.parent
PICTURES = os.environ.get("WORKBENCH_PICTURES")
SIZE = {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
        page = browser.new_page(viewport=SIZE)
        yield page
        browser.close()


class App:
    """``jupyter lab`` or ``jupyter notebook`` in a process."""

    def __init__(self, name: str, root: Path) -> None:
        self.root = root
        extension = bool(PICTURES)
        self.log = Path(os.environ["WORKBENCH_HOME"]).parent / f"{name}.log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"jupyter{name}" if name == "lab" else name, "--no-browser", "--port=0",
             f"--ServerApp.root_dir={root}", "--IdentityProvider.token=t",
             f"--ServerApp.jpserver_extensions={{'workbench': {extension}}}",
             *(["--allow-root"] if os.getuid() == 0 else [])],
            stdout=subprocess.DEVNULL, stderr=self.log.open("w"), cwd=root,
        )  # fmt: skip
        until = time.monotonic() + 90
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/", self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.1)
        self.url = f"http://127.0.0.1:{found[1]}"

    def close(self) -> None:
        ask_to_end(self.process, self.log)
        print(self.log.read_text())


PROBE = "import os\nprint('pid', os.getppid(), 'uid', os.getuid(), open('/proc/1/comm').read())"


def notebook(folder: Path, name: str, *sources: str) -> None:
    cells = [
        {"cell_type": "code", "execution_count": None, "id": f"c{number}", "metadata": {}, "outputs": [],
         "source": source} for number, source in enumerate(sources or (PROBE,))
    ]  # fmt: skip
    metadata = {"kernelspec": {"name": "wb-python", "display_name": "Python", "language": "python"}}
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    (folder / name).write_text(json.dumps(content))


@pytest.fixture
def no_news() -> Iterator[None]:
    """JupyterLab asks whether to fetch news unless the answer is known."""
    folder = Path(os.environ["JUPYTER_CONFIG_DIR"]) / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    yield
    shutil.rmtree(folder.parent)


@pytest.fixture
def tidy_store(image: str) -> Iterator[None]:
    """No snapshot and no container stays."""
    bench = Workbench()
    before = set(bench.refs.all())
    yield
    for container in list(bench.containers):
        bench.remove(container.id, force=True)
    for name in set(bench.refs.all()) - before:
        bench.refs.delete(name)
        kernelspecs.remove(name)
    bench.gc()


def test_jupyterlab_shows_a_card_and_runs_a_notebook(image, tmp_path, page, no_news):
    root = Path("/tmp/analysis") if PICTURES else tmp_path / "root"
    root.mkdir()
    if PICTURES:
        shutil.copy(TOP / "notebooks" / "quickstart.ipynb", root)
    notebook(root, "probe.ipynb")
    app = App("lab", root)
    try:
        page.goto(f"{app.url}/lab?token=t&reset")
        card = page.locator(".jp-LauncherCard[title^='Python 3 (pandas']").first
        expect(card).to_be_visible(timeout=60_000)
        wait_until(page, lambda: drawn(card))
        if PICTURES:
            page.screenshot(path=f"{PICTURES}/launcher.png")
        opened(page, f"{app.url}/lab/tree/probe.ipynb?token=t&reset")
        run_cell(page, 0)
        expect(page.locator(".jp-OutputArea-output").first).to_contain_text("uid 0 init", timeout=60_000)
        if PICTURES:
            opened(page, f"{app.url}/lab/tree/quickstart.ipynb?token=t&reset")
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            page.wait_for_timeout(15_000)
            for name, top in (("notebook", 430), ("plot", 900)):
                page.locator(".jp-WindowedPanel-outer").first.evaluate(f"e => e.scrollTo(0, {top})")
                page.wait_for_timeout(1000)
                page.screenshot(path=f"{PICTURES}/{name}.png")
    finally:
        app.close()
        shutil.rmtree(root)


WATCHERS = "import threading\nsum(each.name == 'workbench-dashboard' for each in threading.enumerate())"


#: A cell that runs until there is a file.
WAIT = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.05)\nos.remove('go')\nprint('slept')"


def run_cell(page: Page, number: int) -> Locator:
    """Run a cell; its output."""
    cell = page.locator(".jp-CodeCell").nth(number)
    cell.locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    return cell.locator(".jp-OutputArea")


def drawn(card: Locator) -> bool:
    """Whether its logo is."""
    return bool(card.locator("img").evaluate("image => image.naturalWidth > 0"))


def opened(page: Page, address: str) -> None:
    """Open a notebook, and wait for its kernel."""
    page.goto(address)
    expect(page.locator(".jp-Toolbar-kernelName")).to_contain_text("pandas", timeout=60_000)
    expect(page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']")).to_be_visible(timeout=60_000)
    page.wait_for_timeout(1000)  # it is shown before a cell would be run


def megabytes(dashboard: Locator) -> float:
    """The memory that it shows."""
    number, unit = dashboard.locator("tr", has_text="memory").locator("td").inner_text().split()[:2]
    return float(number) * {"B": 1e-6, "KiB": 1e-3, "MiB": 1, "GiB": 1024}[unit]


@pytest.mark.first
@pytest.mark.usefixtures("tidy_store")
def test_the_dashboard_is_alive(image, tmp_path, page, no_news):
    """It shows what goes on, takes a snapshot beside a cell that runs, and goes on after restarts of two kinds."""
    root = tmp_path / "root"
    root.mkdir()
    notebook(
        root, "live.ipynb", "%container status", "held = bytearray(b'x') * (300 << 20)",
        "open('/opt/new', 'w').write('x')\n" + WAIT, "%container reset --hard", WAIT, WATCHERS,
        "%container log --stat", "%container diff --files",
    )  # fmt: skip
    app = App("lab", root)
    try:
        opened(page, f"{app.url}/lab/tree/live.ipynb?token=t&reset")
        dashboard = run_cell(page, 0)
        row = {name: dashboard.locator("tr", has=page.get_by_role("rowheader", name=name, exact=True))
               for name in ("snapshot", "changed since", "processor")}  # fmt: skip
        expect(row["snapshot"]).to_contain_text("none yet", timeout=30_000)
        expect(row["processor"]).to_contain_text("%", timeout=30_000)
        before = megabytes(dashboard)
        run_cell(page, 1)
        wait_until(page, lambda: megabytes(dashboard) > before + 250)
        # beside a cell that runs
        slept = run_cell(page, 2)
        page.wait_for_timeout(500)
        dashboard.get_by_placeholder("What changed?").fill("A <b>new</b> file")
        dashboard.get_by_placeholder("name (optional)").fill("live/one")
        dashboard.get_by_role("button", name="Snapshot").click()
        expect(dashboard.locator(".wb-said")).to_contain_text("live/one", timeout=15_000)
        expect(slept).not_to_contain_text("slept")
        expect(row["snapshot"]).to_contain_text("live/one", timeout=15_000)
        (root / "go").touch()
        expect(slept).to_contain_text("slept", timeout=30_000)
        if PICTURES:
            in_both_themes(page, dashboard, "dashboard")
        expect(run_cell(page, 6).locator("table.dataframe th", has_text="parent")).to_be_visible(timeout=15_000)
        expect(run_cell(page, 7).locator("table.dataframe td", has_text="/opt/new")).to_be_visible(timeout=15_000)
        page.set_viewport_size({"width": 700, "height": 800})
        dashboard.scroll_into_view_if_needed()  # its table is another one every two seconds
        for part in (dashboard.locator("table"), dashboard.get_by_role("button", name="Snapshot")):
            expect(part).to_be_in_viewport(ratio=1)
        page.set_viewport_size(SIZE)
        # by the kernel's own wish
        run_cell(page, 3)
        alive_again(page, dashboard, root)
        # by the user's wish
        page.get_by_role("menuitem", name="Kernel", exact=True).click()
        page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Restart Kernel…$")).click()
        page.get_by_role("button", name="Confirm Kernel Restart").click()
        alive_again(page, dashboard, root)
        # as long as it is seen
        expect(run_cell(page, 5)).to_contain_text("1")
        page.locator(".jp-CodeCell").nth(0).locator(".cm-content").click()
        page.get_by_role("menuitem", name="Edit", exact=True).click()
        page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Clear Cell Output$")).click()
        page.wait_for_timeout(4000)
        expect(run_cell(page, 5)).to_contain_text("0")
    finally:
        app.close()


def alive_again(page: Page, dashboard: Locator, root: Path) -> None:
    """The figures follow what another kernel does, and its button works."""
    expect(page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']")).to_be_visible(timeout=60_000)
    wait_until(page, lambda: megabytes(dashboard) < 250)  # that of the new kernel
    run_cell(page, 1)
    wait_until(page, lambda: megabytes(dashboard) > 300)
    slept = run_cell(page, 4)
    page.wait_for_timeout(500)
    dashboard.get_by_placeholder("What changed?").fill("Nothing")
    dashboard.get_by_role("button", name="Snapshot").click()
    expect(dashboard.locator(".wb-said")).to_contain_text("nothing has changed", timeout=4_000)
    expect(slept).not_to_contain_text("slept")
    (root / "go").touch()
    expect(slept).to_contain_text("slept", timeout=30_000)


def wait_until(page: Page, holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until, "\n".join(page.locator(".jp-OutputArea").all_inner_texts())
        page.wait_for_timeout(200)


def in_both_themes(page: Page, what: Locator, name: str) -> None:
    """For the documentation."""
    for theme in ("Light", "Dark"):
        use_theme(page, theme)
        what.screenshot(path=f"{PICTURES}/{name}-{theme.lower()}.png")


def use_theme(page: Page, theme: str) -> None:
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Theme$")).hover()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^JupyterLab {theme}$")).click()
    page.wait_for_timeout(1500)


if PICTURES:

    @pytest.mark.usefixtures("tidy_store")
    def test_pictures_of_the_tables(page, no_news):
        root = Path("/tmp/analysis")
        root.mkdir()
        by = "-a 'Ann <ann@example.org>'"
        notebook(root, "tables.ipynb", "%pip install -q seaborn", f"%container snapshot -m 'Add seaborn' -t plots {by}",
                 f"open('/opt/threshold', 'w').write('0.05')\n%container snapshot -m 'Set the threshold' {by}",
                 "%container log", "%container diff plots~2 plots")  # fmt: skip
        app = App("lab", root)
        try:
            opened(page, f"{app.url}/lab/tree/tables.ipynb?token=t&reset")
            for number in range(5):
                output = run_cell(page, number)
                expect(page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']")).to_be_visible(
                    timeout=90_000
                )
            expect(output).to_contain_text("seaborn", timeout=60_000)
            in_both_themes(page, page.locator(".jp-WindowedPanel-outer").first, "tables")
        finally:
            app.close()
            shutil.rmtree(root)


@pytest.mark.first
def test_the_launcher_with_twenty_images(image, tmp_path, page, no_news):
    """Each can be told from the others, with a logo; those of one language stand together."""
    root = tmp_path / "root"
    root.mkdir()
    bench = Workbench()
    made = bench.image(image)
    names = [f"team/tools-{number:02}" for number in range(20)]
    try:
        for number, name in enumerate(names):
            bench.refs.set(name, image)
            language, title = (("python", "Python 3 (pandas, matplotlib)"), ("R", f"R {number:02}"))[number % 2]
            kernel = replace(made.kernel, language=language, display_name=title)
            kernelspecs.write(name, replace(made, kernel=kernel))
        app = App("lab", root)
        try:
            page.goto(f"{app.url}/lab?token=t&reset")
            cards = page.locator(".jp-Launcher-section").first.locator(".jp-LauncherCard")
            expect(cards.nth(20)).to_be_visible(timeout=60_000)
            titles = [card.get_attribute("title") or "" for card in cards.all()]
            ours = [title for title in titles if title.startswith(("Python 3 (pandas", "R "))]
            assert len(set(ours)) == len(ours) >= 21
            languages = [title.split()[0] for title in ours]
            assert languages == sorted(languages), "grouped by language"
            wait_until(page, lambda: all(drawn(card) for card in cards.all()))
            if PICTURES:
                page.screenshot(path=f"{PICTURES}/launcher-20.png")
        finally:
            app.close()
    finally:
        for name in names:
            kernelspecs.remove(name)
            bench.refs.delete(name)


@pytest.mark.first
def test_notebook_7_runs_a_notebook(image, tmp_path, page):
    root = tmp_path / "root"
    root.mkdir()
    notebook(root, "probe.ipynb")
    app = App("notebook", root)
    try:
        opened(page, f"{app.url}/notebooks/probe.ipynb?token=t")
        run_cell(page, 0)
        expect(page.locator(".jp-OutputArea-output").first).to_contain_text("uid 0 init", timeout=60_000)
    finally:
        app.close()
