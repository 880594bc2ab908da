"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from quantkit.solvers.team import Team

# As in solvers.team, which takes torch.
TORCHRUN = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
F = TypeVar("F", bound=Callable[..., Any])

JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
QUIET = click.option("--quiet", is_flag=True, help="No progress, no prose: warnings, errors and the result.")


def launched() -> bool:
    """Whether this process is one of a team."""
    return os.environ.keys() >= TORCHRUN


def half_launched() -> str:
    """What is missing of what makes this process one of a team; "" if nothing is, or if it is alone."""
    several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    return ", ".join(sorted(TORCHRUN - os.environ.keys())) if several else ""


def follows() -> bool:
    """Whether another of the team speaks."""
    return launched() and os.environ["RANK"] != "0"


def team() -> AbstractContextManager[Team | None]:
    """The team that this process is one of; None if it is alone."""
    if not launched():
        return nullcontext()
    from quantkit.solvers.team import joined

    return joined()


def output_options(function: F) -> F:
    return JSON(QUIET(function))


def options(*given: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(given):
            function = option(function)
        return function

    return decorate


class Bits(click.ParamType[Any]):
    """A number; a whole one as an int."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        return int(number) if number.is_integer() else number
