# SPDX-License-Identifier: Apache-2.0
"""Settings of a synthetic world: the shares of actors that move, brake, turn and overtake."""

from dataclasses import dataclass, field

from ftkd_core.errors import UserError


@dataclass(frozen=True)
class MovingShares:
    """Share of the vehicles of each class that drive; the others are parked."""

    bus: float = 0.7
    trailer: float = 0.2
    construction_vehicle: float = 0.3
    truck: float = 0.6
    motorcycle: float = 0.6
    bicycle: float = 0.5
    car: float = 0.55


@dataclass(frozen=True, kw_only=True)
class WorldShares:
    """Shares of actors by kind of motion, each 0 to 1. Raises UserError for a share out of range.

    Of driving vehicles: along_main, on the main road; turning, turn at a crossing; manoeuvring, change speed
    and lane repeatedly near the ego vehicle. Of the other driving vehicles: steady, keep their speed;
    braking, brake to a stop; the rest waits and starts. Of driving buses and trucks: overtaking, are
    overtaken by a car. Of pedestrians: standing; walking, along the road; the rest crosses it.
    """

    moving: MovingShares = field(default_factory=MovingShares)
    along_main: float = 0.75
    turning: float = 0.35
    steady: float = 0.45
    braking: float = 0.3
    standing: float = 0.35
    walking: float = 0.45
    manoeuvring: float = 0.0
    overtaking: float = 0.0

    def __post_init__(self) -> None:
        shares = {name: value for name, value in vars(self).items() if name != "moving"} | vars(self.moving)
        for name, value in shares.items():
            if not 0.0 <= value <= 1.0:
                raise UserError(f"share {name} {value}: expected 0 to 1")


ORDINARY = WorldShares()
"""A town in which most objects stand still."""

TRAFFIC = WorldShares(
    moving=MovingShares(
        bus=0.95, trailer=0.5, construction_vehicle=0.4, truck=0.95, motorcycle=0.95, bicycle=0.9, car=0.95
    ),
    turning=0.25,
    standing=0.15,
    walking=0.55,
    manoeuvring=1.0,
    overtaking=0.6,
)
"""Dense traffic: most vehicles drive, brake, accelerate, change lanes and turn, buses and trucks occlude."""
