"""`Workbench`: the one face that the edges call. It composes the rooms below and decides nothing itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from traitlets import Bool, CUnicode, Float, Integer, List, TraitError, Unicode, default, validate
from traitlets.config import LoggingConfigurable

from workbench.containers import host_settings, spec
from workbench.containers.container import Container, Containers, new_id
from workbench.containers.state import run_bases
from workbench.history_face import HistoryFace
from workbench.model import (
    SUITE_LABEL,
    Conflict,
    Image,
    InvalidInput,
    Limits,
    Mount,
    Network,
    NotFound,
    Problem,
    Settings,
    narrower,
    parse_network,
    parse_size,
)

if TYPE_CHECKING:
    from pathlib import Path

    from workbench.build.builder import Built, Options
    from workbench.history.freeze import Frozen
    from workbench.images.refs import Refs
    from workbench.images.store import Store

_GUEST = os.path.join(os.path.dirname(os.path.realpath(__file__)), "guest")


def default_home() -> str:
    """``$WORKBENCH_HOME``, else ``workbench`` below ``$XDG_DATA_HOME`` (XDG base directory specification)."""
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.environ.get("WORKBENCH_HOME") or os.path.join(data, "workbench")


class Workbench(HistoryFace, LoggingConfigurable):
    """Images, containers and what they need of the host, for one user."""

    home = Unicode(help="Where images and containers are kept. Default: $WORKBENCH_HOME, else the user's data folder.")
    memory = CUnicode(
        "90%", help="The most memory of one container: a size such as 2G, or a part of the host's. Empty: no limit."
    ).tag(config=True)
    processes = Integer(
        spec.DEFAULT_PROCESSES, help="The most processes and threads of one container. 0: no limit."
    ).tag(config=True)
    cpus = Float(0.0, help="The most processors that one container may use, such as 1.5. 0: no limit.").tag(config=True)
    network = Unicode(
        "outbound",
        help="What containers reach: nothing (none), the outside (outbound), that and each other (lan:NAME), all that "
        "the host does (host).",
    ).tag(config=True)
    default_image = Unicode(
        "", help="The image whose kernel a server takes for new notebooks, by name. Empty: Jupyter's own default."
    ).tag(config=True)
    mounts = List(Unicode(), help="Host folders or files that every container sees, each as SOURCE[:TARGET][:ro].").tag(
        config=True
    )
    offer_host_settings = Bool(
        True, help="Offer the host's CA bundle, proxies and pip, uv and apt index settings to containers and builds."
    ).tag(config=True)
    home.tag(config=True)

    @validate("network")
    def _check_network(self, proposal: dict[str, Any]) -> str:
        try:
            return parse_network(proposal["value"])
        except InvalidInput as error:
            raise TraitError(str(error)) from None

    @default("home")
    def _default_home(self) -> str:
        return default_home()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.home = os.path.abspath(os.path.expanduser(self.home))
        self.containers = Containers(self.home)
        self._store: Store | None = None
        self._refs: Refs | None = None

    # Images

    @property
    def store(self) -> Store:
        """The image store, opened (and its home made) when first needed."""
        if self._store is None:
            from workbench.images.store import Store

            store = Store(self.home)
            store.open()
            self._store = store
        return self._store

    @property
    def refs(self) -> Refs:
        """The images' names."""
        if self._refs is None:
            from workbench.images.refs import Refs

            self._refs = Refs(self.home)
        return self._refs

    def build(
        self, recipe: str, *, name: str | None = None, refresh: bool = False, check: bool = False,
        offline: bool = False, vendored: str | None = None, progress: Callable[[str], None] = lambda _line: None,
    ) -> Built:  # fmt: skip
        """Build a recipe (a folder, or the name of a shipped one), from its lock where it has one.

        name: instead of the recipe's own; refresh: choose
        others for packages of the lock that cannot be had any more; check: build twice and compare; offline: fetch
        nothing; vendored: the folder that ``lock`` filled, by default ``vendor`` beside the recipe.
        Raises InvalidInput, BuildFailed, HostLacks.
        """
        from dataclasses import replace as but

        from workbench.build import builder, lock
        from workbench.build import recipe as recipes

        folder = recipes.find(recipe)
        options = builder.Options(
            lock=lock.load(folder), refresh=refresh, offline=offline, vendored=_vendored(folder, vendored)
        )
        built = self._build(folder, options, name, progress)
        if check:
            again = self._build(folder, but(options, lock=built.lock, fresh=True), "", progress)
            built = but(built, differences=[*built.differences, *builder.compare(self.store, built, again)])
        return built

    def lock(
        self, recipe: str, *, refresh: bool = False, vendor: str | None = None, named: bool = True,
        progress: Callable[[str], None] = lambda _line: None,
    ) -> tuple[str, Built]:  # fmt: skip
        """Choose versions for a recipe, build it, and write its lock: that file, and the build.

        refresh: keep what the present lock says as far as it can be had; vendor: a folder to fill with all files
        that a build needs; named: False to give no image a name. Raises as ``build`` does.
        """
        from workbench.build import builder, lock
        from workbench.build import recipe as recipes

        folder = recipes.find(recipe)
        old = lock.load(folder) if refresh else None
        options = builder.Options(
            lock=old, refresh=True, anew=not refresh, sums=True, vendor=_path(vendor), vendored=_vendored(folder, None),
            keep_failed=named,
        )  # fmt: skip
        built = self._build(folder, options, None if named else "", progress)
        return str(lock.save(built.lock, folder)), built

    def _build(self, folder: Path, options: Options, name: str | None, progress: Callable[[str], None]) -> Built:
        from workbench.build import builder

        return builder.build(
            folder, store=self.store, refs=self.refs, containers=self.containers,
            settings=lambda suite: self.settings(suite or None), progress=progress, name=name, options=options,
        )  # fmt: skip

    def image(self, text: str) -> Image:
        """An image by name, ID or beginning of its ID. Raises NotFound, InvalidInput."""
        return self.store.image(self._resolve(text))

    def _resolve(self, text: str) -> str:
        """The ID behind a name, an ID, or a revision such as ``name~2``."""
        if not any(sign in text for sign in "~^{"):
            return self.refs.resolve(text)
        from workbench.history import log

        return log.resolve(self.store, self.refs, text)

    def images(self) -> list[dict[str, Any]]:
        """A row for each image."""
        names: dict[str, list[str]] = {}
        for name, image_id in sorted(self.refs.all().items()):
            names.setdefault(image_id, []).append(name)
        return [
            {
                "names": names.get(image.id, []), "id": image.id, "created": image.created,
                "size": self.store.size(image), "layers": len(image.diff_ids),
                "kernel": image.kernel.display_name if image.kernel else None,
            }
            for image in self.store.images()
        ]  # fmt: skip

    def remove_image(self, text: str) -> list[str]:
        """Take a name away, or with an ID all names of that image; the names that went.

        The files go with the next ``gc``. Raises Conflict when a container still runs over its last name.
        """
        image_id = self.refs.resolve(text)
        names = [name for name, owner in self.refs.all().items() if owner == image_id]
        by_name = [name for name in names if name in (text, f"{text}:latest")]
        going = by_name or names
        users = [container.id for container in self.containers if image_id in container.images]
        if users and len(going) == len(names):
            raise Conflict(
                f"remove image {text}", f"container {users[0]} is made from it", f"jupyter workbench rm {users[0]}"
            )
        for name in going:
            self.refs.delete(name)
        return going

    # Containers

    def settings(self, suite: str | None = None) -> Settings:
        """What of the host's settings is offered; nothing when the configuration says so.

        suite: the Debian suite inside, for apt's sources.
        """
        return host_settings.discover(os.environ, suite=suite) if self.offer_host_settings else Settings()

    def limits(self) -> Limits:
        """What the configuration grants to one container."""
        return Limits(_memory(self.memory), self.processes or None, self.cpus or None)

    def create(
        self, image: str, *, argv: Sequence[str] | None = None, cwd: str | None, env: Mapping[str, str] | None = None,
        terminal: bool = False, mounts: Sequence[Mount] = (), limits: Limits | None = None,
        network: Network | None = None, forwards: Sequence[tuple[str, int]] = (),
        labels: Mapping[str, str] | None = None, names: Sequence[str] = (), guest: bool = False,
        again: Container | None = None,
    ) -> Container:  # fmt: skip
        """Lay a container out; ``start`` of the result starts it.

        image: name or ID. argv: instead of the image's kernel or command. cwd: the host's folder to work in,
        mounted at the same path; None for none. limits: narrow what configuration and image say. network: instead
        of the configuration's. forwards, names: see ``ContainerSpec``. guest: show ``workbench_guest`` inside.
        again: a stopped container over the same image that goes on, with what it has changed, as all this says now.
        Raises NotFound, InvalidInput, HostLacks, Conflict when somebody else has just taken ``again``.
        """
        image_id = self._resolve(image)
        with self.store.lease(image_id):
            found = self.store.image(image_id)
            wanted = self._spec(found, argv, cwd, env or {}, terminal, mounts, limits, network)
            known = tuple(filter(None, map(spec.label, names)))
            wanted = replace(wanted, forwards=tuple(forwards), names=known)
            if guest:
                wanted = replace(wanted, mounts=(*wanted.mounts, *_guest()))
            about = {"image": image, **(labels or {})}
            if again is not None:
                again.claim(wanted, about)
                return again
            return self.containers.create(wanted, image=image_id, labels=about)

    def stopped_for(self, notebook: str) -> list[Container]:
        """Stopped containers that were a notebook's, the newest first."""
        found: list[tuple[str, Container]] = []
        for container in self.containers:
            with suppress(NotFound):
                # Whose it is first: the state of others is not asked for.
                if container.labels.get("notebook") == notebook and (known := container.state)["status"] == "exited":
                    found.append((str(known["created"]), container))
        return [container for _, container in sorted(found, key=lambda each: each[0], reverse=True)]

    def _spec(
        self, image: Image, argv: Sequence[str] | None, cwd: str | None, env: Mapping[str, str], terminal: bool,
        mounts: Sequence[Mount], limits: Limits | None, network: Network | None,
    ) -> spec.ContainerSpec:  # fmt: skip
        own = spec.working_folder(cwd, homes=host_settings.homes()) if cwd else []
        given = [replace(mount, source=os.path.realpath(mount.source)) for mount in mounts]
        shown = [*own, *(spec.parse_mount(text) for text in self.mounts), *given]
        hidden, fixed = spec.guard(
            shown, homes=host_settings.homes(), private=self._private(), programs=host_settings.programs()
        )
        suite = dict(image.labels).get(SUITE_LABEL)
        settings = self.settings(suite)
        granted = parse_network(network) if network else self.network
        container_id = new_id()
        return spec.ContainerSpec(
            id=container_id,
            argv=tuple(argv or (image.kernel.argv if image.kernel else image.cmd) or ("/bin/sh",)),
            env=spec.environment(image.env, settings, env),
            cwd=own[0].target if own else image.working_dir,
            layers=self._layers(image),
            hostname=container_id,
            mounts=(*shown, *_files(settings)),
            hidden=tuple(hidden),
            fixed=tuple(fixed),
            texts=settings.texts,
            limits=self.limits().stricter(image.limits).stricter(limits or Limits()),
            network=_reached(granted, image),
            terminal=terminal,
        )

    def _layers(self, image: Image) -> tuple[str, ...]:
        # Of a layer that an image names twice only the higher one shows; overlayfs takes each once.
        return tuple(dict.fromkeys(self.store.trees(image.diff_ids)))

    def _private(self) -> Iterator[str]:
        """Folders and sockets of the host that no container may see."""
        from jupyter_core.paths import jupyter_config_dir, jupyter_data_dir, jupyter_runtime_dir

        yield self.home
        yield jupyter_runtime_dir()
        yield jupyter_config_dir()
        yield jupyter_data_dir()  # kernelspecs name programs of the host
        yield from run_bases()
        for name in ("XDG_RUNTIME_DIR", "SSH_AUTH_SOCK"):
            if os.path.isabs(os.environ.get(name, "")):
                yield os.environ[name]

    def describe(self, container: Container) -> str:
        """The launch of a container as a plan, for people."""
        known = spec.ContainerSpec.from_json(container.state["spec"])
        steps = spec.plan(known, writable=os.path.dirname(container.upper), run_dir=container.run_dir, id_kind="range")
        return spec.describe(known, steps)

    def ps(self, every: bool = False) -> list[dict[str, Any]]:
        """A row for each container that runs; with ``every`` for stopped ones as well."""
        rows = []
        for container in self.containers:
            state = container.state
            if every or state["status"] == "running":
                rows.append({
                    "id": container.id, "image": state["labels"].get("image", ""), "image_id": state["image"],
                    "status": state["status"], "created": state["created"], "pid": state["pid"],
                    "command": state["spec"]["argv"], "folder": state["spec"]["cwd"],
                    "network": state["spec"]["network"], "limits": state["spec"]["limits"],
                    "labels": state["labels"], "exit": state["exit"], "usage": _usage(container, state),
                })  # fmt: skip
        return sorted(rows, key=lambda row: str(row["created"]))

    def container(self, text: str) -> Container:
        """A container by id, or a beginning of it. Raises NotFound."""
        return self.containers.get(text)

    def stop(self, text: str, timeout: float = 10.0) -> Container:
        """End a container's processes; what it changed stays."""
        container = self.container(text)
        container.stop(timeout)
        return container

    def remove(self, text: str, force: bool = False) -> str:
        """Remove a container with its changes; its id. force: stop it first, and drop what no snapshot holds.

        Without, raises Conflict for either.
        """
        container = self.container(text)
        if force:
            container.stop(timeout=1.0)
        elif container.state["status"] != "running":
            self.unsaved(container.id).refuse(f"remove container {container.id}", "rm --force")
        # An unchanged one goes when it is stopped; who launched it may just be at that.
        with suppress(FileNotFoundError, NotFound) if force else nullcontext():
            if os.path.isdir(container.folder):
                container.remove()
        return container.id

    def logs(self, text: str) -> str:
        """What a container's main process printed beside its messages."""
        try:
            with open(self.container(text).log, errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def _over(self, known: Any, before: Image, image: Image) -> dict[str, Any]:
        """The spec of a container over another image, as JSON: nothing that it was refused is granted by that."""
        old = spec.ContainerSpec.from_json(known)
        said = set(before.env)
        env = dict(image.env) | {name: value for name, value in old.env if (name, value) not in said}
        return replace(
            old, env=tuple(sorted(env.items())), layers=self._layers(image),
            texts=self.settings(dict(image.labels).get(SUITE_LABEL)).texts,
            limits=old.limits.stricter(image.limits), network=_reached(old.network, image),
        ).to_json()  # fmt: skip

    def freeze(
        self, text: str, out: str = "", *, build: bool = True, with_files: bool = False, most: str | int = "64M",
        progress: Callable[[str], None] = lambda _line: None, stranger: bool = False, image: str = "",
    ) -> Frozen:  # fmt: skip
        """Turn a snapshot back into a recipe in the folder ``out``; see ``history.freeze.freeze``.

        stranger: what is in the image has asked for it: so no image gets a name, and no address is tried that the
        image names. image: what ``text`` means.
        """
        from workbench.build import written
        from workbench.history import freeze

        tools = written.Tools(
            self.store, self.settings,
            lambda folder: self.lock(folder, named=not stranger, progress=progress)[1].image, addresses=not stranger,
        )  # fmt: skip
        return freeze.freeze(
            self.store, self.image(image or text), text, out, tools=tools, build=build, with_files=with_files,
            most=parse_size(most),
        )  # fmt: skip

    # Housekeeping

    def sweep(self) -> list[str]:
        """Tidy up after launchers that were killed; ids of the containers found."""
        return self.containers.sweep()

    def gc(self) -> dict[str, int]:
        """Remove what no name, container or running job needs: layers, blobs and bytes that went."""
        from workbench.build.cache import Cache
        from workbench.history import notebooks

        self.sweep()
        needed = {image for container in self.containers for image in container.images}
        done = self.store.gc(needed.union(notebooks.pinned(self.home)))
        cache = Cache(self.home)
        cache.prune(self.store.has_layer)
        return done | {"bytes": done["bytes"] + cache.drop_downloads()}

    def check(self, repair: bool = False) -> list[Problem]:
        """Hold every file of the store against its digest; what is wrong, and with ``repair`` what was mended."""
        swept = self.sweep()
        left = [
            replace(Problem(f"container {name}", "its launcher was killed"), remedy="tidied up", repaired=True)
            for name in swept
        ]
        return [*left, *self.store.check(repair=repair)]

    def close(self) -> None:
        """End the helper and with it every container that this process started."""
        self.containers.close()


def _reached(granted: Network, image: Image) -> Network:
    # What an image says at the most is no name of a network: that is for its user to choose.
    return granted if image.network in (None, "outbound") else narrower(granted, image.network)


def _usage(container: Container, state: Mapping[str, Any]) -> dict[str, Any] | None:
    usage = container.usage() if state["status"] == "running" else None
    return asdict(usage) if usage else None


def _vendored(folder: Path, text: str | None) -> Path | None:
    beside = folder / "vendor"
    return _path(text) or (beside if beside.is_dir() else None)


def _path(text: str | None) -> Path | None:
    from pathlib import Path

    return Path(text).absolute() if text else None


def _memory(text: str) -> int | None:
    """Bytes; a percentage is of the memory that the host has."""
    if not text.endswith("%"):
        return parse_size(text) if text else None
    try:
        part = float(text[:-1]) / 100
    except ValueError:
        raise InvalidInput("read Workbench.memory", f"{text!r} is no size", 'write it like "2G" or "90%"') from None
    return int(part * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _guest() -> list[Mount]:
    """The package ``workbench_guest``, file by file: a folder of somebody's home could not be read inside."""
    return [
        Mount(f"{_GUEST}/{name}", f"{spec.GUEST}/workbench_guest/{name}", read_only=True)
        for name in sorted(os.listdir(_GUEST))
        if name.endswith(".py")
    ]


def _files(settings: Settings) -> tuple[Mount, ...]:
    return tuple(Mount(source, target, read_only=True) for source, target in settings.files)


def as_row(image: Image) -> dict[str, Any]:
    """An image as plain values, for JSON."""
    return asdict(image)
