"""Private keys that a build makes or copies: whoever has the image would have them, so none ships.

Only what steps of the recipe's own leave is looked at: packages ship keys for their tests, which are no secrets.
"""

from __future__ import annotations

import os
import re
import stat

#: The first line of a private key (RFC 7468, OpenSSH's PROTOCOL.key).
_KEY = re.compile(rb"^-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----\s*$", re.MULTILINE)
_LARGEST = 1 << 20  # bytes of a file that may be a key

#: What Debian's packages make for this one machine when they are installed (sh).
FORGET = r"""
rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub /etc/ssl/private/ssl-cert-snakeoil.key
rm -f /etc/ssl/certs/ssl-cert-snakeoil.pem /var/lib/dbus/machine-id /var/lib/systemd/random-seed
"""


def find(tree: str) -> list[str]:
    """Paths in a layer's tree of files that hold a private key, sorted; runs through ``userns.call``."""
    found = []
    for folder, _, names in os.walk(tree):
        for name in names:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode) and 0 < status.st_size <= _LARGEST:
                with open(path, "rb") as file:
                    if _KEY.search(file.read()):
                        found.append(os.path.relpath(path, tree))
    return sorted(found)
