"""A program for a guest that dials a vsock address: a static ELF file made here, so that it takes no compiler."""

from __future__ import annotations

import socket
import struct

BASE = 0x400000
HEADERS = 64 + 56               # ELF header and one program header

# The exit code is the errno of socket(2) or connect(2), 0 if it got through. x86-64 system calls: 41, 42, 60.
CODE = bytes.fromhex(
    "b829000000"                # mov  eax, 41          socket(AF_VSOCK, SOCK_STREAM, 0)
    "bf28000000"                # mov  edi, 40
    "be01000000"                # mov  esi, 1
    "31d2"                      # xor  edx, edx
    "0f05"                      # syscall
    "85c0"                      # test eax, eax
    "7815"                      # js   end
    "89c7"                      # mov  edi, eax         connect(fd, &address, 16)
    "488d3517000000"            # lea  rsi, [rip + 23]  the address, after the code
    "ba10000000"                # mov  edx, 16
    "b82a000000"                # mov  eax, 42
    "0f05"                      # syscall
    "f7d8"                      # end: neg eax          exit(-eax)
    "89c7"                      # mov  edi, eax
    "b83c000000"                # mov  eax, 60
    "0f05"                      # syscall
)


def dialler(cid: int, port: int) -> bytes:
    """An executable that connects to ``cid`` and ``port``. Its exit code is the errno, or 0."""
    # struct sockaddr_vm, linux/vm_sockets.h
    address = struct.pack("=HHIIB3x", socket.AF_VSOCK, 0, port, cid, 0)
    size = HEADERS + len(CODE) + len(address)
    # Elf64_Ehdr: 64 bits, little endian, executable, x86-64, one program header; elf(5).
    header = struct.pack(
        "<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 2, 62, 1, BASE + HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    # Elf64_Phdr: load all of the file, readable and executable.
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, BASE, BASE, size, size, 0x1000)
    return header + segment + CODE + address
