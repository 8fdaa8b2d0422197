"""What is typed after ``%container``: its verbs, their options, and the request that a line means."""

from __future__ import annotations

import shlex

from .api import Refused, Request

HELP = """\
%container status                    this container: image, changes, memory, processor
%container snapshot -m "what changed" [-t NAME] [-a AUTHOR] [--dry-run]
%container log [IMAGE] [-n N] [--oneline] [--stat]
%container diff [ONE [OTHER]] [--files]
%container show [IMAGE]
%container checkout [-f] IMAGE       this kernel anew in that environment (variables go, files of the container too)
%container checkout -b NAME [IMAGE]  snapshots move NAME from now on
%container reset [--hard] [IMAGE]    this kernel anew in its last snapshot
%container branch [NAME [IMAGE]]     names of its snapshots; a new one
%container tag NAME [IMAGE]
%container export [IMAGE] [-o FILE] [--with NOTEBOOK]
                                     an image with its history as one file, by default here: NAME.oci.tar
%container freeze [IMAGE] [-o FOLDER] [--no-build]
                                     a recipe that gives the image again, by default here: NAME-frozen
%container help

IMAGE: a name, an ID or a revision such as plots~1; by default the last snapshot of this container.
Interrupting the kernel ends what takes long; nothing of it stays. `jupyter workbench import FILE` takes an archive.
Without a container (`%load_ext workbench` in any notebook) log, diff, show and tag want an IMAGE."""


#: What nothing inside can ask for.
_ON_THE_HOST = {
    "import": "import NAME.oci.tar", "build": "build FOLDER",
}  # fmt: skip
_OUTPUT = {"-o": "output", "--output": "output"}
#: Options that may be given more than once.
_LISTS = ("along",)


def parse(line: str) -> Request:
    """The request that a line means. Raises Refused."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise Refused(f"read the line: {error}") from None
    verb, rest = (words[0], words[1:]) if words else ("help", [])
    known: dict[str, tuple[dict[str, str], dict[str, str], int]] = {
        "status": ({}, {}, 0), "help": ({}, {}, 0), "show": ({}, {}, 1),
        "snapshot": ({"-m": "message", "--message": "message", "-t": "tag", "--tag": "tag", "-a": "author",
                      "--author": "author"}, {"--dry-run": "dry_run"}, 0),
        "log": ({"-n": "number"}, {"--oneline": "oneline", "--stat": "stat"}, 1),
        "diff": ({}, {"--files": "files", "--stat": "files"}, 2),
        "tag": ({}, {}, 2), "branch": ({}, {}, 2), "reset": ({}, {"--hard": "hard"}, 1),
        "export": ({**_OUTPUT, "--with": "along"}, {}, 1), "freeze": (_OUTPUT, {"--no-build": "no_build"}, 1),
        "checkout": ({"-b": "create"}, {"-f": "force", "--force": "force"}, 1),
    }  # fmt: skip
    if verb in _ON_THE_HOST:
        raise Refused("%s reads and writes files of the host: in a terminal, jupyter workbench %s" % (
            verb, _ON_THE_HOST[verb]))  # fmt: skip
    if verb not in known:
        raise Refused("{!r} is no verb of %container; it knows {}".format(verb, ", ".join(sorted(known))))
    values, flags, most = known[verb]
    request: Request = {"do": verb}
    plain = []
    while rest:
        word = rest.pop(0)
        if word in values:
            if not rest:
                raise Refused(f"{word} wants a value")
            value = rest.pop(0)
            key = values[word]
            request[key] = [*request.get(key, []), value] if key in _LISTS else value
        elif word in flags:
            request[flags[word]] = True
        elif word.startswith("-"):
            raise Refused(f"%container {verb} has no option {word}")
        else:
            plain.append(word)
    if len(plain) > most:
        raise Refused(f"%container {verb} takes no {plain[most]!r}")
    names = {"diff": ["one", "other"], "tag": ["name", "image"], "branch": ["name", "image"]}.get(verb, ["image"])
    request.update(zip(names, plain))
    if verb == "tag" and not plain:
        raise Refused("%container tag wants a NAME")
    if verb == "checkout" and not {"image", "create"} & set(request):
        raise Refused("%container checkout wants an IMAGE, or -b NAME")
    if request.pop("no_build", False):
        request["build"] = False
    if "number" in request:
        if not request["number"].isdigit():
            raise Refused("-n wants a number")
        request["number"] = int(request["number"])
    return request
