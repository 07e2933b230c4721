"""Programs end bad input with one line, `error: ...`, on stderr and exit status 2."""

import argparse
import difflib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from data import InputError
from plumbing.signals import STOPPED, Stopped, listen


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one line; prints a docstring as it stands"""

    def __init__(self, description: str, **options):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """Parse as argparse does, but report an unknown flag before a missing one."""
        known = self._option_string_actions
        for word in sys.argv[1:] if args is None else args:
            name = word.split("=")[0]
            if name.startswith("--") and " " not in name and name not in known:
                similar = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
                mean = f"; did you mean {similar[0]}?" if similar else ""
                self.error(f"unrecognized arguments: {word}{mean}")
        return super().parse_args(args, namespace)

    def error(self, message: str):
        raise InputError(f"{message} (--help lists the arguments)")


def command(program: str) -> str:
    """Return how to call "train.py", or a module such as "tools.ask", from this folder."""
    home = Path(__file__).parent.parent
    here = home.samefile(Path.cwd())
    if program.endswith(".py"):
        return f"python {program if here else shlex.quote(str(home / program))}"
    return f"{'' if here else f'PYTHONPATH={shlex.quote(str(home))} '}python -m {program}"


def stop(number: int, _) -> None:
    """End a program that has no handler of its own: raise Stopped, so that it can clean up."""
    raise Stopped(f"stopped by {signal.Signals(number).name}")


def run(program: Callable) -> None:
    """Run a program's main(); bad input, or a full disk, becomes one line and exit status 2."""
    former = listen(stop)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if hasattr(sys.stdout, "reconfigure"):  # a Windows console may lack a character
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        program()
    except Stopped as e:
        if rank == 0:  # every process stops; the first prints it
            print(e, file=sys.stderr)
        sys.exit(STOPPED)
    except Exception as e:
        if isinstance(e, OSError) and e.strerror:
            e = InputError(f"{e.filename or 'the machine'}: {e.strerror}")
        # on a CPU torch has no type for it
        on_cpu = isinstance(e, RuntimeError) and "allocate memory" in str(e)
        if on_cpu or isinstance(e, (MemoryError, torch.OutOfMemoryError)):
            e = InputError(f"out of memory: {str(e).splitlines()[0][:200]}; lower --micro-batch, "
                           "then add --recompute; `python -m tools.plan` says what a run wants")
        bad_input = isinstance(e, InputError)
        # another process may have a better error: then the launcher ends this one
        if rank > 0 or (world > 1 and not bad_input):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        if not bad_input:
            raise e
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
