"""Run GQSA checkpoints in transformers: ``import gqsa_compiler.hf``, then ``from_pretrained``.

The import registers the quantiser ``gqsa``. Without it transformers only warns that it does not
know the quantisation, and returns a model with random weights. TVM is not needed.
"""

from transformers.quantizers import register_quantization_config, register_quantizer

from gqsa_compiler.hf.config import GQSAConfig
from gqsa_compiler.hf.linear import GQSALinear
from gqsa_compiler.hf.quantizer import GQSAQuantizer

__all__ = ["GQSAConfig", "GQSALinear", "GQSAQuantizer"]

register_quantization_config("gqsa")(GQSAConfig)
register_quantizer("gqsa")(GQSAQuantizer)
