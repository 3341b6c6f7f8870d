"""A publisher and two members over cupy's binding of NCCL and stub_nccl.cpp: `stub_nccl_main.py LIBRARY CASE...`.

A case is what misbehaves: "none", or a step and a rank such as "group hang:1". Prints a line of JSON with
the signatures of what is called, then one for each case: the outcome of each end, and of a second attempt in the next
epoch. The last case may end this process.
"""

from __future__ import annotations

import ctypes
import json
import logging
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from host_gpu import HostGpu

from headrace.runtime.exchange.communicator import Limits
from headrace.runtime.exchange.header import Route
from headrace.runtime.exchange.nccl import NcclSink, NcclSource

NAMES = ("trainer", "engine0", "engine1")
LIMITS = Limits(init_s=0.5, connect_s=0.5, abort_s=0.3)

CALLS = ("send", "recv", "abort", "destroy", "check_async_error")
"""What the carrier calls of a communicator."""


def main(library: str, *cases: str) -> None:
    stub = ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    from cupy.cuda import nccl

    calls = {name: getattr(nccl.NcclCommunicator, name).__doc__.splitlines()[0] for name in CALLS}
    sys.stdout.write(json.dumps(calls) + "\n")
    for case in cases:
        step, _, rank = case.partition(":")
        source = NcclSource(NAMES[0], HostGpu(), limits=LIMITS, bucket_bytes=1024)
        sinks = [NcclSink(name, HostGpu(), limits=LIMITS, bucket_bytes=1024) for name in NAMES[1:]]
        sent = {"w": torch.randn(50, 20), "b": torch.randn(20).to(torch.bfloat16)}
        manifest = source.publish(1, sent)
        stub.misbehave(step.encode(), int(rank or -1))
        outcomes = []
        for epoch in (1, 2):
            token = bytes(nccl.get_unique_id())
            routes = [
                Route(carrier="nccl", epoch=epoch, members=NAMES, rank=r, token=token, stall_s=0.5) for r in range(3)
            ]
            with ThreadPoolExecutor(3) as threads:
                work: list[Future[Any]] = [threads.submit(source.send, manifest, routes[0])]
                work += [threads.submit(sink.receive, manifest, r) for sink, r in zip(sinks, routes[1:], strict=True)]
                for future in work:
                    if future.exception() is not None:
                        for end in (source, *sinks):
                            end.abort(epoch)
            outcomes.append([_said(future, sent) for future in work])
        sys.stdout.write(json.dumps(outcomes) + "\n")
        sys.stdout.flush()
        for end in (source, *sinks):
            end.close()


def _said(future: Future[Any], sent: dict[str, torch.Tensor]) -> str:
    error = future.exception()
    if error is not None:
        return f"{type(error).__name__}: {error}"
    got = future.result()
    if got is None:
        return "sent"
    same = all((HostGpu().adopt(sent[name])[1] == got[name]).all() for name in sent)
    return "whole" if same else "a mixture"


if __name__ == "__main__":
    logging.basicConfig()
    main(*sys.argv[1:])
