"""``%container status`` where ipywidgets is there: the same figures, live, and a button that takes a snapshot.

The next kernel has a box of the same ID ready, with new widgets in it. After a checkout, of which a front end hears
nothing, the box is told of them; one that has restarted the kernel itself asks the new one for all its widgets, and
takes over the state of those that it shows (``_loadFromKernel`` of @jupyter-widgets/base-manager).
"""

from __future__ import annotations

import html
import threading
import time
from typing import Any, Dict

import ipywidgets

from . import tables
from .api import Refused, ask

if int(ipywidgets.__version__.split(".")[0]) < 8:
    raise ImportError("the widgets of another kernel cannot be taken over before ipywidgets 8")

Status = Dict[str, Any]

_OFTEN = 2.0  # seconds between two looks at what costs nothing
_SELDOM = 10.0  # between two at the files that were changed,
_SHARE = 50  # or so many times what the last one took
#: Seconds after which a front end that has not noticed another kernel listens to it.
_LATER = (1.5, 4.0)

_STYLE = """<style>
.wb-dashboard { color: var(--jp-ui-font-color1, inherit); max-width: 720px; }
.wb-dashboard.jupyter-widgets-disconnected::before { display: none; }
.wb-dashboard > .jupyter-widgets-disconnected:last-child::after { color: var(--jp-error-color1, #c62828);
  content: "The kernel has ended: run this cell again."; }
.wb-dashboard table { border-collapse: collapse; width: 100%; margin: 0; line-height: 1.5;
  font-size: var(--jp-ui-font-size1, 13px); }
.wb-dashboard th { color: var(--jp-ui-font-color2, inherit); font-weight: normal; padding: 2px 16px 2px 0;
  text-align: left; white-space: nowrap; width: 9em; vertical-align: top; }
.wb-dashboard td { padding: 2px 0; text-align: left; overflow-wrap: anywhere; }
.wb-dashboard code { background: none; color: inherit; font-family: var(--jp-code-font-family, monospace); }
.wb-dashboard .wb-of { color: var(--jp-ui-font-color2, inherit); }
.wb-dashboard .wb-bar { background: var(--jp-layout-color3, #8884); border-radius: 2px; display: inline-block;
  height: 6px; margin-left: 12px; vertical-align: middle; width: 120px; }
.wb-dashboard .wb-bar i { background: var(--jp-brand-color1, #1976d2); border-radius: 2px; display: block;
  height: 6px; }
.wb-dashboard .wb-said { font-size: var(--jp-ui-font-size1, 13px); min-height: 1.6em; }
.wb-dashboard .wb-stale { animation: wb-stale 0s 30s forwards; height: 0; overflow: hidden; visibility: hidden; }
@keyframes wb-stale { to { height: auto; visibility: visible; } }
.wb-dashboard .wb-refused { color: var(--jp-error-color1, #c62828); }
</style>"""


#: What a style sheet shows when nothing new has come, whatever the reason: no code may be left to say so.
_STALE = "<div class='wb-stale'>No news for half a minute. Where this stays, run <code>%container status</code>.</div>"


class Network:
    """What has gone over this container's network (proc_net(5))."""

    def total(self) -> list[int] | None:
        """Bytes received and sent, but those that stayed inside; None where that is not told."""
        found = [0, 0]
        try:
            with open("/proc/net/dev") as file:
                lines = file.readlines()[2:]
            for line in lines:
                name, _, numbers = line.partition(":")
                if name.strip() != "lo":
                    received, sent = numbers.split()[0], numbers.split()[8]
                    found = [found[0] + int(received), found[1] + int(sent)]
        except (OSError, ValueError, IndexError):
            return None
        return found


class Face:
    """The widgets that are seen; a dashboard may have several, of which a front end shows one."""

    def __init__(self, owner: Dashboard) -> None:
        wide = ipywidgets.Layout(flex="1 1 auto", width="auto", min_width="12em")
        self.figures = ipywidgets.HTML(_view_count=0)  # so that a front end says how often it is seen
        self.figures.observe(owner.seen, "_view_count")
        self.message = ipywidgets.Text(
            placeholder="What changed?", layout=wide, tooltip="message of the snapshot",
        )  # fmt: skip
        self.name = ipywidgets.Text(
            placeholder="name (optional)", layout=ipywidgets.Layout(width="11em"), tooltip="name of the snapshot",
        )  # fmt: skip
        self.button = ipywidgets.Button(
            description="Snapshot", icon="camera", tooltip="Commit what changed as a layer; cells go on running",
            layout=ipywidgets.Layout(width="8em"),
        )  # fmt: skip
        self.said = ipywidgets.HTML()
        self.button.on_click(lambda _: owner.snapshot(self))
        for field in (self.message, self.name):
            field.on_msg(lambda _, content, __: self._on_message(owner, content))
        row = ipywidgets.HBox([self.message, self.name, self.button])
        style = ipywidgets.HTML(_STYLE, layout=ipywidgets.Layout(display="none"))
        self.widgets = [style, self.figures, row, self.said]
        for widget in (self.figures, self.message, self.name, self.button):
            # A front end may name a subshell of the kernel before, and ipykernel one that is busy.
            vars(widget.comm)["_reply_subshell_for"] = lambda _data, _named: owner.subshell or None

    def _on_message(self, owner: Dashboard, content: dict[str, Any]) -> None:
        if content.get("event") == "submit":  # the Enter key
            owner.snapshot(self)


class Dashboard(ipywidgets.VBox):  # type: ignore[misc]
    """A box whose widgets are another kernel's after a restart."""

    #: Where clicks are heard of, also while a cell runs, one for all; "" where cells run.
    subshell = ""

    def __init__(self, status: Status | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.add_class("wb-dashboard")
        self._faces: list[Face] = []
        self._status: Status = status or {}
        self._usage: list[float] | None = None
        self._used: float | None = None
        self._looking = threading.Lock()
        self._busy = threading.Lock()
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._watched, self._number = False, 0
        self._due = 0.0 if status is None else time.monotonic() + _SELDOM
        self._network = Network()
        self.renew()

    def renew(self) -> None:
        """New widgets in the box, which whoever listens now hears of."""
        face = Face(self)
        self._faces.append(face)
        face.figures.value = self._drawn()
        self.children = tuple(face.widgets)

    def renew_unseen(self) -> None:
        """The same, unless a front end shows those that there are: what is being typed would be lost."""
        if not self._is_seen():
            self.renew()

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        data["text/plain"] = "\n".join(tables.status_lines(self._status))
        return bundle

    # What it shows

    def listen(self) -> None:
        """Have a subshell of its own, in a kernel that can: a front end may have none."""
        from IPython import get_ipython

        kernel = getattr(get_ipython(), "kernel", None)
        thread = getattr(kernel, "shell_channel_thread", None)  # ipykernel 7
        if thread is None or not getattr(kernel, "_supports_kernel_subshells", False) or Dashboard.subshell:
            return
        manager = thread.manager

        def make() -> None:
            Dashboard.subshell = manager._create_subshell()

        thread.io_loop.add_callback(make)

    def seen(self, _change: Any = None) -> None:
        """A front end has drawn it or taken it away: look as long as it is drawn somewhere."""
        with self._lock:
            if self._watched or not self._is_seen():
                return
            self._watched = True
        threading.Thread(target=self._watch, name="workbench-dashboard", daemon=True).start()

    def stop(self, why: str = "") -> None:
        """Look no more."""
        self._end.set()
        if why:
            self._say(why)

    def _is_seen(self) -> bool:
        return not self._end.is_set() and any(face.figures._view_count for face in self._faces)

    def _watch(self) -> None:
        while True:
            with self._lock:
                if not self._is_seen():
                    self._watched = False
                    return
            began = time.monotonic()
            brief = began < self._due
            try:
                self.look(brief)
            except Refused:
                pass  # the launcher is busy, or gone: what is shown stays, and grows stale
            except Exception:  # the kernel ends; or else the next view tries again
                with self._lock:
                    self._watched = False
                return
            now = time.monotonic()
            if not brief:
                self._due = now + max(_SELDOM, _SHARE * (now - began))
            self._end.wait(_OFTEN if self._status.get("watchers") != 0 else _SELDOM)

    def look(self, brief: bool) -> None:
        """Ask once. brief: not for what was changed."""
        with self._looking:
            found = ask({"do": "status", "brief": brief})
            if brief:
                known = ("changes", "size", "disk") if found["head"] == self._status.get("head") else ()
                found.update({key: self._status.get(key) for key in known})
                if not known:
                    self._due = 0.0
            self._status = found
            self._measure(found.get("usage"))
            if found["watchers"] == 0:  # what nobody hears would make the kernel look active to who ends idle ones
                return
            drawn = self._drawn()
            for face in self._faces:
                face.figures.value = drawn

    def _drawn(self) -> str:
        status = self._status
        if not status:
            return "<table><tr><th>image</th><td>…</td></tr></table>" + _STALE
        limits = status["limits"]
        rows = [
            ("image", _named(status["image"], status["image_id"])),
            ("snapshot", _named(status["ref"], status["head"]) if status["ref"] else "none yet"),
            ("changed since", _changed(status)),
        ]
        usage = status.get("usage")
        if usage:
            rows += [
                ("memory", _of(usage["memory"], limits.get("memory"), tables.size)),
                ("processes", _of(usage["processes"], limits.get("processes"), str)),
                ("processor", self._processor(usage["cpu"], limits.get("cpus"))),
            ]
        if status.get("disk") is not None:
            rows.append(("disk", _of_all(tables.size(status["disk"]), "written in this container")))
        rows.append(("network", self._over_network(status["network"])))
        cells = "".join(f"<tr><th scope='row'>{name}</th><td>{value}</td></tr>" for name, value in rows)
        self._number += 1  # so that each is another, which begins to grow stale
        return f"<table aria-label='this container' data-number='{self._number}'>{cells}</table>{_STALE}"

    def _measure(self, usage: dict[str, Any] | None) -> None:
        now, before = time.monotonic(), self._usage
        if usage and (before is None or now - before[0] > _OFTEN / 2):  # a shorter time would tell by chance
            self._usage = [now, usage["cpu"]]
            if before is not None:
                self._used = max(0.0, (usage["cpu"] - before[1]) / (now - before[0]))

    def _processor(self, seconds: float, most: float | None) -> str:
        if self._used is None:
            return html.escape(f"{seconds:.1f} s so far")
        of = f"{seconds:.1f} s so far" if most is None else f"of {most * 100:.0f} %, {seconds:.1f} s so far"
        return _of_all(f"{self._used * 100:.0f} %", of)

    def _over_network(self, kind: str) -> str:
        total = self._network.total() if kind not in ("none", "host") else None  # the host's are not its own
        if total is None:
            return html.escape(kind)
        received, sent = map(tables.size, total)
        return _of_all(kind, f"{received} received, {sent} sent")

    # What it does

    def snapshot(self, face: Face) -> None:
        """Take one in a thread of its own, so that a cell that runs is not waited for."""
        threading.Thread(target=self._snapshot, args=(face.message.value, face.name.value), daemon=True).start()

    def _snapshot(self, message: str, name: str) -> None:
        if not self._busy.acquire(blocking=False):
            return
        try:
            self._enable(False)
            self._say("taking a snapshot …")
            request: dict[str, Any] = {"do": "snapshot", "message": message}
            if name.strip():
                request["tag"] = name.strip()
            taken = ask(request)
            if taken["image"]:
                self._say("{} {}: {}, {}; paused for {:.0f} ms".format(
                    taken["ref"], taken["image"][7:19], tables.count(taken["changes"], "change"),
                    tables.size(taken["size"]), taken["paused"] * 1e3,
                ))  # fmt: skip
                for face in self._faces:
                    face.message.value = face.name.value = ""
            else:
                self._say("nothing has changed since the last snapshot")
            self.look(brief=False)
        except Refused as refused:
            self._say(str(refused), refused=True)
        finally:
            self._enable(True)
            self._busy.release()

    def _enable(self, on: bool) -> None:
        for face in self._faces:
            face.button.disabled = not on

    def _say(self, text: str, refused: bool = False) -> None:
        kind = "wb-said wb-refused" if refused else "wb-said"
        for face in self._faces:
            face.said.value = f"<div class='{kind}' role='status'>{html.escape(tables.plain(text))}</div>"


def _named(name: str, image: str) -> str:
    return f"{html.escape(name)} <code class='wb-of'>{html.escape(image[7:19])}</code>"


def _changed(status: Status) -> str:
    if status.get("changes") is None:
        return "…"
    if not status["changes"]:
        return "nothing"
    return _of_all(
        tables.size(status["size"]),
        "1 file" if status["changes"] == 1 else "{} files and folders".format(status["changes"]),
    )


def _of_all(value: str, of: str) -> str:
    return f"{html.escape(value)} <span class='wb-of'>{html.escape(of)}</span>"


def _of(value: float, most: float | None, shown: Any) -> str:
    if not most:
        return html.escape(shown(value))
    part = min(100.0, 100.0 * value / most)
    bar = f"<span class='wb-bar' aria-hidden='true'><i style='width: {part:.1f}%'></i></span>"
    return f"{_of_all(shown(value), 'of ' + shown(most))}{bar}"


# --- one after the other ---------------------------------------------------------------------------------------

_shown: Dashboard | None = None


def show(status: Status) -> Dashboard:
    """A new one, which is looked at from now on instead of an earlier one."""
    global _shown
    if _shown is not None:
        _shown.stop("a later cell shows how it goes on")
    _shown = Dashboard(status)
    _shown.listen()
    ask({"do": "dashboard", "model": _shown.model_id})
    return _shown


def revive(model: str) -> None:
    """That of the kernel before this one, whose box a front end may still show."""
    global _shown
    from comm import create_comm, get_comm_manager
    from tornado.ioloop import IOLoop

    # Not opened: that would put another box into the place of the one that is seen.
    channel: Any = create_comm(comm_id=model, primary=False, target_name="jupyter.widget")
    get_comm_manager().register_comm(channel)
    # Nor told of its widgets yet: who begins to listen between their opening and that would know a box of widgets
    # that it has not, and update it no more (``state_change`` of @jupyter-widgets/base stays rejected).
    _shown = Dashboard(comm=channel)  # which sends nothing over one without a kernel
    # What a box has by default is made when it is first asked for: while a front end is told of all widgets, too late.
    _shown.get_state()
    if getattr(channel, "kernel", True) is None:  # which ipykernel's opening sets
        from IPython import get_ipython

        channel.kernel = get_ipython().kernel
    IOLoop.current().add_callback(_shown.listen)  # once the kernel has begun
    for seconds in _LATER:
        IOLoop.current().call_later(seconds, _shown.renew_unseen)
