"""Disks of a few megabytes, which fill up."""

import contextlib
import os
import pathlib
import subprocess

import pytest


@contextlib.contextmanager
def tmpfs(folder: pathlib.Path, options: str):
    """A file system of its own in this folder; the test is skipped where it cannot be mounted."""
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: pathlib.Path) -> pathlib.Path:
    """Takes all room that a disk has left, with the file that is returned."""
    path = disk / "filler"
    with open(path, "ab", buffering=0) as file:
        for size in (2**20, os.statvfs(disk).f_bsize):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return path
