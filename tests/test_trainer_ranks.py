"""Gangs of real processes: sums against numpy, in the same bits everywhere; what a death of one costs the other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace.actors.trainer.ranks import ALONE, Gang, RankLost
from headrace.actors.trainer.workload import Workload

SIZE = 3
WORK = Workload(1.0, 0.01)


def gradients(rank: int) -> list[np.ndarray | None]:
    random = np.random.default_rng(rank)
    first = random.normal(size=(5, 7)).astype(np.float32)
    return [first, None if rank == 1 else random.normal(size=3).astype(np.float32)]


def add_up(gang: Gang) -> list[Any]:
    parameters = [torch.nn.Parameter(torch.zeros(5, 7)), torch.nn.Parameter(torch.zeros(3))]
    for parameter, gradient in zip(parameters, gradients(gang.rank), strict=True):
        parameter.grad = None if gradient is None else torch.from_numpy(gradient)
    gang.sum_gradients(parameters)
    values = np.array([gang.rank, -gang.rank, 0.1 * (gang.rank + 1)])
    grads = [p.grad.numpy() for p in parameters if p.grad is not None]
    return [*grads, gang.sum(values), gang.max(values), np.concatenate(gang.micro_batches(range(1, 30), 100))]


def wait_for_the_dead(gang: Gang) -> list[Any]:
    gang.sum(np.zeros(1))
    if gang.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        while True:
            gang.sum(np.zeros(1))
    except RankLost as error:
        return [str(error), time.monotonic() - began]


def meet_nobody(gang: Gang) -> list[Any]:
    if gang.rank == 1:
        return []
    try:
        gang.sum(np.zeros(1))
    except RankLost as error:
        return [str(error)]
    return ["met"]


def run(work: Callable[[Gang], list[Any]], size: int, meeting: Path, meet_s: float = 30.0) -> list[list[Any] | None]:
    """What `work` returns on each rank; None of one that died."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(size)]
    processes = [
        context.Process(target=_rank, args=(pipes[rank][1], work, rank, size, meeting, meet_s)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for _, theirs in pipes:
        theirs.close()
    answers: list[list[Any] | None] = []
    for ours, _ in pipes:
        try:
            assert ours.poll(60)
            answers.append(ours.recv())
        except EOFError:
            answers.append(None)
    for process in processes:
        process.join(30)
        assert process.exitcode is not None
    return answers


def _rank(pipe: Connection, work: Callable[[Gang], list[Any]], rank: int, size: int, meeting: Path, s: float) -> None:
    torch.set_num_threads(1)
    gang = Gang(rank, size, meeting, WORK, meet_s=s)
    pipe.send(work(gang))
    gang.close()


@pytest.mark.slow
def test_sums_are_those_of_numpy_in_the_same_bits_on_every_rank(tmp_path: Path) -> None:
    answers = run(add_up, SIZE, tmp_path / "meeting")
    for index in range(2):
        parts = [g[index] for g in map(gradients, range(SIZE))]
        total = np.zeros((5, 7) if index == 0 else 3, np.float32)
        for part in parts:
            total = total + (0 if part is None else part)
        for answer in answers:
            assert answer is not None
            assert answer[index].tobytes() == total.astype(np.float32).tobytes()
    shares = []
    for answer in answers:
        assert answer is not None
        assert answer[2].tolist() == pytest.approx([3.0, -3.0, 0.6])
        assert answer[3].tolist() == pytest.approx([2.0, 0.0, 0.3])
        shares += answer[4].tolist()
    assert sorted(shares) == list(range(29))


@pytest.mark.slow
def test_a_rank_that_dies_or_never_comes_is_an_error_for_the_others_in_bounded_time(tmp_path: Path) -> None:
    left, gone = run(wait_for_the_dead, 2, tmp_path / "a")
    assert gone is None
    assert left is not None and "rank 0 of 2 can't go on" in left[0]
    assert left[1] < 20
    answers = run(meet_nobody, 2, tmp_path / "b", meet_s=1.0)
    assert answers[1] == [] and answers[0] is not None and "can't go on with the others" in answers[0][0]


def test_one_process_does_it_all() -> None:
    assert sorted(ALONE.micro_batches([3, 1, 2], 4)) == [[0], [1, 2]]
    parameter = torch.nn.Parameter(torch.zeros(2))
    ALONE.sum_gradients([parameter])
    assert parameter.grad is None
    values = np.arange(3.0)
    assert ALONE.sum(values) is values and ALONE.max(values) is values
