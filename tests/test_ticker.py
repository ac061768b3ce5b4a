"""The thread that looks after what waits (H4): while it is needed, in every kind of process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path

import pytest

from rope_middleware.running import ticker
from rope_middleware.running.ticker import Ticker
from tests.kit.programs import run_python
from tests.kit.waiting import eventually

Start = Callable[[], bool]


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "rope_middleware.ticker"]


def run(code: str, *flags: str) -> list[str]:
    """Run a program of its own, which must say nothing on its standard error."""
    done = run_python(*flags, "-c", code)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_H4_the_thread_ends_when_it_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And asks to be started again; what it raises does not end it; the context is an empty one."""
    monkeypatch.setattr(ticker, "QUIET_SECONDS", 0.05)
    before = set(threads())
    known: ContextVar[str] = ContextVar("known", default="nothing")
    known.set("something")
    armed: list[Start] = []
    seen: list[str] = []

    def look() -> bool:
        seen.append(known.get())
        if len(seen) == 2:
            raise ValueError("one look fails")
        return len(seen) < 5

    one = Ticker(look, lambda: 0.01, armed.append)
    assert set(threads()) == before
    for turn in (1, 2):
        start = armed[-1]
        assert start() and start()
        eventually(lambda: len(armed) > turn, "it has asked to be started again")  # noqa: B023
        eventually(lambda: set(threads()) <= before, "it has ended")
    assert len(seen) > 5 and set(seen) == {"nothing"}
    one.stop()


def test_H4_where_no_thread_can_be_started_it_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A request does not fail for it."""
    armed: list[Start] = []
    one = Ticker(lambda: True, lambda: 0.01, armed.append)

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert armed[0]() is False
    assert armed[0]() is True
    one.stop()


HOLDS = """
import logging, os, sys, threading, time
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker
from rope_middleware import SessionJenny, holders, open_scope
from rope_middleware.session.holding import held
held.EVERY, held.LIMIT = 0.02, 0.1
logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.WARNING)
jenny = SessionJenny(sessionmaker(create_engine("sqlite:///{path}")))

def hold(name, sleep=time.sleep, seconds=0.5):
    with open_scope(name):
        jenny.session.execute(text("SELECT 1"))
        sleep(seconds)
"""


@pytest.fixture
def holds(tmp_path: Path) -> str:
    return HOLDS.replace("{path}", f"{tmp_path}/x.db")


def told(lines: list[str]) -> list[str]:
    return sorted(line.split()[0] for line in lines if "without using it" in line)


def test_H4_a_forked_process_has_a_watch_of_its_own(holds: str) -> None:
    """The child starts with nothing, the parent goes on with what it had; neither is warned of."""
    code = """
with open_scope("before"):
    jenny.session.execute(text("SELECT 1"))
    child = os.fork()
    if not child:
        assert not holders() and threading.active_count() == 1
        hold("child")
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    time.sleep(0.5)
"""
    flags = ("-W", "error", "-W", "ignore:unclosed database:ResourceWarning")  # of Python 3.13
    assert told(run(holds + code, *flags)) == ["'before'", "'child'"]


def test_H4_a_fork_while_another_thread_starts_the_watch() -> None:
    """It waits for that start, and both processes have a watch of their own again."""
    code = """
import os, threading, time
from rope_middleware.running.ticker import Ticker

seen, starting, start = set(), threading.Event(), threading.Thread.start

def slow(thread):
    starting.set()
    time.sleep(0.1)
    start(thread)

def look():
    seen.add(os.getpid())
    return True

threading.Thread.start = slow
start(threading.Thread(target=Ticker, args=[look, lambda: 0.01, lambda begin: begin()]))
starting.wait()
child = os.fork()
seen.clear()
end = time.monotonic() + 5
while os.getpid() not in seen and time.monotonic() < end:
    time.sleep(0.01)
if not child:
    os._exit(not seen)
print(os.waitpid(child, 0)[1], len(seen))
"""
    assert run(code, "-W", "ignore") == ["0 1"]


def test_H4_a_process_ends_at_once_with_a_transaction_open(holds: str) -> None:
    """The watch does not keep it, and says nothing at the end."""
    code = """
scope = open_scope("left open")
scope.__enter__()
jenny.session.execute(text("SELECT 1"))
held.EVERY = 3600.0
time.sleep(0.1)
print("the end")
"""
    assert run(holds + code)[-1] == "the end"


GEVENT = """
from gevent import monkey; monkey.patch_all()
import gevent
"""


@pytest.mark.slow
def test_H4_greenlets_of_gevent(holds: str) -> None:
    """They wait in one thread; `gevent.wait()` waits for them, and not for the watch."""
    code = """
gevent.spawn(hold, "one", gevent.sleep)
gevent.spawn(hold, "another", time.sleep)
gevent.wait()
held.EVERY = 3600.0
gevent.wait()
"""
    lines = run(GEVENT + holds + code)
    assert len(told(lines)) == 1  # their lines are the same
    assert "its code is at <string>:1" in lines[0]


# Its resolver needs what it cannot patch.
EVENTLET = """
import os, warnings; os.environ["EVENTLET_NO_GREENDNS"] = "yes"; warnings.simplefilter("ignore")
import eventlet; eventlet.monkey_patch()
"""


@pytest.mark.slow
def test_H4_greenlets_of_eventlet(holds: str) -> None:
    """The twin."""
    code = """
eventlet.spawn(hold, "one", eventlet.sleep).wait()
"""
    lines = run(EVENTLET + holds + code)
    assert told(lines) == ["'one'"]


SUB = """
import os, sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
code = '''
import sys, types
# The package without its __init__.py: from Python 3.12 on SQLAlchemy's modules in C are refused.
package = sys.modules["rope_middleware"] = types.ModuleType("rope_middleware")
package.__path__ = [FOLDER]
from rope_middleware.running import ticker
armed = []
one = ticker.Ticker(lambda: True, lambda: 0.01, armed.append)
armed[0]()
assert one._running is None
'''
one = interpreters.create()
found = interpreters.run_string(one, code.replace("FOLDER", repr(sys.argv[1])))
assert found is None, found
interpreters.destroy(one)
print("ended", flush=True)
os._exit(0)  # Python 3.12.1 crashes at its own end where a subinterpreter has imported asyncio
"""


def test_H4_an_isolated_subinterpreter_goes_without() -> None:
    """It refuses daemons, and its end would wait for any other thread."""
    folder = Path(ticker.__file__).parents[1]
    assert run_python("-W", "ignore", "-c", SUB, folder).stdout == "ended\n"
