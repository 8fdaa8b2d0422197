"""Every command, its options and its help. The one parser of options, with or without configuration files."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from workbench.model import InvalidInput, parse_network

PROG = "jupyter workbench"
CONFIG_NAME = "jupyter_workbench_config"
#: ``--Workbench.memory=2G``: any setting of a configuration file, as with every Jupyter application.
_SETTING = re.compile(r"--[A-Z]\w*\.\w+=")


class _Parser(argparse.ArgumentParser):
    """One line on stderr and exit code 2 for a wrong option."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see `{self.prog} --help`", file=sys.stderr)
        sys.exit(2)


@dataclass(frozen=True)
class Command:
    """A subcommand: its help, its arguments, and ``module:function`` that executes it."""

    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    target: str
    description: str = ""
    examples: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Parsed:
    """What the command line said."""

    name: str
    values: argparse.Namespace
    settings: tuple[str, ...]

    @property
    def debug(self) -> bool:
        """Whether plans and tracebacks are wanted."""
        return bool(self.values.debug)

    @property
    def plain(self) -> bool:
        """Whether it asks for nothing that needs the configuration system."""
        v = self.values
        return bool(self.name) and not (self.settings or v.config)


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _several(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("what", nargs="+", metavar=what.upper(), help=f"{what}s, each by its name or ID")
    _json(parser)


def _build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="FOLDER", help="a folder with a recipe.toml")
    parser.add_argument("--name", help="name[:tag] of the image (default: the recipe's own name)")
    parser.add_argument("--refresh", action="store_true", help="take others for packages that cannot be had any more")
    parser.add_argument("--check", action="store_true", help="build twice, and name the files that differ")
    parser.add_argument("--offline", action="store_true", help="fetch nothing: all files are here, or vendored")
    parser.add_argument("--vendor", metavar="DIR", help="take files from here first (default: FOLDER/vendor)")
    _json(parser)


def _lock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="FOLDER", help="a folder with a recipe.toml")
    parser.add_argument("--refresh", action="store_true", help="keep what the lock says as far as it can be had")
    parser.add_argument("--vendor", metavar="DIR", help="keep all files that a build needs here")
    _json(parser)


def _rmi(parser: argparse.ArgumentParser) -> None:
    _several(parser, "image")


def _network(text: str) -> str:
    try:
        return parse_network(text)
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(error.obstacle) from None


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", metavar="SIZE", help='at most so much memory, like "512M" or "2G"')
    parser.add_argument("--processes", metavar="N", type=int, help="at most so many processes and threads")
    parser.add_argument("--cpus", metavar="N", type=float, help="at most so many processors, like 1.5")
    parser.add_argument(
        "--network", metavar="NETWORK", type=_network,
        help="none; outbound (reach out, not be reached); lan:NAME (that, and find each other); host (the host's own)",
    )  # fmt: skip
    parser.add_argument("--name", metavar="NAME", help="how others find it in a network lan:NAME")
    parser.add_argument(
        "--mount", metavar="SRC[:DST][:ro]", action="append", default=[],
        help="show a folder or file of this machine inside; may be given more than once",
    )  # fmt: skip
    parser.add_argument(
        "--env", metavar="NAME=VALUE", action="append", default=[],
        help="a variable for the command; may be given more than once",
    )  # fmt: skip
    parser.add_argument("--no-folder", action="store_true", help="do not show the current folder inside")
    parser.add_argument(
        "--after-failure", action="store_true", help="IMAGE is a recipe whose build failed: run in what it left"
    )
    parser.add_argument("--rm", action="store_true", help="remove the container even when it changed something")
    parser.add_argument("image", metavar="IMAGE", help="an image, by name or ID")
    command = parser.add_argument(
        "command", metavar="COMMAND", nargs=argparse.REMAINDER,
        help="what to run, with its own options (default: a shell)",
    )  # fmt: skip
    command.required = False


def _ps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", "-a", action="store_true", help="stopped containers too")
    _json(parser)


def _logs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="CONTAINER", help="a container, by its ID or the beginning of it")
    _json(parser)


def _stop(parser: argparse.ArgumentParser) -> None:
    _several(parser, "container")
    parser.add_argument("--time", type=float, default=10.0, metavar="SECONDS", help="wait so long before killing (10)")


def _rm(parser: argparse.ArgumentParser) -> None:
    _several(parser, "container")
    parser.add_argument(
        "--force", "-f", action="store_true", help="stop it first if it runs, and drop what no snapshot holds"
    )


def _snapshot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "container", metavar="CONTAINER", nargs="?", help="by its ID or the beginning of it (default: the only one)"
    )
    parser.add_argument("-m", "--message", metavar="TEXT", help="what changed; the first line is its summary")
    parser.add_argument("-t", "--tag", metavar="NAME", help="point this name at it, and at those that follow")
    parser.add_argument("-a", "--author", metavar="NAME", help="default: user.name and user.email of git")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be taken, and what left out")
    _json(parser)


def _checkout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("container", metavar="CONTAINER", help="by its ID or the beginning of it")
    parser.add_argument(
        "image", metavar="IMAGE", nargs="?", help="a name, an ID or a revision; HEAD: its last snapshot"
    )
    parser.add_argument("-b", dest="create", metavar="NAME", help="make this name, and move it with its snapshots")
    parser.add_argument("--force", "-f", action="store_true", help="drop what no snapshot holds")
    _json(parser)


def _reset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("container", metavar="CONTAINER", help="by its ID or the beginning of it")
    parser.add_argument("image", metavar="IMAGE", nargs="?", help="a name, an ID or a revision (default: HEAD)")
    parser.add_argument("--hard", action="store_true", help="drop what no snapshot holds")
    _json(parser)


def _branch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="a name to make, or what listed names have in them")
    parser.add_argument("image", metavar="IMAGE", nargs="?", help="what it names: a name, an ID or a revision")
    parser.add_argument("--force", "-f", action="store_true", help="move the name when there is one")
    _json(parser)


def _log(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image", metavar="IMAGE", nargs="?", help="a name, an ID, or a revision such as name~2 or name@{1}"
    )
    parser.add_argument("--all", action="store_true", help="the histories of all names in place of one")
    parser.add_argument("--graph", action="store_true", help="draw where they fork, one line for each")
    parser.add_argument("-n", dest="number", metavar="N", type=int, help="at most so many")
    parser.add_argument("--oneline", action="store_true", help="one line for each")
    parser.add_argument("--stat", action="store_true", help="what each changed: packages, and files with their sizes")
    _json(parser)


def _files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stat", action="store_true", help="files with their sizes, too")
    parser.add_argument("--name-status", action="store_true", help="every file, and nothing else")
    _json(parser)


def _show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="a name, an ID or a revision")
    _files(parser)


def _diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("one", metavar="ONE", help="a name, an ID or a revision")
    parser.add_argument("other", metavar="OTHER", help="what it is compared with")
    _files(parser)


def _inventory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="a name, an ID or a revision")
    parser.add_argument("--unowned", action="store_true", help="files that no package owns, in place of packages")
    _json(parser)


def _freeze(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="a name, an ID or a revision")
    parser.add_argument("-o", "--output", metavar="DIR", help="a new or empty folder (default: IMAGE-frozen)")
    parser.add_argument("--no-build", action="store_true", help="only write recipe.toml: no lock, and no comparison")
    parser.add_argument("--with-files", action="store_true", help="files that no package owns, or that were changed")
    parser.add_argument("--most", metavar="SIZE", default="64M", help="of these at most so much (64M)")
    _json(parser)


def _tag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a name, or name:tag")
    parser.add_argument("image", metavar="IMAGE", help="a name, an ID or a revision")
    parser.add_argument("--force", "-f", action="store_true", help="move the name when another image has it")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="a name, an ID or a revision")
    parser.add_argument(
        "-o", "--output", metavar="FILE", required=True, help="the archive to write, like plots.oci.tar"
    )
    parser.add_argument(
        "--with", dest="along", metavar="FILE", action="append", default=[],
        help="a notebook that goes along; may be given more than once",
    )  # fmt: skip
    parser.add_argument("--compress", metavar="HOW", default="none", help="none (read by all), gzip or zstd")


def _import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="an OCI archive or layout, or what docker save wrote")
    parser.add_argument("name", metavar="NAME", nargs="?", help="instead of its own name")
    parser.add_argument("--force", "-f", action="store_true", help="move the name when another image has it")


def _check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repair", action="store_true", help="mend what can be mended")
    _json(parser)


COMMANDS: dict[str, Command] = {
    "build": Command(
        "build an image from a recipe, and its kernel for Jupyter",
        _build, "workbench.cli.commands:build",
        "Build an image from a recipe. Each step is a layer; a step that was built\n"
        "before is taken from the cache. With a recipe.lock beside the recipe just what\n"
        "that names is taken, and the end says whether the image is identical to the lock;\n"
        "exit code 1 when it is not. The image's kernel then stands in the launcher of\n"
        "every Jupyter client as wb-NAME.",
        (("build recipes/python", "the image `python`"),
         ("build . --name team/stats:2", "under another name"),
         ("build . --offline --vendor files", "without a network")),
    ),
    "lock": Command(
        "choose versions for a recipe and write them down", _lock, "workbench.cli.commands:lock",
        "Choose a version of every package, build the image, and write recipe.lock: each\n"
        "file by its hash, and the layer of each step. Whoever builds the recipe with that\n"
        "lock gets the same image, to the byte. Without --refresh all versions are the\n"
        "newest.",
    ),
    "images": Command("list images", _json, "workbench.cli.commands:images"),
    "rmi": Command(
        "remove images", _rmi, "workbench.cli.commands:rmi",
        "Remove names of images, and their kernels from Jupyter. Files go with `gc` once\n"
        "nothing needs them.",
    ),
    "run": Command(
        "run a command in a new container", _run, "workbench.cli.run:run",
        "Run a command in a new container over an image. Options go before IMAGE; all\n"
        "that follows belongs to the command. The current folder is seen inside at the\n"
        "same path. Input, output, signals and the exit code pass through. A container\n"
        "that changed nothing is gone afterwards; one with changes stays, stopped.",
        (("run python", "a shell"), ("run python python script.py", "a script of the current folder"),
         ("run --network none --memory 1G python python -V", "within limits"),
         ("run --network lan:dask --name scheduler python bash", "others of lan:dask find it as `scheduler`")),
    ),
    "snapshot": Command(
        "commit what a container changed as a layer", _snapshot, "workbench.cli.history:snapshot",
        "Take a snapshot of a container: what it changed over its image becomes a layer,\n"
        "and with it a new image with a message, an author and a parent. The container\n"
        "stands still for a moment and goes on. Caches, temporary files, mounted folders\n"
        "and files with credentials are left out.",
        (("snapshot 3f2a -m 'add seaborn' -t plots", "the image `plots`, and a kernel wb-plots"),
         ("snapshot 3f2a --dry-run", "what would be taken")),
    ),
    "checkout": Command(
        "put a container over another environment", _checkout, "workbench.cli.worktree:checkout",
        "Put a stopped container over another environment, with an empty working tree, as\n"
        "%container checkout does in a running notebook. A name is moved by its snapshots from\n"
        "then on. What no snapshot holds is named and kept, unless --force drops it.",
        (("checkout 3f2a plots~1", "the environment before the last snapshot"),
         ("checkout -b try 3f2a", "its snapshots move `try`; its files stay")),
    ),
    "reset": Command(
        "start a container anew from its last snapshot", _reset, "workbench.cli.worktree:reset",
        "Empty a stopped container's working tree. With IMAGE the name that its snapshots move\n"
        "goes there. What no snapshot holds is named and kept, unless --hard drops it.",
    ),
    "branch": Command(
        "list names, or make one", _branch, "workbench.cli.worktree:branch",
        examples=(("branch", "each name, its image, and the containers whose snapshots move it"),
                  ("branch try plots~1", "a new name")),
    ),
    "log": Command(
        "show the history of an image", _log, "workbench.cli.history:log",
        examples=(("log plots", "each snapshot with author, date and message"), ("log -n 5 --oneline plots", ""),
                  ("log --graph --all", "what stands on what")),
    ),
    "show": Command("show an image and what it changed", _show, "workbench.cli.history:show_image"),
    "diff": Command(
        "show what lies between two images", _diff, "workbench.cli.history:diff",
        "Packages first (Debian's, Python's, R's), then files.",
        (("diff plots~1 plots", "what the last snapshot changed"), ("diff --name-status python plots", "every file")),
    ),
    "inventory": Command(
        "list the packages of an image, and where they came from", _inventory, "workbench.cli.inventory:inventory",
        "Packages of Debian, Python, R and conda in every environment of an image, read from\n"
        "its files: nothing of it is run. With --unowned the files that no package owns; of a\n"
        "snapshot those that were not there when it was built.",
        (("inventory plots", "what `pip list` and `dpkg -l` would say"), ("inventory plots --unowned", "")),
    ),
    "freeze": Command(
        "turn a snapshot back into a recipe", _freeze, "workbench.cli.inventory:freeze",
        "Write a recipe that stands on what the snapshot was built from and adds its packages\n"
        "with their exact versions; build it, lock it, and hold the result against the\n"
        "snapshot. What a recipe cannot say is told by name.",
        (("freeze plots", "into the folder plots-frozen"),
         ("freeze plots -o recipes/plots --with-files", "with the files beside the packages")),
    ),
    "tag": Command("give an image another name", _tag, "workbench.cli.history:tag"),
    "export": Command(
        "write an image into one file", _export, "workbench.cli.history:export",
        "Write an image with its history into one OCI archive, which skopeo, Podman, Docker\n"
        "and umoci read as it is.",
        (("export plots -o plots.oci.tar --with analysis.ipynb", "for a colleague"),),
    ),
    "import": Command(
        "take an image from a file", _import, "workbench.cli.history:load",
        "Take an image from an OCI archive or layout or from what docker save wrote; with a\n"
        "kernel in it, wb-NAME. Every byte is held against its digest.",
        (("import plots.oci.tar", "under its own name"),),
    ),
    "ps": Command("list containers", _ps, "workbench.cli.commands:ps"),
    "logs": Command("what a container's kernel or command wrote", _logs, "workbench.cli.commands:logs"),
    "stop": Command("stop running containers", _stop, "workbench.cli.commands:stop"),
    "rm": Command("remove stopped containers and their changes", _rm, "workbench.cli.commands:rm"),
    "gc": Command("free the space of what nothing needs", _json, "workbench.cli.commands:gc"),
    "check": Command(
        "compare what is on disk with its digests", _check, "workbench.cli.commands:check",
        "Compare every file of the store with the digest it goes by. Exit code 1 when\n"
        "something is wrong.",
    ),
    "doctor": Command(
        "examine what this machine offers to containers", _json, "workbench.cli.commands:doctor",
        "Try each thing that a container needs, and say what mends it. Exit code 1 when\n"
        "something needed fails.",
    ),
}  # fmt: skip


def _common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("more")
    group.add_argument("--debug", action="store_true", help="print plans (mounts and steps) and tracebacks")
    group.add_argument("--config", metavar="FILE", help=f"a configuration file (default: {CONFIG_NAME}.py)")


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one command."""
    command = COMMANDS[name]
    lines = [f"  {PROG} {line}\n      {meaning}" for line, meaning in command.examples]
    parser = _Parser(
        prog=f"{PROG} {name}",
        description=command.description or command.summary[0].upper() + command.summary[1:] + ".",
        epilog="\n".join(["examples:", *lines]) if lines else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.arguments(parser)
    _common(parser)
    return parser


class _Version(argparse.Action):
    """Reads the version only when it is asked for: the look into the metadata takes 20 ms."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(version("jupyter-workbench"))
        parser.exit()


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    parser = _Parser(
        prog=PROG,
        usage=f"{PROG} COMMAND [OPTIONS]",
        description="Images, and containers over them, for notebook kernels.\n\ncommands:\n" + "\n".join(lines),
        epilog=f"`{PROG} COMMAND --help` says more. First steps:\n"
        f"  {PROG} doctor                 does this machine have all that is needed?\n"
        f"  {PROG} build recipes/python   then start JupyterLab and take the new kernel",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument("--help-all", action="store_true", help="every setting of the configuration file")
    parser.add_argument("--generate-config", action="store_true", help=f"write a {CONFIG_NAME}.py to fill in")
    _common(parser)
    return parser


def _nearest(word: str, known: Iterable[str]) -> str:
    import difflib

    return next(iter(difflib.get_close_matches(word, list(known), 1)), "")


def parse(argv: Sequence[str]) -> Parsed:
    """Read a command line. Exits by itself for ``--help`` (0) and for a wrong option (2)."""
    if argv and not argv[0].startswith("-"):
        name, rest = argv[0], list(argv[1:])
        if name == "help":
            parse([*rest[:1], "--help"])
        if name not in COMMANDS:
            near = _nearest(name, COMMANDS)
            hint = f"did you mean `{PROG} {near}`?" if near else f"see `{PROG} --help`"
            print(f"{PROG}: there is no command {name!r}; {hint}", file=sys.stderr)
            sys.exit(2)
        parser = parser_of(name)
    else:
        name, rest, parser = "", list(argv), _overview()
        if not rest:
            parser.print_help()
            sys.exit(2)
    values, unknown = parser.parse_known_args(rest)
    settings = tuple(word for word in unknown if _SETTING.match(word))
    wrong = [word for word in unknown if word not in settings]
    if wrong:
        options = [option for action in parser._actions for option in action.option_strings]
        near = _nearest(wrong[0].split("=")[0], options)
        parser.error(f"{wrong[0]!r} is not understood" + (f", did you mean {near}?" if near else ""))
    if not name and not (values.generate_config or values.help_all):
        parser.error("name a command")
    return Parsed(name, values, settings)


def config_files() -> list[str]:
    """The configuration files that a JupyterApp of this name would load."""
    from jupyter_core.paths import jupyter_config_path

    return [
        path
        for folder in jupyter_config_path()
        for name in ("jupyter_config", CONFIG_NAME)
        for suffix in (".py", ".json")
        if os.path.exists(path := os.path.join(folder, name + suffix))
    ]
