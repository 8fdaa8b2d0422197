"""Runs inside a container: changes its files at random, and tells what is there. One JSON line asks, one answers."""

import hashlib
import json
import os
import random
import shutil
import stat
import sys

PLACES = ("/opt", "/usr/share", "/etc", "/srv")
LEFT_OUT = ("/proc", "/sys", "/dev", "/run", "/tmp", "/var/tmp", "/var/log", "/var/cache/apt", "/var/lib/apt/lists",
            "/root/.cache", "/root/.ipython")  # fmt: skip


def listing(with_links=False, whole=False):
    """Every attribute that an environment has of each file, but the times of folders.

    whole: read large files to their end, and tell one hash of it all.
    with_links: instead, the names of each file that has several. (A copied file with links is shown by overlayfs as
    several files until it is mounted anew.)
    """
    found, links = {}, {}
    with open("/proc/self/mountinfo") as file:  # a file's device says nothing in an overlay
        mounted = {line.split()[4] for line in file} - {"/"}
    for folder, names, files in os.walk("/"):
        names[:] = sorted(name for name in names if os.path.join(folder, name) not in LEFT_OUT)
        for name in sorted([*names, *files]):
            path = os.path.join(folder, name)
            s = os.lstat(path)
            if path in mounted:
                if name in names:
                    names.remove(name)
                continue
            row = [oct(s.st_mode), s.st_uid, s.st_gid]
            if not stat.S_ISDIR(s.st_mode):
                row.append(s.st_mtime_ns)
            if stat.S_ISREG(s.st_mode):
                with open(path, "rb") as file:  # of a large one its beginning, its size and its time say enough
                    data = file.read() if whole else file.read(1 << 17)
                    row += [s.st_size, hashlib.sha256(data).hexdigest()]
                links.setdefault((s.st_dev, s.st_ino), []).append(os.fsencode(path).hex())
            if stat.S_ISLNK(s.st_mode):
                row.append(os.fsencode(os.readlink(path)).hex())
            attributes = sorted(name for name in os.listxattr(path, follow_symlinks=False) if name.startswith("user."))
            row.append([[name, os.getxattr(path, name, follow_symlinks=False).hex()] for name in attributes])
            found[os.fsencode(path).hex()] = row
    names = [sorted(members) for members in links.values() if len(members) > 1]
    if whole:
        text = json.dumps([found, sorted(names)], sort_keys=True)
        return {"hash": hashlib.sha256(text.encode()).hexdigest(), "files": len(found), "links": len(names)}
    return names if with_links else found


def mutate(seed, rounds):
    """Operations on files and folders, of the image's and new ones."""
    rnd = random.Random(seed)
    names = [b"a", b"b", b"c", b"d", b"new\nline", b"\xff\xfe", "ü".encode(), b"-x", b"." + b"y" * 200]

    def folder():
        here = os.fsencode(rnd.choice(PLACES))
        while rnd.random() < 0.6:
            inside = [entry.path for entry in os.scandir(here) if entry.is_dir(follow_symlinks=False)]
            inside = [path for path in inside if path != b"/etc/apt/auth.conf.d"]  # credentials: no snapshot takes them
            if not inside:
                break
            here = rnd.choice(sorted(inside))
        return here

    def some(regular=False):
        here = folder()
        entries = sorted(
            entry.path for entry in os.scandir(here) if not regular or entry.is_file(follow_symlinks=False)
        )
        return rnd.choice(entries) if entries else None

    def fresh():
        return os.path.join(folder(), rnd.choice(names))

    def opened(path):
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o644), "wb")

    def write():
        with opened(fresh()) as file:
            file.write(rnd.randbytes(rnd.choice([0, 1, 511, 512, 513, 70000])))

    def sparse():
        with opened(fresh()) as file:
            file.truncate(rnd.choice([4096, 1 << 20]))
            file.seek(rnd.randrange(4000))
            file.write(b"data")

    def change():
        with open(some(regular=True), "r+b") as file:
            file.seek(0, 2 if rnd.random() < 0.5 else 0)
            file.write(b"changed")

    def same_size():
        path = some(regular=True)
        kept = os.stat(path)
        with open(path, "r+b") as file:
            first = file.read(1)
            file.seek(0)
            file.write(bytes([first[0] ^ 1]))
        if rnd.random() < 0.5:
            os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))

    def remove_at(path):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)

    def remove():
        remove_at(some())

    def replace():
        path = some()
        remove_at(path)
        if rnd.random() < 0.5:
            os.mkdir(path)
            with open(os.path.join(path, rnd.choice(names)), "wb") as file:
                file.write(b"inside")
        else:
            with open(path, "wb") as file:
                file.write(b"a file now")

    def exists_and_back():
        path = some()
        mode = os.lstat(path).st_mode
        if not stat.S_ISLNK(mode):
            os.chmod(path, 0o7777 & ~stat.S_IMODE(mode) | 0o600)
            os.chmod(path, stat.S_IMODE(mode))

    actions = [
        write, write, sparse, change, same_size, remove, remove, replace, exists_and_back,
        lambda: os.mkdir(fresh()),
        lambda: os.symlink(rnd.choice([*names, b"/etc/passwd", b"gone"]), fresh()),
        lambda: os.link(some(), fresh()),
        lambda: os.mkfifo(fresh()),
        lambda: os.rename(some(), fresh()),
        lambda: os.chmod(some(), rnd.choice([0o600, 0o755, 0o4711, 0o2755, 0o1777])),
        lambda: os.chown(some(), rnd.choice([0, 1, 1000]), rnd.choice([0, 2, 1001]), follow_symlinks=False),
        lambda: os.setxattr(some(), b"user.note", rnd.randbytes(5)),
        lambda: os.setxattr(some(), b"user.overlay.opaque", b"y"),
        lambda: os.utime(some(), ns=(1, rnd.randrange(1 << 60)), follow_symlinks=False),
    ]  # fmt: skip
    done = 0
    for _ in range(rounds):
        try:
            rnd.choice(actions)()
            done += 1
        except (OSError, TypeError, IndexError):
            pass
    return done


for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "mutate":
        answer = mutate(request["seed"], request["rounds"])
    else:
        answer = listing(request["do"] == "links", request["do"] == "hash")
    print(json.dumps(answer), flush=True)
