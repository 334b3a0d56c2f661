"""Heterogeneous devices on a virtual clock. The clients of every server step are known before training starts."""

from fedpriv.clock.participation import Clock
from fedpriv.clock.profiles import DEVICES, Devices, Fleet, Profile
from fedpriv.clock.schedules import SCHEDULES, FedBuff, FedFix, Schedule, Synchronous
from fedpriv.clock.timeline import Group, Step, Timeline
from fedpriv.clock.token_walk import Token

__all__ = [
    "DEVICES",
    "SCHEDULES",
    "Clock",
    "Devices",
    "FedBuff",
    "FedFix",
    "Fleet",
    "Group",
    "Profile",
    "Schedule",
    "Step",
    "Synchronous",
    "Timeline",
    "Token",
]
