"""The NCCL carrier without a GPU: the bytes it moves, its threads, and the interface of cupy that it relies on."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_gpu import HostFabric, HostGpu, Hub

from headrace.kernels.reference.bucket import checksum
from headrace.runtime.errors import (
    BadWeights,
    CommunicatorHung,
    CorruptWeights,
    StaleIncarnation,
    TransferFailed,
)
from headrace.runtime.exchange import cuda, device, device_fp8, fp8
from headrace.runtime.exchange.communicator import Limits
from headrace.runtime.exchange.header import Manifest, Route
from headrace.runtime.exchange.holding import Held, Holding, Part, Shard, Split, Whole
from headrace.runtime.exchange.mesh import Mesh
from headrace.runtime.exchange.nccl import NcclSink, NcclSource
from headrace.runtime.exchange.plan import Plan, make_plan

LIMITS = Limits(init_s=10.0, connect_s=0.2, look_s=5.0, abort_s=0.5)


def tensors(seed: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    return {
        "embedding": torch.randn(33, 16, generator=random),
        "experts": torch.randn(4, 6, 10, generator=random).to(torch.bfloat16),
        "norm": torch.randn(16, generator=random).numpy(),
    }


def same(a: Any, b: Any) -> bool:
    return bool(np.array_equal(bits(a), bits(b)))


def bits(x: Any) -> np.ndarray:
    return np.asarray(HostGpu().adopt(x)[1]).view(np.uint8)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 10
    while left := [t.name for t in threading.enumerate() if t.name.startswith("engine")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.002)


class Ends:
    """A publisher and its members, in threads."""

    def __init__(self, members: int = 2, **options: Any) -> None:
        self.hub, self.hung = Hub(), list[str]()
        options = {
            "make": lambda _: HostFabric(self.hub), "limits": LIMITS, "bucket_bytes": 256, "on_hung": self.hung.append,
        } | options  # fmt: skip
        self.source = NcclSource("trainer", HostGpu(), **options)
        self.sinks = [NcclSink(f"engine{i}", HostGpu(), **options) for i in range(members)]
        self.names = ("trainer", *(sink.name for sink in self.sinks))
        self.threads = ThreadPoolExecutor(members + 1)

    def route(self, rank: int, epoch: int, **options: Any) -> Route:
        token = b"%127d " % epoch
        return Route(carrier="nccl", epoch=epoch, members=self.names, rank=rank, token=token, **options)

    def exchange(self, manifest: Manifest, epoch: int, into: Any = None, **options: Any) -> list[Any]:
        """The outcome of each end: what it returned, or raised."""
        work = [self.threads.submit(self.source.send, manifest, self.route(0, epoch, **options))]
        work += [
            self.threads.submit(sink.receive, manifest, self.route(i + 1, epoch, **options), into and into[i])
            for i, sink in enumerate(self.sinks)
        ]
        return [future.exception() or future.result() for future in work]

    def close(self) -> None:
        for end in (self.source, *self.sinks):
            end.close()
        self.threads.shutdown()


def test_every_member_gets_every_tensor_whole_and_the_communicator_is_kept():
    ends = Ends()
    into = [tensors(7), tensors(8)]
    for version in (1, 2):
        published = tensors(version)
        manifest = ends.source.publish(version, published)
        assert (manifest.version, manifest.generation) == (version, version)
        for got in ends.exchange(manifest, 5, into if version == 2 else None)[1:]:
            assert list(got) == list(published)
            assert all(same(got[name], published[name]) for name in published)
    assert ends.hub.inits == 3, "the second version needs no init"
    ends.close()


def test_a_plan_reshards_on_the_way():
    def plan(manifest: Manifest, route: Route) -> Plan:
        whole = Whole("experts", "bfloat16", (4, 6, 10))
        cut = Held("mine", (Part(whole, (Split(0, ("ep",)), Split(2, ("tp",)))),))
        return make_plan(
            Holding(Mesh({"one": 1}), [Held("experts", (Part(whole),))]),
            Holding(Mesh({"ep": 2, "tp": 2}, first=1), [cut]),
        )

    ends = Ends(4, plan=plan)
    published = tensors(3)
    outcome = ends.exchange(ends.source.publish(1, published), 0)
    for rank, got in enumerate(outcome[1:]):
        ep, tp = divmod(rank, 2)
        wanted = published["experts"].view(torch.int16).numpy()[2 * ep : 2 * ep + 2, :, 5 * tp : 5 * tp + 5]
        assert np.array_equal(got["mine"].view(np.int16), wanted)
    ends.close()


def test_shards_of_two_publishers_meet_in_engines_that_are_cut_otherwise():
    whole = Whole("w", "<f4", (10, 8))

    def plan(manifest: Manifest, route: Route) -> Plan:
        trainer = Holding(Mesh({"fsdp": 2}), [Held("w", (Part(whole),), (Shard(0, ("fsdp",)),))])
        engines = Holding(Mesh({"tp": 2}, first=2), [Held("w", (Part(whole, (Split(1, ("tp",)),)),))])
        return make_plan(trainer, engines)

    ends = Ends(2, plan=plan)
    other = NcclSource("trainer/1", HostGpu(), make=lambda _: HostFabric(ends.hub), bucket_bytes=256, plan=plan)
    full = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    manifest = ends.source.publish(4, {"w": full[:5]})
    other.publish(4, {"w": full[5:]})
    names = ("trainer", "trainer/1", "engine0", "engine1")
    with ThreadPoolExecutor(4) as threads:
        route = [replace(ends.route(rank, 0), members=names) for rank in range(4)]
        sent = [threads.submit(end.send, manifest, route[r]) for r, end in enumerate((ends.source, other))]
        got = [threads.submit(sink.receive, manifest, route[r + 2]) for r, sink in enumerate(ends.sinks)]
    assert [future.exception() for future in sent] == [None, None]
    for tp, future in enumerate(got):
        assert np.array_equal(future.result()["w"], full[:, 4 * tp : 4 * tp + 4].numpy())
    other.close()
    ends.close()


def test_tensors_travel_as_fp8_where_that_is_wanted():
    ends = Ends(2, quantized=("embedding", "experts"))
    published = tensors(1)
    _, first, second = ends.exchange(ends.source.publish(1, published), 0)
    for name in ("embedding", "experts"):
        dtype, sent = HostGpu().adopt(published[name])
        codes, scales = fp8.quantize(fp8.as_float(sent, dtype).reshape(-1, sent.shape[-1]))
        wanted = fp8.from_float(fp8.dequantize(codes, scales), dtype).reshape(sent.shape)
        assert np.array_equal(first[name], wanted) and np.array_equal(second[name], wanted)
        assert not np.array_equal(first[name], sent)
    assert same(first["norm"], published["norm"])
    ends.close()


def test_bytes_that_change_on_their_way_are_found():
    ends = Ends(1)
    manifest = ends.source.publish(1, tensors(1))
    ends.hub.spoil = lambda data: data[:130] + bytes([data[130] ^ 1]) + data[131:]
    assert isinstance(ends.exchange(manifest, 0)[1], CorruptWeights)
    ends.hub.spoil = lambda data: bytes([data[0] ^ 1]) + data[1:]  # The version in the header.
    assert "did not arrive as it was sent" in str(ends.exchange(manifest, 1)[1])
    ends.close()


def come(ends: Ends, rank: int, route: Route) -> None:
    """That rank forms the communicator, and then does nothing."""
    with ends.hub.changed:
        ends.hub.joined[route.token].add(rank)
        ends.hub.changed.notify_all()


def test_a_publisher_that_is_silent_ends_the_transfer_and_the_epoch_is_over():
    ends = Ends(1)
    manifest, route = ends.source.publish(1, tensors(1)), ends.route(1, 0, stall_s=0.2)
    come(ends, 0, route)
    waited = r"nothing moved for 0.2 s, waiting for bucket 0 from rank 0 \(0 of 12 waves"
    with pytest.raises(TransferFailed, match=rf"engine0, rank 1 of 2 in epoch 0, .*: {waited}"):
        ends.sinks[0].receive(manifest, route)
    with pytest.raises(TransferFailed, match="epoch 0 is over here; repeat the transfer under a higher one"):
        ends.sinks[0].receive(manifest, route)
    assert same(ends.exchange(manifest, 1)[1]["embedding"], tensors(1)["embedding"])
    assert ends.hung == []
    ends.close()


def test_abort_ends_a_transfer_at_once_and_says_what_it_waited_for():
    ends = Ends(1)
    manifest = ends.source.publish(1, tensors(1))
    route = ends.route(1, 0, stall_s=30.0)
    work = ends.threads.submit(ends.sinks[0].receive, manifest, route)
    come(ends, 0, route)
    deadline = time.monotonic() + 20
    while not any("bucket" in row["method"] for row in ends.sinks[0].waits()) and time.monotonic() < deadline:
        time.sleep(0.005)
    [row] = ends.sinks[0].waits()
    assert row["target"] == "rank 1 of 2, epoch 0"
    ends.sinks[0].abort(0)
    assert "told to stop: the exchange ends this epoch" in str(work.exception(timeout=20))
    ends.close()


def test_an_init_that_hangs_costs_the_process_and_only_that():
    ends = Ends(1, limits=Limits(init_s=0.3, abort_s=0.2))
    manifest = ends.source.publish(1, tensors(1))
    ends.hub.mute = {0}
    error = ends.threads.submit(ends.source.send, manifest, ends.route(0, 0)).exception()
    assert isinstance(error, CommunicatorHung)
    assert "trainer, rank 0 of 2 in epoch 0, at init" in str(error)
    assert "this process must end" in ends.hung[0]
    with pytest.raises(CommunicatorHung):
        ends.source.send(manifest, ends.route(0, 1))


def test_what_is_wrong_with_weights_is_refused_and_the_last_version_stays():
    ends = Ends(1)
    good = ends.source.publish(3, tensors(1))
    for poison in (float("nan"), float("inf"), -float("inf")):
        for name in ("embedding", "experts"):
            bad = tensors(2)
            bad[name].view(-1)[5] = poison
            with pytest.raises(BadWeights, match=f"{name} of version 4 has values that are not finite"):
                ends.source.publish(4, bad)
    with pytest.raises(BadWeights, match="version 3 of trainer can't follow 3"):
        ends.source.publish(3, tensors(2))
    with pytest.raises(BadWeights, match=r"norm was <f4 \[16\], is <f4 \[17\]"):
        ends.source.publish(4, tensors(2) | {"norm": np.zeros(17, np.float32)})
    with pytest.raises(BadWeights, match=r"norm was <f4 .* is not there"):
        ends.source.publish(4, {name: value for name, value in tensors(2).items() if name != "norm"})
    with pytest.raises(BadWeights, match=r"embedding: the plan has <f4 \[33, 16\], engine0 has <f4 \[16, 33\]"):
        wrong = tensors(2) | {"embedding": torch.zeros(16, 33)}
        ends.sinks[0].receive(good, ends.route(1, 0), wrong)
    with pytest.raises(ValueError, match="give both ends the plan"):
        ends.sinks[0].receive(good, ends.route(1, 0), None, [])
    assert same(ends.exchange(good, 1)[1]["embedding"], tensors(1)["embedding"])
    ends.source.publish(4, tensors(4))
    with pytest.raises(StaleIncarnation, match="version 3 of trainer is not there any more"):
        ends.source.send(good, ends.route(0, 1))
    ends.close()


def test_checksum_constants_are_those_of_the_kernels():
    for num_bytes in (0, 16, 4096):
        nothing = torch.zeros(num_bytes, dtype=torch.uint8)
        assert int(checksum(nothing)) & device.WORD_MASK == device.mix(-1 - num_bytes)


def test_without_a_gpu_the_reason_is_said():
    why = cuda.why_no_gpu()
    if not why:
        pytest.skip("there is a GPU: tests/gpu/exchange")
    assert why.startswith(("there is no GPU", "cupy can't be imported"))
    assert cuda.gpu_uuid() == ""
    with pytest.raises(TransferFailed, match="trainer can't exchange weights by NCCL: "):
        NcclSource("trainer").open(0)


@pytest.fixture(scope="module")
def nccl() -> Any:
    pytest.importorskip("cupy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cupy.cuda import nccl
    if not nccl.available:
        pytest.skip("NCCL is not installed here (nvidia-nccl-cu13)")
    return nccl


def test_unique_ids_are_there_without_a_gpu(nccl: Any):
    unique = nccl.get_unique_id()
    assert (type(unique), len(unique)) == (bytes, 128)
    assert unique != nccl.get_unique_id()
    nccl.groupStart()
    nccl.groupEnd()
    with pytest.raises(ValueError, match="commId length 1"):
        nccl.NcclCommunicator(1, b"x", 0)


def test_a_communicator_that_was_given_up_reports_instead_of_crashing(nccl: Any):
    dead = nccl.NcclCommunicator.__new__(nccl.NcclCommunicator)
    dead.abort()
    dead.destroy()
    for call in (dead.check_async_error, lambda: dead.send(0, 1, nccl.NCCL_UINT8, 0, 0)):
        with pytest.raises(nccl.NcclError, match="INVALID_ARGUMENT"):
            call()


def test_errors_of_the_library_are_reported_as_failed_transfers(nccl: Any):
    from headrace.runtime.exchange.nccl import CupyFabric

    if not cuda.why_no_gpu():
        pytest.skip("there is a GPU: tests/gpu/exchange")
    fabric = CupyFabric(device.Gpu())
    with pytest.raises(TransferFailed, match="GPU 0: cudaErrorInsufficientDriver"):
        fabric.init(1, nccl.get_unique_id(), 0)
    fabric.abort()


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that says it is NCCL."""
    pytest.importorskip("cupy")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("nccl") / "libnccl.so.2"
    source = Path(__file__).with_name("stub_nccl.cpp")
    flags = ["-std=c++17", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libnccl.so.2"]
    subprocess.run(["g++", *flags, "-o", library, source], check=True)
    return str(library)


def run_stub(stub: str, *cases: str) -> tuple[list[Any], subprocess.CompletedProcess[str]]:
    """What was printed: signatures, then first and second attempt of each case."""
    script = Path(__file__).with_name("stub_nccl_main.py")
    environment = os.environ | {"LD_LIBRARY_PATH": str(Path(stub).parent)}
    command = [sys.executable, "-P", script, stub, *cases]
    environment["PYTHONPATH"] = str(script.parent)
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment, check=False)
    return [json.loads(line) for line in done.stdout.splitlines()], done


@pytest.mark.slow
def test_cupys_binding_moves_whole_weights_and_every_fault_is_over_after_an_abort(stub: str):
    """cupy lets go of the GIL in calls that hang, and an abort from another thread ends them."""
    whole = ["sent", "whole", "whole"]
    cases = ("none", "group hang:1", "group hang:0", "group error:2", "async error:1")
    printed, done = run_stub(stub, *cases)
    assert done.returncode == 0, done.stderr
    signatures, *outcomes = printed
    bytes_to = "size_t count, int datatype, int peer, intptr_t stream"
    assert signatures == {
        "send": f"NcclCommunicator.send(self, intptr_t sendbuf, {bytes_to})",
        "recv": f"NcclCommunicator.recv(self, intptr_t recvbuf, {bytes_to})",
        **{name: f"NcclCommunicator.{name}(self)" for name in ("abort", "destroy", "check_async_error")},
    }
    assert outcomes[0] == [whole, whole]
    for case, (first, second) in zip(cases[1:], outcomes[1:], strict=True):
        assert second == whole, (case, second)
        assert all(one in ("sent", "whole") or one.startswith("TransferFailed: ") for one in first), (case, first)
        assert first != whole, case
    assert "nothing moved for 0.5 s" in outcomes[1][0][1]
    assert "group end on GPU 0: NCCL_ERROR_REMOTE_ERROR: a peer has gone" in outcomes[3][0][2]
    assert "look for asynchronous errors on GPU 0: NCCL_ERROR_REMOTE_ERROR" in outcomes[4][0][1]


@pytest.mark.slow
@pytest.mark.parametrize("case", ("init hang:2", "group stuck:1", "abort hang:1"))
def test_what_hangs_even_after_an_abort_ends_its_process_once_it_was_said(stub: str, case: str):
    _, done = run_stub(stub, case)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "this process must end" in done.stderr


def test_the_checksum_kernel_computes_what_the_reference_does(tmp_path: Path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    program = tmp_path / "sum.cpp"
    program.write_text(
        "struct Threads { long long n; long long size() { return n; } };\n"
        'extern "C" unsigned long long sum(const unsigned* words, long long count, long long threads) {\n'
        "Threads _ind{threads}; unsigned long long all = 0, partial;\n"
        "for (long long i = 0; i < threads; ++i) {" + device.CHECKSUM_SOURCE + "all += partial; }\n"
        "return all; }\n"
    )
    library = tmp_path / "sum.so"
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-o", library, program], check=True)
    function = ctypes.CDLL(str(library)).sum
    function.restype = ctypes.c_uint64
    for num_bytes in (16, 4096, 100_000):
        data = torch.randint(
            0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(num_bytes)
        )
        for threads in (1, 7, 1000):
            got = function(ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(num_bytes // 4), ctypes.c_int64(threads))
            assert (got + device.mix(-1 - num_bytes)) & device.WORD_MASK == int(checksum(data)) & device.WORD_MASK


def test_the_fp8_kernels_compute_what_fp8_does(tmp_path: Path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    program = tmp_path / "fp8.cpp"
    program.write_text(
        "#include <cmath>\n"
        'extern "C" void encode(const float* xs, float scale, unsigned char* codes, long n) {\n'
        "for (long i = 0; i < n; ++i) { float x = xs[i]; unsigned char& code = codes[i];"
        + device_fp8.ENCODE_SOURCE
        + '}}\nextern "C" void decode(const unsigned char* codes, float scale, float* ys, long n) {\n'
        "for (long i = 0; i < n; ++i) { unsigned char code = codes[i]; float& y = ys[i];"
        + device_fp8.DECODE_SOURCE
        + "}}\n"
    )
    library = tmp_path / "fp8.so"
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-o", library, program], check=True)
    loaded = ctypes.CDLL(str(library))

    def run(name: str, given: np.ndarray, scale: float, result: np.ndarray) -> np.ndarray:
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (given, result)]
        getattr(loaded, name)(pointers[0], ctypes.c_float(scale), pointers[1], ctypes.c_long(len(given)))
        return result

    every_bfloat16 = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    near = (every_bfloat16.view(np.uint32)[:, None] + np.array([-1, 1]).astype(np.uint32)).ravel().view(np.float32)
    all_codes = np.arange(256, dtype=np.uint8)
    for scale in (1.0, 0.0173, 3.3e-39):
        for values in (every_bfloat16, near):
            with np.errstate(all="ignore"):
                wanted = fp8.encode(values / np.float32(scale))
            got = run("encode", values, scale, np.empty(len(values), np.uint8))
            number = ~np.isnan(values)
            assert np.array_equal(got[number], wanted[number])
            assert ((got[~number] & 0x7F) == 0x7F).all()
        decoded = run("decode", all_codes, scale, np.empty(256, np.float32))
        wanted = fp8.dequantize(all_codes[None], np.array([scale], np.float32))[0]
        assert np.array_equal(decoded, wanted, equal_nan=True)
