"""The kernel provisioner: how jupyter_client (JupyterLab, Notebook, nbclient, papermill, console) starts kernels.

``kernel.json`` names it in ``metadata.kernel_provisioner``; nothing else needs to be configured, and no server
extension is needed. One instance lives as long as its kernel, through every restart, and so does its container
with the writable layer.

Interface: https://jupyter-client.readthedocs.io/en/stable/provisioning.html
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from logging import ERROR, INFO
from typing import TYPE_CHECKING, Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.multikernelmanager import MultiKernelManager
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase
from jupyter_core.utils import ensure_async
from traitlets import Bool, Float, Integer, List, Unicode

from workbench.containers.spec import parse_mount
from workbench.history import notebooks
from workbench.jupyter import connection, environment, events, listening, shared
from workbench.jupyter.guest_api import GuestApi
from workbench.model import (
    Conflict,
    Exit,
    LaunchFailed,
    Limits,
    NotFound,
    Running,
    WorkbenchError,
    narrower,
    parse_network,
    parse_size,
)

if TYPE_CHECKING:
    from workbench.containers.container import Container
    from workbench.history_face import Checkout
    from workbench.jupyter.last_words import Listener
    from workbench.model import Image, Kernel
    from workbench.workbench import Workbench


class WorkbenchProvisioner(KernelProvisionerBase):
    """One kernel in one container."""

    image = Unicode("", config=True, help="The image: a name, or its ID.")
    memory = Unicode("", config=True, help="The most memory of this kernel, like 2G: less than all others allow.")
    processes = Integer(0, config=True, help="The most processes and threads of this kernel. 0: no limit of its own.")
    cpus = Float(0.0, config=True, help="The most processors of this kernel. 0: no limit of its own.")
    network = Unicode("", config=True, help="What this kernel reaches, if that is less; or its network, lan:NAME.")
    alias = Unicode("", config=True, help="This kernel's name in a network lan:NAME. Empty: that of its notebook.")
    mounts = List(Unicode(), config=True, help="Host folders that this kernel sees, each as SOURCE[:TARGET][:ro].")
    resume = Bool(True, config=True, help="Go on with what a notebook changed before when it is opened again.")
    home = Unicode("", help="The store that the image is in, where it is not the user's default.")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._container: Container | None = None
        self._content: dict[str, Any] = {}
        self._exit: Exit | None = None
        self._exited: Future[Exit] | None = None
        self._guest: GuestApi | None = None
        self._tell_event: events.Tell = events.nobody
        self._listener: Listener | None = None
        self._farewell: Future[int] | None = None
        self._shutdown: asyncio.Future[Any] | None = None
        self._expected = True
        self._has_process = self._has_run = False
        #: By id of a cell the image that it was last run in.
        self.ran: dict[str, str] = {}
        self._taken = environment.Taken()
        self._now: environment.Now | None = None
        self._between: Callable[[], None] | None = None  # what is to be done before the kernel is started again
        self._ending = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._mounts: list[tuple[str, str]] = []
        self._cwd = ""

    # Start

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Lay out the container and write the host's connection file; keyword arguments for launch_kernel."""
        try:
            return await self._prepare(kwargs)
        except WorkbenchError:
            await self._discard()
            raise

    async def _prepare(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        km: Any = self.parent
        if km is None:
            raise LaunchFailed(f"start a kernel of {self.image}", "no kernel manager asks for it")
        await self._free_sockets()
        asked: environment.Asked = kwargs.pop("workbench", None) or environment.Asked()
        environ: Mapping[str, str] = kwargs.get("env") or os.environ
        bench = shared.workbench(self.config, self.home)
        if self._between is not None and self._container is not None:
            await asyncio.to_thread(self._between)
        if self._container is None:
            path = str(environ.get("JPY_SESSION_NAME", "")) if self._is_a_servers() else ""
            self._taken = environment.take_up(bench, path, km.kernel_name, self.image, self.resume)
        image = bench.image(self._container.image_id if self._container else self._taken.image or self.image)
        kernel = image.kernel
        if kernel is None:
            raise LaunchFailed(
                f"start a kernel of {self.image}", "the image has no kernel", "name a kernel in its recipe"
            )
        encrypt = self._encrypt(kwargs.pop("transport_encryption", None), kernel)
        argv = [*connection.command(kernel), *kwargs.pop("extra_arguments", [])]
        if self._container is None:
            self._container = self._create(bench, image, argv, str(kwargs.get("cwd") or os.getcwd()), environ, asked)
            self._set_transport(f"{self._container.run_dir}/{connection.PREFIX}")
        if encrypt and self._keys() is None:
            import zmq

            # made once, like the session's key: the connection file stays through a restart
            km.curve_publickey, km.curve_secretkey = zmq.curve_keypair()
        km.write_connection_file(jupyter_session=environ.get("JPY_SESSION_NAME", ""))
        self.connection_info = km.get_connection_info()
        self._content = connection.guest_content(
            key=km.session.key.decode(),
            signature_scheme=km.session.signature_scheme,
            kernel_name=km.kernel_name,
            curve=(keys[0].decode(), keys[1].decode()) if (keys := self._keys()) else None,
            transport=kernel.transport,
        )
        return {**kwargs, "cmd": argv, "env": connection.kernel_env(environ, image)}

    def _encrypt(self, asked: str | None, kernel: Kernel) -> bool:
        """Whether CURVE keys are to be made: as LocalProvisioner decides it, and never in clear when required."""
        km: Any = self.parent
        policy = asked if asked is not None else getattr(km, "transport_encryption", "disabled")
        if hasattr(km, "_transport_encryption_policy"):
            policy = km._transport_encryption_policy(policy)
        if policy == "required":
            connection.require_curve(kernel, self.image)
            return True
        return bool(policy == "auto" and "curve" in kernel.supported_encryption)

    def _keys(self) -> tuple[bytes, bytes] | None:
        """The manager's CURVE keys; before jupyter_client 8.9 it knows none."""
        km: Any = self.parent
        public = getattr(km, "curve_publickey", None)
        return (public, km.curve_secretkey) if public else None

    def _create(
        self, bench: Workbench, image: Image, argv: list[str], cwd: str, environ: Mapping[str, str],
        asked: environment.Asked,
    ) -> Container:  # fmt: skip
        self._cwd = cwd
        own = Limits(parse_size(self.memory) if self.memory else None, self.processes or None, self.cpus or None)
        network = parse_network(bench.network)
        for text in filter(None, (self.network, asked.network)):
            network = narrower(network, parse_network(text))
        path = environ.get("JPY_SESSION_NAME", "")
        notebook = os.path.splitext(os.path.basename(path))[0]
        labels = {"image": self.image, "kernel": str(self.kernel_id or "")}
        again = self._taken.container
        container = bench.create(
            image.id,
            argv=argv,
            cwd=cwd,
            env=connection.kernel_env(environ, image),
            guest=True,
            mounts=[parse_mount(text) for text in self.mounts],
            limits=own.stricter(asked.limits),
            network=network,
            names=(asked.alias or self.alias or notebook,),
            forwards=connection.forwards(image.kernel) if image.kernel else (),
            labels=labels | ({"notebook": path} if self._is_a_servers() and path else {}),
            again=again,
        )
        self._has_run = again is not None
        self._tell_event = events.teller(self.parent)
        self._guest = GuestApi(bench, container, self._start_again, self._tell_event, self._watchers)
        self._guest.notice = self._taken.notice
        self._guest.start()
        spec = container.state["spec"]
        self._cwd = spec["cwd"]
        self._mounts = [(mount["source"], mount["target"]) for mount in spec["mounts"]]
        return container

    def _set_transport(self, prefix: str) -> None:
        km: Any = self.parent
        km.transport, km.ip = "ipc", prefix
        for channel in connection.CHANNELS:
            setattr(km, f"{channel}_port", connection.number(channel))
        connect = km.connect_shell

        def connect_shell(*args: Any, **kwargs: Any) -> Any:
            channel = connect(*args, **kwargs)
            if hasattr(channel, "on_send"):  # a stream, such as a server has for each browser
                channel.on_send(self._on_request)
            return channel

        km.connect_shell = connect_shell

    def _on_request(self, frames: list[Any], _status: object) -> None:
        """A server hands a message on to the kernel."""
        if self._listener is not None and (asked := self._listener.sent(frames)) and self._now is not None:
            self.ran[asked] = self._now.image

    @property
    def head(self) -> notebooks.Record | None:
        """The environment for a notebook's record; None while it is no snapshot."""
        if self._container is None:
            return None
        return environment.record(shared.workbench(self.config, self.home), self._container, self.image)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:  # noqa: ARG002
        """Start the container with the kernel in it; until it listens."""
        container = self._container
        assert container is not None, "pre_launch comes first"
        self._loop = asyncio.get_running_loop()
        connection.clear_sockets(container.run_dir)
        connection.write_guest(container.run_dir, self._content)
        self._exit, self._farewell, self._expected = None, None, False
        # No thread pool: the helper may be started here, and is to end with this process, not with a thread.
        started = container.start()
        exited = self._exited = container.exited
        self._follow()
        exited.add_done_callback(self._on_exit)
        try:
            await asyncio.wrap_future(started)
        except WorkbenchError:
            self._expected = True
            await self._discard()
            raise
        self._has_process = self._has_run = True
        self._between, self._now = None, environment.Now(container)
        self._tell(container, "started")
        await listening.until_listening(container.run_dir, exited.done)
        return self.connection_info

    def _tell(self, container: Container, action: str, reason: str = "") -> None:
        """To who listens to the server's events."""
        data = {"kernel": str(self.kernel_id or ""), "image": self.image, "action": action, "reason": reason}
        self._tell_event(events.CONTAINER, container=container.id, **data)

    def _start_again(self, between: Callable[[], None]) -> None:
        """End the kernel, do something, and start it again, as its manager does when it is asked to; in any thread."""
        self._between = between
        assert self._loop is not None
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._restart(), self._loop)
        else:  # a manager that runs its loop only while it is asked for something
            threading.Thread(target=asyncio.run, args=(self._restart(),), name="workbench-restart").start()

    async def change(self, act: Callable[[Workbench], Checkout]) -> Checkout:
        """Put another environment in the place of the running kernel's, for its server. Raises what ``act`` does.

        What a running container allows is done at once; else the kernel is ended, and started again whatever comes
        of it.
        """
        bench = shared.workbench(self.config, self.home)
        try:
            return await asyncio.to_thread(act, bench)
        except Running:
            pass
        done: Future[Checkout] = Future()

        def between() -> None:
            try:
                done.set_result(act(bench))
            except WorkbenchError as error:
                done.set_exception(error)

        self._between = between
        await self._restart()
        if not done.done():
            raise LaunchFailed("change the environment", "the kernel was not started again", "see the server's log")
        return done.result()

    async def _restart(self) -> None:
        km: Any = self.parent
        owner = self._manager_of_many()
        try:
            self._expect_end()
            if self._container is not None:
                self._container.kill()
            while self._ended() is None:
                await asyncio.sleep(0.005)
            if owner is None:
                await ensure_async(km.restart_kernel(now=True))
                return
            # A server takes a kernel that ended while it was busy for busy still, and does not wait for its channels.
            if hasattr(km, "execution_state"):
                km.execution_state = "starting"
            await ensure_async(owner.restart_kernel(self.kernel_id, now=True))
        except Exception:
            self._between = None
            self.log.exception("Kernel %s could not be started in another environment", self.kernel_id)

    async def _discard(self) -> None:
        """The kernel could not be started: nothing of it stays, but for changes that an earlier run has made."""
        container = self._container
        if self._has_run or container is None:
            await self._settle()
            return
        if self._guest is not None:
            self._guest.close()
            self._guest = None
        self._container = None
        km: Any = self.parent
        km.cleanup_connection_file()
        with suppress(WorkbenchError, OSError):
            await asyncio.to_thread(container.remove)

    # Life

    @property
    def has_process(self) -> bool:
        """Whether a kernel was started and its end not yet taken notice of, or it is being started again."""
        return self._has_process or self._between is not None

    async def poll(self) -> int | None:
        """None while it runs, or while its clients are being told why it died; else the exit code."""
        if self._between is not None and not self._ending:
            return None  # to clients that look whether it has died, a kernel that changes its environment has not
        code = self._ended()
        if code is None or self._exit is None or self._expected:
            return None if self._shutdown and not self._shutdown.done() else code
        if self._exit.asked and (owner := self._manager_of_many()):
            # Its owner stopped it: to a server, which asks here, that is a shutdown and no death to recover from.
            self._expected = True
            self._shutdown = asyncio.ensure_future(ensure_async(owner.shutdown_kernel(self.kernel_id, now=True)))
            return None
        return code

    def _is_a_servers(self) -> bool:
        """Whether it is one of many kernels, which people open and close; else its client runs it once."""
        return isinstance(getattr(self.parent, "parent", None), MultiKernelManager)

    def _manager_of_many(self) -> Any:
        """What has this kernel among its own and would restart it; None for a client with the one."""
        owner = getattr(self.parent, "parent", None)
        return owner if isinstance(owner, MultiKernelManager) and self.kernel_id in owner else None

    def _watchers(self) -> int | None:
        """How many front ends listen to it; None where nobody counts them."""
        model = getattr(self._manager_of_many(), "kernel_model", None)
        return int(model(self.kernel_id)["connections"]) if model else None

    def _ended(self) -> int | None:
        if not self._has_process:
            return 0
        if self._exit is None or (self._farewell is not None and not self._farewell.done()):
            return None
        return self._exit.code

    async def wait(self) -> int | None:
        """Wait for its end; the exit code."""
        code = 0
        while self._has_process:
            polled = self._ended()
            if polled is not None:
                code, self._has_process = polled, False
                break
            await asyncio.sleep(0.02)
        self._ending = False
        return code

    async def send_signal(self, signum: int) -> None:
        """To the kernel's process group, by way of the container's init."""
        if self._container is not None and self._has_process and signum:
            if signum == signal.SIGKILL:
                await self.kill()
            else:
                self._container.signal(signum)

    async def kill(self, restart: bool = False) -> None:  # noqa: ARG002
        """End everything in the container at once."""
        self._expect_end()
        self._ending = True
        if self._container is not None:
            self._container.kill()

    async def terminate(self, restart: bool = False) -> None:  # noqa: ARG002
        """Ask the kernel to end (SIGTERM)."""
        self._expect_end()
        if self._container is not None:
            self._container.signal(signal.SIGTERM)

    async def shutdown_requested(self, restart: bool = False) -> None:  # noqa: ARG002
        """The kernel was told to end by message."""
        self._expect_end()

    async def cleanup(self, restart: bool = False) -> None:
        """A restart keeps the container and its writable layer; else it stays only if it holds changes."""
        await self._free_sockets()
        if not restart:
            await self._settle()

    async def _settle(self) -> None:
        if self._guest is not None:
            self._guest.close()
        container, self._container = self._container, None
        if container is None:
            return
        try:
            kept = await asyncio.to_thread(container.settle)
            if kept:
                self.log.info("Container %s is kept, stopped, with its changes", container.id)
            self._tell(container, "kept" if kept else "removed")
        except Conflict:  # it would not end in the time that it was given
            container.kill()
        except (WorkbenchError, OSError) as error:
            self.log.warning("Container %s: %s", container.id, error)

    # Its end

    def _follow(self) -> None:
        from workbench.jupyter import last_words

        km: Any = self.parent
        address = f"ipc://{km.ip}-{connection.number('iopub')}"
        self._listener = last_words.Listener(address, km.session, self._keys())
        last_words.instance().follow(self._listener)

    def _expect_end(self) -> None:
        self._expected = True
        if self._listener is not None and self._exit is None:
            from workbench.jupyter import last_words

            last_words.instance().forget(self._listener)

    def _on_exit(self, exited: Future[Exit]) -> None:
        """In the helper's reader thread. ``_exit`` is set last: poll() must not report the end before the words."""
        if exited is not self._exited:
            return
        end = exited.result()
        if end.reason and not self._expected and self._listener is not None:
            from workbench.jupyter import last_words

            text = f"Kernel {end.reason}" if end.asked else f"Kernel died: {end.reason.removeprefix('killed: ')}"
            self.log.log(INFO if end.asked else ERROR, "%s (kernel %s, image %s)", text, self.kernel_id, self.image)
            self._farewell = last_words.instance().say(self._listener, text)
        if (container := self._container) is not None:
            self._tell(container, "ended", end.reason)
        self._exit = end

    async def _free_sockets(self) -> None:
        """Wait until nothing of ours uses the names of the kernel's sockets."""
        from workbench.jupyter import last_words

        waiting: list[Future[Any]] = []
        if self._farewell is not None:
            waiting.append(self._farewell)
        elif self._listener is not None:
            waiting.append(last_words.instance().forget(self._listener))
        for future in waiting:
            for _ in range(200):
                if future.done():
                    break
                await asyncio.sleep(0.01)
        self._listener = self._farewell = None

    # Facts

    def resolve_path(self, path: str) -> str | None:
        """The host's path of a file seen inside; None for what is not in a mounted folder."""
        inside = os.path.normpath(os.path.join(self._cwd or "/", path))
        best: tuple[str, str] | None = None
        for source, target in self._mounts:
            covers = inside == target or inside.startswith(target.rstrip("/") + "/")
            if covers and (best is None or len(target) > len(best[1])):
                best = source, target
        if best is None:
            return None
        source, target = best
        found = os.path.realpath(source + inside[len(target) :])
        # a link in the folder may lead elsewhere: inside it names another file than on the host
        if found != source and not found.startswith(source.rstrip("/") + "/"):
            return None
        return found if os.path.exists(found) else None

    async def get_provisioner_info(self) -> dict[str, Any]:
        """What another process needs to find the container again."""
        info: dict[str, Any] = await super().get_provisioner_info()
        return info | {"container": self._container.id if self._container else None, "image": self.image}

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        """Find the container again; its end can only be waited for by the process that started it."""
        await super().load_provisioner_info(provisioner_info)
        self.image = provisioner_info.get("image") or self.image
        if provisioner_info.get("container"):
            with suppress(NotFound):
                self._container = shared.workbench(self.config, self.home).container(provisioner_info["container"])
