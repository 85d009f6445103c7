"""Report of a load of weights, for the log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass
class LoadReport:
    """Report of a load. Names are ours, those of ``ignored`` and ``unexpected`` the file's."""

    prefixes: list[str] = field(default_factory=list)
    """Prefix of the file's names used for each part."""
    loaded: dict[str, int] = field(default_factory=dict)
    """Number of tensors loaded, by part."""
    resized: dict[str, str] = field(default_factory=dict)
    """Name → the shapes before and after."""
    fresh: dict[str, str] = field(default_factory=dict)
    """Name of a tensor or of a whole part that keeps its initial value → why that is expected."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Name in the file → why it is not wanted."""
    unexpected: list[str] = field(default_factory=list)
    """Names in the file that no tensor of the model uses and no rule ignores."""

    def __str__(self) -> str:
        lines = [f"prefix {prefix}" for prefix in self.prefixes]
        lines += ["loaded: " + ", ".join(f"{part} {count} tensors".lstrip() for part, count in self.loaded.items())]
        lines += [f"resized: {name} {shapes}" for name, shapes in self.resized.items()]
        lines += [f"freshly initialised: {names}: {reason}" for reason, names in _by_reason(self.fresh)]
        lines += [f"not wanted: {names}: {reason}" for reason, names in _by_reason(self.ignored)]
        if self.unexpected:
            lines.append(f"unexpected: {some(self.unexpected)}")
        return "\n".join(f"  {line}" for line in lines)


def _by_reason(entries: Mapping[str, str]) -> list[tuple[str, str]]:
    reasons = dict.fromkeys(entries.values())
    return [(reason, some([name for name, why in entries.items() if why == reason])) for reason in reasons]


def some(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
