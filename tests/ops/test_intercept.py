"""Where interceptors are switched on: for the process, or in a context."""

import threading
from contextvars import copy_context

import ops

from .toys import Recorder, toy_double


def test_install_for_the_process(x):
    seen, local = Recorder(), Recorder()
    first, second = ops.install(seen), ops.install(seen)
    toy_double(x)
    assert len(seen.calls) == 2, "installed twice, it sees twice"
    first.remove()
    first.remove()
    with ops.intercepted(local):
        thread = threading.Thread(target=toy_double, args=(x,))
        thread.start()
        thread.join()
    assert (len(seen.calls), len(local.calls)) == (3, 0), "other threads: of the process yes, of the `with` no"
    second.remove()
    toy_double(x)
    assert len(seen.calls) == 3


def test_with_belongs_to_a_context(x):
    seen = Recorder()
    with ops.intercepted(seen):
        inside = copy_context()
        outside_calls = []
        thread = threading.Thread(target=lambda: outside_calls.append(inside.run(toy_double, x)))
        thread.start()
        thread.join()
    assert len(seen.calls) == 1 and len(outside_calls) == 1, "a context that is handed over takes its tools along"
    inside.run(toy_double, x)
    assert len(seen.calls) == 2
    toy_double(x)
    assert len(seen.calls) == 2


def test_a_generator_sees_the_tools_of_who_asks_it(x):
    def steps():
        while True:
            yield toy_double(x)

    seen, generator = Recorder(), steps()
    next(generator)
    with ops.intercepted(seen):
        next(generator)
    next(generator)
    assert len(seen.calls) == 1
