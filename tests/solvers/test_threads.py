"""Parts of the work, and the threads that do them."""

from __future__ import annotations

import os

import pytest
import torch

from quantkit import layer_memory
from quantkit.solvers import threads as solver_threads
from quantkit.solvers.threads import in_threads, parts

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 576, 1000, 4096, 14336, 128256])
def test_parts_cover_all_rows_and_do_not_depend_on_threads(rows: int) -> None:
    found = parts(rows, CPU)
    torch.set_num_threads(5)
    assert parts(rows, CPU) == found
    assert [row for part in found for row in range(part.start, part.stop)] == list(range(rows))
    assert all(part.stop - part.start <= 256 for part in found)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_part_has_one_thread_and_no_gradients(threads: int) -> None:
    torch.set_num_threads(threads)
    weight = torch.ones(3, requires_grad=True)

    def work(item: int) -> tuple[int, int, bool]:
        return item, torch.get_num_threads(), (weight * item).requires_grad

    assert in_threads(work, range(20), CPU) == [(item, 1, False) for item in range(20)]
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("inference", [True, False])
def test_a_part_may_change_tensors_of_the_caller(inference: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    with torch.inference_mode(inference):
        out = torch.zeros(4)
        made = in_threads(lambda item: out[item : item + 1].add_(item), range(4), CPU)
        assert out.tolist() == [0, 1, 2, 3]
    assert all(tensor.is_inference() == inference for tensor in made)


def test_the_plan_knows_the_largest_part() -> None:
    """It cannot import this module, which takes torch."""
    ours, theirs = layer_memory, solver_threads
    assert (ours.MOST, ours.LEAST, ours.LARGEST) == (theirs.MOST, theirs.LEAST, theirs.LARGEST)


def test_errors_arrive() -> None:
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda item: 1 // item, [1, 0], CPU)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_after_a_fork_there_are_threads_again() -> None:
    torch.set_num_threads(2)
    assert in_threads(abs, [-1, -2], CPU) == [1, 2]
    child = os.fork()
    if child == 0:
        os._exit(0 if in_threads(abs, [-1, -2], CPU) == [1, 2] else 1)
    assert os.waitpid(child, 0)[1] == 0
