"""A question of arithmetic, and a calculator that may be called: the smallest task with a tool.

    goal         what is 17 * 23 + 5 ?
    observation  2 calls left
    answer       call 17 * 23
    observation  result 391 , 1 call left
    answer       answer 396

What the tool is given is read by a parser of this file: whole numbers, + - * and parentheses, and nothing else.
"""

from __future__ import annotations

import re

from ctrlrl.envs.text.base import TextState, TextStep
from ctrlrl.envs.text.replayed import Replayed
from ctrlrl.errors import UsageError

_LENGTH, _DIGITS, _LARGEST = 100, 9, 10**12


class Calculator(Replayed):
    """Reward 1 for the right answer, which ends the episode as does a wrong one."""

    def __init__(
        self,
        budget: int = 2,
        *,
        terms: int = 3,
        largest: int = 30,
        call_cost: float = 0.0,
        invalid_penalty: float = 0.0,
        max_turns: int = 6,
    ) -> None:
        """Ask questions.

        Args:
            budget: calls of an episode.
            terms: numbers of a question.
            largest: of these numbers; the smallest is 2.
            call_cost: taken from the reward of each call.
            invalid_penalty: taken where the answer is neither a call nor an answer.
            max_turns: of an episode.

        Raises:
            UsageError: a question would have no numbers, or too large ones.
        """
        if not (2 <= terms <= 5 and 2 <= largest <= 200 and budget >= 0):
            raise UsageError(
                "a question has 2 to 5 terms, its largest number is 2 to 200, and a budget is 0 or more: got "
                f"terms = {terms}, largest = {largest}, budget = {budget}"
            )
        super().__init__(max_turns)
        self.budget, self.terms, self.largest = budget, terms, largest
        self.call_cost, self.invalid_penalty = call_cost, invalid_penalty
        self._question, self._said = "", ""
        self._value = self._left = 0

    def _begin(self) -> TextState:
        numbers = [str(self._generator.integers(2, self.largest + 1)) for _ in range(self.terms)]
        signs = ["+-*"[int(self._generator.integers(3))] for _ in range(self.terms - 1)]
        words = [numbers[0]]
        for sign, number in zip(signs, numbers[1:], strict=True):
            words += [sign, number]
        self._question, self._said, self._left = " ".join(words), "", self.budget
        self._value = evaluate(self._question)
        return self._look()

    def _answer(self, answer: str) -> TextStep:
        verb, _, rest = " ".join(answer.split()).lower().partition(" ")
        if verb == "answer" and re.fullmatch(rf"-?[0-9]{{1,{len(str(_LARGEST))}}}", rest):
            right = int(rest) == self._value
            self._said = "right" if right else "wrong"
            return TextStep(self._look(), float(right), True, success=right)
        result = _result(rest) if verb == "call" and self._left else None
        if result is None:
            self._said = "refused"
            return TextStep(self._look(), -self.invalid_penalty, valid=False)
        self._said, self._left = f"result {result}", self._left - 1
        return TextStep(self._look(), -self.call_cost)

    def expert(self) -> str:
        """Calls the tool with the question, where it may, and says what comes out."""
        known = self._said == f"result {self._value}"
        return f"answer {self._value}" if known or not self._left else f"call {self._question}"

    def _look(self) -> TextState:
        left = f"{self._left} call{'' if self._left == 1 else 's'} left"
        return TextState(f"{self._said} , {left}" if self._said else left, (), f"what is {self._question} ?")


def _result(text: str) -> int | None:
    """What `evaluate` gives; None where it refuses."""
    try:
        return evaluate(text)
    except ValueError:
        return None


def evaluate(text: str) -> int:
    """The value of whole numbers, + - * and parentheses.

    Raises:
        ValueError: it is something else, longer than 100 characters, or a number is longer than 9 digits or a result
            than 12.
    """
    tokens = re.findall(r"[0-9]+|[-+*()]", text) if len(text) <= _LENGTH else []
    if not tokens or "".join(tokens) != "".join(text.split()):
        raise ValueError(f"not arithmetic: {text[:_LENGTH]!r}")
    tokens.append("")  # the end

    def bounded(value: int) -> int:
        if abs(value) > _LARGEST:
            raise ValueError("the result is too large")
        return value

    def total() -> int:
        value = product()
        while tokens[0] in ("+", "-"):
            value = bounded(value + product() if tokens.pop(0) == "+" else value - product())
        return value

    def product() -> int:
        value = factor()
        while tokens[0] == "*":
            tokens.pop(0)
            value = bounded(value * factor())
        return value

    def factor() -> int:
        token = tokens.pop(0)
        if token == "-":
            return -factor()
        if token == "(":
            value = total()
            if tokens.pop(0) != ")":
                raise ValueError("a parenthesis is not closed")
            return value
        if not token.isdigit() or len(token) > _DIGITS:
            raise ValueError(f"no number that this reads: {token!r}")
        return int(token)

    value = total()
    if tokens != [""]:
        raise ValueError(f"unexpected: {tokens[0]!r}")
    return value
