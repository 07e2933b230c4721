"""Programs that a person types: python -m tools.ask RUN, and so on."""

import sys

from plumbing.signals import begin_program

if sys.argv[0] == "-m":  # this package is loading because one of its programs was started
    begin_program()
