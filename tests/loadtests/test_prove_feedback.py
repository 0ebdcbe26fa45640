"""The proof of the labels, in small: a thousand times fewer of them."""

from pathlib import Path

from loadtests.prove_feedback import Plan, prove, shown


async def test_every_label_counts_once_while_a_worker_is_killed_and_redis_restarted(
    tmp_path: Path,
) -> None:
    plan = Plan(
        calls=1_000,
        alone=20,
        rounds=1,
        megabytes=1,
        disturbances=("redis killed",),
        flood=False,
    )
    report = await prove(plan, tmp_path)
    assert report.faults == [], "\n".join(shown(report))
    assert report.disturbed == {"redis killed": 1}
