"""Where a step's seconds go: the host's, and on a GPU those between events of its stream."""

import time

import pytest
import torch

from torch_hf.optimizer.timer import StepTimer


class Stream:
    """A GPU that works on after its launches have returned."""

    def __init__(self):
        self.now = 0.0  # milliseconds of work that were launched
        self.waits = 0

    def event(self, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, stream):
        self.stream = stream
        self.at = None

    def record(self):
        self.at = self.stream.now

    def synchronize(self):
        self.stream.waits += 1

    def elapsed_time(self, other):
        assert self.stream.waits, "events are read after their stream has come so far"
        return other.at - self.at


def test_seconds_of_the_host():
    timer = StepTimer(("a", "b"))
    with timer.part("a"):
        time.sleep(0.02)
    assert timer.timed("b", lambda x: x + 1)(2) == 3
    found = timer.seconds()
    assert 0.02 <= found["a"] <= found["total"]
    assert found["b"] < 0.01
    assert found["total"] == pytest.approx(sum(found[k] for k in ("a", "b", "other")))


def test_seconds_of_a_gpu_are_those_of_its_work(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    timer = StepTimer(("a", "b"), torch.device("cuda"))

    def launch(milliseconds):
        stream.now += milliseconds

    for _ in range(3):
        timer.timed("a", launch)(2000.0)
    with pytest.raises(KeyError), timer.part("b"):
        launch(500.0)
        raise KeyError
    assert stream.waits == 0
    found = timer.seconds()
    assert stream.waits == 1
    assert (found["a"], found["b"]) == (6.0, 0.5)
    again = timer.seconds()
    assert (again["a"], again["b"]) == (6.0, 0.5)
