"""The judge of the studies' goals: which goals there are under a condition, and what is met."""

from __future__ import annotations

import pytest

from tests.commands.bench.goals import judge

AR, LASGD, GROUPS = "allreduce", "lasgd:period=auto", "ps:mode=elastic,groups=4"
PURE, FULL, DYNAMIC = "ps:mode=sync,groups=8", "backup:backups=0", "backup"


def rows(
    method: str, times: list[float | str], accuracy: float = 0.9, link: str = "", delays: str = "constant:"
) -> list[dict[str, str]]:
    """A run per time, in which an iteration takes as many milliseconds."""
    values = {"simulated_delays": delays, "method": method, "accuracy": str(accuracy)}
    values |= {"data": "digits", "link": link} if link else {}
    return [values | {"seconds_to_target": str(t), "ms_per_iteration": str(t or 1)} for t in times]


def verdicts(found: list[dict[str, str]]) -> list[str]:
    return [line.rpartition(": ")[2] for line in judge(found)]


@pytest.mark.parametrize(
    ("link", "delays", "share", "lost", "expected"),
    [
        ("fast", "constant:", 1.05, 0.004, ["met", "met"]),
        ("fast", "constant:", 1.06, 0, ["not met", "met"]),
        ("fast", "slow:", 0.4, 0, ["met", "met"]),
        ("fast", "slow:", 0.41, 0, ["not met", "met"]),
        ("100mbit", "constant:", 0.35, 0, ["met", "met"]),
        ("100mbit", "constant:", 0.36, 0.006, ["not met", "not met"]),
        ("100mbit", "slow:", 0.9, 0, ["met"]),
    ],
)
def test_asynchrony(link: str, delays: str, share: float, lost: float, expected: list[str]) -> None:
    baseline = rows(AR, [1, 1, 9], 0.9, link, delays)
    assert verdicts(baseline + rows(LASGD, [share, share, 0.1], 0.9 - lost, link, delays)) == expected


def test_goals_need_both_methods_and_a_target_that_is_reached() -> None:
    assert not judge(rows(AR, [1], link="fast") + rows("lasgd:period=2", [1], link="fast"))
    assert verdicts(rows(AR, [1], link="fast") + rows(LASGD, [""], link="fast")) == ["not met", "met"]
    assert not judge(rows(FULL, [1]))


@pytest.mark.parametrize(("share", "verdict"), [(0.39, ["met"]), (0.41, ["not met"])])
def test_servers_on_slow_links_only(share: float, verdict: list[str]) -> None:
    for link, expected in (("fast", []), ("100mbit", verdict)):
        assert verdicts(rows(PURE, [1], link=link) + rows(GROUPS, [share], link=link)) == expected


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, ["met", "met"]), (0.7, ["not met", "met"]), (0.95, ["not met"] * 2)]
)
def test_stragglers(share: float, expected: list[str]) -> None:
    found = rows(FULL, [1], delays="slow:") + rows(DYNAMIC, [share], delays="slow:")
    assert verdicts(found + rows("dsgd", [0.9], delays="slow:")) == expected
    assert not judge(rows(FULL, [1], delays="pareto:") + rows(DYNAMIC, [2], delays="pareto:"))
