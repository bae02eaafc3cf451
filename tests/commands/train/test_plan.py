"""Records of training are at steps that follow from the settings alone."""

from __future__ import annotations

from hpcsgd.commands.train.plan import Plan


def recorded(plan: Plan, synchronous: bool) -> list[int]:
    return [step for step in range(1, plan.total + 1) if plan.has_record(step, synchronous)]


def test_records_come_with_a_period_or_at_the_stops_of_an_asynchronous_method() -> None:
    plan = Plan(10, 10, 26, 0, evaluate_every=10, checkpoint_every=8, snapshot_every=27, log_every=6)
    assert recorded(plan, True) == [6, 12, 18, 24, 26]
    assert recorded(plan, False) == [6, 8, 10, 16, 20, 24, 26]
    stops, step = [], 0
    while step < plan.total:
        step += plan.steps_to_next_stop(step)
        stops.append(step)
    assert stops == recorded(plan, False)
