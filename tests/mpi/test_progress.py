"""The communication thread: order of tasks, errors, services and deadlines."""

from __future__ import annotations

import faulthandler
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcsgd import DeadlineExceeded
from hpcsgd.diagnostics.activity import ActivityRecord
from hpcsgd.diagnostics.stack_dump import summarize
from hpcsgd.mpi.progress import Progress
from hpcsgd.mpi.tasks import POLL_INTERVAL, Steps, Turn, Wait
from hpcsgd.mpi.waiting import DeadlineWaiter, Explanation, WaitHooks


@pytest.fixture
def progress() -> Iterator[Progress]:
    progress = Progress(DeadlineWaiter(3, 20.0), ActivityRecord(), threaded=True)
    progress.waiter.hooks = WaitHooks(poll=progress.poll, is_background=progress.in_background)
    yield progress
    progress.stop()


def test_jobs_run_in_order_in_one_other_thread(progress: Progress) -> None:
    seen: list[tuple[int, int]] = []
    works = [
        progress.submit(f"job {i}", lambda i=i: seen.append((i, threading.get_ident())) or i)
        for i in range(200)
    ]
    assert [work.wait() for work in reversed(works)] == list(reversed(range(200)))
    assert [i for i, _ in seen] == list(range(200))
    assert len({thread for _, thread in seen}) == 1 and seen[0][1] != threading.get_ident()


def test_a_failed_job_raises_its_error_and_all_later_jobs_fail(progress: Progress) -> None:
    begun: list[int] = []
    good = progress.submit("good", lambda: 1)
    bad = progress.submit("bad", lambda: [][1])
    later = progress.submit("later", lambda: begun.append(1))
    assert good.wait() == 1
    for work in (bad, later, bad):
        with pytest.raises(IndexError):
            work.wait()
    with pytest.raises(IndexError):
        progress.run("still later", lambda: begun.append(2))
    progress.drain()
    assert not begun and bad.test() and later.test()


def test_wait_with_a_timeout_expires_and_a_later_wait_succeeds(progress: Progress) -> None:
    gate = threading.Event()
    work = progress.submit("the slow one", lambda: gate.wait(20))
    assert not work.test()
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"rank 3: no end of the slow one after 0\.05 s"):
        work.wait(0.05)
    assert time.monotonic() - started < 5 and not work.test()
    gate.set()
    assert work.wait() is True and work.test()
    assert progress.wait_seconds > 0.04 and progress.busy_seconds > 0.04


def test_run_is_inline_only_where_nothing_is_queued(progress: Progress) -> None:
    assert progress.run("alone", threading.get_ident) == threading.get_ident()
    gate, order = threading.Event(), []
    progress.submit("first", lambda: gate.wait(20) and order.append("first"))
    threading.Timer(0.1, gate.set).start()
    assert progress.run("second", lambda: order.append("second") or threading.get_ident()) != (
        threading.get_ident()
    )
    assert order == ["first", "second"]


def test_drain_waits_for_all(progress: Progress) -> None:
    seen: list[int] = []
    for i in range(5):
        progress.submit(str(i), lambda i=i: (time.sleep(0.02), seen.append(i)))
    progress.drain()
    assert seen == list(range(5))


class Buffer:
    pass


def test_a_buffer_is_released_before_the_work_is_complete(progress: Progress) -> None:
    buffer = Buffer()
    alive = weakref.ref(buffer)
    gate = threading.Event()
    work = progress.submit("uses it", lambda buffer=buffer: gate.wait(20) and None)
    del buffer
    gc.collect()
    assert alive() is not None, "a job in flight keeps its buffer alive"
    gate.set()
    work.wait()
    assert alive() is None


def test_without_a_thread_jobs_run_at_once() -> None:
    progress = Progress(DeadlineWaiter(0, 1.0), ActivityRecord(), threaded=False)
    assert progress.submit("now", threading.get_ident).wait() == threading.get_ident()
    work = progress.submit("bad", lambda: [][1])
    with pytest.raises(IndexError):
        work.wait()


def test_stop_ends_the_thread_and_a_later_job_starts_another(progress: Progress) -> None:
    thread = progress.submit("one", threading.current_thread).wait()
    progress.stop()
    progress.stop()
    assert not thread.is_alive()
    assert progress.submit("another", lambda: 5).wait() == 5, "a later job starts another thread"


def test_a_deadline_error_names_rank_operation_and_missing_ranks() -> None:
    waiter, checks = DeadlineWaiter(2, 0.3), []
    waiter.hooks = WaitHooks(
        check=lambda: checks.append(1),
        explain=lambda seconds: Explanation(f"rank 1: asleep for {seconds > 0.3}"),
    )
    with pytest.raises(DeadlineExceeded) as error:
        waiter.until(lambda: False, "all-reduce of bucket 3 at step 17", lambda: [4, 1])
    text = str(error.value)
    assert "rank 2: waited 0.3 s for ranks 1, 4 in all-reduce of bucket 3 at step 17" in text
    assert "rank 1: asleep for True" in text and "HPCSGD_TIMEOUT" in text and checks
    assert isinstance(error.value, TimeoutError)


def test_a_wait_ends_when_its_condition_is_true() -> None:
    began = time.monotonic()
    DeadlineWaiter(0, 20.0).until(lambda: time.monotonic() - began > 0.1, "a moment")
    assert 0.1 < time.monotonic() - began < 5


def test_a_service_runs_while_idle_and_while_waiting_until_stopped(progress: Progress) -> None:
    calls: list[str] = []

    def steps() -> Steps[None]:
        while True:
            calls.append(threading.current_thread().name)
            yield POLL_INTERVAL

    service = progress.serve(steps())
    progress.waiter.until(lambda: "hpcsgd" in calls, "the idle thread")
    main = threading.current_thread().name
    progress.waiter.until(lambda: main in calls, "a wait of this thread")
    progress.stop_serving(service)
    assert service.done and not progress.is_serving
    before = len(calls)
    time.sleep(0.02)
    assert len(calls) == before


def test_a_failed_service_fails_the_next_operation(progress: Progress) -> None:
    def steps() -> Steps[None]:
        while threading.current_thread() is threading.main_thread():
            yield POLL_INTERVAL
        raise KeyError("lost")

    progress.serve(steps())
    with pytest.raises(KeyError, match="lost"):
        for _ in range(1000):
            progress.submit("a job", lambda: time.sleep(0.001)).wait()


def test_a_service_that_fails_in_a_wait_of_this_thread_fails_later_operations_too(progress: Progress) -> None:
    def steps() -> Steps[None]:
        while threading.current_thread() is not threading.main_thread():
            yield POLL_INTERVAL
        raise KeyError("lost")

    progress.serve(steps())
    with pytest.raises(KeyError, match="lost"):
        progress.waiter.until(lambda: False, "a wait")
    with pytest.raises(KeyError, match="lost"):
        progress.run("another operation", lambda: None)


@pytest.mark.parametrize("call", ["run", "submit"])
def test_steps_wait_for_what_they_yield_and_return_a_result(progress: Progress, call: str) -> None:
    seen: list[float] = []

    def steps() -> Steps[str]:
        for _ in range(3):
            end = time.monotonic() + 0.02
            yield Wait(lambda end=end: time.monotonic() >= end)  # type: ignore[misc]
            seen.append(time.monotonic() - end)
        yield None
        return "a result"

    found = progress.run("steps", steps) if call == "run" else progress.submit("steps", steps).wait()
    assert found == "a result" and len(seen) == 3 and min(seen) >= 0


class Pipelined:
    """Tasks that need their turn for their middle step only; records when each one takes a step."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.record = progress, list[tuple[str, int]]()
        self.gates = {name: threading.Event() for name in "abc"}

    def submit(self, name: str) -> Any:
        turn = Turn()

        def steps() -> Steps[None]:
            self.record.append((name, 0))
            yield Wait(lambda: turn.begun)
            self.record.append((name, 1))
            yield Wait(self.gates[name].is_set)
            turn.over = True
            for number in (2, 3):
                yield None
                self.record.append((name, number))

        return self.progress.submit(name, steps, turn)


def test_tasks_with_turns_begin_before_them_and_end_after_them(progress: Progress) -> None:
    gate, tasks = threading.Event(), Pipelined(progress)
    progress.submit("a plain task", lambda: gate.wait(20))
    works = [tasks.submit(name) for name in "abc"]
    plain = progress.submit("another", lambda: tasks.record.append(("plain", 0)))
    gate.set()
    progress.waiter.until(lambda: ("b", 0) in tasks.record and ("c", 0) in tasks.record, "their first steps")
    assert ("a", 1) in tasks.record and ("b", 1) not in tasks.record, "the turn is that of a"
    tasks.gates["a"].set()
    progress.waiter.until(lambda: ("a", 3) in tasks.record, "the end of a")
    assert ("b", 1) in tasks.record and ("c", 1) not in tasks.record, "while b waits in its turn"
    tasks.gates["c"].set()
    assert works[0].test() and not plain.test()
    tasks.gates["b"].set()
    for work in (*works, plain):
        work.wait()
    order = tasks.record
    assert [name for name, number in order if number == 1] == ["a", "b", "c"]
    assert order[-1] == ("plain", 0), "a plain task may wait for all before it"
    assert sorted(order[:-1]) == [(name, number) for name in "abc" for number in range(4)]


def test_the_error_of_a_task_after_its_turn_ends_all_that_have_not_ended(progress: Progress) -> None:
    turns, gate = [Turn(), Turn()], threading.Event()

    def first() -> Steps[None]:
        turns[0].over = True
        yield None
        gate.wait(20)
        raise KeyError("late")

    def second() -> Steps[None]:
        yield Wait(lambda: False)

    hold = threading.Event()
    progress.submit("a plain task", lambda: hold.wait(20))
    works = [progress.submit(str(i), job, turns[i]) for i, job in enumerate((first, second))]
    works.append(progress.submit("another", lambda: None))
    hold.set()
    gate.set()
    for work in works:
        with pytest.raises(KeyError, match="late"):
            work.wait(20)


def test_the_deadline_of_a_task_names_what_it_waits_for(progress: Progress) -> None:
    progress.waiter.timeout = 0.3
    steps = [Wait(lambda: False, lambda: [5, 2], "a slot", "look there")]
    with pytest.raises(DeadlineExceeded, match=r"rank 3: waited 0\.3 s for ranks 2, 5 in a slot") as error:
        progress.submit("the task", lambda: (yield from steps)).wait()
    assert "look there; to wait longer" in str(error.value)
    progress.release()


def test_a_dump_of_stacks_names_the_communication_thread_and_omits_it_where_it_is_idle(
    progress: Progress, tmp_path: Path
) -> None:
    gate = threading.Event()

    def threads() -> list[str]:
        with (tmp_path / "stacks").open("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            return [line for line in summarize(file.read()) if "thread" in line and "File" not in line]

    progress.submit("the first", lambda: None).wait()
    time.sleep(0.05)
    assert "communication thread:" not in threads() and "another thread:" not in threads()
    begun = threading.Event()
    work = progress.submit("a wait", lambda: begun.set() or gate.wait(20))
    assert begun.wait(20) and "communication thread:" in threads()
    gate.set()
    work.wait()


def test_an_error_of_a_late_task_leaves_the_result_of_one_that_has_ended(progress: Progress) -> None:
    turns, hold = [Turn(), Turn()], threading.Event()

    def late() -> Steps[None]:
        turns[0].over = True
        yield Wait(lambda: works[1].test())
        raise KeyError("late")

    def last() -> Steps[int]:
        yield None
        return 7

    progress.submit("a plain task", lambda: hold.wait(20))
    works = [progress.submit(str(i), job, turns[i]) for i, job in enumerate((late, last))]
    hold.set()
    with pytest.raises(KeyError, match="late"):
        works[0].wait(20)
    assert works[1].wait() == 7


def test_a_stopped_service_is_freed_with_its_owner(progress: Progress) -> None:
    class Owner:
        def __init__(self) -> None:
            self.service = progress.serve(self.steps())

        def steps(self) -> Steps[None]:
            while True:
                yield POLL_INTERVAL

    owner = Owner()
    freed = weakref.ref(owner)
    progress.stop_serving(owner.service)
    gc.disable()
    try:
        del owner
        assert freed() is None
    finally:
        gc.enable()
