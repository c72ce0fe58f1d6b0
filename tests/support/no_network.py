"""Run as sitecustomize of a child: an internet socket is written down with who asked for it, and ends the process.

Python's own sockets are told by audit events. What is opened in C, which no event tells, a seccomp filter of Linux ends
with SIGSYS; the file SOCKETS names gets the line "filter" where that is in place.
"""

import ctypes
import os
import platform
import socket
import sys
import traceback

_NUMBER_OF_SOCKET = {"x86_64": 41, "aarch64": 198}  # of the system call
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF: a word, compare with a constant, give the answer
_ALLOW, _KILL_PROCESS = 0x7FFF0000, 0x80000000
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _MODE_FILTER = 38, 22, 2


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("value", ctypes.c_uint32)]


class _Program(ctypes.Structure):
    _fields_ = [("count", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction))]


def _filter():
    """Whether the kernel now ends this process and its children where they ask for a socket of the internet."""
    number = _NUMBER_OF_SOCKET.get(platform.machine())
    if number is None or sys.platform != "linux":
        return False
    steps = [
        (_LOAD, 0, 0, 0),  # the number of the call
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, 16),  # its first argument, the family
        (_EQUAL, 1, 0, int(socket.AF_INET)),
        (_EQUAL, 0, 1, int(socket.AF_INET6)),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_RETURN, 0, 0, _ALLOW),
    ]
    program = _Program(len(steps), (_Instruction * len(steps))(*(_Instruction(*step) for step in steps)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    return not prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) and not prctl(_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program))


def _watch(event, arguments):
    if event == "socket.__new__":
        inside = arguments[1] in (socket.AF_INET, socket.AF_INET6)
    elif event in ("socket.connect", "socket.bind", "socket.sendto"):
        inside = isinstance(arguments[1], tuple)  # AF_UNIX: a text
    else:
        inside = event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
    if inside:
        _say(f"{event} {arguments!r}\n{''.join(traceback.format_stack(limit=60))}")
        os._exit(97)  # an error could be caught


def _say(text):
    with open(os.environ["SOCKETS"], "a", encoding="utf-8") as file:
        file.write(text + "\n")


if os.environ.get("SOCKETS"):
    sys.addaudithook(_watch)
    if _filter():
        _say("filter")
