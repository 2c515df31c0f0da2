"""The picture of a compression: one self-contained HTML page."""

from __future__ import annotations

REPORT_FILE = "compression.html"
"""Its name in a checkpoint."""
