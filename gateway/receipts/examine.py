"""Whether receipts have a place that is fit for them. Looks at files, changes none."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from entitlement.examination import Check, fail, ok, warn

COMPONENT: Final = "receipts"
LEAST_MIB: Final = 64  # below it, a burst of grants fills the disk
_VOLATILE: Final = {"tmpfs": "memory", "ramfs": "memory", "overlay": "the container's own layer"}
_MOUNTS: Final = Path("/proc/self/mountinfo")


def examine(base: Path, max_mib: int) -> list[Check]:
    """`base`: the tenant's folder. One that does not exist yet is made by the gateway."""
    try:
        folders = [base, *sorted(path for path in base.glob("*/*") if path.is_dir())] if base.exists() else []
        place = next(path for path in (base, *base.parents) if path.exists())
        return list(_examine(base, place, folders, max_mib))
    except OSError as error:
        return [fail(COMPONENT, "folder", f"{base}: {error.strerror}", "let the gateway's user read and write it")]


def _examine(base: Path, place: Path, folders: list[Path], max_mib: int) -> Iterable[Check]:
    if not place.is_dir():
        yield fail(COMPONENT, "folder", f"{place} is a file", "correct ENTITLEMENT_GATEWAY_RECEIPTS_DIR")
        return
    yield _writable(base, place, folders)
    yield _space(place, max_mib)
    if medium := _VOLATILE.get(_file_system(place, _mounts())):
        fix = "put ENTITLEMENT_GATEWAY_RECEIPTS_DIR on a disk or volume that outlives machine and container"
        yield warn(COMPONENT, "medium", f"{place} is on {medium}: receipts are gone with it", fix)
    if kept := [path for folder in folders for path in folder.glob("*.kept")]:
        fix = "compare with entitlement explain KEY; remove the file when it has been looked at (docs/reliability.md)"
        yield warn(COMPONENT, "kept", f"{len(kept)} files that could not be replayed, such as {kept[0]}", fix)


def _writable(base: Path, place: Path, folders: list[Path]) -> Check:
    """By mode, too: root may write what a gateway under another user may not."""
    for path in folders or [place]:
        found = path.stat()
        owner = _name_of(found.st_uid)
        if not found.st_mode & stat.S_IWUSR or not os.access(path, os.W_OK | os.X_OK):
            mode = f"{stat.S_IMODE(found.st_mode):04o}"
            text = f"{path} cannot be written (mode {mode}, owner {owner}): nothing is granted with a receipt"
            return fail(COMPONENT, "folder", text, f"chmod u+rwx {path}, owned by the user that runs the gateway")
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            return fail(COMPONENT, "folder", f"{path} is mounted read-only", "mount it read-write")
    if not folders:
        return ok(COMPONENT, "folder", f"{base} is not there yet; a gateway makes it")
    return ok(COMPONENT, "folder", f"{base}, owner {_name_of(base.stat().st_uid)}, {_count(folders)}")


def _count(folders: list[Path]) -> str:
    waiting = sum(1 for folder in folders[1:] for _ in folder.glob("*.receipts"))
    return f"gateways {len(folders) - 1}, files {waiting}"


def _space(place: Path, max_mib: int) -> Check:
    free = shutil.disk_usage(place).free >> 20
    found = f"{free:,} MiB free on its disk"
    if free < LEAST_MIB:
        return fail(
            COMPONENT, "space", f"{found}: when it is full, nothing is granted", "free some, or move the folder"
        )
    if free < max_mib:
        fix = f"free some, or lower ENTITLEMENT_GATEWAY_RECEIPTS_MAX_MIB ({max_mib})"
        return warn(COMPONENT, "space", f"{found}, and receipts may take {max_mib:,}", fix)
    return ok(COMPONENT, "space", found)


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _mounts() -> dict[str, str]:
    """File system by mount point; nothing where the system does not tell (macOS)."""
    if not _MOUNTS.exists():
        return {}
    found = {}
    for line in _MOUNTS.read_text().splitlines():
        before, _, after = line.partition(" - ")
        found[before.split(" ")[4]] = after.split(" ")[0]
    return found


def _file_system(place: Path, mounts: dict[str, str]) -> str:
    resolved = place.resolve()
    return next((mounts[str(path)] for path in (resolved, *resolved.parents) if str(path) in mounts), "")
