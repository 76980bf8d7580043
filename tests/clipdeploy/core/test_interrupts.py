from __future__ import annotations

import signal
import threading

import pytest

from clipdeploy.core.interrupts import interrupts


@pytest.mark.usefixtures("python_hears_ctrl_c")
def test_interrupts_are_kept_for_the_caller() -> None:
    stop: list[BaseException] = []
    with interrupts(stop):
        signal.raise_signal(signal.SIGINT)
    assert [type(error) for error in stop] == [KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("python_hears_ctrl_c")
def test_the_handler_of_another_stays() -> None:
    heard: list[int] = []
    stop: list[BaseException] = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    with interrupts(stop):
        signal.raise_signal(signal.SIGINT)
    assert (heard, stop) == ([signal.SIGINT], [])


def test_another_thread_can_build() -> None:
    passed = []

    def block() -> None:
        with interrupts([]):
            passed.append(True)

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert passed
