"""Signals and how a program ends. Standard library only: it works while torch still loads."""

import os
import signal
import sys
from collections.abc import Callable

STOPPED = 3  # exit status of a program that a signal ended in order
# what ends a run in order; Windows has no SIGHUP
SIGNALS = [number for number in signal.Signals if number.name in ("SIGTERM", "SIGINT", "SIGHUP")]


class Stopped(Exception):
    """A signal has ended the program; the text names the step, and the work that is lost."""


def listen(handler: Callable) -> dict:
    """Call `handler(number, frame)` on each of SIGNALS; return the former handlers."""
    former = {}
    for number in SIGNALS:
        # a signal ignored at the program's start stays ignored: `nohup` relies on it
        if signal.getsignal(number) != signal.SIG_IGN:
            former[number] = signal.signal(number, handler)
    return former


def block(on: bool) -> None:
    """Let signals wait, or let them through. A process that is started meanwhile inherits it."""
    if hasattr(signal, "pthread_sigmask"):  # Windows has none
        signal.pthread_sigmask(signal.SIG_BLOCK if on else signal.SIG_UNBLOCK, SIGNALS)


def begin_program() -> None:
    """End with one line on a signal until the program listens anew; let pictures go to files."""
    os.environ["MPLBACKEND"] = "Agg"    # a notebook's, which a command inherits, may be missing

    def end(number: int, _) -> None:
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            print(f"stopped by {name} before the first step: nothing is lost", file=sys.stderr)
        os._exit(STOPPED)

    listen(end)
