"""Load in virtual time: the throughput, the waits and the fairness that the scheduler gives."""

import random

import pytest
from simulation import Cost, Simulation, image_request, percentile

from latentforge.serve.scheduler import Limits

SECONDS = 60.0


def poisson(simulation: Simulation, rate: float, *, seed: int = 0, **options: float) -> None:
    """Let single images arrive at random, at a rate per second, for a minute."""
    draw = random.Random(seed)
    request, time = image_request(), draw.expovariate(rate)
    while time < SECONDS:
        simulation.send(time, request, **options)  # type: ignore[arg-type]
        time += draw.expovariate(rate)


@pytest.mark.parametrize(
    ("cost", "replicas", "capacity"),
    [
        (Cost(0.015, 0.005), 1, 8 / 0.55),  # they gain nearly three times
        (Cost(0.0, 0.04), 2, 5.0),  # they gain nothing
    ],
)
def test_ten_times_the_load(cost: Cost, replicas: int, capacity: float) -> None:
    limits = Limits(queue_seconds=5)
    simulation = Simulation(cost, limits, replicas)
    poisson(simulation, 10 * capacity)
    simulation.run()
    accepted, refused = simulation.having("completed"), simulation.having("refused")
    assert len(accepted) + len(refused) == len(simulation.outcomes)
    within = [outcome for outcome in accepted if (outcome.ended or 0) <= SECONDS]
    assert len(within) >= 0.9 * capacity * SECONDS
    service = cost.seconds(max(simulation.batches, key=lambda batch: len(batch.rows))) * 10
    assert percentile((o.seconds for o in accepted), 99) <= limits.queue_seconds + service
    scheduler = simulation.scheduler
    assert (scheduler.waiting, scheduler.running, scheduler.permits, scheduler.jobs) == (0,) * 4


def test_deadlines_under_load_waste_nothing() -> None:
    """Requests that could not be done at their deadline are refused at once."""
    simulation = Simulation(Cost(0.0, 0.02), Limits(queue_seconds=60))
    poisson(simulation, 50, seconds=4)
    simulation.run()
    late, done = simulation.having("deadline_exceeded"), simulation.having("completed")
    assert len(done) >= 0.9 * 5 * SECONDS
    assert len(late) <= 0.03 * len(done)


def small(simulation: Simulation, start: float, gap: float) -> list[str]:
    request = image_request(steps=4)
    return [simulation.send(start + gap * index, request) for index in range(20)]


@pytest.mark.parametrize("gap", [0.0, 0.2])
@pytest.mark.parametrize(
    "huge",
    [
        {"images": 64},  # of the same size and steps, many images
        {"images": 600},  # more than a minute: it has its turns, no more
        {"images": 10, "height": 768, "width": 768, "steps": 15},
    ],
)
def test_small_requests_beside_a_huge_one(huge: dict[str, int], gap: float) -> None:
    cost, limits = Cost(0.005, 0.015), Limits(aging_seconds=2)
    alone = Simulation(cost, limits)
    small(alone, 0.5, gap)
    alone.run()
    beside = Simulation(cost, limits)
    large = beside.send(0.0, image_request(**huge))  # type: ignore[arg-type]
    names = small(beside, 2.5, gap)
    beside.run()
    p95 = percentile((o.seconds for o in alone.having("completed")), 95)
    assert percentile((beside.outcomes[name].seconds for name in names), 95) <= 3 * p95
    work = sum(cost.seconds(batch) * batch.settings.steps for batch in beside.batches)
    assert beside.outcomes[large].seconds <= work * 1.01
