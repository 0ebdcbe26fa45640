"""The proof of releases, in small: one that is as good, one that is not, and a rollback."""

from pathlib import Path

from loadtests.prove_release import Plan, lines, prove


async def test_who_is_as_good_is_promoted_who_is_not_is_rolled_back_and_the_ledgers_are_exact(
    tmp_path: Path,
) -> None:
    plan = Plan(parts=("small",), workers=1, per_s=150.0, connections=8)
    report = await prove(plan, tmp_path)
    assert report.violations == [], "\n".join(lines(report))
    assert [each.how for each in report.releases["small"]] == ["promoted", "rolled back"]
