"""Benchmarks: participants on the same request, each in its own process, with interleaved runs.

* protocol.py: a participant, its job, and the messages that it exchanges
* participant_process.py: the parent's side of a participant's process
* worker.py: the participant's side, and the program that serves an engine directory
* interleaved.py: several participants in turn, A B A B
* study.py: everything that ``latentforge bench`` measures
* summary.py: results as text for a terminal
"""

__all__ = ["REPEATS"]

REPEATS = 5
"""Default number of timed runs per participant: the fewest that support a conclusion."""
