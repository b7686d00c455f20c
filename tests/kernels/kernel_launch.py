"""What the tests of ahead-of-time compilation compile; `launches_*.py` hold one table `LAUNCHES` for each op."""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Launch:
    """A launcher call on small CPU tensors and what its kernels may use.

    `rounds`: the kernel rounds by adding and subtracting a constant, or must equal its reference bit for bit.
    `required`: by capability an expression that is found in the PTX of one of the kernels. `sass_limits`: how often
    instructions may stand in the SASS for sm_90 of any of them.
    """

    name: str
    call: Callable[[], object]
    registers: int
    rounds: bool = False
    required: Mapping[int, str] = field(default_factory=dict)
    sass_limits: Mapping[str, int] = field(default_factory=dict)


@functools.cache
def launches() -> dict[str, Launch]:
    """The launches of all tables by name."""
    found: dict[str, Launch] = {}
    for path in sorted(Path(__file__).parent.glob("launches_*.py")):
        for launch in importlib.import_module(path.stem).LAUNCHES:
            if launch.name in found:
                raise ValueError(f"{path.stem}: the name {launch.name} is taken; choose another")
            found[launch.name] = launch
    return found
