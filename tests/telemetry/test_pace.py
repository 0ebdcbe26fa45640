from app.telemetry.pace import Pace


def beats_until_due(pace: Pace, took_s: float) -> int:
    """Ten a second, once it was done at 100 s."""
    pace.done(100.0, took_s)
    return next(beat for beat in range(1, 1000) if pace.is_due(100.0 + beat / 10 + 0.001))


def test_what_is_cheap_is_done_at_every_beat() -> None:
    assert Pace(0.0, 1.0, 0.003).is_due(100.0)
    assert beats_until_due(Pace(0.0, 1.0, 0.003), 0.000_03) == 1


def test_what_is_dear_takes_no_more_than_its_share() -> None:
    assert beats_until_due(Pace(0.0, 1.0, 0.003), 0.001_5) == 5


def test_it_is_done_in_time_whatever_it_takes() -> None:
    assert beats_until_due(Pace(0.0, 1.0, 0.003), 1.0) == 10


def test_where_there_is_no_hurry_the_least_pause_is_kept() -> None:
    assert beats_until_due(Pace(1.0, 1.0, 0.003), 0.000_03) == 10
