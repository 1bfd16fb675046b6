"""Participants on the same request, in processes of their own, taking turns.

participant.py is the parent's side of one process and what it is asked; turns.py lets several of
them run; statistics.py makes figures of what they took; study.py is what ``latentforge bench``
does with all that.
"""
