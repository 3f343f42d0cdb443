"""How a recipe writes quantities: counts (400k), budgets (1.5x), numbers, dtypes."""

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, Field

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def count(value: object) -> object:
    """Read "400k" as 400000; numbers pass."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower().replace("_", "")
    digits, suffix = (text[:-1], text[-1]) if text and text[-1] in "kmb" else (text, "")
    try:
        return round(float(digits) * _SUFFIX[suffix])
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is not a count; write 400k, 1.5M or a number") from None


Count = Annotated[int, BeforeValidator(count), Field(gt=0)]


@dataclass(frozen=True)
class Budget:
    """At most `times` the parameters of the largest expert, or `parameters` in absolute terms."""

    times: float | None = None
    parameters: int | None = None

    def resolve(self, largest: int) -> int:
        """Parameters that the result may have."""
        if self.parameters is not None:
            return self.parameters
        assert self.times is not None
        return round(self.times * largest)


def budget(value: object) -> object:
    """Read "1.5x" or "900k" as a budget."""
    if isinstance(value, str) and value.strip().lower().endswith("x"):
        try:
            times = float(value.strip()[:-1])
        except ValueError:
            raise ValueError(f"{value!r} is not a multiple; write 1.5x") from None
        if not 0 < times < math.inf:
            raise ValueError(f"{value!r}: a model needs more than no parameters and less than infinitely many")
        return Budget(times=times)
    if isinstance(value, Budget):
        return value
    parameters = count(value)
    if not isinstance(parameters, int) or parameters <= 0:
        raise ValueError(f"{value!r} is neither a multiple (1.5x) nor a count (900k)")
    return Budget(parameters=parameters)


def whole(value: object) -> int:
    """A count that must be one."""
    found = count(value)
    if not isinstance(found, int) or isinstance(found, bool):
        raise ValueError(f"{value!r} is not a count; write 400k, 1.5M or a number")  # noqa: TRY004  pydantic's
    return found


def number(value: object) -> float:
    """A number, which YAML may have read as text (1e-4)."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is no number") from None


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def dtype_name(value: object) -> object:
    """Read "bf16" as "bfloat16"."""
    return DTYPES.get(value, value) if isinstance(value, str) else value
