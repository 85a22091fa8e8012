"""How much of the job queue each tenant may have, by what a store knows."""

from services.conversation_store.runs.shares import GUESSED_SLOTS, WORKER_REMEMBERED_S, Shares


def test_tenant_alone_may_have_half_of_what_the_workers_do_at_once() -> None:
    shares = Shares()
    assert shares.share("a") == GUESSED_SLOTS // 2
    # Workers of an earlier release do not say how much they do.
    shares.look(at_work=600, now=0)
    assert shares.share("a") == 300
    shares.told("w1", 500, 0)
    shares.told("w2", 100, 0)
    shares.told("w1", 500, 1)
    assert shares.share("a") == 300
    shares.told("w2", 1, 2)
    shares.heard("w1", WORKER_REMEMBERED_S + 1)
    shares.look(at_work=0, now=WORKER_REMEMBERED_S + 2.5)
    assert shares.share("a") == 250
    shares.look(at_work=0, now=3 * WORKER_REMEMBERED_S)
    assert shares.share("a") == 250


def test_worker_that_does_one_thing_at_a_time_has_one_job_of_each_tenant_before_it() -> None:
    shares = Shares()
    shares.told("w", 1, 0)
    for tenant in ("a", "b", "c"):
        assert shares.enter(tenant) is not None
        assert shares.enter(tenant) is None
    shares.taken("a", shares.queued.readings)
    assert shares.has_room("a")


def test_tenants_that_compete_share_evenly_and_a_newcomer_has_his_share_at_once() -> None:
    shares = Shares()
    shares.told("w", 40, 0)
    for tenant in ("a", "b"):
        shares.entered(tenant)
    shares.judge_who_competes()
    assert [shares.share(tenant) for tenant in ("a", "b", "newcomer")] == [10, 10, 6]


def test_turn_that_is_committed_after_a_reading_began_is_not_forgotten() -> None:
    shares = Shares()
    entering = shares.enter("a")
    assert entering is not None
    shares.queued.reading()
    shares.queued.are({})
    shares.has_entered("a", entering)
    assert shares.queued.of("a") == 1


def test_nobody_overtakes_the_line_of_his_own_tenant() -> None:
    shares = Shares()
    shares.joined("a")
    assert shares.is_wanted.is_set()
    assert (shares.has_room("a"), shares.room("a") > 0, shares.has_room("b")) == (False, True, True)
    shares.left("a")
    assert shares.has_room("a")


def test_what_was_done_while_somebody_counted_is_counted_too() -> None:
    shares = Shares()
    shares.entered("a")
    before = shares.queued.readings
    shares.queued.reading()
    shares.entered("a")
    # Whether it is left out of what is being read nobody knows.
    for since in (before, shares.queued.readings):
        shares.taken("a", since)
    assert shares.queued.of("a") == 2
    shares.queued.are({"a": 5})
    assert shares.queued.of("a") == 6
    shares.queued.reading()
    shares.queued.are({})
    assert (shares.queued.of("a"), shares.queued.tenants()) == (0, set())


def test_taken_job_calls_for_a_look_only_if_somebody_is_in_line() -> None:
    shares = Shares()
    shares.taken("a", shares.queued.readings)
    assert not shares.is_wanted.is_set()
    shares.joined("b")
    shares.is_wanted.clear()
    shares.taken("a", shares.queued.readings)
    assert shares.is_wanted.is_set()
