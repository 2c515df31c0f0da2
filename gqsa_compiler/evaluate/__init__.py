"""Perplexity and KL divergence of a dense model, a checkpoint or an artefact."""

from gqsa_compiler.evaluate.scorer import Scorer, locate, open_scorer
from gqsa_compiler.evaluate.scoring import EvalResult, evaluate, perplexity

__all__ = ["EvalResult", "Scorer", "evaluate", "locate", "open_scorer", "perplexity"]
