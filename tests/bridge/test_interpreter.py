"""The bridge's threads get the interpreter from an idle scheduler thread, not from a busy one."""

from __future__ import annotations

import sys
import threading

import pytest

from sglang_bridge.interpreter import Insistence


@pytest.fixture
def usual():
    before = sys.getswitchinterval()
    yield before
    assert sys.getswitchinterval() == before


def test_an_idle_thread_has_to_let_go_soon(usual):
    with Insistence() as insistence:
        assert sys.getswitchinterval() == usual
        insistence.follow(True)
        assert sys.getswitchinterval() < usual / 10


def test_a_busy_one_is_let_be(usual):
    with Insistence() as insistence:
        insistence.follow(False)
        assert sys.getswitchinterval() == usual
        insistence.follow(True)
        insistence.follow(True)
        insistence.follow(False)
        assert sys.getswitchinterval() == usual


def test_an_error_puts_the_interval_back(usual):
    def fail():
        with Insistence() as insistence:
            insistence.follow(True)
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_the_last_of_two_threads_puts_back_what_the_first_found(usual):
    began, end = threading.Event(), threading.Event()

    def insist():
        with Insistence() as insistence:
            insistence.follow(True)
            began.set()
            end.wait(10)

    other = threading.Thread(target=insist)
    with Insistence() as insistence:
        insistence.follow(True)
        other.start()
        assert began.wait(10)
    assert sys.getswitchinterval() < usual / 10, "the other thread still insists"
    end.set()
    other.join()
