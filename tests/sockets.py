"""Which sockets a process has open, as /proc tells."""

import ipaddress
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

TCP_LISTEN, UNIX_ACCEPTS = "0A", 0x10000


@dataclass(frozen=True)
class Socket:
    """`kind`: tcp, tcp6, udp, udp6, unix, netlink (to the kernel alone), or other. `where`: its own address; of a unix socket its
    file, "@..." for an abstract name, or empty if it has none; else empty."""

    kind: str
    where: str
    listens: bool

    @property
    def on_loopback(self) -> bool:
        if not self.where:
            return False
        address = ipaddress.ip_address(self.where)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def of_own_process() -> list[Socket]:
    inodes = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            name = os.readlink(descriptor)
        except FileNotFoundError:  # the one that listed the folder
            continue
        if name.startswith("socket:["):
            inodes.add(name[len("socket:[") : -1])
    found, known = [], set()
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for fields in rows(kind):
            if fields[9] in inodes:
                known.add(fields[9])
                found.append(Socket(kind, ip_address(fields[1].partition(":")[0]), fields[3] == TCP_LISTEN))
    for fields in rows("unix"):
        if fields[6] in inodes:
            known.add(fields[6])
            found.append(Socket("unix", fields[7] if len(fields) > 7 else "", bool(int(fields[3], 16) & UNIX_ACCEPTS)))
    netlink = {fields[9] for fields in rows("netlink")}
    return found + [Socket("netlink" if inode in netlink else "other", "", False) for inode in sorted(inodes - known)]


def rows(kind: str) -> list[list[str]]:
    path = Path("/proc/self/net", kind)
    return [line.split() for line in path.read_text().splitlines()[1:]] if path.exists() else []


def ip_address(digits: str) -> str:
    """As the kernel writes it: words of four bytes, each in the order of the machine. "0100007F" is 127.0.0.1."""
    words = [int(digits[start : start + 8], 16) for start in range(0, len(digits), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
