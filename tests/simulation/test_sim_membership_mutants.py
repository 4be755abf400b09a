"""Whole clusters from seeds; then planted bugs, each of which the checkers must catch."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import pytest

from manifold.kernel.config import MembershipConfig
from manifold.kernel.effects import Effect, Persist
from manifold.kernel.membership.messages import Gossip, State, Update
from manifold.kernel.membership.protocol import Membership
from manifold.kernel.membership.suspicion import least_ms
from manifold.kernel.membership.table import Record, Table
from manifold.tools.simulator.faults import Faults, parse
from manifold.tools.simulator.membership import Detection, factory, membership_only
from manifold.tools.simulator.run import Report, build, settle, simulate

SIZES = (2, 3, 5, 8, 16)


@pytest.mark.parametrize("faults", ["none", "light", "heavy"])
@pytest.mark.parametrize("block", range(5))
def test_safety_under_faults_then_agreement_after_healing(faults: str, block: int) -> None:
    for seed in range(block * 14, block * 14 + 14):
        report = simulate(seed, SIZES[seed % 5], faults, 25_000.0, core=seed % 3 == 0)
        assert not report.failures, report.text()


def test_sixteen_nodes_that_boot_together_agree_within_half_a_second_with_few_messages() -> None:
    for seed in range(10):
        world, made = build(seed, 16, Faults(), membership_only)
        world.start_all()
        agreement = made.checkers[-1]
        took_ms = world.run_until(lambda: not agreement.settled(world, world.nodes), 2_000.0, 20.0)  # noqa: B023
        assert took_ms is not None and took_ms <= 600.0
        world.run(3_000.0 - world.now_ms)
        assert world.network.sent / 16 < 50
        before = world.network.sent
        world.run(20_000.0)
        assert (world.network.sent - before) / 16 / 20 < 3  # idle: a probe and an answer a second


@pytest.mark.parametrize(("nodes", "seeds"), [(16, 12), (64, 4)])
def test_detection_takes_what_the_formula_says(nodes: int, seeds: int) -> None:
    """T * e/(e-1) + min: the mean over seeds lies within a period and a half of it."""
    config = MembershipConfig()
    took_ms = []
    for seed in range(seeds):
        world, made = build(seed, nodes, Faults(), membership_only)
        detection = next(c for c in made.checkers if isinstance(c, Detection))
        world.start_all()
        world.run(4_000.0 + 137.0 * seed)
        victim = world.nodes[-1 - seed % 3]
        world.crash(victim)
        world.run(30_000.0)
        took_ms.append(detection.took_ms[(victim.kid, 1)])
    expected_ms = config.probe_ms * 1.582 + least_ms(config, nodes)
    assert abs(mean(took_ms) - expected_ms) < 1.5 * config.probe_ms
    assert max(took_ms) < expected_ms + 6 * config.probe_ms


@pytest.mark.parametrize("size", [2, 5, 16])
def test_two_halves_that_buried_each_other_meet_again(size: int) -> None:
    world, made = build(size, size, Faults(), membership_only)
    world.start_all()
    world.run(3_000.0)
    world.partition(world.nodes[: size // 2], 150_000.0)
    world.run(150_000.0)
    far = world.nodes[0].machine.get(world.nodes[-1].kid)
    assert far is not None and far.state == State.DEAD
    failures: list[str] = []
    assert settle(world, made.checkers, world.nodes, failures) is not None, failures


def test_a_paused_node_buries_nobody_and_is_found_again() -> None:
    for seed in range(8):
        world, made = build(seed, 8, Faults(), membership_only)
        world.start_all()
        world.run(3_000.0)
        sleeper = world.nodes[seed]
        world.pause(sleeper, 40_000.0)
        world.run(40_500.0)
        views = [sleeper.machine.get(node.kid).state for node in world.nodes if node.up]
        assert State.DEAD not in views
        assert settle(world, made.checkers, world.nodes, []) is not None


class ForgetsItsIncarnation(Membership):
    """Persists zero whatever it claims (habitat#5581)."""

    def _persist(self) -> Persist:
        return Persist("incarnation", b"\x91\x00")


class SendsBeforeItIsDurable(Membership):
    def _finish(
        self, now_ms: float, *, ticked: bool = False, persist: bool = False
    ) -> list[Effect]:
        effects = super()._finish(now_ms, ticked=ticked, persist=persist)
        return sorted(effects, key=lambda effect: isinstance(effect, Persist))


class NeverRefutes(Membership):
    def _about_me(self, update: Update, now_ms: float) -> None:
        return


class RaisesOthers(Membership):
    """Accuses with an incarnation of its own making."""

    def _apply(self, update: Update, now_ms: float, *, quiet: bool = False) -> None:
        if update.by == self.me.kid and update.state == State.SUSPECT:
            raised = update.incarnation + 1
            update = Update(update.kid, update.boot, raised, update.state, update.by)
        super()._apply(update, now_ms, quiet=quiet)


class StaleAliveWins(Table):
    """Resurrects: any alive of the same boot replaces dead."""

    def merge(self, update: Update, now_ms: float) -> tuple[Record | None, State | None, bool]:
        record = self.get(update.kid)
        same = record is not None and record.boot == update.boot
        if same and record.state == State.DEAD and update.state == State.ALIVE:
            record.incarnation, record.state = update.incarnation, State.ALIVE
            self.live += 1
            return record, State.DEAD, True
        return super().merge(update, now_ms)


class Resurrects(Membership):
    def __init__(self, *arguments: object, **named: object) -> None:
        super().__init__(*arguments, **named)  # type: ignore[arg-type]
        self._table = StaleAliveWins()


class KeepsTheFirstIncarnation(Membership):
    """Does not store a higher incarnation where the state stays (al8n/memberlist#197)."""

    def _apply(self, update: Update, now_ms: float, *, quiet: bool = False) -> None:
        row = self._table.get(update.kid)
        if row is not None and (row.boot, row.state) == (update.boot, update.state):
            return
        super()._apply(update, now_ms, quiet=quiet)


class SuspectsAtOnce(Membership):
    """A verdict without asking anybody else, after a tenth of the time."""

    def _probe_indirectly(self, probe: object, now_ms: float) -> None:
        self._probe.data_seq, self._probe.end_ms = 0, now_ms  # type: ignore[union-attr]


class CallsNobodyDead(Membership):
    def _judge(self, now_ms: float) -> None:
        for suspicion in self._suspicions.values():
            suspicion.deadline_ms = now_ms + 1e9


class NeverMeetsAgain(Membership):
    """No call to the dead, no call to absent seeds once the cluster was found."""

    def _exchange_step(self, now_ms: float) -> None:
        self._reconnect_due_ms = self._exchange_due_ms = now_ms + 1e9

    def _join(self, now_ms: float) -> None:
        if self._table.live == 0:
            super()._join(now_ms)
        else:
            self._seeds.due_ms = now_ms + 1e9


def hunt(mutant: type[Membership], faults: str, sizes: tuple[int, ...] = (5, 8, 16)) -> Report:
    """The first failing run of a mutant, in few seeds."""
    made = factory(MembershipConfig(), mutant)
    for seed in range(12):
        report = simulate(
            seed, sizes[seed % len(sizes)], faults, 30_000.0, made, core=seed % 2 == 1
        )
        if report.failures:
            return report
    raise AssertionError(f"{mutant.__name__} was not caught")


@pytest.mark.parametrize(
    ("mutant", "faults", "says"),
    [
        (ForgetsItsIncarnation, "heavy", "C4"),
        (SendsBeforeItIsDurable, "heavy", "C4"),
        (NeverRefutes, "heavy", "every view"),
        (RaisesOthers, "heavy", "C3"),
        (Resurrects, "heavy", ""),
        (CallsNobodyDead, "heavy", "every view"),
        (SuspectsAtOnce, "delay=400:700", "C1"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_each_planted_bug_is_caught(mutant: type[Membership], faults: str, says: str) -> None:
    report = hunt(mutant, faults)
    assert any(says in failure for failure in report.failures), report.text()
    assert report.command in report.text()


@pytest.mark.parametrize(
    ("machine", "resurrected"), [(Membership, False), (KeepsTheFirstIncarnation, True)]
)
def test_a_dead_node_stays_dead_after_a_later_death_was_heard(
    machine: type[Membership], resurrected: bool
) -> None:
    """dead(3), dead(7), then an alive(5) that was long under way."""
    world, _ = build(1, 3, Faults(), factory(MembershipConfig(), machine))
    world.start_all()
    world.run(3_000.0)
    viewer, victim = world.nodes[0].machine, world.nodes[1].kid
    meta = viewer.get(victim).meta
    for incarnation, state in ((3, State.DEAD), (7, State.DEAD), (5, State.ALIVE)):
        update = Update(victim, 1, incarnation, state, "", meta)
        viewer.receive(world.nodes[2].kid, Gossip(1, (update,)), viewer._armed_ms)
    assert (viewer.get(victim).state == State.ALIVE) is resurrected


def test_a_machine_that_never_calls_the_dead_stays_apart() -> None:
    made = factory(MembershipConfig(), NeverMeetsAgain)
    world, protocols = build(1, 6, Faults(), made)
    world.start_all()
    world.run(3_000.0)
    world.partition(world.nodes[:3], 150_000.0)
    world.run(150_000.0)
    assert settle(world, protocols.checkers, world.nodes, []) is None


def test_the_unchanged_machine_passes_where_the_mutants_are_caught() -> None:
    same: Callable[[str], Faults] = parse
    assert same("delay=400:700").quiet is True
    for seed in range(4):
        report = simulate(seed, 5, "delay=100:200", 30_000.0)
        assert not report.failures, report.text()


def test_a_large_cluster_starts_from_what_it_knew_before() -> None:
    report = simulate(1, 130, "light", 16_000.0)
    assert not report.failures, report.text()
    assert report.messages < 130 * 18 * 12  # per node and second; introductions alone would be 60
