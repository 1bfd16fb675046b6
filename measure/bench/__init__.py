"""Benchmarks: participants on the same request, each in its own process, with interleaved runs.

protocol.py defines the messages that a participant exchanges and describes one; process.py starts
and drives its process; worker.py serves an engine directory in such a process; interleaved.py runs
several participants in turn; study.py is everything that ``latentforge bench`` measures; summary.py
prints it.
"""

__all__ = ["REPEATS"]

REPEATS = 5
"""Default number of timed runs per participant: the fewest that support a conclusion."""
