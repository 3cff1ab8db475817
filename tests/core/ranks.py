"""Runs a function on real gloo ranks: processes forked from a clean server, torchrun's variables set."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.core.preloaded"])


class RankFailed(AssertionError):
    """A rank raised, died or did not answer; the text holds its traceback."""


def run_ranks(
    fn: Any, *args: Any, num_processes: int = 2, env: dict[str, str] | None = None, deadline: float = 170.0
) -> list[Any]:
    """`fn(*args)` on `num_processes` ranks; their values in rank order."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    payload = cloudpickle.dumps((fn, args))
    pipes: list[Connection] = []
    processes = []
    for rank in range(num_processes):
        ours, theirs = CONTEXT.Pipe()
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "GLOO_SOCKET_IFNAME": "lo",
            **(env or {}),
        }
        process = CONTEXT.Process(target=_serve, args=(theirs, variables, payload, list(sys.path)))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, processes, time.monotonic() + deadline)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
        for pipe in pipes:
            pipe.close()
        del store


def _collect(pipes: list[Connection], processes: list[Any], end: float) -> list[Any]:
    values: dict[int, Any] = {}
    failures: dict[int, str] = {}
    open_pipes = dict(zip(pipes, range(len(pipes)), strict=True))
    while open_pipes:
        for pipe in wait(list(open_pipes), timeout=max(0.0, end - time.monotonic())):
            rank = open_pipes.pop(pipe)
            try:
                good, value = pipe.recv()
            except EOFError:
                processes[rank].join(5)
                good, value = False, f"died with exit code {processes[rank].exitcode}"
            if good:
                values[rank] = cloudpickle.loads(value)
            else:
                failures[rank] = value
                # The others may wait for it for ever; give them a moment to say what they saw.
                end = min(end, time.monotonic() + 5)
        if open_pipes and time.monotonic() >= end:
            for rank in open_pipes.values():
                os.kill(processes[rank].pid, signal.SIGUSR1)
                failures.setdefault(rank, "did not answer; its stack is on stderr")
            time.sleep(0.5)
            break
    if failures:
        raise RankFailed("\n".join(f"--- rank {rank}\n{text}" for rank, text in failures.items()))
    return [values[rank] for rank in range(len(pipes))]


def _serve(pipe: Connection, variables: dict[str, str], payload: bytes, path: list[str]) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # A loader's workers too would come from a server, and each rank would start one of its own, which takes seconds.
    multiprocessing.set_start_method("fork", force=True)
    sys.path[:] = path
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        fn, args = cloudpickle.loads(payload)
        answer = (True, cloudpickle.dumps(fn(*args)))
    except BaseException:  # noqa: BLE001 - whatever it is, the test must show it
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()
