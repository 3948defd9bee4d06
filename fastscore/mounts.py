"""What kind of file system a path lies on, as far as the system tells."""

from __future__ import annotations

import re
from pathlib import Path

_NETWORK = {
    *("9p", "afs", "afpfs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "pvfs2"),
    *("smb3", "smbfs", "fuse.ceph", "fuse.glusterfs", "fuse.sshfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse"),
}


def network_file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """The kind of network file system that a path lies on, or None; also where the system does not tell."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found, kind = "", None
    for line in lines:
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) < 5 or not right:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4])  # a space is written \\040
        if len(point) >= len(found) and path.is_relative_to(point):
            found, kind = point, right.split()[0]
    return kind if kind in _NETWORK else None
