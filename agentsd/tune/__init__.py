"""Settings found by measuring: the fastest or the closest configuration of a model on a machine.

In each part of the noise schedule every level of the UNet has a candidate for its attention, and the part one for the
step cache. Time and error of a UNet call are measured for one change at a time, on the inputs of stock runs
(`measure`). If times and squared errors added up, the combinations that no other one beats in both would be those that
`search` finds, exactly; some of them are verified by whole images (`verify`).
"""

from agentsd.tune.measure import Measurements
from agentsd.tune.tuner import Tuner
from agentsd.tune.verify import Target, Verified

__all__ = ["Measurements", "Target", "Tuner", "Verified"]
