"""How many requests may be sent again."""

from app.backends.retry_budget import RetryBudget


def test_a_tenth_of_the_requests_may_be_sent_again_and_five_at_once() -> None:
    budget = RetryBudget()
    again = 0
    for _ in range(1000):
        budget.earn()
        again += budget.spend()
    assert 100 <= again <= 105


def test_what_was_not_sent_again_is_not_saved_up() -> None:
    budget = RetryBudget()
    for _ in range(1000):
        budget.earn()
    assert sum(budget.spend() for _ in range(100)) == 5
