"""What a run will take of each device's memory, before any weight is loaded."""

from tljax.planning.planner import plan
from tljax.planning.result import Change, MemoryPlan, Moment

__all__ = ["Change", "MemoryPlan", "Moment", "plan"]
