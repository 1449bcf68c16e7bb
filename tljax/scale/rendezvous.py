"""Waiting for all processes of a run before jax does, which ends the process where one of them does not come."""

import contextlib
import json
import socket
import time
from typing import Any

from tljax.errors import ShardingError

_GREETING = "tljax-connect-1"
_PAUSE = 0.1


def meet(address: str, n_processes: int, process: int, timeout: float) -> None:
    """Waits until all processes have come: process 0 listens at its address, the others tell it their numbers.

    Raises:
        ShardingError: some did not come in time (says which), two have one number, or they do not agree on how many
            there are; process 0 cannot listen there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ShardingError(f'coordinator={address!r}: expected a host and a port, such as "10.0.0.1:1234".')
    until = time.monotonic() + timeout
    if process:
        _announce(host, int(port), n_processes, process, until, timeout)
    else:
        _gather(address, int(port), n_processes, until, timeout)


def _gather(address: str, port: int, n_processes: int, until: float, timeout: float) -> None:
    come: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise ShardingError(f"Process 0 cannot listen at {address}: {error}. Choose a free port.") from error
        listener.listen(n_processes)
        while len(come) < n_processes - 1:
            listener.settimeout(max(0.01, until - time.monotonic()))
            try:
                other = stack.enter_context(listener.accept()[0])
            except TimeoutError:
                missing = [number for number in range(1, n_processes) if number not in come]
                raise ShardingError(_did_not_come(missing, timeout, address, n_processes)) from None
            if (told := _read(other)) is None:
                continue  # somebody else's
            problem = _misfit(told, n_processes, come)
            if problem:
                for one in (other, *come.values()):
                    _send(one, {"problem": problem})
                raise ShardingError(problem)
            come[told["process"]] = other
        for one in come.values():
            _send(one, {"problem": ""})


def _announce(host: str, port: int, n_processes: int, process: int, until: float, timeout: float) -> None:
    where, waiting = f"{host}:{port}", False
    while (left := until - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as server:
                waiting = True
                _send(server, {"greeting": _GREETING, "process": process, "n_processes": n_processes})
                server.settimeout(max(0.01, until - time.monotonic()))
                if (told := _read(server)) is None:
                    raise ConnectionError
        except OSError:
            time.sleep(_PAUSE)
            continue
        if told["problem"]:
            raise ShardingError(told["problem"])
        return
    missing = [0] if not waiting else [number for number in range(1, n_processes) if number != process]
    raise ShardingError(_did_not_come(missing, timeout, where, n_processes))


def _misfit(told: dict[str, Any], n_processes: int, come: dict[int, socket.socket]) -> str:
    number, count = told.get("process"), told.get("n_processes")
    if count != n_processes:
        return f"Process 0 was started with n_processes={n_processes}, and process {number} with n_processes={count}."
    if number in come or number not in range(1, n_processes):
        return f"Two processes say that they are process {number}: give each its own number, 0 to {n_processes - 1}."
    return ""


def _did_not_come(missing: list[int], timeout: float, address: str, n_processes: int) -> str:
    numbers = ", ".join(map(str, missing))
    which = f"process {numbers}" if len(missing) == 1 else f"one of the processes {numbers}"
    return (
        f"After {timeout:g} seconds {which} had not come to {address}. Start all {n_processes} processes, each with "
        "its own number and with the same coordinator, an address of process 0 that the others reach; give a longer "
        "timeout= where they start slowly."
    )


def _send(to: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it is gone, and will be missed
        to.sendall(json.dumps(message).encode() + b"\n")


def _read(other: socket.socket) -> dict[str, Any] | None:
    """Returns a message, or ``None`` if it is not one of this module's."""
    other.settimeout(other.gettimeout() or 5)
    try:
        with other.makefile("rb") as stream:
            told = json.loads(stream.readline(10_000))
    except (OSError, ValueError):
        return None
    known = isinstance(told, dict) and ("problem" in told or told.get("greeting") == _GREETING)
    return told if known else None
