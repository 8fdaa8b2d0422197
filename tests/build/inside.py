"""What runs where the files of a layer can be read, whoever owns them (``userns.call``)."""

from __future__ import annotations

import os


def find(folders: list[str], marks: list[str]) -> list[str]:
    """Files below the folders that hold one of the texts, in name, link or content."""
    wanted = [mark.encode() for mark in marks]
    found = []
    for folder in folders:
        for above, names, files in os.walk(folder):
            for name in (*names, *files):
                path = os.path.join(above, name)
                texts = [os.fsencode(name)]
                if os.path.islink(path):
                    texts.append(os.readlink(path).encode())
                elif os.path.isfile(path):
                    with open(path, "rb") as file:
                        texts.append(file.read())
                found += [f"{path}: {mark!r}" for mark in wanted if any(mark in text for text in texts)]
    return found
