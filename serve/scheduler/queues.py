"""Queue of one model, which shares its time fairly between owners, and between the jobs of each.

Each owner has a tag, the cost of the images that ran for it: the owner of the lowest tag is next,
and an owner who comes back after a pause starts at the tag that is served (start-time fair queuing,
Goyal et al. 1996). Among the jobs of an owner goes the one that would be finished first if all of
them ran at once, each at its share of the speed (weighted fair queuing, Demers et al. 1989): small
jobs pass a huge one, equal ones go in the order of their arrival, and each is done about as soon as
if it had its share from the start. Whatever has waited for too long has a turn first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from latentforge.serve.request import BatchKey, ImageRequest, Row

__all__ = ["FairQueue", "Flow", "Taken"]


@dataclass(eq=False)
class Flow:
    """Images of one job that wait.

    Attributes:
        job: id of the job.
        owner: name of its key.
        request: the job's request.
        arrived: seconds, when the job was accepted.
        rows: its images that wait.
        alone: True for images that do not share a batch, since one of them failed there.
        finish: virtual time at which all are done, if all jobs of the owner run at once.
        since: seconds, when it had a turn, or arrived.
        row_cost: work of one image.
    """

    job: str
    owner: str
    request: ImageRequest
    arrived: float
    rows: deque[Row]
    alone: bool = False
    finish: float = 0.0
    since: float = field(init=False)
    row_cost: float = field(init=False)

    def __post_init__(self) -> None:
        self.since, self.row_cost = self.arrived, self.key.row_cost

    @property
    def key(self) -> BatchKey:
        """Key of the batches that the images may run in."""
        return self.request.key

    @property
    def cost(self) -> float:
        """Work of all its images."""
        return self.row_cost * len(self.rows)


@dataclass(eq=False)
class _Share:
    """Waiting jobs of one owner.

    Attributes:
        tag: of the owner among the others.
        time: virtual time of its jobs.
        images: number of images.
        cost: work of all.
        flows: the jobs' images, by job and by being alone.
    """

    tag: float
    time: float = 0.0
    images: int = 0
    cost: float = 0.0
    flows: dict[tuple[str, bool], Flow] = field(default_factory=dict)


Taken = Sequence[tuple[Flow, Row]]

Allowed = Callable[[Flow, Taken], bool]
"""(flow, batch so far) -> True if the next image of the flow may join it."""


class FairQueue:
    """Waiting images of one model.

    Args:
        aging_seconds: wait for a turn after which a job has one before all others of its owner.
    """

    def __init__(self, aging_seconds: float) -> None:
        self._aging = aging_seconds
        self._shares: dict[str, _Share] = {}
        self._paused: dict[str, float] = {}
        self._time = 0.0

    def __iter__(self) -> Iterator[Flow]:
        for share in self._shares.values():
            yield from share.flows.values()

    def __len__(self) -> int:
        return sum(share.images for share in self._shares.values())

    @property
    def cost(self) -> float:
        """Work of all images that wait."""
        return sum(share.cost for share in self._shares.values())

    @property
    def jobs(self) -> int:
        """Number of jobs that wait; one that waits to run alone too counts twice."""
        return sum(len(share.flows) for share in self._shares.values())

    def jobs_of(self, owner: str) -> int:
        """Return the number of jobs of one owner that wait."""
        share = self._shares.get(owner)
        return len(share.flows) if share is not None else 0

    def work_before(self, owner: str, cost: float) -> float:
        """Return the work that would be done before that of a further job of an owner ends.

        Args:
            owner: the owner.
            cost: work of the job.
        """
        if (share := self._shares.get(owner)) is None:
            return 0.0
        earlier = (f for f in share.flows.values() if f.finish <= share.time + cost)
        owners = len(self._shares)
        return min(self.cost, owners * sum(flow.cost for flow in earlier))

    def add(self, flow: Flow) -> None:
        """Let the images of a job wait. Those that join others of the job are behind them."""
        share = self._shares.get(flow.owner)
        if share is None:
            tag = max(self._time, self._paused.pop(flow.owner, 0.0))
            share = self._shares[flow.owner] = _Share(tag)
        share.images += len(flow.rows)
        share.cost += flow.cost
        name = (flow.job, flow.alone)
        if (waiting := share.flows.get(name)) is not None:
            waiting.rows.extend(flow.rows)
            return
        flow.finish = share.time + flow.cost
        share.flows[name] = flow

    def discard(self, job: str, owner: str) -> None:
        """Let the images of a job wait no longer."""
        for alone in (False, True):
            flow = self._flow(owner, (job, alone))
            if flow is not None:
                share = self._shares[owner]
                share.images -= len(flow.rows)
                share.cost -= flow.cost
                flow.rows.clear()
                self._leave(flow)

    def take(self, batch_size: Callable[[BatchKey], int], allowed: Allowed, now: float) -> Taken:
        """Take the images that run next: as many of one key as are worth it; none if none may run.

        Args:
            batch_size: most images of a key that run together.
            allowed: says which images may run.
            now: seconds.
        """
        first = self._first(allowed, now)
        if first is None:
            return ()
        size = 1 if first.alone else batch_size(first.key)
        taken: list[tuple[Flow, Row]] = []
        for flow in [first, *self._companions(first)]:
            while flow.rows and len(taken) < size and allowed(flow, taken):
                taken.append((flow, self._pop(flow)))
                flow.since = now
        return taken

    def _first(self, allowed: Allowed, now: float) -> Flow | None:
        for share in sorted(self._shares.values(), key=lambda share: share.tag):
            flows = [flow for flow in share.flows.values() if allowed(flow, ())]
            if flows:
                oldest = min(flows, key=lambda flow: flow.since)
                aged = now - oldest.since >= self._aging
                return oldest if aged else min(flows, key=lambda flow: flow.finish)
        return None

    def _companions(self, first: Flow) -> list[Flow]:
        """Return the other flows whose images may share a batch, in the order of their turns."""
        if first.alone:
            return []
        others = (flow for flow in self if flow is not first and not flow.alone)
        same = (flow for flow in others if flow.key == first.key)
        return sorted(same, key=lambda flow: (self._shares[flow.owner].tag, flow.finish))

    def _pop(self, flow: Flow) -> Row:
        row, cost = flow.rows.popleft(), flow.row_cost
        share = self._shares[flow.owner]
        self._time = max(self._time, share.tag)
        share.images -= 1
        share.cost -= cost
        share.tag += cost
        share.time += cost / len(share.flows)
        self._leave(flow)
        return row

    def _leave(self, flow: Flow) -> None:
        """Remove a flow without images, and the share of an owner without flows."""
        if flow.rows:
            return
        share = self._shares[flow.owner]
        del share.flows[flow.job, flow.alone]
        if share.flows:
            return
        del self._shares[flow.owner]
        self._paused[flow.owner] = share.tag
        self._paused = {name: tag for name, tag in self._paused.items() if tag > self._time}

    def _flow(self, owner: str, name: tuple[str, bool]) -> Flow | None:
        share = self._shares.get(owner)
        return share.flows.get(name) if share is not None else None
