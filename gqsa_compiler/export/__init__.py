"""Compressed models in the formats of other programs (docs/interop.md)."""

from gqsa_compiler.export.driver import DTYPES, FORMATS, export_model
from gqsa_compiler.export.report import ExportReport

__all__ = ["DTYPES", "FORMATS", "ExportReport", "export_model"]
