"""What a signal does to a program. Standard library only: it works while torch still loads."""

import os
import signal
import sys
from collections.abc import Callable

STOPPED = 3  # exit status of a program that a signal ended in order
# what ends a run in order; Windows has no SIGHUP
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP")
           if hasattr(signal, name)]


class Stopped(Exception):
    """A signal has ended the program; its text says at what, and what is lost."""


def listen(handler: Callable) -> dict:
    """Call `handler(number, frame)` on each of SIGNALS; returns the former handlers.

    A signal that was ignored when the program started stays ignored: `nohup` asks for that.
    """
    former = {}
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            former[number] = signal.signal(number, handler)
    return former


def block(on: bool) -> None:
    """Let signals wait, or let them through. A process that is started meanwhile inherits it."""
    if hasattr(signal, "pthread_sigmask"):  # Windows has none
        signal.pthread_sigmask(signal.SIG_BLOCK if on else signal.SIG_UNBLOCK, SIGNALS)


def listen_while_loading() -> None:
    """End at once on a signal, with one line. Call it before the libraries load: they take seconds.

    A program that starts its work listens anew, with a handler that ends the work in order.
    """
    listen(end_at_once)


def end_at_once(number: int, _) -> None:
    """Print one line, in the first process only, and end with the status of a stopped run."""
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        print(f"stopped by {name} before the first step: nothing is lost", file=sys.stderr)
        sys.stderr.flush()
    os._exit(STOPPED)
