"""Scheduler: who runs next, with whom, and for how long a client may wait. Does no I/O."""

from latentforge.serve.scheduler.gains import BatchGains
from latentforge.serve.scheduler.limits import Limits, OwnerLimits
from latentforge.serve.scheduler.scheduler import JobChange, Scheduler

__all__ = ["BatchGains", "JobChange", "Limits", "OwnerLimits", "Scheduler"]
