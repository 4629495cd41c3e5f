"""Random numbers by hashing: each row's stream is its own."""

from __future__ import annotations

import torch

from ctrlrl.envs.streams import Streams


def streams(seeds: list[int]) -> Streams:
    made = Streams(len(seeds), torch.device("cpu"))
    made.seed(range(len(seeds)), seeds)
    return made


def draw(made: Streams, size: int, rows: torch.Tensor | None = None, phase: str = "step") -> torch.Tensor:
    made.begin(phase)
    drawn = made.uniform(size).clone()
    made.end(rows)
    return drawn


def splitmix64(state: int, count: int) -> list[int]:
    """The generator as published, on unbounded integers."""
    numbers, whole = [], 2**64
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % whole
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % whole
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % whole
        numbers.append(z ^ (z >> 31))
    return numbers


def test_the_published_generator() -> None:
    made = streams([0])
    made.key[:] = 1234567  # first number: 6457827717110365317, as in the reference implementation
    assert splitmix64(1234567, 1) == [6457827717110365317]
    drawn = torch.cat([draw(made, 3), draw(made, 4)], 1)[0].double()
    pairs = [(n >> 40, (n >> 16) % 2**24) for n in splitmix64(1234567, 4)]
    expected = [*pairs[0], pairs[1][0], *pairs[2], *pairs[3]]  # of an odd number of numbers half a hash is left over
    assert drawn.tolist() == [number / 2**24 for number in expected]


def test_rows_depend_on_neither_number_nor_neighbours() -> None:
    few, many = streams([7, 8]), streams([7, 8, 9, 10, 11])
    for turn in range(20):
        rows = torch.tensor([True, turn % 3 == 0])
        others = torch.tensor([True, turn % 3 == 0, turn % 2 == 0, False, True])
        assert torch.equal(draw(few, 3, rows), draw(many, 3, others)[:2])


def test_rows_that_did_not_use_numbers_get_them_again() -> None:
    made = streams([1, 2])
    first = draw(made, 4, torch.tensor([True, False]))
    second = draw(made, 4)
    assert torch.equal(first[1], second[1]) and not torch.equal(first[0], second[0])


def test_rows_that_count_draw_the_numbers_they_would_among_all() -> None:
    some, every = streams([1, 2, 3]), streams([1, 2, 3])
    rows = torch.tensor([True, False, True])
    for size in (5, 5, 7):  # the first time, in one block, and in one that is too small
        some.begin("reset", rows)
        drawn = some.uniform(size)
        some.end(rows)
        assert torch.equal(drawn[rows], draw(every, size, rows)[rows])
        assert not drawn[1].any()


def test_blocks_do_not_change_the_numbers() -> None:
    """The second time all numbers of a phase are drawn at once."""
    one, two = streams([3]), streams([3])
    for _ in range(3):
        one.begin("a")
        parts = torch.cat([one.uniform(2), one.uniform(5), one.uniform(1)], 1)
        one.end()
        assert torch.equal(parts, draw(two, 8))


def test_uniform() -> None:
    drawn = draw(streams(list(range(1000))), 100)
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = torch.histc(drawn, 20, 0, 1)
    assert ((counts - 5000).square() / 5000).sum() < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001
    centered = drawn - 0.5
    neighbours = torch.stack([(centered[:, 1:] * centered[:, :-1]).mean(), (centered[1:] * centered[:-1]).mean()])
    assert neighbours.abs().max() < 4 / 12 / 100_000**0.5
