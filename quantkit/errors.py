"""Every error that a user can meet, and the exit code it ends in.

    QuantkitError                 1   the run failed
    ├── InputError                2   usage, recipe or input is wrong; nothing was written
    │   ├── UsageError            2   an option, or options that do not go together
    │   ├── RecipeError           2   a recipe file or a --set
    │   ├── SourceError           2   the checkpoint to read
    │   └── OutputError           2   the folder to write
    ├── RunError                  1   the run broke off (disk full, source changed under way); it can be resumed
    ├── VerifyError               3   a written folder is not what its manifest and plan say
    ├── GateError                 3   an evaluated folder is further from its source than it may be
    └── Interrupted             130   Ctrl-C or SIGTERM; the same command resumes

An error prints three lines: what is wrong, `in:` where, `hint:` what to type instead. A Python traceback is for
faults of this program alone.
"""

from __future__ import annotations


class QuantkitError(Exception):
    """Base of all errors meant for a user. `what` names the tensor, key or file at fault."""

    exit_code = 1
    own = said = False  # of a team's processes: whether this one is to say it; whether another one does

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  in: {self.where}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class InputError(QuantkitError):
    exit_code = 2


class UsageError(InputError):
    pass


class RecipeError(InputError):
    pass


class SourceError(InputError):
    pass


class NotFiniteError(SourceError):
    """A weight holds a NaN or an infinity: no run of the same plan can end."""


class OutputError(InputError):
    pass


class RunError(QuantkitError):
    exit_code = 1


class VerifyError(QuantkitError):
    exit_code = 3


class GateError(QuantkitError):
    exit_code = 3


class Interrupted(QuantkitError):  # noqa: N818  (it is no error)
    exit_code = 130
