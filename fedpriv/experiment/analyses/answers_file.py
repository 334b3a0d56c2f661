"""The name of the file with the answers of an analysis."""

__all__ = ["ANALYSIS_FILE"]

ANALYSIS_FILE = "analysis.json"
