"""When the service builds: at once, in quiet, not for ever later, and again after a failure."""

from cache_builder.agenda import Agenda
from cache_builder.serve_config import ServiceRules

RULES = ServiceRules(quiet_s=10, patience_s=35, retry_s=100)


class Clock:
    """Time that stands still between calls of `pass_`."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def pass_(self, seconds: float) -> None:
        self.now_s += seconds


def begun() -> tuple[Agenda, Clock]:
    clock = Clock()
    agenda = Agenda(RULES, clock)
    assert agenda.is_due()
    agenda.begin()
    return agenda, clock


def test_nothing_is_due_where_nothing_has_changed() -> None:
    agenda, clock = begun()
    clock.pass_(1e9)
    assert not agenda.is_due()


def test_a_build_waits_for_quiet_but_not_for_ever() -> None:
    agenda, clock = begun()
    agenda.change()
    assert agenda.waits_for_quiet
    clock.pass_(9)
    agenda.change()
    clock.pass_(9)
    assert not agenda.is_due()
    clock.pass_(1)
    assert agenda.is_due()
    agenda.begin()
    for _ in range(3):
        agenda.change()
        clock.pass_(9)
        assert not agenda.is_due()
    agenda.change()
    clock.pass_(8)  # 35 s after the first change
    assert agenda.is_due()


def test_failures_are_tried_again_ever_later_and_at_once_after_a_change() -> None:
    agenda, clock = begun()
    pauses = []
    for _ in range(8):
        pauses.append(agenda.fail())
        clock.pass_(pauses[-1] - 1)
        assert not agenda.is_due()
        clock.pass_(1)
        assert agenda.is_due()
        agenda.begin()
    assert pauses == [100, 200, 400, 800, 1600, 3200, 3600, 3600]
    agenda.fail()
    agenda.change()
    clock.pass_(10)
    assert agenda.is_due()
    agenda.begin()
    agenda.succeed()
    assert agenda.fail() == 100


def test_what_is_put_off_comes_and_takes_along_what_has_changed() -> None:
    agenda, clock = begun()
    agenda.change()
    agenda.again(1)
    assert not agenda.waits_for_quiet
    clock.pass_(1)
    assert agenda.is_due()
