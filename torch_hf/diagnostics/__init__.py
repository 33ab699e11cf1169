"""Which operation of a loss cannot be differentiated twice, and what to do about it."""

from torch_hf.diagnostics.diagnose import ADVICE, Diagnosis, Finding, diagnose

__all__ = ["ADVICE", "Diagnosis", "Finding", "diagnose"]
