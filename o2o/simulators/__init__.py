"""Environments that are pure JAX functions: their steps run inside the program that learns, thousands side by side."""

from o2o.simulators.batch import Batch, Worlds
from o2o.simulators.protocol import Outcome, Simulator

__all__ = ["Batch", "Outcome", "Simulator", "Worlds"]
