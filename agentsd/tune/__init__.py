"""Settings found by measuring: the fastest or the closest configuration of a model on a machine.

The noise schedule is cut into parts. In each part every level of the UNet has a candidate for its attention, and the
part one for the step cache. The time of a UNet call and the error of the noise that it predicts are measured for one
change at a time (`measure`), against stock and on the inputs of stock runs. If times and squared errors added up, the
combinations that no other one beats in both would be those that `search` finds, exactly; some of them are verified by
whole images (`verify`).
"""

from agentsd.tune.measure import Measurements
from agentsd.tune.tuner import Tuner
from agentsd.tune.verify import Target, Verified

__all__ = ["Measurements", "Target", "Tuner", "Verified"]
