"""Did-you-mean: the same sentence for every unknown name (key, method, family, role)."""

from collections.abc import Iterable
from difflib import get_close_matches


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing is near."""
    by_lower = {k.lower(): k for k in known}
    found = get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """`no method 'tiees'; did you mean 'ties'? known: dare, ties`."""
    names = sorted(known)
    near = closest(name, names)
    hint = f"; did you mean {near!r}?" if near else ";"
    return f"no {kind} {name!r}{hint} known: {', '.join(names) or 'none'}"
