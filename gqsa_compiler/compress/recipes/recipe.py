"""Recipes: how strongly to compress, by what method, and how long to train for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from gqsa_compiler.compress.recipes.budget import Budget
from gqsa_compiler.compress.recipes.checks import above_zero, number, one_of, whole
from gqsa_compiler.compress.recipes.target import MAX_SPARSITY_PERCENT, LayerTarget
from gqsa_compiler.errors import UsageError
from gqsa_compiler.limits import BALANCES, BITS, GROUP_SIZES

MAX_RATE = 10.0
"""The largest learning rate that is not surely a slip."""

STAGES = ("block", "weights", "scales")
"""The training stages, in the order they run."""

Structure = Literal["group", "2:4"]
Score = Literal["fisher", "obs", "wanda", "magnitude"]
Solver = Literal["compensated", "rtn"]

STRUCTURES: tuple[Structure, ...] = ("group", "2:4")
SCORES: tuple[Score, ...] = ("fisher", "obs", "wanda", "magnitude")
SOLVERS: tuple[Solver, ...] = ("compensated", "rtn")


@dataclass(frozen=True)
class Head:
    """What the language-model head becomes: all of its groups stay.

    Parameters
    ----------
    bits : int
        Bits of a code: 2, 3, 4 or 8.
    group_size : int
        Consecutive input features of a group: a power of two, 8 to 256.

    Raises
    ------
    UsageError
        A number is out of range.
    """

    bits: int = 4
    group_size: int = 32

    def __post_init__(self) -> None:
        """Check the numbers."""
        one_of("bits", self.bits, BITS)
        one_of("group_size", self.group_size, GROUP_SIZES)

    @property
    def target(self) -> LayerTarget:
        """The head as a layer."""
        return LayerTarget(self.bits, self.group_size, 0.0)


@dataclass(frozen=True)
class BlockStage:
    """Stage one (BQPO): each decoder block is trained against the dense block's outputs.

    Parameters
    ----------
    epochs : float
        Passes over the stage's tokens, for every block.
    samples : int
        At most so many calibration sequences are used.
    batch_tokens : int
        Tokens of an optimiser step.
    weight_rate, scale_rate, zero_rate : float
        Peak learning rates. Those of weights and scales are relative to the mean size of the
        layer's weights and scales, that of zero points is in code steps.
    mask_updates : int
        Times that the mask is chosen anew, evenly spread over the first half of the steps; 0
        keeps the one-shot mask.
    dense_share : float
        Share of the batches that run on the dense model's inputs instead of the compressed one's.

    Raises
    ------
    UsageError
        A number is out of range.
    """

    epochs: float = 2.0
    samples: int = 128
    batch_tokens: int = 2048
    weight_rate: float = 5e-3
    scale_rate: float = 2e-3
    zero_rate: float = 1e-2
    mask_updates: int = 0
    dense_share: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        above_zero("epochs", self.epochs)
        whole("samples", self.samples, 1)
        whole("batch_tokens", self.batch_tokens, 1)
        for name in ("weight_rate", "scale_rate", "zero_rate"):
            number(name, getattr(self, name), 0, MAX_RATE)
        whole("mask_updates", self.mask_updates, 0)
        number("dense_share", self.dense_share, 0, 1)


@dataclass(frozen=True)
class ModelStage:
    """End-to-end training: stage two (E2E-OQP), and the optional stage that trains weights too.

    Parameters
    ----------
    epochs : float
        Passes over the calibration tokens.
    most_tokens : int or None
        Tokens that are trained on in all, each as often as it is: with more text there are fewer
        passes. None: no limit.
    batch_tokens : int
        Tokens of an optimiser step.
    scale_rate, zero_rate, weight_rate : float
        Peak learning rates, as in `BlockStage`. A weight rate of 0 freezes the codes.
    norm_rate : float
        Peak learning rate of the norms' weights, relative to their mean size.
    distillation : float
        Share of KL(dense || compressed) in the loss, 0 to 1; the rest is the next-token loss.
    warmup : float
        Share of the steps in which the rates rise from 0; they fall as a cosine after it.

    Raises
    ------
    UsageError
        A number is out of range.
    """

    epochs: float = 1.0
    most_tokens: int | None = None
    batch_tokens: int = 4096
    scale_rate: float = 1e-3
    zero_rate: float = 0.0
    weight_rate: float = 0.0
    norm_rate: float = 1e-3
    distillation: float = 0.8
    warmup: float = 0.05

    def __post_init__(self) -> None:
        """Check the numbers."""
        above_zero("epochs", self.epochs)
        if self.most_tokens is not None:
            whole("most_tokens", self.most_tokens, 1)
        whole("batch_tokens", self.batch_tokens, 1)
        for name in ("scale_rate", "zero_rate", "weight_rate", "norm_rate"):
            number(name, getattr(self, name), 0, MAX_RATE)
        number("distillation", self.distillation, 0, 1)
        number("warmup", self.warmup, 0, 1)


@dataclass(frozen=True)
class Recipe:
    """What every compressed layer becomes, and how.

    Parameters
    ----------
    name : str
        What reports call it, e.g. ``w4s50g16``.
    bits : int
        Bits a weight of the kept groups.
    sparsity_percent : int
        Share of the groups to drop, 0 to 95 %.
    group_size : int
        Consecutive input features of a group: a power of two, 8 to 256.
    structure : str
        ``group`` drops whole groups; ``2:4`` drops two weights of every four (a baseline).
    score : str
        What a group is worth: ``obs`` (Hessian), ``fisher`` (the same, times what an error in its
        row's output costs the whole model), ``wanda`` (activation-weighted magnitude) or
        ``magnitude``.
    solver : str
        ``compensated`` lets the rest make up for what is dropped and rounded; ``rtn`` does not.
    balance : str
        Where the least groups are dropped: in each ``row``, in each ``matrix``, or in the whole
        ``model`` (within limits for every layer).
    block, weights, scales
        The training stages; None skips one.
    budget : Budget, optional
        A size for all layers together: each layer's sparsity, and perhaps its group size and
        bits, are chosen for it. The head is not in it.
    head : Head, optional
        What the language-model head becomes. None leaves it in 16 bits; the compiler rounds such
        a head to 8.

    Raises
    ------
    UsageError
        A number is out of range, or two settings contradict each other.
    """

    name: str
    bits: int
    sparsity_percent: int
    group_size: int
    structure: Structure = "group"
    score: Score = "obs"
    solver: Solver = "compensated"
    balance: str = "matrix"
    block: BlockStage | None = None
    weights: ModelStage | None = None
    scales: ModelStage | None = None
    budget: Budget | None = None
    head: Head | None = None

    def __post_init__(self) -> None:
        """Check the numbers, and that the settings go together."""
        try:
            one_of("bits", self.bits, BITS)
            whole("sparsity_percent", self.sparsity_percent, 0, MAX_SPARSITY_PERCENT)
            one_of("group_size", self.group_size, GROUP_SIZES)
            one_of("structure", self.structure, STRUCTURES)
            one_of("score", self.score, SCORES)
            one_of("solver", self.solver, SOLVERS)
            one_of("balance", self.balance, BALANCES)
            self._check_two_of_four()
            self._check_measured()
            if self.weights is not None and not self.weights.weight_rate:
                raise UsageError("the stage weights trains weights: its weight_rate is above 0.")
            if self.scales is not None and self.scales.weight_rate:
                raise UsageError(
                    "the stage scales freezes the codes: its weight_rate is 0 (weights are "
                    "trained in the stage named weights)."
                )
        except UsageError as error:
            raise UsageError(f"Recipe {self.name}: {error}") from None

    def _check_two_of_four(self) -> None:
        if self.structure != "2:4":
            return
        if self.sparsity_percent:
            raise UsageError("2:4 drops half of the weights by itself: sparsity_percent is 0.")
        if self.balance != "matrix":
            raise UsageError(
                f"2:4 drops as many weights everywhere: balance {self.balance} cannot be had."
            )
        if self.budget is not None:
            raise UsageError("2:4 has one size: it takes no budget.")
        if self.block is not None and self.block.mask_updates:
            raise UsageError("the mask of 2:4 stays as it is: the block's mask_updates is 0.")

    def _check_measured(self) -> None:
        """What layers cost the model is measured for OBS masks with compensation."""
        if self.score == "fisher" and (self.structure, self.solver) != ("group", "compensated"):
            raise UsageError(
                "the score fisher is for groups that are dropped with compensation: structure is "
                "group and solver is compensated."
            )
        if self.solver == "rtn" or self.score not in ("fisher", "obs"):
            what = "a budget" if self.budget is not None else "balance model"
            if self.budget is not None or self.balance == "model":
                raise UsageError(
                    f"{what} is for the scores fisher and obs with the solver compensated."
                )

    @property
    def measures(self) -> bool:
        """Whether what each layer costs the model is measured before anything is compressed."""
        chooses = self.budget is not None or (self.balance == "model" and self.sparsity > 0)
        return chooses or (self.score == "fisher" and self.sparsity > 0)

    @property
    def sparsity(self) -> float:
        """Share of groups to drop, 0 to 0.95."""
        return self.sparsity_percent / 100

    @property
    def target(self) -> LayerTarget:
        """What a layer becomes for which nothing else was chosen."""
        return LayerTarget(self.bits, self.group_size, self.sparsity)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the training stages it has, in the order they run."""
        return tuple(stage for stage in STAGES if getattr(self, stage) is not None)

    def one_shot(self) -> Recipe:
        """Return the recipe without its training stages."""
        return replace(self, block=None, weights=None, scales=None)
