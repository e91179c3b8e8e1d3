"""What options may be: numbers within bounds that no sensible run leaves, names and paths that a system can hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from tinyonn.places import checked_path, checked_text

LONGEST_NAME = 1000  # characters of a column, a kind, a project
MOST = 10**12  # samples, tokens, steps
WIDEST = 10**6  # what a machine holds at a time
STEEPEST = 1e6  # of a factor

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(gt=0, le=MOST)]  # of what is gone through one after another
Width = Annotated[int, Field(gt=0, le=WIDEST)]  # of what is held together
Windows = Annotated[int, Field(gt=0, le=100_000)]
Threads = Annotated[int, Field(gt=0, le=10_000)]
Number = Annotated[int, Field(ge=0, le=WIDEST)]  # such a width, or 0
Weight = Annotated[float, Field(ge=0, le=STEEPEST, allow_inf_nan=False)]  # of a loss, of a feature
Rate = Annotated[float, Field(ge=0, le=STEEPEST, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=1, le=STEEPEST, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, le=STEEPEST, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Some = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]  # a share that is not 0
Budget = Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)]  # a share, or a number of weights
Signed = Annotated[float, Field(ge=-STEEPEST, le=STEEPEST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=LONGEST_NAME), AfterValidator(checked_text)]
Place = Annotated[str, AfterValidator(checked_path)]
