"""Perplexity and KL divergence of a dense model, a checkpoint or an artefact."""

from gqsa_compiler.evaluate.scoring import EvalResult, evaluate, perplexity
from gqsa_compiler.evaluate.scorer import Scorer, open_scorer

__all__ = ["EvalResult", "Scorer", "evaluate", "open_scorer", "perplexity"]
