"""A network of this process's own that has nothing but loopback.

For what listens on every interface, whatever it is told: nobody else can reach it there. What a
process starts afterwards is in the same network; files and sockets in the file system are not
touched by it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct

_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS = 0x8914
_IFF_UP, _IFF_RUNNING = 0x1, 0x40
_libc = ctypes.CDLL(None, use_errno=True)


def enter() -> bool:
    """Move the calling thread, and all threads and processes that it starts from now on, into
    such a network; False where the kernel does not allow it, which it allows root.

    Raises
    ------
    OSError
        It failed for another reason.
    """
    if _libc.unshare(_CLONE_NEWNET):
        code = ctypes.get_errno()
        if code in (errno.EPERM, errno.ENOSYS, errno.EINVAL):
            return False
        raise OSError(code, f"no network namespace: {os.strerror(code)}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        up = struct.pack("16sh22x", b"lo", _IFF_UP | _IFF_RUNNING)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, up)
    return True
