"""Max-min rates against a linear-programming twin, and segments on shared links against closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from test_cluster import make_cluster

from rlhfsim.cluster import ClusterTopology
from rlhfsim.costs.segment import Elapsed, Route, Segment, Transfer
from rlhfsim.sim.links import LinkPool, lone_rate, max_min_rates

LINKS = "abcdef"
COSTS = st.sampled_from([0.25, 0.5, 1.0, 2.0, 7.0])


@st.composite
def networks(draw: Any) -> tuple[list[dict[str, float]], dict[str, float], list[float]]:
    capacities = {link: draw(st.floats(0.5, 50.0)) for link in LINKS}
    usages = [
        draw(st.dictionaries(st.sampled_from(LINKS), COSTS, min_size=1, max_size=4))
        for _ in range(draw(st.integers(1, 6)))
    ]
    demands = [draw(st.one_of(st.just(math.inf), st.floats(0.01, 50.0))) for _ in usages]
    return usages, capacities, demands


def weight(usage: dict[str, float], capacities: dict[str, float]) -> float:
    """Bandwidth that a payload byte takes on the flow's busiest link."""
    return max((u / capacities[link], u) for link, u in usage.items())[1]


def twin(usages: list[dict[str, float]], capacities: dict[str, float], demands: list[float]) -> list[float]:
    """Lexicographic max-min by linear programs: raise the lowest level, fix whoever cannot go above it, repeat."""
    n, w = len(usages), [weight(u, capacities) for u in usages]
    links = [[u.get(link, 0.0) / wi for u, wi in zip(usages, w, strict=True)] for link in LINKS]
    upper = [d * wi if math.isfinite(d) else None for d, wi in zip(demands, w, strict=True)]
    fixed: dict[int, float] = {}

    def best(objective: list[float], floors: dict[int, float], level: bool) -> float:
        # Variables: one level a flow, and the common lowest one.
        rows, rhs = [[*row, 0.0] for row in links], [capacities[link] for link in LINKS]
        if level:
            rows += [[-1.0 if j == i else 0.0 for j in range(n)] + [1.0] for i in range(n) if i not in fixed]
            rhs += [0.0] * (n - len(fixed))
        bounds = [
            (fixed[i] * (1 - 1e-11), fixed[i]) if i in fixed else (floors.get(i, 0.0), upper[i]) for i in range(n)
        ]
        solved = linprog([-x for x in objective], A_ub=rows, b_ub=rhs, bounds=[*bounds, (0, None)], method="highs")
        assert solved.status == 0, solved.message
        return -float(solved.fun)

    while len(fixed) < n:
        low = best([0.0] * n + [1.0], {}, True)
        free = [i for i in range(n) if i not in fixed]
        floors = dict.fromkeys(free, low * (1 - 1e-9))
        stuck = [i for i in free if best([float(j == i) for j in range(n)] + [0.0], floors, False) <= low * (1 + 1e-6)]
        fixed |= dict.fromkeys(stuck or free, low)
    return [fixed[i] / w[i] for i in range(n)]


@settings(deadline=None, max_examples=60)
@given(networks())
def test_equal_to_the_linear_programming_twin(network: Any) -> None:
    assert max_min_rates(*network) == pytest.approx(twin(*network), rel=1e-5)


@settings(deadline=None, max_examples=300)
@given(networks())
def test_capacities_hold_and_no_flow_can_gain_but_from_a_smaller_one(network: Any) -> None:
    usages, capacities, demands = network
    rates = max_min_rates(usages, capacities, demands)
    load = {link: sum(r * u.get(link, 0.0) for r, u in zip(rates, usages, strict=True)) for link in LINKS}
    assert all(load[link] <= capacities[link] * (1 + 1e-9) for link in LINKS)
    level = [r * weight(u, capacities) for r, u in zip(rates, usages, strict=True)]
    for i, usage in enumerate(usages):
        assert 0 < rates[i] <= demands[i]
        if rates[i] < demands[i] * (1 - 1e-9):
            full = [link for link in usage if load[link] >= capacities[link] * (1 - 1e-9)]
            highest = [max(level[j] for j, u in enumerate(usages) if link in u) for link in full]
            assert any(level[i] >= most * (1 - 1e-9) for most in highest)


@given(networks(), st.randoms(use_true_random=False))
def test_order_of_the_flows_does_not_matter(network: Any, random: Any) -> None:
    usages, capacities, demands = network
    order = list(range(len(usages)))
    random.shuffle(order)
    shuffled = max_min_rates([usages[i] for i in order], capacities, [demands[i] for i in order])
    straight = max_min_rates(usages, capacities, demands)
    assert shuffled == pytest.approx([straight[i] for i in order], rel=1e-9)


def test_flows_without_links_get_what_they_ask_for() -> None:
    usages: list[dict[str, float]] = [{}, {"a": 1.0}, {"a": 1.0}]
    assert max_min_rates(usages, {"a": 4.0}, [math.inf] * 3) == [math.inf, 2.0, 2.0]


def test_two_collectives_share_a_nic_by_bytes_on_it_not_by_payload() -> None:
    # A payload byte of the second flow costs four bytes on the NIC: equal bandwidth there, a quarter of the payload.
    assert max_min_rates([{"nic": 1.0}, {"nic": 4.0}], {"nic": 8.0}, [math.inf] * 2) == pytest.approx([4.0, 1.0])


def test_another_flow_can_make_one_faster() -> None:
    """The anomaly of max-min fairness: a newcomer slows a neighbour, which frees a link for somebody else."""
    capacities = {"a": 10.0, "b": 10.0}
    old, new = [{"a": 1.0}, {"a": 1.0, "b": 1.0}], [{"b": 4.0}, {"b": 1.0}, {"b": 1.0}]
    before = max_min_rates(old, capacities, [math.inf] * 2)
    after = max_min_rates([*old, *new], capacities, [math.inf] * 5)
    assert before == pytest.approx([5.0, 5.0])
    assert after[1] == pytest.approx(2.5) and after[0] == pytest.approx(7.5)


# --- segments in simulated time --------------------------------------------------------------------------------------

ROUTES = {
    1: Route({"nic": 1.0, "left": 1.0}, 0.0, 1.0),
    2: Route({"nic": 1.0, "right": 1.0}, 0.0, 1.0),
    3: Route({"far": 1.0}, 0.0, 1.0),
    4: Route({"right": 1.0}, 0.0, 1.0),
    5: Route({}, 0.0, 1.0),
}


class Topology:
    """Routes by the first rank of the first group; counts what is asked."""

    def __init__(self) -> None:
        self.capacities = {"nic": 10.0, "left": 100.0, "right": 20.0, "far": 10.0}

    def route(self, op: str, groups: tuple[tuple[int, ...], ...]) -> Route:
        return ROUTES[groups[0][0]]


def segment(route: int, payload: float, compute: float = 0.0, **more: Any) -> Segment:
    transfer = Transfer("send", ((route, 9),), payload)
    return Segment(f"on {route}", np.array([[compute]]), transfers=(transfer,), **more)


def simulate(*jobs: tuple[float, Segment]) -> tuple[list[tuple[float, Elapsed, float]], float]:
    """Jobs start at their second; (end, breakdown, alone seconds) of each, and when the calendar is empty."""
    env = simpy.Environment()
    pool, out = LinkPool(env, Topology()), {}  # type: ignore[arg-type,var-annotated]

    def job(i: int, start: float, s: Segment) -> Any:
        yield env.timeout(start)
        elapsed, alone = yield from pool.run(s)
        out[i] = (env.now, elapsed, alone)

    for i, (start, s) in enumerate(jobs):
        env.process(job(i, start, s))
    env.run()
    assert not any(pool._flows.values())
    for (end, elapsed, _), (start, _) in zip((out[i] for i in range(len(jobs))), jobs, strict=True):
        assert elapsed.seconds == pytest.approx(end - start, rel=1e-9)
        assert elapsed.compute + elapsed.communication + elapsed.peers == pytest.approx(elapsed.seconds, rel=1e-9)
    return [out[i] for i in range(len(jobs))], env.now


def test_two_sends_out_of_one_nic_get_half_each_then_all() -> None:
    # 10 bytes/s. Both at 5 until the short one (20 bytes) ends at 4 s; the other has 30 of 50 left, at 10.
    (short, long), end = simulate((0.0, segment(1, 20.0)), (0.0, segment(2, 50.0)))
    assert (short[0], short[2]) == pytest.approx((4.0, 2.0))
    assert (long[0], long[2]) == pytest.approx((7.0, 5.0))
    assert end == pytest.approx(7.0)


def test_a_late_send_finds_the_rest() -> None:
    # The first moves 30 bytes alone in 3 s and the other 20 sharing, until 7 s; the second then has 10 of 30 left.
    (first, second), _ = simulate((0.0, segment(1, 50.0)), (3.0, segment(2, 30.0)))
    assert (first[0], second[0]) == pytest.approx((7.0, 8.0))


def test_others_are_left_alone() -> None:
    (a, far), _ = simulate((0.0, segment(1, 20.0)), (0.0, segment(3, 50.0)))
    assert (a[0], far[0]) == pytest.approx((2.0, 5.0))


def test_a_change_reaches_flows_through_others() -> None:
    # right (20): route 2 is held to 5 by the NIC while route 1 runs, so route 4 gets 15; afterwards 10 and 10.
    (one, two, four), _ = simulate((0.0, segment(1, 10.0)), (0.0, segment(2, 100.0)), (0.0, segment(4, 60.0)))
    assert one[0] == pytest.approx(2.0)
    assert four[0] == pytest.approx(2.0 + (60 - 30) / 10)
    assert two[0] == pytest.approx(2.0 + 90 / 10)


def test_compute_is_not_slowed_by_others() -> None:
    # 3 s compute and 2 s transfer; at half the rate 3 + 4. Two of them share for all of their time.
    done, _ = simulate((0.0, segment(1, 20.0, compute=3.0)), (0.0, segment(2, 20.0, compute=3.0)))
    for end, elapsed, alone in done:
        assert (end, alone, elapsed.compute[0], elapsed.communication[0]) == pytest.approx((7.0, 5.0, 3.0, 4.0))


def test_hidden_transfers_ask_only_for_what_they_need() -> None:
    # 9 rounds of 2 s beside 2 bytes each (0.2 s): alone 18.2 s, 18/18.2 bytes/s of 10. The NIC has enough for both.
    hidden = segment(1, 2.0, compute=2.0, repeats=np.array([9.0]), prefetch=1)
    (slow, fast), _ = simulate((0.0, hidden), (0.0, segment(2, 50.0)))
    assert slow[0] == slow[2] == pytest.approx(18.2)
    assert fast[0] == pytest.approx(50 / (10 - 18 / 18.2))


def test_hidden_transfers_come_out_when_the_link_is_too_slow_for_all() -> None:
    # Each needs 80 bytes in 10.8 s (7.4 bytes/s); two of them get 5: 16 s, of which 5.2 s are waiting for the link.
    hidden = segment(1, 8.0, compute=1.0, repeats=np.array([10.0]), prefetch=1)
    done, _ = simulate((0.0, hidden), (0.0, segment(2, 8.0, compute=1.0, repeats=np.array([10.0]), prefetch=1)))
    for end, elapsed, alone in done:
        assert (end, alone, elapsed.compute[0]) == pytest.approx((16.0, 10.8, 10.0))


def test_segments_without_traffic_are_one_event() -> None:
    done, _ = simulate(
        (0.0, segment(5, 1e9, compute=4.0)),
        (0.0, Segment("compute", np.array([[1.0], [2.0]]))),
        (0.0, segment(1, 0.0, compute=1.0)),
    )
    assert [d[0] for d in done] == pytest.approx([4.0, 2.0, 1.0])
    assert done[1][1].peers == pytest.approx([1.0, 0.0])


def test_several_transfers_of_a_segment_do_not_slow_each_other() -> None:
    transfers = (Transfer("send", ((1, 9),), 20.0), Transfer("send", ((2, 9),), 30.0))
    both = Segment("both", np.array([[1.0]]), transfers=transfers)
    (one,), _ = simulate((0.0, both))
    assert one[0] == one[2] == pytest.approx(1.0 + 2.0 + 3.0)
    (one, other), _ = simulate((0.0, both), (0.0, segment(4, 5.0)))  # 12 of 20 on right: enough for its 10 x 0.6
    assert one[0] == pytest.approx(6.0) and other[0] == pytest.approx(5.0 / 14.0)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.floats(0, 20), st.integers(1, 4), st.floats(0.1, 200), st.floats(0, 5), st.booleans()),
        min_size=1,
        max_size=8,
    )
)
def test_never_faster_than_alone_no_ghosts_same_again(jobs: list[tuple[float, int, float, float, bool]]) -> None:
    plan = [
        (start, segment(route, payload, compute, prefetch=int(ahead))) for start, route, payload, compute, ahead in jobs
    ]
    done, end = simulate(*plan)
    assert end == max(d[0] for d in done)  # nothing is left in the calendar after the last end
    assert all(elapsed.seconds >= alone * (1 - 1e-9) for _, elapsed, alone in done)
    assert [d[0] for d in done] == [d[0] for d in simulate(*plan)[0]]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.integers(0, 15),
                st.integers(2, 8),
                st.sampled_from(["all_gather", "all_to_all"]),
                st.floats(1e6, 1e9),
            ),
            min_size=1,
            max_size=2,
        ),
        min_size=2,
        max_size=5,
    )
)
def test_the_pool_looks_at_few_links_and_finds_the_rates_of_all(jobs: list[list[tuple[int, int, Any, float]]]) -> None:
    topology = ClusterTopology(make_cluster(nodes=4, gpus=4, nics=2, leaf=2, oversubscription=3.0))
    env = simpy.Environment()
    pool = LinkPool(env, topology)
    for job in jobs:
        transfers = tuple(
            Transfer(op, (tuple((first + 3 * i) % 16 for i in range(size)),), payload)
            for first, size, op, payload in job
        )
        env.process(pool.run(Segment("job", np.zeros((1, 1)), transfers=transfers)))
    while env.peek() == 0.0:
        env.step()
    flows = {f.number: f for running in pool._flows.values() for f in running.values()}.values()
    assert len(flows) == len(jobs)
    every = topology.capacities
    expected = max_min_rates([f.usage(every) for f in flows], every, [f.demand for f in flows])
    assert [f.rate for f in flows] == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 100)), min_size=1, max_size=6))
def test_blocking_sends_on_one_nic_are_processor_sharing(jobs: list[tuple[float, float]]) -> None:
    """Against a tiny-step twin of equal shares."""
    done, _ = simulate(*((start, segment(1, payload)) for start, payload in jobs))
    left, ends, now, step = [p for _, p in jobs], [0.0] * len(jobs), 0.0, 2e-3
    while any(x > 0 for x in left):
        active = [i for i, (start, _) in enumerate(jobs) if start <= now and left[i] > 0]
        for i in active:
            left[i] -= step * 10.0 / len(active)
            if left[i] <= 0:
                ends[i] = now + step
        now += step
    assert [d[0] for d in done] == pytest.approx(ends, abs=0.1)


def test_an_interrupt_gives_the_links_back() -> None:
    env = simpy.Environment()
    pool, ends = LinkPool(env, Topology()), {}  # type: ignore[arg-type,var-annotated]

    def job(name: str, s: Segment) -> Any:
        try:
            yield from pool.run(s)
        except simpy.Interrupt:
            name += " interrupted"
        ends[name] = env.now

    victim = env.process(job("victim", segment(1, 1000.0)))
    env.process(job("other", segment(2, 50.0)))

    def stop() -> Any:
        yield env.timeout(4.0)
        victim.interrupt()

    env.process(stop())
    env.run()
    # 20 bytes in the first 4 s, the other 30 at the full rate; nothing waits for the victim's end.
    assert ends == {"victim interrupted": 4.0, "other": pytest.approx(7.0)}
    assert env.now == pytest.approx(7.0)


def test_few_events() -> None:
    """No polling: re-timed transfers still have one timer each."""
    env = simpy.Environment()
    pool, steps = LinkPool(env, Topology()), 0  # type: ignore[arg-type]
    for i in range(10):
        env.process(pool.run(segment(1 + i % 2, 10.0 + i)))
    while env.peek() < math.inf:
        env.step()
        steps += 1
    assert steps == 30  # start, timer and end of each of the ten processes


def test_lone_rate() -> None:
    assert lone_rate({"a": 2.0, "b": 1.0}, {"a": 10.0, "b": 4.0}) == 4.0
    assert lone_rate({}, {}) == math.inf
