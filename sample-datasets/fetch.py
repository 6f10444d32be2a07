# Copyright (c) Patchwise contributors
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for details.
"""Fetch tasks of the Medical Segmentation Decathlon, from the public mirror or a hospital's own, with checksums."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import httpx

MIRROR = "https://msd-for-monai.s3-us-west-2.amazonaws.com"
TASKS = (
    "Task01_BrainTumour", "Task02_Heart", "Task03_Liver", "Task04_Hippocampus", "Task05_Prostate", "Task06_Lung",
    "Task07_Pancreas", "Task08_HepaticVessel", "Task09_Spleen", "Task10_Colon",
)  # fmt: skip
EXIT_REFUSED = 2
_CHUNK = 1 << 20
_PARTIAL = ".part"


class FetchError(Exception):
    """A dataset that could not be fetched; the message gives the problem and the remedy."""


def known_checksums() -> dict[str, str]:
    """MD5 of the archive of every task, by its name, as in MONAI."""
    from monai.apps import DecathlonDataset  # seconds to import

    return dict(DecathlonDataset.md5)


def fetch(
    task: str, out: Path, mirror: str, checksum: str, keep: bool = False, report: Callable[[str], None] = lambda _: None
) -> Path:
    """Download `mirror`/`task`.tar, check it, unpack it to `out`/`task`; the folder appears only once it is complete.

    An interrupted download is resumed. `checksum` is an MD5 or SHA-256 in hexadecimal, distinguished by its length.

    Raises:
        FetchError: the folder exists, the server refuses, the checksum differs (the file is removed), the archive is
            unsafe or broken, the disk is full.
    """
    folder = out / task
    if folder.exists():
        raise FetchError(f"{folder} exists; remove it to fetch {task} again")
    archive = out / f"{task}.tar"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            download(f"{mirror.rstrip('/')}/{task}.tar", archive, report)
        check(archive, checksum)
        report(f"unpacking {archive.name}")
        unpack(archive, folder)
    except OSError as error:
        raise FetchError(
            f"{error.strerror or error}: {error.filename or out}; make room or name another folder"
        ) from error
    if not keep:
        archive.unlink()
    return folder


def download(url: str, target: Path, report: Callable[[str], None] = lambda _: None) -> None:
    """Write `url` to `target` by way of `target`.part, from where that file ends if the server can.

    Raises:
        FetchError: no answer, an error status, a transfer that ends early (the part is kept for the next attempt), too
            little room on the disk.
    """
    part = target.with_name(target.name + _PARTIAL)
    start = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"} if start else {"Accept-Encoding": "identity"}
    try:
        with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=60) as answer:
            if answer.status_code == 416 and answer.headers.get("Content-Range", "").endswith(f"/{start}"):
                part.rename(target)  # it was complete, and only the renaming was interrupted
                return
            if answer.status_code == 416:
                part.unlink()
                raise FetchError(f"{url} is shorter than the part that lay here; the part was removed, run again")
            if answer.status_code == 404:
                raise FetchError(f"{url} does not exist (404); check the task and --mirror")
            if answer.status_code >= 400:
                raise FetchError(
                    f"{url} answers {answer.status_code} {answer.reason_phrase}; check --mirror or try later"
                )
            if answer.status_code != 206:
                start = 0  # the server sends the file from its beginning
            expected = start + int(answer.headers.get("Content-Length", 0))
            free = shutil.disk_usage(target.parent).free + start
            if expected > free:
                raise FetchError(f"{url} needs {expected} bytes, {target.parent} has {free} left; make room")
            report(f"{url}: {expected / 1e6:.0f} MB" + (f", going on at {start / 1e6:.0f} MB" if start else ""))
            with part.open("r+b" if start else "wb") as file:
                file.seek(start)
                for (
                    block
                ) in answer.iter_raw():  # no larger chunks, so that the received data are kept if the connection breaks
                    file.write(block)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise FetchError(f"{url} could not be read to its end ({error}); run again to go on") from error
    if expected > start and part.stat().st_size < expected:
        raise FetchError(f"{url} ended after {part.stat().st_size} of {expected} bytes; run again to go on")
    part.rename(target)


def check(archive: Path, checksum: str) -> None:
    """Compare MD5 (32 digits) or SHA-256 (64) of a file; one that differs is removed, so that it is never used.

    Raises:
        FetchError: another checksum, or one that is neither.
    """
    kind = {32: "md5", 64: "sha256"}.get(len(checksum))
    if kind is None:
        raise FetchError(f"checksum {checksum!r} is neither an MD5 (32 digits) nor a SHA-256 (64)")
    digest = hashlib.new(kind, usedforsecurity=False)
    with archive.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    if digest.hexdigest() != checksum.lower():
        archive.unlink()
        raise FetchError(
            f"{archive.name} has {kind} {digest.hexdigest()}, expected {checksum.lower()}; the file was removed, "
            "fetch it again or check the mirror"
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the only top folder of `archive` as `folder`, completely or not at all, and write nothing outside.

    Only plain files and folders are unpacked. macOS's `._` companions are left out.

    Raises:
        FetchError: a broken archive, members that point outside, links or devices, another top folder.
    """
    beside = folder.with_name(f".{folder.name}{_PARTIAL}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                _place(tar, member, beside, folder.name)
        if not (beside / folder.name / "dataset.json").is_file():
            raise FetchError(f"{archive.name} holds no {folder.name}/dataset.json; it is not a task of the decathlon")
        (beside / folder.name).rename(folder)
    except (tarfile.TarError, EOFError) as error:
        raise FetchError(
            f"{archive.name} is not a complete tar file ({error}); remove it and fetch it again"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _place(tar: tarfile.TarFile, member: tarfile.TarInfo, root: Path, top: str) -> None:
    parts = Path(member.name).parts
    if not parts or parts == (".",) or parts[-1].startswith("._"):
        return
    if Path(member.name).is_absolute() or ".." in parts or parts[0] != top:
        raise FetchError(
            f"{Path(str(tar.name)).name} holds {member.name!r}, which lies outside of {top}; nothing was unpacked"
        )
    target = root.joinpath(*parts)
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    source = tar.extractfile(member) if member.isfile() else None
    if source is None:
        raise FetchError(f"{Path(str(tar.name)).name} holds {member.name!r}, a link or device; nothing was unpacked")
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        shutil.copyfileobj(source, file, _CHUNK)


def _full_name(given: str) -> str | None:
    """`Task04_Hippocampus` for itself, `Task04`, `4` and `hippocampus`."""
    for name in TASKS:
        number, word = name.removeprefix("Task").split("_", 1)
        if given.lower() in (name.lower(), f"task{number}", number, str(int(number)), word.lower()):
            return name
    return None


def main(arguments: list[str] | None = None) -> int:
    """Command line: `fetch.py Task04_Hippocampus --out data [--mirror URL]`; `fetch.py --list` names the tasks."""
    parser = argparse.ArgumentParser(prog="fetch.py", description="Fetch tasks of the Medical Segmentation Decathlon.")
    parser.add_argument("tasks", nargs="*", help="Task04_Hippocampus, Task04, 4 or hippocampus")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder that the tasks' folders go to")
    parser.add_argument("--mirror", default=MIRROR, metavar="URL", help="where TASK.tar lies")
    parser.add_argument("--checksum", metavar="HEX", help="MD5 or SHA-256 of a repacked archive; for one task")
    parser.add_argument("--keep", action="store_true", help="keep the archive")
    parser.add_argument("--list", action="store_true", help="name the tasks and their MD5, and end")
    options = parser.parse_args(arguments)
    if options.list:
        sys.stdout.writelines(f"{name} {md5}\n" for name, md5 in sorted(known_checksums().items()))
        return 0
    if not options.tasks or (options.checksum and len(options.tasks) > 1):
        parser.error("name a task (or --list); --checksum goes with one task")
    try:
        for given in options.tasks:
            task = _full_name(given)
            if task is None:
                raise FetchError(f"no task {given}; known are {', '.join(TASKS)}")
            checksum = options.checksum or known_checksums()[task]
            fetch(task, options.out, options.mirror, checksum, options.keep, _say)
    except FetchError as error:
        _say(str(error))
        return EXIT_REFUSED
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    raise SystemExit(main())
