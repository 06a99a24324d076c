"""The sweeps of `dials.py`, by name."""

from __future__ import annotations

from .angle import Angle
from .codes import Codes
from .domains import Domains
from .lora import Lora
from .sweep import Condition as Condition
from .sweep import Sweep as Sweep
from .sweep import Variant as Variant
from .tradeoff import Tradeoff
from .trial import Trial

WORKLOADS: dict[str, type[Sweep]] = {kind.name: kind for kind in (Trial, Angle, Codes, Domains, Lora, Tradeoff)}
