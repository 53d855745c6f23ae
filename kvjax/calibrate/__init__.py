"""Calibrates what A²ATS knows of a model: the codebooks of its keys."""

from kvjax.calibrate.a2ats import Settings, calibrate
from kvjax.calibrate.codebooks import Codebooks, load, save

__all__ = ["Codebooks", "Settings", "calibrate", "load", "save"]
