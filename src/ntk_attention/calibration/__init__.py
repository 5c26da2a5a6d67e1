"""The start of an adapter: near the frozen model, in coordinates that train well."""

from .settings import CalibrationSettings
from .start import calibrate

__all__ = ["CalibrationSettings", "calibrate"]
