"""The benchmark beside TRL: its arithmetic by hand. TRL itself runs where the benchmark does."""

import pytest

from tests.scripts import loaded


@pytest.fixture(scope="module")
def bench():
    with loaded("bench_trl") as module:
        yield module


@pytest.mark.parametrize(
    ("ours", "theirs", "below"),
    [
        ([0.5, 0.52], [0.6, 0.62], True),
        ([0.6, 0.62], [0.5, 0.52], False),
        ([0.5, 0.61], [0.6, 0.62], False),  # they overlap
        ([0.3, 0.59], [0.6, 0.62], False),  # 0.165 on average, and twice the standard error is 0.291
        ([0.98, 0.981], [0.99, 0.991], False),  # too little to matter
        ([0.1], [0.9], None),
    ],
)
def test_ours_is_below_where_every_seed_is_and_by_more_than_the_noise(bench, ours, theirs, below):
    assert bench.clearly_below(ours, theirs) is below


def test_what_counts_at_the_end_is_the_last_quarter(bench):
    assert bench.finals([[0, 0, 0, 0, 0, 0, 1, 2], [0, 1, 3]]) == [1.5, 3]


def test_ratios_are_within_turns_and_the_first_counts_for_the_rewards_alone(bench):
    def turn(reward, seconds, tokens, mib):
        return {"steps": 100, "reward": reward, "seconds": seconds, "tokens": tokens, "peak_mib": mib}

    ours = [turn(10, 50, 300, 400), turn(20, 1, 300, 410), turn(30, 2, 300, 420)]
    theirs = [turn(11, 9, 400, 500), turn(21, 2, 400, 510), turn(31, 8, 400, 520)]
    rows = bench.tables([{"ours": ours, "trl": theirs}]).splitlines()
    assert rows[0] == "| mean reward of completions | ctrlrl, seed 0 | TRL, seed 0 |"
    assert rows[2:5] == [
        "| 0 to 100 | 0.100 | 0.110 |",
        "| 100 to 200 | 0.200 | 0.210 |",
        "| 200 to 300 | 0.300 | 0.310 |",
    ]
    assert "| ctrlrl | 75 | 225 | 3.00 | 420 |" in rows  # 100 and 50 completions a second
    assert "| TRL | 31 | 125 | 4.00 | 520 |" in rows
    assert "| times TRL's | 3.00 (2.00 to 4.00) | 2.25 (1.50 to 3.00) | | |" in rows
